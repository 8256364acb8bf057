"""The parts of a run, built from its configuration and the data that rank 0 has opened: the same for every job that
trains, or that runs a step again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from sftdist.core.distributed import World
from sftdist.core.settings import Init, Method, TrainConfig
from sftdist.core.storage import read_json, write_json
from sftdist.data.corpus import Corpus, overlong_lines
from sftdist.data.leaks import Overlay
from sftdist.data.new_tokens import ids_of, require_seen
from sftdist.data.pipeline import Prepared
from sftdist.data.plan import Plan, PlanTotals, SourceTotals
from sftdist.data.planned import corpus_of, plan_spec
from sftdist.data.store import TokenStore
from sftdist.data.summary import describe_plan
from sftdist.data.template import ChatTemplate
from sftdist.model.cpu import is_emulated
from sftdist.model.load import weight_hashes
from sftdist.model.text_part import parts_named
from sftdist.training.build import Trained, build_trained, model_config, special_ids
from sftdist.training.opening import Opening
from sftdist.training.planned_model import cost_model
from sftdist.training.startup import together


@dataclass(frozen=True)
class Parts:
    """The data, the order in which it is trained, and the model under its engine."""

    corpus: Corpus
    plan: Plan
    totals: PlanTotals
    trained: Trained


def build_parts(cfg: TrainConfig, opening: Opening, run_dir: Path, world: World, say: Callable[[str], None]) -> Parts:
    """Collective; `say` prints a line on rank 0."""
    logging.disable_progress_bar()  # one bar a rank would garble the screen
    corpus = corpus_of(cfg, opened(cfg, opening))
    tokenizer = corpus.template.tokenizer
    shape = model_config(cfg, len(tokenizer), special_ids(tokenizer))
    plan = Plan(corpus.tables, plan_spec(cfg), cost_model(shape, cfg.tune, corpus.supervised_share))
    totals = totals_of(plan, run_dir, world)
    numbers = ids_of(tokenizer, cfg.model.add_tokens)
    together(world, lambda: require_seen(corpus.stores, numbers) if world.is_main else None)
    for line in (*overlong_lines(corpus, cfg.data.max_len), *describe_plan(plan, totals, world.size)):
        say(line)
    trained = build_trained(cfg, corpus, shape, world)
    say(f"attention: {trained.attention}")
    say(f"kernels: {trained.kernels}{', layers compiled' if cfg.model.compile else ''}")
    if is_emulated(cfg.precision, world.device):
        say("precision: this CPU has no instructions for bf16; precision=fp32 is several times as fast here")
    if trained.outside_text:
        say(f"frozen, and kept in the export: {parts_named(trained.outside_text)}, which no text passes through")
    return Parts(corpus, plan, totals, trained)


def opened(cfg: TrainConfig, opening: Opening) -> Prepared:
    """The same stores on every rank, by memory map."""
    stores = {name: opened_store(path, opening.overlay) for name, path in opening.stores.items()}
    held_out = {name: opened_store(path, opening.overlay) for name, path in opening.held_out.items()}
    first = next(iter(stores.values()))
    template = ChatTemplate.load(str(first.path / "tokenizer"))
    template = ChatTemplate.of(
        template.tokenizer, template.text, arguments=cfg.model.template_args, stop_ids=first.manifest["stop_ids"]
    )
    return Prepared(stores, held_out, template, report={})


def opened_store(path: str, overlay: str | None) -> TokenStore:
    """Without the rows that leak what is held out."""
    store = TokenStore.open(Path(path))
    return store if overlay is None else Overlay(Path(overlay)).over(store)


def totals_of(plan: Plan, run_dir: Path, world: World) -> PlanTotals:
    """The totals of the real plan: counted once by rank 0, kept in the run directory."""
    if world.is_main:
        path = run_dir / "plan.json"
        if not path.is_file() or read_json(path)["fingerprint"] != plan.fingerprint:
            write_json(path, {"fingerprint": plan.fingerprint, **asdict(plan.totals())})
        kept = {key: value for key, value in read_json(path).items() if key != "fingerprint"}
    totals = world.broadcast_object(kept if world.is_main else None)
    return PlanTotals(**{**totals, "sources": tuple(SourceTotals(**source) for source in totals["sources"])})


def base_of(cfg: TrainConfig, trained: Trained, world: World) -> dict[str, Any] | None:
    """What the trained weights belong to, by content: adapters to their base, a decoder to its vision tower. Any other
    full fine-tune holds all of its weights itself."""
    if cfg.tune.method == Method.full and not trained.outside_text:
        return None
    hashes = weight_hashes(Path(str(cfg.model.path))) if world.is_main else None
    return {
        "path": cfg.model.path,
        "revision": trained.commit or cfg.model.revision,
        "init": cfg.model.init.value,
        "seed": cfg.seed if cfg.model.init == Init.random else None,
        "files": world.broadcast_object(hashes),
    }
