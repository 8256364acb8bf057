"""The held-out prompts of a release asked again: does it still answer as when it was published?

Prompts, references and scores of then are in the release (`report/`), so no data is needed beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sftdist.core.distributed import World
from sftdist.core.settings import EvalsSettings, TrainConfig
from sftdist.data.contract_file import read_contract_file, read_file
from sftdist.data.held_out import message_from_json
from sftdist.evals.aggregate import metrics_of
from sftdist.evals.decoding import Decoding
from sftdist.evals.endpoint import Endpoint
from sftdist.evals.engines import load_engine
from sftdist.evals.generate import answers
from sftdist.evals.intervals import Estimate, change
from sftdist.evals.lineup import Measures, probes_of, scores
from sftdist.evals.live import Forms, schema_files
from sftdist.evals.pace import shown
from sftdist.evals.prompts import Answer, Prompt
from sftdist.evals.report import EvalReport, Scores
from sftdist.evals.shift import ALPHA
from sftdist.evals.suite import scored
from sftdist.evals.voice import Voice

AT_ONCE = 8  # requests to an endpoint: servers batch what comes together


@dataclass(frozen=True)
class Again:
    """One metric then (`published`) and now, over the same prompts. `worse`: the interval of the change says so."""

    name: str
    prompts: int
    published: float
    now: float
    change: Estimate
    worse: bool


def prompts_again(rows: Iterable[Mapping[str, Any]]) -> list[Prompt]:
    """The prompts of rows.jsonl, without those that say another one in other words."""
    return [
        Prompt(
            id=row["id"],
            source=row["source"],
            messages=tuple(message_from_json(message) for message in row["prompt"]),
            reference=row["reference"],
            tools=tuple(row["tools"]),
            tags=tuple(row["tags"]),
            turn=row["turn"],
            checks=row["checks"],
        )
        for row in rows
        if row["variant"] is None
    ]


def voice_of(release: Path, cfg: TrainConfig) -> Voice:
    """The template of the release, used as `cfg` rendered the data that it was made of."""
    return Voice.load(release, arguments=cfg.model.template_args, optional=cfg.data.allow_unrendered)


def from_folder(
    release: Path, prompts: Sequence[Prompt], decoding: Decoding, voice: Voice, world: World
) -> list[Answer]:
    """What the model in the folder says."""
    with shown("the release", is_main=True) as progress:
        return answers(
            lambda: load_engine(release, voice, decoding, world.device),
            prompts,
            voice=voice,
            decoding=decoding,
            world=world,
            progress=progress,
        )


def from_endpoint(endpoint: Endpoint, prompts: Sequence[Prompt], max_new_tokens: int, voice: Voice) -> list[Answer]:
    """What the served model says. Raises ConfigError and EndpointError as `Endpoint.ask` does.

    A server may send the end of a thought that `voice` has opened in the prompt, or take out the whole of it.
    """

    def ask(prompt: Prompt) -> Answer:
        answer = endpoint.ask(prompt.messages, max_new_tokens, tools=prompt.tools)
        return replace(answer, opened="</think>" in answer.text and voice.opens(voice.encode(prompt)))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, prompts))


def measures_of(release: Path, forms: Forms, evals: EvalsSettings) -> Measures:
    """The probes that need no other model than the one that is asked, with what travels in the release."""
    return Measures(
        probes=[name for name in evals.probes if scores(name)],
        contracts=forms.contracts,
        schemas={source: read_contract_file(file, read_file(file)) for source, file in schema_files(release).items()},
        functions=evals.functions,
    )


def regressions(
    published: EvalReport, prompts: Sequence[Prompt], said: Sequence[Answer], measures: Measures
) -> list[Again]:
    """Every metric that both evaluations have and that can be worse, the worst change first.

    An interval is as wide as it takes for `ALPHA` over all of them together (Bonferroni).
    """
    probes = probes_of(measures)
    given = scored(prompts, {prompt.id: answer for prompt, answer in zip(prompts, said, strict=True)}, probes)
    known = {metric.name: metric for probe in probes for metric in probe.metrics}
    now = metrics_of(prompts, known, given, None)
    pairs = [(name, one, now[name]) for name, one in published.metrics.items() if name in now and _counts(one)]
    found = [again for pair in pairs if (again := _again(*pair, number=len(pairs))) is not None]
    return sorted(found, key=lambda one: (not one.worse, one.name))


def _counts(scores: Scores) -> bool:
    return scores.higher_is_better is not None and scores.weights is None and scores.fault() is None


def _again(name: str, then: Scores, now: Scores, *, number: int) -> Again | None:
    before, after = dict(zip(then.ids, then.tuned, strict=True)), dict(zip(now.ids, now.tuned, strict=True))
    ids = [id for id in then.ids if id in after]
    if not ids:
        return None
    old, new = [before[id] for id in ids], [after[id] for id in ids]
    estimate = change(new, old, None, 1 - 2 * ALPHA / number, then.low, then.high)
    worse = estimate.high < 0 if then.higher_is_better else estimate.low > 0
    return Again(name, len(ids), sum(old) / len(ids), sum(new) / len(ids), estimate, worse)


def regression_report(
    asked: str, prompts: Sequence[Prompt], found: Sequence[Again], published: EvalReport
) -> dict[str, Any]:
    """Plain values, for the report of a look; `not_again`: what publish measured and a look does not."""
    again = {one.name for one in found}
    return {
        "asked": asked,
        "prompts": len(prompts),
        "metrics": [asdict(one) for one in found],
        "not_again": [
            name for name, one in published.metrics.items() if name not in again and one.higher_is_better is not None
        ],
    }


def findings(found: Sequence[Again]) -> list[str]:
    """What has become worse, in sentences."""
    return [
        f"{one.name}: {one.now:.3f} on the holdout asked again, {one.published:.3f} when it was published "
        f"(change {one.change.value:+.3f}, {one.change.low:+.3f} to {one.change.high:+.3f})"
        for one in found
        if one.worse
    ]


def decoding_of(published: EvalReport, world: World) -> Decoding:
    """As the release was asked when it was published, on this machine."""
    facts = published.decoding
    return Decoding.on(
        world.device,
        max_new_tokens=facts["max_new_tokens"],
        batch_size=facts["batch_size"],
        engine=facts["engine"],
        dtype=facts["dtype"],
    )
