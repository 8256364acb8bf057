"""The ten checks of the start-up contract, put together from the parts of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from sftdist.core.distributed import World
from sftdist.core.errors import DataError, StartupError
from sftdist.core.settings import TrainConfig
from sftdist.core.snapshot import config_hash, to_dict
from sftdist.core.storage import sha256_json, write_text
from sftdist.data.corpus import Corpus
from sftdist.data.plan import Plan
from sftdist.data.store import TRAIN, TokenStore
from sftdist.model.backends.registry import open_backend
from sftdist.model.checks import check_isolation, check_logits, check_parity
from sftdist.model.load import assert_tied_as_configured
from sftdist.model.text_part import causal_lm
from sftdist.training.build import Trained
from sftdist.training.memory_probe import probe_figures
from sftdist.training.optimizer import full_shape
from sftdist.training.startup import (
    Check,
    Supervision,
    check_bos,
    check_dtypes,
    check_rows,
    check_supervision,
    same_on_every_rank,
    together,
)
from sftdist.training.trial import save_figures
from sftdist.training.zero_config import COMPUTE_DTYPE

BOS_SCAN_ROWS = 1_000_000
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
        count = micro.pop()
        return f"plan {common}, {count} micro-batch{'es' * (count != 1)} each in step 1"

    def supervision_figures() -> str:
        reached = set(trained.coverage.token_rows) if trained.coverage else set(trained.untrained)
        return check_supervision(sources, trained.untrained, set(trained.untrained) <= reached)

    def conversation_figures() -> str:
        text = shown_conversation(corpus)
        if world.is_main:
            keep_text(run_dir / SHOWN, text)
        return f"{run_dir / SHOWN}\n{text}"

    def dtype_figures() -> str:
        compute = str(COMPUTE_DTYPE[engine.spec.precision]).removeprefix("torch.")
        return check_dtypes(engine.dtypes(), compute) + coverage_figures(trained)

    return [
        Check("one configuration", lambda: same_configuration(cfg, world)),
        Check("one plan", plan_figures),
        Check("supervision", supervision_figures),
        Check("single BOS", lambda: check_bos(sources)),
        Check("a decoded conversation", conversation_figures),
        Check("isolation and attention", lambda: attention_figures(trained, world, cfg, longest(corpus))),
        Check("dtypes", dtype_figures),
        Check("vocabulary", lambda: vocabulary_figures(trained, corpus)),
        Check("memory", lambda: probe_figures(cfg, corpus, plan, trained, world)),
        Check("trial save", lambda: save_figures(engine, run_dir, world, cfg.checkpoint)),
    ]


def same_configuration(cfg: TrainConfig, world: World) -> str:
    """What is trained, by the hash that names a run; then all the rest, which no two ranks may see differently."""
    common = same_on_every_rank(world, "the configuration", config_hash(cfg))
    same_on_every_rank(world, "a setting that a resume may change", sha256_json(to_dict(cfg)))
    return common


def supervision(store: TokenStore) -> Supervision:
    """The figures of a store's train split."""
    split, bos = store.manifest["splits"]["train"], store.manifest["bos_token_id"]
    doubled = 0
    if bos is not None:
        starts = store.offsets[:-1][:BOS_SCAN_ROWS][store.lengths[:BOS_SCAN_ROWS] > 1]
        doubled = int(np.count_nonzero((store.ids[starts] == bos) & (store.ids[starts + 1] == bos)))
    return Supervision(split["tokens"], split["targets"], store.manifest["stop_share"], doubled)


def longest(corpus: Corpus) -> int:
    return max(int(fitted.lengths[fitted.longest(1)][0]) for fitted in corpus.fitted)


def shown_conversation(corpus: Corpus) -> str:
    """The first conversation of the first source, each supervised stretch between [[ and ]].

    Raises DataError where it holds an id that the tokenizer of the stores does not know.
    """
    store, tokenizer = corpus.stores[0], corpus.template.tokenizer
    row = int(np.flatnonzero(store.split == TRAIN)[0])
    ids, weights = store.tokens(row)
    unknown = [id for id in ids.tolist() if tokenizer.convert_ids_to_tokens(id) is None]
    if unknown:
        raise DataError(
            f"source {store.name}: the first conversation holds the ids {unknown[:5]}, which the tokenizer "
            f"({len(tokenizer)} tokens) does not know; run `prepare` again with the tokenizer that belongs to the model"
        )
    starts = np.flatnonzero(np.diff(weights > 0, prepend=False))
    pieces = np.split(ids, starts[starts > 0])
    trained = bool(weights[0] > 0)
    text = ""
    for piece in pieces:
        decoded = tokenizer.decode(piece.tolist())
        text += f"[[{decoded}]]" if trained else decoded
        trained = not trained
    return text


def keep_text(path: Path, text: str) -> None:
    """Write it into the run directory, whose disk the run needs for everything else, too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text + "\n")
    except OSError as error:
        raise StartupError(f"{path}: cannot be written ({error}); make run.dir writable, or give another") from error


def attention_figures(trained: Trained, world: World, cfg: TrainConfig, longest: int) -> str:
    """Isolation, parity and the path to the logits, on the real model and device."""
    model, rows = trained.engine.module.model, trained.config.get_text_config(decoder=True).vocab_size
    backend = open_backend(trained.attention.name)
    assert not isinstance(backend, str), "it was opened when the model was loaded"
    packed = cfg.train.packing
    # Together: under ZeRO 3 every one of these is a collective, and a fault may show on one rank's device only.
    isolation = together(world, lambda: check_isolation(model, rows, world.device, packed=packed))
    # Long and short documents may run on different code: both are compared.
    parities = [
        together(
            world, partial(check_parity, model, backend, rows, world.device, longest, packed=packed, beyond=beyond)
        )
        for beyond in ((0, LONG_DOCUMENT) if longest > LONG_DOCUMENT else (0,))
    ]
    logits = together(world, lambda: check_logits(model, rows, world.device))
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


def vocabulary_figures(trained: Trained, corpus: Corpus) -> str:
    """The embedding of the model as it stands now, under its engine, and the head beside it."""
    causal = causal_lm(trained.engine.module.model)
    assert_tied_as_configured(causal)
    rows = full_shape(causal.get_input_embeddings().weight)[0]
    return f"{check_rows(rows, corpus.largest_id)}; head {'tied' if trained.tied else 'not tied'} to it, as configured"
