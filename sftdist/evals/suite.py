"""The whole of an evaluation: both models answer the same prompts, and every answer is scored."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sftdist.core.distributed import World
from sftdist.core.errors import DataError
from sftdist.core.ledger import versions
from sftdist.core.storage import write_jsonl
from sftdist.evals.aggregate import Given, metrics_of, robustness_of, rows_of
from sftdist.evals.backends.hf import load_model
from sftdist.evals.benchmarks import benchmarks
from sftdist.evals.cache import AnswerCache
from sftdist.evals.engines import load_engine
from sftdist.evals.generate import answers
from sftdist.evals.identity import identify
from sftdist.evals.lineup import code_of, probes_of, prompts_of, refuse_unknown_checks
from sftdist.evals.metrics import Probe
from sftdist.evals.pace import shown
from sftdist.evals.probes.robustness import fall
from sftdist.evals.prompts import Answer, Prompt
from sftdist.evals.questions import questions, refuse_trained
from sftdist.evals.report import ROWS, EvalReport, ModelFacts, Scores
from sftdist.evals.request import SuiteSpec
from sftdist.evals.row_losses import Row, loss_scores, name_of, require_same_tokens, row_losses, rows_to_score
from sftdist.evals.voice import Voice
from sftdist.evals.waiting import Beat, on_main, quiet, unbroken_on_main

Say = Callable[[str], None]
SHOWN = 10  # problems at a time


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation; `rows` is what `folder/rows.jsonl` holds."""

    report: EvalReport
    rows: list[dict[str, Any]]
    folder: Path


@dataclass(frozen=True)
class Models:
    """Who answers: the tuned model, and its base where there is one, by these names."""

    folders: Mapping[str, Path]
    facts: Mapping[str, ModelFacts]

    @classmethod
    def of(cls, tuned: Path, base: Path | None, world: World) -> Models:
        """Rank 0 reads every byte of them. Collective."""
        folders = {"tuned": tuned} | ({} if base is None else {"base": base})

        def identified() -> dict[str, ModelFacts]:
            return {name: identify(folder) for name, folder in folders.items()}

        return cls(folders, world.broadcast_object(unbroken_on_main(world, "reading the models", identified)))


def evaluate(spec: SuiteSpec, world: World, say: Say) -> Evaluated:
    """Ask, score and write `spec.folder`; the same result on every rank. Collective.

    Raises DataError where there is nothing to ask, or where a prompt is among the rows that were trained on.
    """
    clock = Clock()
    with clock.of("identify"):
        models = Models.of(spec.candidate, spec.base, world)
    if spec.named:
        spec = replace(spec, folder=spec.folder.with_name(f"{spec.folder.name}-{models.facts['tuned'].sha256[:8]}"))
    others = [] if spec.base is None else [spec.base]
    voice = Voice.load(
        spec.candidate,
        *others,
        arguments=spec.template_args,
        optional=spec.allow_unrendered,
        chat_template=spec.chat_template,
    )
    probes = probes_of(spec.measures)
    prompts, left_out = to_ask(spec, voice, probes)
    rows = loss_rows(spec, voice)
    say(f"{len(prompts):,} prompts for {' and '.join(models.folders)}")
    given: dict[str, Given] = {}
    for name, folder in models.folders.items():
        with clock.of(f"answers of {name}"):
            said = ask(name, folder, models.facts[name], prompts, voice, spec, world)
        with clock.of(f"scores of {name}"):
            given[name] = on_main(world, "scoring", partial(scored, prompts, said, probes)) or Given(said)
    with clock.of("loss"):
        losses = losses_of(rows, models, voice, spec, world)
    with clock.of("benchmarks"):
        asked = partial(benchmarks, models.folders, spec.tasks, voice, spec.decoding, world.device)
        tasks = on_main(world, "running the tasks of lm-eval", asked)
    if tasks is None:
        report, lines = world.broadcast_object(None)
        return Evaluated(report, lines, spec.folder)
    tuned, base = given["tuned"], given.get("base")
    known = {metric.name: metric for probe in probes for metric in probe.metrics}
    metrics = {**metrics_of(prompts, known, tuned, base), **robustness_of(prompts, fall, tuned, base)}
    lines = rows_of(prompts, tuned, base)
    report = EvalReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        split=spec.split,
        tuned=models.facts["tuned"],
        base=models.facts.get("base"),
        decoding=spec.decoding.facts(),
        data={**spec.data, "prompts": counts(prompts), "left_out": left_out},
        metrics={**metrics, **losses, **tasks.metrics},
        run=spec.run,
        versions={**versions(), **code_of(spec.measures)},
        seconds=clock.seconds,
        asked={
            **tasks.asked,
            **{row.id: row.content for row in rows},
            **{prompt.id: prompt.sha256 for prompt in prompts},
        },
    )
    report.write(spec.folder)
    write_jsonl(spec.folder / ROWS, lines)
    world.broadcast_object((report, lines))
    return Evaluated(report, lines, spec.folder)


def to_ask(spec: SuiteSpec, voice: Voice, probes: Sequence[Probe]) -> tuple[list[Prompt], dict[str, str]]:
    """All prompts; and by id, why others are left out: those that the template cannot render.

    Raises DataError where that is a prompt of the data, where there is none, or for checks that cannot be carried out.
    """
    measures = spec.measures
    refuse_trained(spec.stores, spec.split, spec.trained)
    if not probes:
        return [], {}
    asked = questions(spec.stores, spec.split, max_len=spec.max_len, most=spec.max_prompts)
    if not asked:
        raise nothing_in(spec.split)
    if refused := voice.refused(asked):
        raise DataError("\n".join(list(refused.values())[:SHOWN]))
    prompts = prompts_of(asked, measures)
    left_out = voice.refused(prompts)
    kept = [prompt for prompt in prompts if prompt.id not in left_out]
    for prompt in kept:
        refuse_unknown_checks(prompt, measures)
        for probe in probes:
            probe.check(prompt)
    return kept, left_out


def ask(
    name: str, folder: Path, facts: ModelFacts, prompts: Sequence[Prompt], voice: Voice, spec: SuiteSpec, world: World
) -> dict[str, Answer]:
    """What one model says to every prompt, by id. Collective; its weights are not loaded where all is known already."""
    cache = None if spec.cache is None else AnswerCache(spec.cache, facts.sha256, voice.sha256, spec.decoding)
    load = partial(load_engine, folder, voice, spec.decoding, world.device)
    with shown(name, is_main=world.is_main) as progress:
        said = answers(load, prompts, voice=voice, decoding=spec.decoding, world=world, cache=cache, progress=progress)
    return {prompt.id: answer for prompt, answer in zip(prompts, said, strict=True)}


def nothing_in(split: str) -> DataError:
    """There is no row to ask or to measure."""
    fraction, file = ("val_fraction", "val") if split == "validation" else ("holdout_fraction", "holdout")
    return DataError(
        f"evaluate: given no conversation in the {split} split that fits into data.max_len, required at least one; "
        f"raise data.{fraction}, or give data.{file}=FILE"
    )


def scored(prompts: Sequence[Prompt], said: Mapping[str, Answer], probes: Sequence[Probe], beat: Beat = quiet) -> Given:
    """The answers of one model with all their scores, by metric; `beat` is called after each prompt."""
    scores: dict[str, dict[str, float]] = {}
    for prompt in prompts:
        found = scores[prompt.id] = {}
        for probe in probes:
            found |= probe.score(prompt, said[prompt.id])
        beat()
    return Given(said, scores)


def loss_rows(spec: SuiteSpec, voice: Voice) -> list[Row]:
    """The rows whose loss is measured: none where it is not asked for. Raises DataError where there is none, or where
    they are tokens of another tokenizer."""
    if "loss" not in spec.measures.probes:
        return []
    rows = rows_to_score(spec.stores, spec.split, max_len=spec.max_len, most=spec.max_prompts)
    if not rows:
        raise nothing_in(spec.split)
    require_same_tokens(spec.stores, voice.template)
    return rows


def losses_of(rows: Sequence[Row], models: Models, voice: Voice, spec: SuiteSpec, world: World) -> dict[str, Scores]:
    """The loss on the reference answers. Collective."""
    if not rows:
        return {}
    dtype, device, found = spec.decoding.dtype, world.device, {}
    for name, folder in models.folders.items():
        load = partial(load_model, folder, dtype=dtype, device=device, rows=voice.rows)
        kept = spec.cache / name_of(models.facts[name].sha256, rows, dtype, device.type)
        found[name] = row_losses(load, rows, world, kept)
    return loss_scores(rows, found["tuned"], found.get("base"))


def counts(prompts: Sequence[Prompt]) -> dict[str, int]:
    """How many prompts of each source there are, and how many that say another one in other words."""
    return dict(sorted(Counter("robustness" if prompt.variant else prompt.source for prompt in prompts).items()))


class Clock:
    """Seconds by part of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - began, 3)
