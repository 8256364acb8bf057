"""The ten checks of the start-up contract, put together from the parts of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sftdist.core.distributed import World
from sftdist.core.errors import StartupError
from sftdist.core.settings import TrainConfig
from sftdist.core.snapshot import config_hash
from sftdist.core.storage import write_text
from sftdist.data.corpus import Corpus
from sftdist.data.loader import Batch, Document, pack_documents
from sftdist.data.plan import Plan
from sftdist.data.store import TRAIN, TokenStore
from sftdist.model import cost
from sftdist.model.backends.registry import open_backend
from sftdist.model.checks import check_isolation, check_logits, check_parity
from sftdist.training.build import Trained, memory_setup
from sftdist.training.engine import Engine
from sftdist.training.meter import memory_gib
from sftdist.training.startup import (
    Check,
    LocalFailure,
    Supervision,
    check_bos,
    check_disk,
    check_grace,
    check_rows,
    check_supervision,
    compare_memory,
    same_on_every_rank,
)

BOS_SCAN_ROWS = 1_000_000
CANDIDATES = 2048  # conversations per source looked at for the costliest pack
TRIAL_BYTES = 2**24
LONG_DOCUMENT = 512  # tokens; a backend may treat longer documents in another way
SHOWN = "log/first_conversation.txt"


def contract(
    cfg: TrainConfig, corpus: Corpus, plan: Plan, trained: Trained, world: World, run_dir: Path
) -> Sequence[Check]:
    """The checks, in the order of the contract."""
    sources = {store.name: supervision(store) for store in corpus.stores}
    engine = trained.engine
    first = next(plan.steps_from(None))

    def plan_figures() -> str:
        dealt = first.deal(world.size, plan.cost)
        micro = {len(packs) for packs in dealt}
        assert len(micro) == 1, "deal gives every rank the same number of packs"
        common = same_on_every_rank(world, "the plan", plan.fingerprint)
        return f"plan {common}, {micro.pop()} micro-batches each in step 1"

    def supervision_figures() -> str:
        reached = set(trained.coverage.token_rows) if trained.coverage else set(trained.untrained)
        return check_supervision(sources, trained.untrained, set(trained.untrained) <= reached)

    def conversation_figures() -> str:
        text = shown_conversation(corpus)
        if world.is_main:
            (run_dir / SHOWN).parent.mkdir(parents=True, exist_ok=True)
            write_text(run_dir / SHOWN, text + "\n")
        return f"{run_dir / SHOWN}\n{text}"

    def model_figures() -> str:
        return attention_figures(trained, world, cfg, longest(corpus))

    def dtype_figures() -> str:
        reach = coverage_figures(trained)
        dtypes = ", ".join(f"{name} {dtype}" for name, dtype in engine.dtypes().items())
        return f"{dtypes}, cross-entropy float32{reach}"

    def vocabulary_figures() -> str:
        rows = trained.config.get_text_config(decoder=True).vocab_size
        tied = "tied" if trained.tied else "not tied"
        return f"{check_rows(rows, corpus.largest_id)}; head {tied} to it, as configured"

    def memory_figures() -> str:
        return probe_figures(cfg, corpus, plan, trained, world)

    def save_figures() -> str:
        return trial_save(engine, run_dir, world, cfg.checkpoint.grace_seconds)

    return [
        Check("one configuration", lambda: same_on_every_rank(world, "the configuration", config_hash(cfg))),
        Check("one plan", plan_figures),
        Check("supervision", supervision_figures),
        Check("single BOS", lambda: check_bos(sources)),
        Check("a decoded conversation", conversation_figures),
        Check("isolation and attention", model_figures),
        Check("dtypes", dtype_figures),
        Check("vocabulary", vocabulary_figures),
        Check("memory", memory_figures),
        Check("trial save", save_figures),
    ]


def supervision(store: TokenStore) -> Supervision:
    """The figures of a store's train split."""
    split, bos = store.manifest["splits"]["train"], store.manifest["bos_token_id"]
    doubled = 0
    if bos is not None:
        starts = store.offsets[:-1][:BOS_SCAN_ROWS][store.lengths[:BOS_SCAN_ROWS] > 1]
        doubled = int(np.count_nonzero((store.ids[starts] == bos) & (store.ids[starts + 1] == bos)))
    return Supervision(split["tokens"], split["targets"], store.manifest["stop_share"], doubled)


def longest(corpus: Corpus) -> int:
    return max(int(fitted.lengths.max()) for fitted in corpus.fitted)


def shown_conversation(corpus: Corpus) -> str:
    """The first conversation of the first source, each supervised stretch between [[ and ]]."""
    store = corpus.stores[0]
    row = int(np.flatnonzero(store.split == TRAIN)[0])
    ids, weights = store.tokens(row)
    starts = np.flatnonzero(np.diff(weights > 0, prepend=False))
    pieces = np.split(ids, starts[starts > 0])
    trained = bool(weights[0] > 0)
    text = ""
    for piece in pieces:
        decoded = corpus.template.tokenizer.decode(piece.tolist())
        text += f"[[{decoded}]]" if trained else decoded
        trained = not trained
    return text


def attention_figures(trained: Trained, world: World, cfg: TrainConfig, longest: int) -> str:
    """Isolation, parity and the path to the logits, on the real model and device."""
    model, rows = trained.engine.module.model, trained.config.get_text_config(decoder=True).vocab_size
    backend = open_backend(trained.attention.name)
    assert not isinstance(backend, str), "it was opened when the model was loaded"
    packed = cfg.train.packing
    isolation = check_isolation(model, rows, world.device, packed=packed)
    # Long and short documents may run on different code: both are compared.
    parities = [
        check_parity(model, backend, rows, world.device, longest, packed=packed, beyond=beyond)
        for beyond in ((0, LONG_DOCUMENT) if longest > LONG_DOCUMENT else (0,))
    ]
    logits = check_logits(model, rows, world.device)
    leak = f"leak {isolation.leak:.1e} (control {isolation.control:.1e})" if isolation else "no packing"
    errors = ", ".join(f"{max(one.errors.values(), default=0.0):.1e} over {one.tokens} tokens" for one in parities)
    return f"{trained.attention.name}: {leak}; parity {errors} in {parities[0].layers} layers; logits {logits:.1e}"


def coverage_figures(trained: Trained) -> str:
    """What an adapter trains, and by name what it leaves out."""
    coverage = trained.coverage
    if coverage is None:
        return ""
    left = f"; not reached: {'; '.join(coverage.not_reached)}" if coverage.not_reached else ""
    count = f"{coverage.trainable:,} of {coverage.total:,} parameters"
    return f"; adapters on {coverage.layers} layers, {count} train{left}"


def probe_figures(cfg: TrainConfig, corpus: Corpus, plan: Plan, trained: Trained, world: World) -> str:
    """Forward and backward of `loss * 0` on the costliest pack that this run can hold."""
    batch = costliest_pack(corpus, plan.spec.pack_tokens)
    trainable = trained.coverage.trainable if trained.coverage else None
    setup = memory_setup(cfg, stage=cfg.zero.stage, world=world.size, trainable=trainable)
    mapping = trained.config.to_dict()
    available = available_bytes(world)
    fixes = cost.cheapest_overrides(mapping, setup, available, max_len=cfg.data.max_len, lora_r=cfg.tune.r)
    predicted = cost.total(cost.memory(mapping, setup))
    try:
        trained.engine.probe(batch)
    except torch.OutOfMemoryError as error:
        raise LocalFailure(
            f"memory: the costliest pack of {plan.spec.pack_tokens:,} tokens does not fit into "
            f"{available / cost.GIB:.1f} GiB (predicted {predicted / cost.GIB:.1f} GiB). Cheapest overrides that would "
            f"fit: {'; '.join(fixes or []) or 'none; use more or larger GPUs'}"
        ) from error
    measured = memory_gib(world.device) * cost.GIB
    return compare_memory(predicted, measured, available, fixes or [])


def available_bytes(world: World) -> float:
    """Memory that one rank may use: its GPU, or its part of the host."""
    if world.device.type == "cuda":
        return float(torch.cuda.get_device_properties(world.device).total_memory)
    return psutil.virtual_memory().total / world.size


def costliest_pack(corpus: Corpus, pack_tokens: int) -> Batch:
    """The longest conversations that one pack holds: the most attention, and every token of the pack."""
    candidates = []
    for number, fitted in enumerate(corpus.fitted):
        most = min(CANDIDATES, len(fitted.lengths))
        places = np.argpartition(-fitted.lengths, most - 1)[:most]
        candidates += [(int(fitted.lengths[place]), number, int(fitted.rows[place])) for place in places]
    chosen, room = [], pack_tokens
    for length, number, row in sorted(candidates, reverse=True):
        if length <= room:
            ids, weights = corpus.stores[number].tokens(row)
            chosen.append(Document(ids[:length], weights[:length], number, ""))
            room -= length
    return pack_documents(chosen)


def trial_save(engine: Engine, run_dir: Path, world: World, grace_seconds: float) -> str:
    """Save, read back and compare some parameters; their speed gives the time of a whole save."""
    shapes = engine.shapes()
    copies = 1 + len(engine.optimizer.moments)
    whole = 4 * copies * sum(shape.numel() for shape in shapes.values())
    started, written = time.perf_counter(), 0
    piece: dict[str, torch.Tensor] = {}
    for name, tensors in engine.state():
        piece |= {f"{name}|{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        written = sum(tensor.nbytes for tensor in piece.values())
        if written >= TRIAL_BYTES:
            break
    problem = None
    if world.is_main:
        try:
            save_and_compare(run_dir / ".trial.safetensors", piece)
        except StartupError as error:
            problem = str(error)
    problem = world.broadcast_object(problem)
    if problem is not None:  # on every rank: none may wait for another in the next collective
        raise StartupError(problem)
    seconds = world.all_reduce_max(time.perf_counter() - started) * whole / max(1, written)
    return f"{check_disk(run_dir, whole)}; a save takes {check_grace(seconds, grace_seconds)}"


def save_and_compare(path: Path, piece: dict[str, torch.Tensor]) -> None:
    """Raises `StartupError` when the disk does not give back what was written."""
    try:
        save_file({name: tensor.clone() for name, tensor in piece.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        read = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StartupError(
            f"{path}: a trial save failed ({error}); checkpoints need a writable disk with room. "
            "Free some space, or give another run.dir."
        ) from error
    finally:
        path.unlink(missing_ok=True)
    wrong = [name for name, tensor in piece.items() if not torch.equal(tensor, read[name])]
    if wrong:
        raise StartupError(
            f"{path}: read back other values than were written ({', '.join(wrong[:3])}); this disk or file system "
            "cannot be trusted with a checkpoint. Give another run.dir."
        )
