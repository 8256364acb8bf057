"""Is the data fit? Findings from the figures of the report alone, the gravest first: what a person looks at first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FIT, LOOK, UNFIT = "fit", "look", "unfit"
LEVELS = (UNFIT, LOOK, FIT)
WORDS = {FIT: "Fit", LOOK: "Look first", UNFIT: "Not fit"}
NOTES = {FIT: "note", LOOK: "look at", UNFIT: "not fit"}  # what a single finding is

MUCH, MOST = 0.05, 0.5  # of the rows read, for what leaves or is found at one stage
FAULTY = 0.001  # the same for FAULTS
LOST, LOST_MOST = 0.01, 0.2  # of the supervised tokens, for what data.max_len costs
FEW_SUPERVISED = 0.05  # of the tokens
FILL = 0.9
MANY_PASSES = 4.0  # "up to 4 epochs of repeated data ... negligible changes to loss", Muennighoff et al. 2023
SHARE_OFF = 0.05  # between the lambda of a source and its realised share

# What each stage is called, and where rows that left there are no loss.
STAGE_NAMES = {
    "read": "read",
    "left_out": "left out by the row function",
    "bad": "bad: cannot be parsed",
    "breach": "breach of the contract",
    "cut_off": "answer cut off or empty",
    "contaminated": "in or near an evaluation prompt",
    "duplicate": "exact duplicate",
    "contradiction": "contradicts another answer",
    "near_duplicate": "near duplicate",
    "refused": "refused: mask not proven",
    "kept": "kept",
    "leaked": "train row near a held-out row",
    "held_out": "prompt is in the validation or holdout file",
    "train": "train",
    "validation": "validation",
    "holdout": "holdout",
}
KEPT = ("read", "kept", "train", "validation", "holdout")
FAULTS = ("bad", "refused", "breach", "cut_off", "contradiction")  # of the data, not only of its abundance
Finding = dict[str, str]


def judged(report: dict[str, Any]) -> dict[str, Any]:
    """The report with `verdict` {"level", "findings": [{"level", "text"}]}, of each source and of all together."""
    sources = {
        name: {**source, "verdict": _verdict(_of_source(name, source, report))}
        for name, source in report["sources"].items()
    }
    return {**report, "sources": sources, "verdict": _verdict(_of_all({**report, "sources": sources}))}


def _verdict(findings: Iterator[Finding]) -> dict[str, Any]:
    found = sorted(findings, key=lambda finding: LEVELS.index(finding["level"]))
    return {"level": found[0]["level"] if found else FIT, "findings": found}


def _finding(level: str, text: str) -> Finding:
    return {"level": level, "text": text}


def _level(share: float, much: float, most: float) -> str:
    return UNFIT if share >= most else LOOK if share >= much else FIT


def _of_source(name: str, source: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _stages(source["stages"])
    if not source["stages"]["train"]["rows"] and not source["held_out"]:
        yield _finding(UNFIT, "no row is left to train on")
    yield from _found(source)
    yield from _lint(source.get("lint", {}))
    train = source["stages"]["train"]
    if train["tokens"] and train["share"] < FEW_SUPERVISED:
        yield _finding(LOOK, f"only {percent(train['share'])} of the train tokens are supervised")
    training = report.get("training", {})
    yield from _overlong(training, name, train)
    for planned in training.get("plan", {}).get("sources", []):
        if planned["name"] == name:
            yield from _planned(planned, training["plan"])


def _stages(stages: Mapping[str, Any]) -> Iterator[Finding]:
    read = stages["read"]["rows"]
    for stage, count in stages.items():
        if stage in KEPT or stage == "left_out" or not count["rows"]:
            continue
        share = count["rows"] / max(1, read)
        level = _level(share, FAULTY if stage in FAULTS else MUCH, MOST)
        yield _finding(level, f"{rows(count['rows'])} ({percent(share)} of those read) left: {stage_name(stage)}")


def _found(source: Mapping[str, Any]) -> Iterator[Finding]:
    """What was found and stays in the data."""
    for stage, count in source.get("found", {}).items():
        if count:
            share = count / max(1, source["stages"]["read"]["rows"])
            level = _level(share, FAULTY if stage in FAULTS else MUCH, MOST)
            yield _finding(level, f"{rows(count)} ({percent(share)}) found and kept: {stage_name(stage)}")


def _lint(lint: Mapping[str, Any]) -> Iterator[Finding]:
    """What makes a tone unstable."""
    if lint.get("mixed tone"):
        yield _finding(LOOK, f"some answers have it, others have not: {', '.join(lint['mixed tone'])}")
    for told in lint.get("contradicted instructions", []):
        if told["contradicted"]:
            level = _level(told["contradicted"] / max(1, lint["answers"]), FAULTY, MOST)
            yield _finding(
                level, f"the answer contradicts what was asked for in {rows(told['contradicted'])}: {told['what']}"
            )


def _overlong(training: Mapping[str, Any], name: str, train: Mapping[str, Any]) -> Iterator[Finding]:
    over = training.get("over", {}).get(name)
    if over and over["rows"]:
        share = over["targets"] / train["targets"] if train["targets"] else 1.0
        level = UNFIT if training["overlong"] == "error" else _level(share, LOST, LOST_MOST)
        yield _finding(
            level,
            f"{rows(over['rows'])} with {percent(share)} of the supervised tokens are longer than "
            f"data.max_len={training['max_len']} (data.overlong={training['overlong']})",
        )


def _planned(planned: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[Finding]:
    if abs(planned["share"] - planned["lam"]) > SHARE_OFF:
        yield _finding(LOOK, f"its share of the loss is {planned['share']:.3f}, asked for is {planned['lam']:.3f}")
    passes = planned["passes"] * plan["repeats"]
    if passes > MANY_PASSES:
        yield _finding(LOOK, f"each row would be seen about {passes:.1f} times: more rows, or a smaller lambda")


def _of_all(report: Mapping[str, Any]) -> Iterator[Finding]:
    if "refused" in report:
        yield _finding(UNFIT, "prepare refuses this data, for the reasons below")
    for level in (UNFIT, LOOK):
        names = [name for name, source in report["sources"].items() if source["verdict"]["level"] == level]
        if names:
            yield _finding(level, f"{'source' if len(names) == 1 else 'sources'} {', '.join(names)}")
    yield from _required(report)
    training = report.get("training", {})
    if "not_computed" in training:
        yield _finding(LOOK, f"packs and mixture were not computed: {training['not_computed']}")
    plan = training.get("plan", {})
    if plan.get("packing") and plan["fill"] < FILL:
        yield _finding(LOOK, f"packs of {plan['pack_tokens']:,} tokens are only {percent(plan['fill'])} full")
    splits = [split for split in ("validation", "holdout") if not _rows_of(report, split)]
    if splits:
        yield _finding(LOOK, f"no row in the {' and the '.join(splits)} split")
    holdout = report.get("holdout")
    if holdout and not holdout["locked"] and _rows_of(report, "holdout"):
        yield _finding(LOOK, "the holdout is not locked: set data.holdout_lock=FILE and run prepare with lock=write")


def _rows_of(report: Mapping[str, Any], split: str) -> int:
    return sum(source["stages"][split]["rows"] for source in report["sources"].values())


def _required(report: Mapping[str, Any]) -> Iterator[Finding]:
    """`data.require`: tags and label origins of which there are too few train rows."""
    for kind, least in report.get("required", {}).items():
        counts = [source.get("coverage", {}).get(kind, {}) for source in report["sources"].values()]
        for label, number in least.items():
            have = sum(count.get(label, 0) for count in counts)
            if have < number:
                yield _finding(UNFIT, f"{kind}: {rows(have)} of {label}, required {number:,}")


def stage_name(stage: str) -> str:
    """What a stage is called for a person."""
    return STAGE_NAMES.get(stage, stage.replace("_", " "))


def percent(share: float) -> str:
    """`12.3 %`; what is there but hardly so is never 0."""
    return "< 0.1 %" if 0 < share < 0.001 else f"{share:.1%}".replace("%", " %")


def rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
