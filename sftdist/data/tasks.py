"""What prepare is asked for, and the stores that this takes: each with the key of everything that changes its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftdist.core.errors import ConfigError, DataAbsentError, DataError
from sftdist.core.settings import Leaks, NearDuplicates, OnFinding
from sftdist.core.storage import (
    publish_directory,
    remove_abandoned,
    sha256_file,
    sha256_json,
)
from sftdist.data.clean import CLEAN_VERSION, Rules, normalise
from sftdist.data.contamination import CONTAMINATION_VERSION, Contamination
from sftdist.data.contract import Contract
from sftdist.data.duplicates import DECIDE_VERSION
from sftdist.data.encode import Job
from sftdist.data.findings import Checks
from sftdist.data.keys import prompt_key
from sftdist.data.lint import LINT_VERSION
from sftdist.data.mask import MaskOptions
from sftdist.data.near import NEAR_VERSION, Near
from sftdist.data.new_tokens import with_tokens
from sftdist.data.sources import (
    Part,
    Source,
    chunks,
    fingerprint,
    parse_chunk,
    parts_of,
)
from sftdist.data.split import SPLIT_VERSION, split_of
from sftdist.data.store import HOLDOUT, STORE_FORMAT, TRAIN, VALIDATION
from sftdist.data.template import ChatTemplate
from sftdist.data.versions import SCHEMA_VERSION
from sftdist.data.vocabulary import VOCABULARY_VERSION, texts_of, train_tokenizer

KEY_DIGITS = 16


@dataclass(frozen=True)
class SourceRequest:
    """A source, how its assistant turns are trained, and what its answers must fulfil."""

    source: Source
    mask: MaskOptions = field(default_factory=MaskOptions)
    contract: Path | None = None
    on_breach: OnFinding = OnFinding.error
    licence: str | None = None
    origin: str | None = None


@dataclass(frozen=True)
class PrepareRequest:
    """Everything that prepare needs. `tokenizer`: a folder, a Hub name or an object; without: `vocabulary`."""

    sources: tuple[SourceRequest, ...]
    store_dir: Path
    validation: SourceRequest | None = None
    holdout: SourceRequest | None = None
    tokenizer: str | PreTrainedTokenizerBase | None = None
    revision: str | None = None
    vocabulary: int | None = None
    chat_template: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    add_tokens: tuple[str, ...] = ()
    validation_fraction: float = 0.02
    holdout_fraction: float = 0.02
    rules: Rules = field(default_factory=Rules)
    deduplicate: bool = True
    near: Near | None = None
    near_duplicates: NearDuplicates = NearDuplicates.report
    contradictions: OnFinding = OnFinding.report
    cut_off: OnFinding = OnFinding.report
    decontaminate: tuple[Path, ...] = ()
    leaks: Leaks | None = None
    holdout_lock: Path | None = None
    lock: str | None = None  # write | extend | withdraw: what to do with that file; else the data is held to it
    require_tags: Mapping[str, int] = field(default_factory=dict)
    require_origins: Mapping[str, int] = field(default_factory=dict)
    max_bad_rows: int = 0
    max_refused: int = 0
    workers: int = 1


@dataclass(frozen=True)
class Task:
    """One store to have: the job that makes it, and its content key."""

    job: Job
    ingredients: dict[str, Any]
    path: Path

    @property
    def name(self) -> str:
        return self.job.source.name

    @property
    def work(self) -> Path:
        """The folder of the shards that the store is made of, there only until it is."""
        return self.path.with_name(f".{self.path.name}.work")


def roles_of(request: PrepareRequest) -> list[tuple[SourceRequest, int | None]]:
    """Every source with the split that all its rows belong to, or None where the hash decides."""
    roles: list[tuple[SourceRequest, int | None]] = [(entry, None) for entry in request.sources]
    roles += [(request.validation, VALIDATION)] if request.validation else []
    roles += [(request.holdout, HOLDOUT)] if request.holdout else []
    names = [entry.source.name for entry, _ in roles]
    if len(set(names)) != len(names):
        raise ConfigError(f"data.sources: given the names {', '.join(names)}, required each name once")
    return roles


def parts_by_name(roles: Sequence[tuple[SourceRequest, int | None]]) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    problems: list[str] = []
    for entry, _ in roles:
        try:
            found[entry.source.name] = parts_of(entry.source)
        except DataError as problem:
            problems.append(str(problem))
    if problems:
        raise DataAbsentError("\n".join(problems))
    return found


def template_of(request: PrepareRequest, say: Callable[[str], None] = lambda line: None) -> ChatTemplate:
    """The tokenizer and chat template of a request; a trained vocabulary is made (and kept) where there is none."""
    return template_from(request, parts_by_name(roles_of(request)), say)


def template_from(request: PrepareRequest, parts: dict[str, list[Part]], say: Callable[[str], None]) -> ChatTemplate:
    return with_tokens(_given_template(request, parts, say), request.add_tokens)


def _given_template(request: PrepareRequest, parts: dict[str, list[Part]], say: Callable[[str], None]) -> ChatTemplate:
    arguments = request.template_args
    if request.vocabulary is not None:
        path = _trained_vocabulary(request, parts, say)
        return ChatTemplate.load(str(path), chat_template=request.chat_template or "chatml", arguments=arguments)
    if request.tokenizer is None:
        raise ConfigError("model.path: given nothing, required a tokenizer; set model.path or model.tokenizer")
    if isinstance(request.tokenizer, str):
        return ChatTemplate.load(
            request.tokenizer, revision=request.revision, chat_template=request.chat_template, arguments=arguments
        )
    return ChatTemplate.of(request.tokenizer, request.chat_template, arguments=arguments)


def tasks_of(
    request: PrepareRequest,
    roles: Sequence[tuple[SourceRequest, int | None]],
    parts: dict[str, list[Part]],
    template: ChatTemplate,
) -> list[Task]:
    evaluation = _evaluation_files(request)
    prints = {name: fingerprint(entry.source, parts[name]) for entry, _ in roles for name in [entry.source.name]}
    contamination = Contamination.load(evaluation, request.near) if evaluation and request.near is not None else None
    tasks = []
    for entry, split in roles:
        job = Job(
            source=entry.source,
            parts=tuple(parts[entry.source.name]),
            template=template,
            mask=entry.mask,
            rules=request.rules,
            near=request.near,
            checks=Checks(
                contract=None if entry.contract is None else Contract.load(entry.contract),
                on_breach=entry.on_breach,
                cut_off=request.cut_off,
                contamination=contamination,
            ),
            validation=0.0 if request.validation else request.validation_fraction,
            holdout=0.0 if request.holdout else request.holdout_fraction,
            split=split,
        )
        ingredients = {
            "format": [STORE_FORMAT, SCHEMA_VERSION, SPLIT_VERSION],
            **prints[entry.source.name],
            **template.fingerprint(),
            "clean": {"version": CLEAN_VERSION, **asdict(request.rules)},
            "duplicates": {
                "version": DECIDE_VERSION,
                "exact": request.deduplicate,
                "contradictions": request.contradictions is OnFinding.drop,
                "near": str(request.near_duplicates),
            },
            "lint": LINT_VERSION,
            "near": None if request.near is None else {"version": NEAR_VERSION, **asdict(request.near)},
            **job.checks.ingredients(),
            "decontaminate": _evaluation(evaluation) if contamination else None,
            "split": {"split": split, "validation": job.validation, "holdout": job.holdout},
            "mask": {k: str(v) for k, v in vars(entry.mask).items()},
        }
        key = sha256_json(ingredients)[:KEY_DIGITS]
        tasks.append(Task(job, ingredients, request.store_dir / f"{entry.source.name}-{key}"))
    return tasks


def _evaluation(files: Sequence[Path]) -> list[Any]:
    """What the rows that hold an evaluation prompt depend on; the names of the files stand in what is said of them."""
    return [CONTAMINATION_VERSION, *([file.name, sha256_file(file)] for file in files)]


def _evaluation_files(request: PrepareRequest) -> list[Path]:
    """The files with prompts that are kept out; folders and globs as for a source."""
    if not request.decontaminate:
        return []
    if request.near is None:
        raise ConfigError("data.decontaminate: given files without data.near, by which their prompts are compared")
    key = "data.decontaminate"
    parts = parts_of(Source("evaluation", tuple(map(str, request.decontaminate)), key=key))
    if tables := [part.shown for part in parts if part.file is None]:
        raise ConfigError(f"{key}: given {', '.join(tables)}, required files; download it to a file first")
    return [part.file for part in parts if part.file is not None]


# --- the trained vocabulary ---------------------------------------------------------------------------


def vocabulary_path(request: PrepareRequest, parts: dict[str, list[Part]]) -> Path:
    prints = [fingerprint(entry.source, parts[entry.source.name]) for entry in request.sources]
    fractions = [request.validation_fraction, request.holdout_fraction]
    cleaned = [CLEAN_VERSION, asdict(request.rules)]
    key = sha256_json([VOCABULARY_VERSION, request.vocabulary, prints, fractions, cleaned])[:KEY_DIGITS]
    return request.store_dir / f"tokenizer-{key}"


def _trained_vocabulary(request: PrepareRequest, parts: dict[str, list[Part]], say: Callable[[str], None]) -> Path:
    path = vocabulary_path(request, parts)
    if path.is_dir():
        remove_abandoned(path)
    else:
        say(f"training a tokenizer of {request.vocabulary} entries on the train rows of all sources")
        texts = (text for entry in request.sources for text in _train_texts(request, entry.source, parts))
        tokenizer = train_tokenizer(texts, request.vocabulary or 0)
        with publish_directory(path) as folder:
            tokenizer.save_pretrained(str(folder))
    return path


def _train_texts(request: PrepareRequest, source: Source, parts: dict[str, list[Part]]) -> Iterator[str]:
    """The text of the train split alone: what is held out must not shape the tokenizer."""
    for chunk in chunks(parts[source.name]):
        for row, _ in parse_chunk(chunk, source, parts[source.name][chunk.part]).conversations:
            row, _ = normalise(row, request.rules)
            validation, holdout = request.validation_fraction, request.holdout_fraction
            if split_of(prompt_key(row), validation=validation, holdout=holdout) == TRAIN:
                yield from texts_of(row)
