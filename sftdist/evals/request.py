"""From the configuration of `evaluate` to what its suite is asked for: folders, open stores, plain values."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sftdist.core import snapshot
from sftdist.core.errors import ConfigError
from sftdist.core.settings import EvaluateConfig, Init, PublishConfig, SourceSettings, TrainConfig
from sftdist.core.storage import read_json
from sftdist.data.contract import Contract
from sftdist.data.contract_file import read_contract_file, read_file
from sftdist.data.manifest import MANIFEST, rows_behind
from sftdist.data.request import prepare_small
from sftdist.data.request import request_of as data_request_of
from sftdist.data.rowset import RowSet
from sftdist.data.store import TokenStore
from sftdist.evals.benchmarks import require_lm_eval
from sftdist.evals.decoding import Decoding
from sftdist.evals.endpoint import Endpoint
from sftdist.evals.identity import adapter_base
from sftdist.evals.lineup import Measures, require_probes
from sftdist.evals.voice import tokenizer_folder

EXPORT = "export"  # in a run directory
OWN = tuple({item.name for item in fields(PublishConfig)} - {item.name for item in fields(TrainConfig)})


@dataclass(frozen=True)
class SuiteSpec:
    """`stores`: those that are asked from; `trained`: the rows that the model was trained on; `run` and `data` go into
    the report as they are. `named`: the candidate is not the run's own export, so that its folder has its hash."""

    candidate: Path
    base: Path | None
    split: str
    stores: Sequence[TokenStore]
    trained: Sequence[RowSet]
    max_prompts: int | None
    max_len: int
    template_args: Mapping[str, Any]
    chat_template: str | None
    allow_unrendered: Sequence[str]
    measures: Measures
    decoding: Decoding
    cache: Path
    folder: Path
    named: bool = False
    tasks: Sequence[str] = ()
    run: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


Resolve = Callable[[str, str], Path]  # a key and what it names, to the folder of a model


def request_of(cfg: EvaluateConfig, resolve: Resolve, device: torch.device) -> SuiteSpec:
    """What a (composed) configuration asks for; `resolve` finds the folder of what a key names.

    Raises ConfigError where a model is missing, DataError as prepare does.
    """
    require_probes(cfg.evals.probes)
    require_lm_eval(cfg.tasks, asked="benchmarks" in cfg.evals.probes)
    run_dir = Path(str(cfg.run.dir))
    is_run = (run_dir / snapshot.FILE).is_file()
    candidate = _candidate(cfg, run_dir, is_run, resolve)
    base = _base(cfg, candidate, is_run, resolve)
    stores, holdout = _stores(cfg, None if is_run else candidate)
    evals = cfg.evals
    decoding = Decoding.on(
        device,
        max_new_tokens=evals.max_new_tokens,
        batch_size=evals.batch_size,
        engine=evals.engine.value,
        dtype=None if evals.precision is None else evals.precision.value,
    )
    return SuiteSpec(
        candidate=candidate,
        base=base,
        split=cfg.split,
        stores=stores,
        trained=[
            *(_trained(run_dir, Path(cfg.data.store_dir)) if is_run else []),
            *_trained_elsewhere(candidate, run_dir, Path(cfg.data.store_dir)),
        ],
        max_prompts=evals.max_prompts,
        max_len=cfg.data.max_len,
        template_args=cfg.model.template_args,
        chat_template=None if is_run else cfg.model.chat_template,
        allow_unrendered=cfg.data.allow_unrendered,
        measures=_measures(cfg, [store.name for store in stores]),
        decoding=decoding,
        cache=Path(evals.cache or Path(cfg.data.store_dir) / "answers"),
        folder=run_dir / "report" / ("benchmarks" if evals.probes == ["benchmarks"] else cfg.split),
        named=is_run and cfg.candidate is not None,
        tasks=cfg.tasks,
        run=_run(cfg, run_dir) if is_run else {},
        data={
            "sources": {store.name: store.manifest["key"] for store in stores},
            "holdout": holdout,
            "store_dir": cfg.data.store_dir,
        },
    )


def _stores(cfg: EvaluateConfig, judged: Path | None) -> tuple[list[TokenStore], dict[str, Any]]:
    """The stores to ask from, and what the data report says of the holdout. None for benchmarks alone; only a file of
    the user's own where it has the split.

    `judged`: without a run, the model whose tokenizer and template they are made with.
    """
    if cfg.evals.probes == ["benchmarks"]:
        return [], {}
    asked = data_request_of(cfg.data, cfg.model, held_out_alone=True)
    if judged is not None and cfg.model.vocabulary is None:
        asked = replace(asked, tokenizer=cfg.model.tokenizer or str(tokenizer_folder(judged)), revision=None)
    if cfg.split == "validation" and cfg.data.val is not None and cfg.model.vocabulary is None:
        asked = replace(asked, sources=(), holdout_lock=None)  # neither the train rows nor their lock have a say
    prepared = prepare_small(asked, _prepare_line(), say=partial(print, flush=True))
    own = [store for store in prepared.held_out.values() if store.manifest["splits"][cfg.split]["rows"]]
    return own or list(prepared.stores.values()), prepared.report["holdout"]


def _candidate(cfg: EvaluateConfig, run_dir: Path, is_run: bool, resolve: Resolve) -> Path:
    """The model to judge: the one that is named, the run's export, or without a run `model.path`."""
    if cfg.candidate is not None:
        return resolve("candidate", cfg.candidate)
    if is_run:
        export = run_dir / EXPORT
        if not export.is_dir() and not cfg.watch:  # a watch names the model of each step itself
            raise ConfigError(
                f"run.dir={run_dir}: given a run without {EXPORT}, required its exported model; let sftdist train "
                f"come to its end, or name a checkpoint's (sftdist export run.dir={run_dir}): candidate=FOLDER"
            )
        return export
    if cfg.model.path is None:
        if cfg.run.dir != f"runs/{cfg.run.name}":  # somebody has named it
            snapshot.require_run(run_dir)
        raise ConfigError("evaluate: given no model, required run.dir=R, candidate=FOLDER or model.path=FOLDER")
    return resolve("model.path", cfg.model.path)


def _base(cfg: EvaluateConfig, candidate: Path, is_run: bool, resolve: Resolve) -> Path | None:
    """What it is compared with; None where there is no pretrained model to compare with."""
    if cfg.base is not None:
        return resolve("base", cfg.base)
    if is_run:
        pretrained = cfg.model.init is Init.pretrained and cfg.model.path is not None
        return resolve("model.path", str(cfg.model.path)) if pretrained else None
    return adapter_base(candidate)


def _trained(run_dir: Path, store_dir: Path) -> list[RowSet]:
    """The rows that the run was trained on, by its own data manifest. Raises ConfigError where they are not there: then
    nobody knows whether a prompt was among them."""
    manifest = run_dir / MANIFEST
    if not manifest.is_file():
        raise ConfigError(f"{run_dir}: given a run without {MANIFEST}, required one that says what was trained on")
    rows = rows_behind(read_json(manifest), [store_dir, run_dir])
    if rows.gone:
        raise ConfigError(
            [
                f"data.store_dir: {name}: given no store of what was trained on ({why})"
                for name, why in rows.gone.items()
            ]
            + ["required the stores of the run, to know which prompts are new to the model: " + _prepare_line()]
        )
    return list(rows.found.values())


def _trained_elsewhere(candidate: Path, run_dir: Path, store_dir: Path) -> Iterator[RowSet]:
    """The rows that a model of another run, or a release, was trained on, where they are known and there."""
    folder = candidate.resolve()
    for home in (folder, *folder.parents[:2]):
        if not (home / MANIFEST).is_file() or home == run_dir.resolve():
            continue
        folders = [store_dir]
        if (home / snapshot.FILE).is_file():
            folders.append(Path(snapshot.read_config(home).data.store_dir))
        rows = rows_behind(read_json(home / MANIFEST), folders)
        yield from rows.found.values()
        for name, why in rows.gone.items():
            print(f"{candidate}: the prompts are not compared with its training source {name}: {why}", flush=True)


def _measures(cfg: EvaluateConfig, asked: Sequence[str]) -> Measures:
    """`asked`: the names of the stores that are asked from."""
    evals, judge = cfg.evals, cfg.evals.judge
    sources = dict.fromkeys([*asked, *cfg.data.sources])
    if unknown := [name for name in evals.schemas if name not in sources]:
        raise ConfigError(f"evals.schemas: given the source {unknown[0]}, required one of {', '.join(sources)}")
    endpoint = None
    if judge.url is not None:
        endpoint = Endpoint(judge.url, judge.model, os.environ.get(judge.key_variable))
    return Measures(
        probes=evals.probes,
        contracts=_contracts(cfg.data.sources, asked),
        schemas={source: read_schema(Path(file)) for source, file in evals.schemas.items()},
        functions=evals.functions,
        policy=evals.policy,
        adversarial=evals.adversarial,
        robustness=evals.robustness,
        robustness_prompts=evals.robustness_prompts,
        classifier=evals.classifier,
        unsafe_label=evals.unsafe_label,
        judge=endpoint,
        rubric=judge.rubric,
        seed=cfg.seed,
    )


def _contracts(sources: Mapping[str, SourceSettings], asked: Sequence[str]) -> dict[str, Contract]:
    """A file of the user's own (data.val, data.holdout) has the contract of the only source, as it has its shape."""
    found = {name: Contract.load(Path(one.contract)) for name, one in sources.items() if one.contract is not None}
    if len(sources) == 1 and found:
        return {name: next(iter(found.values())) for name in asked}
    return found


def read_schema(file: Path) -> dict[str, Any]:
    """A JSON Schema in a JSON or YAML file. Raises ConfigError for what cannot be read or is no object."""
    found = read_contract_file(file, read_file(file))
    if not isinstance(found, dict):
        raise ConfigError(f"evals.schemas: given {file}, required a JSON Schema that is an object")
    return found


def _run(cfg: EvaluateConfig, run_dir: Path) -> dict[str, Any]:
    return {"name": cfg.run.name, "dir": str(run_dir), "config": snapshot.config_hash(cfg)}


def _prepare_line() -> str:
    """The command that makes the stores with the words of this one that are not its own."""
    return (
        f"sftdist prepare {shlex.join(word for word in sys.argv[1:] if '=' in word and word.split('=')[0] not in OWN)}"
    )
