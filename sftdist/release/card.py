"""The model card: what is known of a release, in figures, and what is not known, in words.

Its header is YAML as the Hugging Face Hub reads it (https://huggingface.co/docs/hub/model-cards-metadata). Nothing is
claimed that was not measured or written down: a licence of the model itself is nowhere in a run, so none is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from sftdist.core.runfacts import RunFacts
from sftdist.evals.report import Estimate, EvalReport, Figures
from sftdist.release.changelog import shown
from sftdist.release.gate import Decision

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONFIDENCE = 0.95
_UNKNOWN = "not stated"


@dataclass(frozen=True)
class Card:
    """Everything that a card is made of. `ledger`: the run's line in the ledger, empty where there is none."""

    name: str
    version: int
    created: str  # UTC, ISO 8601
    report: EvalReport
    decision: Decision
    run: RunFacts
    ledger: Mapping[str, Any] = field(default_factory=dict)
    base_is_folder: bool = False  # `model.path` of the run is a folder, and no name on the Hub

    def text(self) -> str:
        """README.md."""
        header = yaml.safe_dump(self._header(), sort_keys=False, allow_unicode=True, width=1000)
        parts = [f"---\n{header}---\n", f"# {self.name} v{self.version}\n", self._summary()]
        sections = {
            "What it is for": self._purpose(),
            "How to use it": self._use(),
            "What it scores": self._scores(),
            "Why it was released": self._gate(),
            "What it was trained on": self._data(),
            "How it was trained": self._training(),
            "Licences": self._licences(),
            "Where it comes from": self._provenance(),
        }
        parts += [f"## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items()]
        return "\n".join(parts)

    # --- header ---------------------------------------------------------------------------------------

    def _header(self) -> dict[str, Any]:
        base = self._base()
        datasets = sorted({name for name in map(_hub_data, self._sources().values()) if name})
        return {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["sftdist", "sft", "conversational"],
            **({"base_model": base, "base_model_relation": "finetune"} if self._on_hub(base) else {}),
            **({"datasets": datasets} if datasets else {}),
            **self._model_index(),
        }

    def _model_index(self) -> dict[str, Any]:
        """Results in the Hub's own form; each metric with the prompts that it was measured on."""
        by_source: dict[str, list[dict[str, Any]]] = {}
        for name, figures in self._figures.items():
            source, _, metric = name.rpartition(".")
            one = {"type": metric, "value": round(figures.tuned.value, 4), "name": f"{name} ({figures.n} prompts)"}
            by_source.setdefault(source or "all", []).append(one)
        results = [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": f"{source} ({self.report.split})", "type": source},
                "metrics": metrics,
            }
            for source, metrics in by_source.items()
        ]
        return {"model-index": [{"name": self.name, "results": results}]} if results else {}

    # --- sections -------------------------------------------------------------------------------------

    def _summary(self) -> str:
        sources = ", ".join(_text(mixed.name) for mixed in self.run.mixture) or "one source"
        rules = [verdict for verdict in self.decision.verdicts if verdict.outcome == "passed"]
        return (
            f"{self._base_words()}, fine-tuned on conversations of {sources}. It was released on {self.created[:10]}, "
            f"after {len(rules)} rule{'s' * (len(rules) != 1)} of a gate passed on prompts of the {self.report.split} "
            "split, which it was not trained on.\n"
        )

    def _purpose(self) -> Iterator[str]:
        yield "It answers prompts like those of the sources it was trained on:"
        yield ""
        shares = {mixed.name: mixed.share for mixed in self.run.mixture}
        yield from _table(
            ["source", "share of what was learned", "conversations", "tags", "answers held to a contract"],
            [
                [
                    name,
                    _percent(shares.get(name)),
                    f"{entry['splits']['train']['rows']:,}",
                    ", ".join(sorted(entry.get("coverage", {}).get("tags", {}))) or "none",
                    "yes" if entry.get("contract") else "no",
                ]
                for name, entry in self._sources().items()
                if entry["splits"]["train"]["rows"]
            ],
        )
        yield ""
        longest = self.run.config["data"]["max_len"]
        yield (
            f"Other uses were not tested. No conversation that it learned from is longer than {longest:,} tokens. What "
            "is not in the table of scores below was not measured: other languages, tasks and lengths, harm that those "
            "prompts do not ask for, and whether what it says is true."
        )
        if worse := list(self._worse()):
            yield ""
            yield f"It is worse than its base, beyond the doubt of the interval, in: {', '.join(worse)}."

    def _use(self) -> list[str]:
        return [
            "```python",
            "from transformers import pipeline",
            "",
            'chat = pipeline("text-generation", model="FOLDER OR NAME OF THIS MODEL")',
            'chat([{"role": "user", "content": "..."}], max_new_tokens=256)',
            "```",
            "",
            "The chat template in this folder is the one of training, and `generation_config.json` holds every token "
            "that ends an answer.",
        ]

    def _scores(self) -> Iterator[str]:
        plain = {key: value for key, value in self.report.decoding.items() if isinstance(value, str | int)}
        decoding = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plain.items() if key != "greedy")
        how = "greedily, " if plain.get("greedy") else ""
        both = "This model and its base" if self.report.base else "This model"
        yield f"{both} answered the same prompts ({how}{_text(decoding)}); 95 % intervals over the prompts."
        yield ""
        rows = [
            [name, f"{one.n:,}", _estimate(one.base), _estimate(one.tuned), _estimate(one.change)]
            for name, one in self._figures.items()
        ]
        yield from _table(["metric", "prompts", "base", "this model", "change"], rows)
        meanings = {name: self.report.metrics[name].meaning for name in self._figures}
        if known := sorted({(name.rpartition(".")[2], text) for name, text in meanings.items() if text}):
            yield ""
            yield from (f"- `{_text(metric)}`: {_text(meaning)}" for metric, meaning in known)

    def _gate(self) -> Iterator[str]:
        yield f"The gate {'passed' if self.decision.passed else 'did not pass'}:"
        yield ""
        rows = [[one.rule, one.metric, str(one.outcome), one.words] for one in self.decision.verdicts]
        yield from _table(["rule", "metric", "verdict", "why"], rows)
        if looks := self.report.data.get("looks"):
            yield ""
            times = "once" if looks == 1 else f"{looks} times"
            yield f"This holdout was looked at {times}, this release included. Each look makes it a little less unseen."

    def _data(self) -> Iterator[str]:
        mixed = {one.name: one for one in self.run.mixture}
        rows = []
        for name, entry in self._sources().items():
            one, splits = mixed.get(name), entry["splits"]
            rows.append(
                [
                    name,
                    entry.get("licence") or _UNKNOWN,
                    entry.get("origin") or _UNKNOWN,
                    *(f"{splits[split]['rows']:,}" for split in ("train", "validation", "holdout")),
                    "" if one is None or one.asked is None else f"{one.asked:g}",
                    _percent(one.share if one else None),
                    "" if one is None or one.passes is None else f"{one.passes:.2f}",
                    _origins(entry.get("coverage", {}).get("origins", {})),
                ]
            )
        columns = ["source", "licence", "origin", "train", "validation", "holdout", "lambda", "share", "passes"]
        yield from _table([*columns, "answers written by"], rows)
        yield ""
        held = self.run.data.get("holdout", {})
        lock = f"locked, version {held['version']}" if held.get("locked") else "not locked by a file"
        yield f"Held out: {held.get('rows', 0):,} conversations, {lock}. All figures of the data: `data-manifest.json`."

    def _training(self) -> Iterator[str]:
        config, hardware = self.run.config, self.ledger.get("hardware", {})
        optimizer, tune = config["optimizer"], config["tune"]
        device = f"{hardware['ranks']} x {hardware['device']}" if hardware else _UNKNOWN
        kind = "QLoRA: over a base in 4 bits, nf4" if tune["method"] == "qlora" else "LoRA"
        lora = f"adapters ({kind}), rank {tune['r']}, alpha {tune['alpha']:g}, merged into the base"
        versions = ", ".join(f"{name} {version}" for name, version in self._versions().items())
        schedule = f"{optimizer['schedule']}, {optimizer['warmup_ratio']:.0%} warm-up"
        facts = {
            "trained": "all weights" if tune["method"] == "full" else lora,
            "optimizer": f"{optimizer['name']}, learning rate {optimizer['lr']:g}, {schedule}",
            "steps": f"{self.run.steps:,}, {self.run.tokens:,} tokens",
            "time in steps": _duration(self.run.seconds),
            "hardware": device,
            "precision": f"{config['precision']}, ZeRO stage {config['zero']['stage']}",
            "seed": str(config["seed"]),
            "versions": versions or _UNKNOWN,
        }
        yield from _table(["", ""], [[key, value] for key, value in facts.items()])
        yield ""
        yield "Every setting: `config.yaml`."

    def _licences(self) -> Iterator[str]:
        stated = {name: entry.get("licence") for name, entry in self._sources().items()}
        yield (
            "This model is made of its base and of the sources above, whose terms hold for it, too. Nobody has stated "
            "a licence for the model itself."
        )
        if missing := sorted(name for name, licence in stated.items() if not licence):
            yield ""
            names = ", ".join(map(_text, missing))
            yield f"No licence is stated for {names}: find it out before the model is passed on."

    def _provenance(self) -> Iterator[str]:
        git, config = self.ledger.get("git", {}), self.ledger.get("config")
        facts = {
            "run": self.run.name,
            "sha256 of the model": self.report.tuned.sha256,
            "sha256 of the base": self.report.base.sha256 if self.report.base else _UNKNOWN,
            **self._start(),
            "sha256 of the configuration": str(config or _UNKNOWN),
            "commit of sftdist": _commit(git),
            "report": "`report/report.json`, and a line per prompt in `report/rows.jsonl`",
            "every file": "`release.json` (sha256)",
        }
        yield from _table(["", ""], [[key, value] for key, value in facts.items()])

    def _start(self) -> dict[str, str]:
        parent = self._parent()
        if "release" in parent:
            return {"started from": f"{parent['release']} (release.json: {parent['release_sha256']})"}
        return {"started from": f"run {parent['run']}, step {parent['step']}"} if "run" in parent else {}

    # --- facts ----------------------------------------------------------------------------------------

    @cached_property
    def _figures(self) -> dict[str, Figures]:
        """Of every metric whose scores are sound, in order of names."""
        return {
            name: scores.figures(_CONFIDENCE)
            for name, scores in sorted(self.report.metrics.items())
            if scores.fault() is None
        }

    def _worse(self) -> Iterator[str]:
        for name, one in self._figures.items():
            higher = self.report.metrics[name].higher_is_better
            if one.change is not None and higher is not None:
                down, up = one.change.low, one.change.high
                if (up < 0) if higher else (down > 0):
                    yield f"`{_text(name)}`"

    def _sources(self) -> Mapping[str, Any]:
        return dict(self.run.data.get("sources", {}))

    def _versions(self) -> Mapping[str, str]:
        return dict(self.ledger.get("versions") or self.report.versions)

    def _base(self) -> str | None:
        return self.run.config["model"]["path"]

    def _parent(self) -> Mapping[str, Any]:
        """The release or run that the base comes from; empty for any other model."""
        return dict(self.ledger.get("parent") or {})

    def _on_hub(self, base: str | None) -> bool:
        return not self.base_is_folder and _HUB_NAME.fullmatch(base or "") is not None

    def _base_words(self) -> str:
        base = self._base()
        if self.run.config["model"]["init"] == "random" or base is None:
            return "A model trained from random weights"
        if self._on_hub(base):
            return f"[{base}](https://huggingface.co/{base})"
        if (release := self._parent().get("release")) is not None:
            return f"The release {_text(release)}"
        return f"The base model `{_text(base)}` (a folder)"


def _hub_data(entry: Mapping[str, Any]) -> str | None:
    """The name of a source's data set on the Hub; None where it came from files."""
    origin = str(entry.get("origin") or "").removeprefix("hub:").removeprefix("https://huggingface.co/datasets/")
    return origin if _HUB_NAME.fullmatch(origin) else None


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(map(_text, row))} |"


def _text(value: str) -> str:
    """One line that is no markup of its own."""
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")


def _estimate(found: Estimate | None) -> str:
    return "" if found is None else shown(found) if math.isfinite(found.value) else "not finite"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _origins(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items()) or _UNKNOWN


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _commit(git: Mapping[str, Any]) -> str:
    if not git.get("commit"):
        return _UNKNOWN
    return f"{git['commit']}{', with changes that were not committed' if git.get('dirty') else ''}"
