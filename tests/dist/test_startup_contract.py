"""The start-up contract on real ranks: each of its ten checks fires on a real fault, and none leaves a trace."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sftdist.core import memory
from sftdist.core.config import compose
from sftdist.core.distributed import World
from sftdist.core.errors import SftdistError
from sftdist.core.settings import TrainConfig
from sftdist.data.corpus import Corpus
from sftdist.data.loader import Loader
from sftdist.data.plan import Plan
from sftdist.data.planned import corpus_of, plan_spec
from sftdist.data.store import Block, TokenStore, write_store
from sftdist.model.backends.interface import Documents
from sftdist.model.text_part import causal_lm
from sftdist.train import ready_data
from sftdist.training import contract as contract_parts
from sftdist.training import memory_probe
from sftdist.training.build import Trained, build_trained, model_config, special_ids
from sftdist.training.contract import contract
from sftdist.training.planned_model import cost_model
from sftdist.training.startup import run_checks
from tests.e2e.workshop import SMALL, model_folder, write_rows
from tests.faults import Job
from tests.ranks import run_ranks

KEYS = ("model.path=model", "data.train=my.jsonl", *SMALL, "zero.stage=1", "train.max_steps=2", "run.dir=run")


@dataclass(frozen=True)
class Parts:
    """What the contract looks at, as the training program builds it."""

    cfg: TrainConfig
    corpus: Corpus
    plan: Plan
    trained: Trained
    run_dir: Path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    model_folder(folder / "model", "llama_tied")
    write_rows(folder / "my.jsonl", 60)
    write_rows(folder / "other.jsonl", 61)
    with inside(folder):
        ready_data(configured())
        ready_data(configured("data.train=other.jsonl"))
    return folder


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def configured(*more: str) -> TrainConfig:
    return compose("full", [*KEYS, *more])


def built(world: World, cfg: TrainConfig) -> Parts:
    corpus = corpus_of(cfg, ready_data(cfg))
    tokenizer = corpus.template.tokenizer
    shape = model_config(cfg, len(tokenizer), special_ids(tokenizer))
    plan = Plan(corpus.tables, plan_spec(cfg), cost_model(shape, cfg.tune, corpus.supervised_share))
    run_dir = Path(str(cfg.run.dir))
    run_dir.mkdir(exist_ok=True)
    return Parts(cfg, corpus, plan, build_trained(cfg, corpus, shape, world), run_dir)


# The faults --------------------------------------------------------------------------------------------------------

Change = Callable[[NDArray[np.int32], NDArray[np.float32], int], None]  # ids and weights of a row, its number


def rewritten(parts: Parts, name: str, change: Change) -> Parts:
    """The same source in a store that another program has written: rows changed in place, figures as they are then."""
    store = parts.corpus.stores[0]

    def produce(folder: Path) -> Iterator[Block]:
        for row in range(len(store)):
            ids, weights = store.tokens(row)
            change(ids, weights, row)
            here, files = slice(row, row + 1), np.zeros(1, dtype=np.int64)
            same = store.contents[here], store.prompts[here], store.labels[here]
            yield Block(
                ids, weights, np.array([len(ids)]), store.split[here], files, files, store.row_ids([row]), *same
            )

    def describe(figures: Any) -> dict[str, Any]:
        return {**kept, "stop_share": figures.stop_share(kept["stop_ids"])}

    kept = {key: store.manifest[key] for key in ("key", "files", "vocabulary", "bos_token_id", "stop_ids")}
    path = Path(f"store-{name}-{os.getpid()}")
    changed = write_store(path, produce, name=store.name, vocabulary=70_000, describe=describe)
    return replace(parts, corpus=replace(parts.corpus, stores=(changed,)))


def no_stop(ids: NDArray[np.int32], weights: NDArray[np.float32], row: int) -> None:
    if row == 3:
        weights[np.flatnonzero(weights)[-1]] = 0.0


def no_target(ids: NDArray[np.int32], weights: NDArray[np.float32], row: int) -> None:
    weights[:] = 0.0


def two_bos(store: TokenStore, ids: NDArray[np.int32], weights: NDArray[np.float32], row: int) -> None:
    if row % 2 == 0:
        ids[:2] = store.manifest["bos_token_id"]


def unknown_first(ids: NDArray[np.int32], weights: NDArray[np.float32], row: int) -> None:
    ids[4] = 60_000


def unknown_later(ids: NDArray[np.int32], weights: NDArray[np.float32], row: int) -> None:
    ids[4] = 60_000 if row == 40 else ids[4]


def another_configuration(parts: Parts, world: World) -> Parts:
    return replace(parts, cfg=replace(parts.cfg, seed=world.rank))


def another_interval(parts: Parts, world: World) -> Parts:
    return replace(parts, cfg=replace(parts.cfg, checkpoint=replace(parts.cfg.checkpoint, every_steps=world.rank)))


def another_data(parts: Parts, world: World) -> Parts:
    """Rank 1 has come upon other rows under the same name."""
    corpus = corpus_of(parts.cfg, ready_data(configured("data.train=other.jsonl")))
    plan = Plan(corpus.tables, plan_spec(parts.cfg), parts.plan.cost)
    return replace(parts, plan=plan) if world.rank == 1 else parts


def untrained_rows(parts: Parts, world: World) -> Parts:
    """Template tokens without trained rows, and an adapter that does not train them."""
    return replace(parts, trained=replace(parts.trained, untrained=(7, 8)))


def log_is_a_file(parts: Parts, world: World) -> Parts:
    run_dir = Path("run-with-a-log")
    run_dir.mkdir(exist_ok=True)
    (run_dir / "log").touch()
    return replace(parts, run_dir=run_dir)


def a_leak_on_rank_1(parts: Parts, world: World) -> Parts:
    """Its attention does not see where documents end; under ZeRO 3 the other rank must not be left in a collective."""
    name = causal_lm(parts.trained.engine.module.model).config._attn_implementation
    sound = ALL_ATTENTION_FUNCTIONS[name]

    def leaking(*given: Any, documents: Documents, **more: Any) -> Any:
        return sound(*given, documents=Documents.of_lengths([documents.tokens]), **more)

    if world.rank == 1:
        ALL_ATTENTION_FUNCTIONS.register(name, leaking)
    return parts


def another_scaling(parts: Parts, world: World) -> Parts:
    """An attention backend that ignores the layer's own scaling."""
    opened = contract_parts.open_backend("sdpa")
    assert not isinstance(opened, str)
    sound = opened.attend

    def wrong(query: Any, key: Any, value: Any, documents: Any, arguments: Any) -> Any:
        return sound(query, key, value, documents, replace(arguments, scaling=1.0))

    contract_parts.open_backend = lambda name: replace(opened, attend=wrong)
    return parts


def low_moments(parts: Parts, world: World) -> Parts:
    """An optimizer that keeps its second moments in bfloat16."""
    parts.trained.engine.dtypes()  # makes them
    for state in parts.trained.engine._core.optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()
    return parts


def untied(parts: Parts, world: World) -> Parts:
    model = causal_lm(parts.trained.engine.module.model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return parts


def out_of_reach(parts: Parts, world: World) -> Parts:
    """A tensor that is to be trained and that the forward does not use."""
    parts.trained.engine.module.model.register_parameter("spare", torch.nn.Parameter(torch.zeros(3)))
    return parts


def a_small_machine(parts: Parts, world: World) -> Parts:
    memory.total_bytes = lambda: 2**28
    return parts


def short_grace(parts: Parts, world: World) -> Parts:
    return replace(parts, cfg=replace(parts.cfg, checkpoint=replace(parts.cfg.checkpoint, grace_seconds=1e-9)))


def a_full_host(parts: Parts, world: World) -> Parts:
    """No memory left for the copy of a background save."""
    memory.free_bytes = lambda: 1000
    return replace(parts, cfg=replace(parts.cfg, checkpoint=replace(parts.cfg.checkpoint, background=True)))


@dataclass(frozen=True)
class Fault:
    """`check`: the number of the check that has to refuse, `says`: words of its message; `fresh`: it needs a model of
    its own, since it changes it."""

    check: int
    make: Callable[[Parts, World], Parts]
    says: tuple[str, ...]
    keys: tuple[str, ...] = ()
    fresh: bool = False


def store_fault(check: int, change: Change, *says: str) -> Fault:
    return Fault(check, lambda parts, world: rewritten(parts, change.__name__, change), says)


def doubled(parts: Parts, world: World) -> Parts:
    return rewritten(parts, "two_bos", partial(two_bos, parts.corpus.stores[0]))


SAME = "Start all ranks from the same checkout"
FAULTS = [
    Fault(1, another_configuration, ("the configuration differs between ranks (rank 0: ", SAME)),
    Fault(1, another_interval, ("a setting that a resume may change differs between ranks", SAME)),
    Fault(2, another_data, ("the plan differs between ranks (rank 0: ", "the same token stores")),
    store_fault(3, no_target, "source train: no supervised token in", "at least one", "`sftdist inspect`"),
    store_fault(3, no_stop, "only 98.33% of the conversations end", "100% are required", "model.chat_template"),
    Fault(4, doubled, ("30 conversations begin with two BOS tokens; at most one", "Run `prepare` again")),
    store_fault(5, unknown_first, "holds the ids [60000]", "does not know; run `prepare` again with the tokenizer"),
    Fault(5, log_is_a_file, ("run-with-a-log/log", "cannot be written", "make run.dir writable")),
    Fault(6, another_scaling, ("sdpa differs from the model's own eager attention", "cannot be trained exactly")),
    store_fault(8, unknown_later, "token id 60000 is in the data, but the embedding has", "needs at least 60001"),
    Fault(9, a_small_machine, ("0.12 GiB are there", "predicted were", "by part, as predicted", "use more ranks")),
    Fault(10, short_grace, ("a save would take about", "Set checkpoint.grace_seconds=1")),
    Fault(10, a_full_host, ("only 0.00 GiB are free there", "Set checkpoint.background=false")),
    Fault(
        7, low_moments, ("exp_avg_sq are bfloat16, they must be float32", "Set `precision`"), ("zero.stage=0",), True
    ),
    Fault(8, untied, ("tie_word_embeddings=True", "are two parameters", "correct tie_word"), fresh=True),
    Fault(9, out_of_reach, ("1 of ", "get no gradient (model.spare)", "tune.target"), fresh=True),
    Fault(3, untrained_rows, ("[7, 8] whose embedding rows were never", "tune.method=full"), ("tune.method=lora",)),
    Fault(6, a_leak_on_rank_1, ("moved the hidden states of its neighbours", "packing=false"), ("zero.stage=3",)),
]


@contextmanager
def put_back() -> Iterator[None]:
    """What a fault replaces in this process."""
    before = contract_parts.open_backend, memory.total_bytes, memory.free_bytes
    functions = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    try:
        yield
    finally:
        contract_parts.open_backend, memory.total_bytes, memory.free_bytes = before
        for name, function in functions.items():
            ALL_ATTENTION_FUNCTIONS.register(name, function)


def refusals(world: World, home: Path) -> list[tuple[int, str]]:
    """Per fault: how many checks passed before one refused, and what it said."""
    os.chdir(home)
    found: list[tuple[int, str]] = []
    keys: tuple[str, ...] = ()
    parts = built(world, configured())
    for fault in FAULTS:
        if fault.fresh or fault.keys != keys:
            parts.trained.engine.close()
            parts, keys = built(world, configured(*fault.keys)), fault.keys
        said: list[str] = []
        with put_back():
            faulty = fault.make(parts, world)
            checks = contract(faulty.cfg, faulty.corpus, faulty.plan, faulty.trained, world, faulty.run_dir)
            try:
                run_checks(world, checks, said.append)
            except SftdistError as error:
                found.append((len(said), str(error)))
            else:
                found.append((len(said), "nothing was refused"))
    parts.trained.engine.close()
    return found


def test_each_check_fires_on_every_rank_and_says_what_to_change(home: Path) -> None:
    ranks = run_ranks(refusals, 2, home, timeout=200)
    for number, fault in enumerate(FAULTS):
        for rank in ranks:
            passed, message = rank[number]
            assert passed + 1 == fault.check, (fault, message)
            assert all(words in message for words in fault.says), (fault, message)
    assert {fault.check for fault in FAULTS} == set(range(1, 11))


# Memory that really runs out, disks that are really small ------------------------------------------------------------


def little_memory(rank: int, pipe: Any) -> None:
    """A fault: rank 1 may take 160 MiB more when its memory check begins, and no byte beyond: room for all that a
    forward pass allocates but for one tensor, so that it is torch's allocator that is refused, not a thread's stack."""
    original = memory_probe.probe_figures

    def probe_figures(*given: Any) -> str:
        pipe.send(("probes", time.monotonic()))
        if rank == 1:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 160 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return original(*given)

    contract_parts.probe_figures = probe_figures  # type: ignore[assignment]


def test_a_rank_out_of_memory_ends_all_with_the_overrides_that_would_fit(home: Path) -> None:
    """Rank 0 is in the reduction of its gradients by then; nobody answers it."""
    model_folder(home / "wide", "llama", hidden_size=64, intermediate_size=8192)
    keys = ["+exp=full", *KEYS, "model.path=wide", "data.max_len=1024", "train.pack_tokens=8192", "zero.stage=2"]
    keys = [key for key in keys if key not in ("model.path=model", "data.max_len=256", "run.dir=run")]
    with Job(2, [*keys, "precision=fp32", "run.dir=run-small"], home, little_memory) as job:
        job.hear(1, "probes", 120)
        began = job.hear(0, "probes", 120)
        codes = job.codes(60)
        took = time.monotonic() - began
        screen = job.screen()
    assert all(codes), screen
    assert took < 30, "a forward and backward, and the seconds in which a failure is heard of"
    assert "memory: rank 1 cannot hold the costliest pack of" in screen
    assert "can't allocate memory" in screen
    assert "The cheapest overrides that would fit:" in screen
    assert "train.pack_tokens=1024" in screen
    assert not list((home / "run-small").glob("checkpoints/step-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes file systems of a few KiB."""
    made: list[Path] = []

    def make(kib: int) -> Path:
        folder = tmp_path / f"disk-{kib}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here ({done.stderr.decode().strip()})")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)


def disk_refusals(world: World, home: Path, folders: Sequence[Path]) -> list[str]:
    os.chdir(home)
    parts = built(world, configured())
    found = []
    for folder in folders:
        checks = contract(parts.cfg, parts.corpus, parts.plan, parts.trained, world, folder)
        try:
            run_checks(world, checks, lambda line: None)
        except SftdistError as error:
            found.append(str(error))
        else:
            found.append("nothing was refused")
    return found


@pytest.mark.long
@pytest.mark.skipif(shutil.which("mount") is None, reason="mount is not installed")
def test_a_small_disk_is_refused_before_step_1(home: Path, small_disk: Callable[[int], Path]) -> None:
    """A checkpoint of this model takes 330 KiB: too little for the trial; for it, but not for three; enough."""
    folders = [small_disk(kib) for kib in (200, 800, 2000)]
    for rank in run_ranks(disk_refusals, 2, home, folders):
        assert "a trial save failed" in rank[0]
        assert "Free some space" in rank[0]
        assert "3 more checkpoints need" in rank[1]
        assert "set checkpoint.keep_last lower" in rank[1]
        assert rank[2] == "nothing was refused"
    assert [path.name for path in folders[0].rglob("*") if path.is_file()] == ["first_conversation.txt"]


# No trace ----------------------------------------------------------------------------------------------------------


def two_steps(world: World, home: Path, overrides: Sequence[str], *, checked: bool) -> Any:
    """Losses, gradient norms, random state and weights after two steps of the plan, on one rank."""
    os.chdir(home)
    parts = built(world, configured(*overrides))
    if checked:
        run_dir = Path(f"run-checked-{'-'.join(overrides)}")
        checks = contract(parts.cfg, parts.corpus, parts.plan, parts.trained, world, run_dir)
        run_dir.mkdir(exist_ok=True)
        run_checks(world, checks, lambda line: None)
        assert [path.name for path in run_dir.rglob("*") if path.is_file()] == ["first_conversation.txt"]
    engine, figures = parts.trained.engine, []
    loader = Loader(parts.plan, parts.corpus.stores, rank=world.rank, world_size=world.size, state=None)
    for _ in range(2):
        step = loader.take()
        for index, batch in enumerate(step.micro):
            scale = world.size / step.denominator
            output = engine.forward_backward(batch, scale=scale, last=index == len(step.micro) - 1)
            figures.append(output.sum.item())
        figures.append(engine.step(1e-3).grad_norm)
    loader.close()
    weights = np.concatenate([value.detach().float().flatten().numpy() for _, value in engine.parameters()])
    engine.close()
    return figures, torch.get_rng_state().numpy().tobytes(), weights


def traces(world: World, home: Path, cases: Sequence[Sequence[str]]) -> list[bool]:
    """Per case: do the checks leave a trace?"""
    found = []
    for case in cases:
        plain, checked = (two_steps(world, home, case, checked=flag) for flag in (False, True))
        found.append(plain[:2] != checked[:2] or not np.array_equal(plain[2], checked[2]))
    return found


def cases(*stages: int) -> list[tuple[str, str]]:
    return [(f"zero.stage={stage}", f"precision={name}") for stage in stages for name in ("fp32", "bf16")]


def test_the_contract_leaves_no_trace(home: Path) -> None:
    for rank in run_ranks(traces, 2, home, cases(3)[1:]):
        assert not any(rank)


@pytest.mark.long
def test_the_contract_leaves_no_trace_at_any_stage(home: Path) -> None:
    for rank in run_ranks(traces, 2, home, cases(0, 1, 2, 3)):
        assert not any(rank)
