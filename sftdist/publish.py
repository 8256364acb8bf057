"""The `publish` command: a model that its files, the holdout and the gate speak for gets a version in the registry.

`sftdist publish run.dir=R name=support-bot`, also under torchrun, or `run(cfg)` from Python.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers.utils import logging

from sftdist.core import agent, config, ledger, snapshot
from sftdist.core.distributed import World, session
from sftdist.core.errors import CheckpointError, ConfigError, GateError
from sftdist.core.releases import Release, check_name, latest
from sftdist.core.rules import BROUGHT_ALONG
from sftdist.core.runfacts import DATA, RunFacts, run_facts, step_of
from sftdist.core.settings import PublishConfig
from sftdist.core.storage import MANIFEST, disk_explained, read_json, read_jsonl, read_manifest, sha256_file, write_text
from sftdist.data.comparison import data_changes
from sftdist.data.manifest import open_source
from sftdist.data.template import ChatTemplate
from sftdist.evals.features import features_of
from sftdist.evals.live import Forms, answer_counts, write_forms
from sftdist.evals.profile import LEAST_PROMPTS, PROFILE, profile_of
from sftdist.evals.report import REPORT, ROWS, EvalReport
from sftdist.evals.request import SuiteSpec
from sftdist.evals.user_turns import prompts_of
from sftdist.evals.waiting import unbroken_on_main
from sftdist.evaluate import HOLDOUT, EvaluateResult, Say, gate_issues, judged, rules_of, silent, spec_of, sweep_issues
from sftdist.fresh_answer import answer_of
from sftdist.release import registry
from sftdist.release.card import Card
from sftdist.release.changelog import CHANGELOG, REPORT_FOLDER, Contents, changes, entry, extended
from sftdist.release.gate import Decision
from sftdist.release.hub import CARD, push, require_card
from sftdist.release.registry import Draft, Entries
from sftdist.release.rule import Against
from sftdist.release.soundness import Training, faults
from sftdist.training.offline import OUTLINE

T = TypeVar("T")


@dataclass(frozen=True)
class PublishResult:
    """The release, and what was decided."""

    release: Release
    decision: Decision


def main() -> int:
    """The command line. Under torchrun this process is a rank; alone it answers on one device."""
    return config.main(
        PublishConfig, command, "publish", checks=[gate_issues, publish_issues], sweep_checks=[sweep_issues]
    )


def command(cfg: PublishConfig) -> int:
    run(cfg)
    return agent.DONE


def publish_issues(cfg: PublishConfig) -> list[str]:
    """What publish needs beside what evaluate does, and what it does not let anybody choose. Raises ConfigError where
    `run.dir` is no run: what else is missing then does not matter."""
    changed = snapshot.differences(snapshot.read_config(snapshot.require_run(cfg.run.dir)), cfg)
    return release_issues(cfg) + [
        f"{key}: the run has {before!r}, given {now!r}; a release is judged on what its run was given"
        for key, (before, now) in changed.items()
        if not key.startswith("export.")
    ]


def release_issues(cfg: PublishConfig) -> list[str]:
    """What is wrong with a release that is asked for, whatever its run."""
    issues = []
    try:
        check_name(cfg.name or "")
    except ConfigError as problem:
        issues.append(str(problem))
    if cfg.split != HOLDOUT:
        issues.append(f"split: given {cfg.split}, but a release is decided on the holdout; leave split out")
    if cfg.base is not None:
        issues.append(f"base: given {cfg.base}, but a release is compared with the base of its run; leave base out")
    if not cfg.gate.rules:
        issues.append("gate.rules: given none, required at least one; choose a gate (gate=chat) or write rules")
    if cfg.hub is not None and cfg.hub_rows and not cfg.hub_private:
        issues.append(
            "hub_rows: given true with hub_private=false, but everybody would see the holdout's prompts and the "
            "answers; give hub_rows=false, too"
        )
    return [*issues, *absent_sources(cfg)]


def absent_sources(cfg: PublishConfig) -> list[str]:
    """Rules that would be refused after all the work, because there is no such source in the data."""
    sources = [HOLDOUT] if cfg.data.holdout is not None else list(cfg.data.sources)
    known = tuple(f"{name}." for name in (*sources, *BROUGHT_ALONG))
    absent = [rule.text for rule in rules_of(cfg) if not rule.optional and not rule.metric.startswith(("*", *known))]
    if not absent:
        return []
    return [
        f"gate.rules: given {', '.join(absent)}, but the sources of the data are {', '.join(sources)}; "
        "choose a gate that names no source, such as gate=chat, or write gate.rules for yours"
    ]


def run(cfg: PublishConfig) -> PublishResult:
    """Look at the files, ask the holdout's prompts, hold the gate's rules against the answers, and release.

    Raises GateError where any of them speaks against it, DataError as evaluate does, HubError where the release could
    not be pushed (it is in the registry then).
    """
    if issues := publish_issues(cfg):
        raise ConfigError(issues)
    logging.disable_progress_bar()
    with session() as world:
        try:
            return published(cfg, world, partial(print, flush=True) if world.is_main else silent)
        except GateError as refusal:  # on every rank; it leaves the session as one that has come to its end
            refused, is_main = refusal, world.is_main
    refused.reported = not is_main  # said once
    raise refused


def published(cfg: PublishConfig, world: World, say: Say) -> PublishResult:
    """Every rank asks and scores, rank 0 does the rest. Collective."""
    spec = spec_of(cfg, world)
    on_main(world, "looking at the files", lambda: require_sound(cfg, spec, say))
    world.progress.note("evaluating")
    last = latest(Path(cfg.registry), str(cfg.name))
    told = None if last is None else on_main(world, "reading the last release", partial(told_of, last))
    result = judged(cfg, spec, world, say, last=told, preview=False)
    decision = result.decision
    assert decision is not None, "publish_issues asks for rules"
    return on_main(
        world,
        "releasing",
        lambda: PublishResult(Publisher(cfg, spec, result, decision, last, say).release(), decision),
    )


def told_of(last: Release) -> EvalReport:
    """The report of the last release, as it was published. Raises GateError where it is not."""
    registry.require_unchanged(last, [f"{REPORT_FOLDER}/{REPORT}"])
    return EvalReport.read(last.path / REPORT_FOLDER / REPORT)


def on_main(world: World, what: str, work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; a GateError there is one everywhere."""

    def made_or_refused() -> tuple[T | None, str | None]:
        try:
            return work(), None
        except GateError as error:
            return None, str(error)

    made, refusal = world.broadcast_object(unbroken_on_main(world, what, made_or_refused))
    if refusal is not None:
        raise GateError(refusal)
    return cast(T, made)


def require_sound(cfg: PublishConfig, spec: SuiteSpec, say: Say) -> None:
    """Raises GateError, and writes the decision, where the files alone speak against a release."""
    run_dir = Path(str(cfg.run.dir))
    found = faults(spec.candidate, Training(run_dir / OUTLINE, spec.base))
    if not spec.candidate.resolve().is_relative_to(run_dir.resolve()):
        found.append(f"candidate: given {spec.candidate}, required an export of the run, which lies in {run_dir}")
    if found:
        refusal = Decision(False, found, [], model="", base=None, last=None, split=spec.split, report="")
        raise GateError(_refused(refusal, run_dir, spec.candidate))
    say(f"{spec.candidate}: every file is as it was exported, and its weights are finite and not those of the base")
    if not spec.data["holdout"].get("locked"):
        say("the holdout is locked by no file: another preparation may choose other rows (data.holdout_lock)")


def _refused(decision: Decision, run_dir: Path, candidate: Path) -> str:
    written = decision.write(run_dir / "report")
    return "\n".join([f"{candidate} is not released:", *decision.lines()[1:], f"the decision: {written}"])


@dataclass(frozen=True)
class Publisher:
    """Everything that a release is made of; `last`: what was in use when the gate decided."""

    cfg: PublishConfig
    spec: SuiteSpec
    result: EvaluateResult
    decision: Decision
    last: Release | None
    say: Say

    def release(self) -> Release:
        """The version in the registry, and on the Hub where that is asked for. Raises GateError where the gate has not
        passed."""
        run_dir, folder = Path(str(self.cfg.run.dir)), Path(self.cfg.registry)
        if not self.decision.passed:
            raise GateError(_refused(self.decision, run_dir, self.spec.candidate))
        self.decision.write(run_dir / "report")
        name, model = str(self.cfg.name), self.result.report.tuned.sha256
        made = registry.finished(folder, name, model)
        if made is not None:
            self.say(f"this very model is released already: {made}, in {made.path}")
        else:
            with disk_explained(folder, "the answers are kept, so it takes seconds"):
                made = registry.release(folder, name, self.fill, self.describe, say=self.say)
            self.say(f"released {made}: {made.path}")
        if self.cfg.hub is not None:
            push(
                made.path,
                self.cfg.hub,
                f"v{made.version}",
                private=self.cfg.hub_private,
                rows=self.cfg.hub_rows,
                say=self.say,
            )
        return made

    def fill(self, folder: Path) -> Entries:
        """The model as it was judged, byte by byte, proven by asking it; the evaluation; what the run was made of."""
        entries = copied(self.spec.candidate, folder)
        judged_files = self.result.report.tuned.files
        if wrong := [name for name, sha in judged_files.items() if entries.get(name, {}).get("sha256") != sha]:
            raise GateError(
                f"{self.spec.candidate}: {', '.join(wrong[:5])} changed since the model was judged; publish it again"
            )
        try:
            answer_of(folder)
        except CheckpointError as problem:
            raise GateError(str(problem)) from problem
        run_dir = Path(str(self.cfg.run.dir))
        (folder / REPORT_FOLDER).mkdir()
        for name in (REPORT, self.result.page.name, ROWS):
            shutil.copyfile(self.result.page.with_name(name), folder / REPORT_FOLDER / name)
        if EvalReport.read(folder / REPORT_FOLDER / REPORT).sha256 != self.decision.report:
            raise GateError(f"{self.result.page.parent}: given another report than the gate's; publish the model again")
        for name in (snapshot.FILE, DATA):
            shutil.copyfile(run_dir / name, folder / name)
        config.write_config(folder / REPORT_FOLDER, self.cfg)  # with the probes and the gate of this decision
        self.decision.write(folder)
        self._write_profile(folder)
        return entries

    def describe(self, draft: Draft) -> dict[str, Any]:
        """Card and changelog, which name the version and compare it with the one in use."""
        if draft.last != self.last and any(rule.against is Against.last for rule in rules_of(self.cfg)):
            raise GateError(
                f"{draft.last} was released meanwhile, but the gate compared with {self.last or 'no release'}; publish "
                "again: the answers are kept"
            )
        facts = self._facts(draft.last)
        card = Card(
            name=draft.name,
            version=draft.version,
            created=registry.now(),
            report=self.result.report,
            decision=self.decision,
            run=self._run(),
            ledger=self._ledger(),
            base_is_folder=self.spec.base is not None,
        )
        text = card.text()
        require_card(text)
        write_text(draft.folder / CARD, text)
        write_text(draft.folder / CHANGELOG, self._changelog(draft, facts, card.created))
        return facts

    def _changelog(self, draft: Draft, facts: Mapping[str, Any], created: str) -> str:
        last = draft.last
        if last is None:
            return extended(None, entry(draft.version, created, None, None))
        stores = [Path(snapshot.read_config(folder).data.store_dir) for folder in (draft.folder, last.path)]
        data = data_changes(last.path / DATA, draft.folder / DATA, stores)
        mixture = {source["name"]: source for source in facts["mixture"]}
        now = Contents(draft.folder, self.result.report, {}, mixture, facts["run"]["steps"])
        found = entry(draft.version, created, last.version, changes(Contents.of(last.path), now, data))
        before = last.path / CHANGELOG
        return extended(before.read_text(encoding="utf-8") if before.is_file() else None, found)

    def _run(self) -> RunFacts:
        """The run up to the step of this model."""
        return run_facts(Path(str(self.cfg.run.dir)), step_of(self.spec.candidate))

    def _facts(self, last: Release | None) -> dict[str, Any]:
        """What `release.json` says beside its files; `last`: what is in use."""
        report, found = self.result.report, self._run()
        return {
            "model_sha256": report.tuned.sha256,
            "base_sha256": None if report.base is None else report.base.sha256,
            "previous": None if last is None else last.version,
            "parent": self._ledger().get("parent"),
            "run": {"name": found.name, "config_sha256": self._ledger().get("config"), "steps": found.steps},
            "mixture": [asdict(source) for source in found.mixture],
            "gate": {
                "passed": sum(verdict.outcome == "passed" for verdict in self.decision.verdicts),
                "skipped": sum(verdict.outcome == "skipped" for verdict in self.decision.verdicts),
            },
            "split": report.split,
            "looks": report.data.get("looks"),
            "holdout_locked": bool(report.data["holdout"].get("locked")),
        }

    def _ledger(self) -> Mapping[str, Any]:
        """The last line of the run in the ledger beside its directory."""
        run_dir = Path(str(self.cfg.run.dir))
        lines = [line for line in ledger.read(run_dir.parent / ledger.FILE) if line.get("run") == self.cfg.run.name]
        return lines[-1] if lines else {}

    def _write_profile(self, folder: Path) -> None:
        """What prompts and answers of this release look like, and the forms of its answers, for `sftdist monitor`."""
        sources = self.cfg.data.sources
        contracts = {name: Path(one.contract) for name, one in sources.items() if one.contract is not None}
        write_forms(folder, contracts, {name: Path(file) for name, file in self.cfg.evals.schemas.items()})
        manifest, store_dir = read_json(folder / DATA), Path(self.cfg.data.store_dir)
        stores = [open_source(one, [store_dir]) for one in manifest["sources"].values()]
        prompts = prompts_of(stores, ChatTemplate.load(str(folder), arguments=self.cfg.model.template_args))
        if len(prompts) < LEAST_PROMPTS:
            self.say(f"no {PROFILE}: {len(prompts)} user turns are too few to say what prompts look like")
            return
        profile = profile_of(prompts)
        written = read_jsonl(folder / REPORT_FOLDER / ROWS)
        rows = [row for row in written if row["source"] in manifest["sources"] and row["variant"] is None]
        asked = features_of([_question(row) for row in rows])
        counts = answer_counts(profile.model, asked, [row["tuned"] for row in rows], Forms.read(folder))
        replace(profile, answers=counts.to_json()).write(folder / PROFILE)


def _question(row: Mapping[str, Any]) -> str:
    """The last thing that the user says in a prompt of rows.jsonl."""
    return next((str(one["content"]) for one in reversed(row["prompt"]) if one["role"] == "user"), "")


def copied(source: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Copy the files of an export, each as its manifest says; their entries. Raises GateError for one that is not."""
    entries = {}
    for name, listed in read_manifest(source).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)
        entries[name] = {"bytes": target.stat().st_size, "sha256": sha256_file(target)}
        if entries[name] != listed:
            raise GateError(f"{source / name}: its copy is not what {MANIFEST} says; export the model again")
    return entries


if __name__ == "__main__":
    sys.exit(main())
