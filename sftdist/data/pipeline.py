"""The whole of prepare: sources in, one verified token store per source and a data report out.

A store is found by its content key, the hash of everything that changes its bytes and of nothing else. One process at
a time works on a store, in a folder of shards that outlives it: whoever comes after a killed one goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftdist.core.errors import ConfigError, DataAbsentError, DataError
from sftdist.core.lock import alone
from sftdist.core.settings import Leaks, NearDuplicates, OnFinding
from sftdist.core.storage import (
    publish_directory,
    read_json,
    remove_abandoned,
    remove_path,
    sha256_file,
    sha256_json,
    verify_directory,
)
from sftdist.data.build import SAY_EVERY_SECONDS, at_most_every, build_store
from sftdist.data.clean import CLEAN_VERSION, Rules, normalise
from sftdist.data.contamination import CONTAMINATION_VERSION, Contamination
from sftdist.data.contract import Contract
from sftdist.data.duplicates import DECIDE_VERSION, decide
from sftdist.data.encode import Job, encode_chunk
from sftdist.data.findings import BREACH, CUT_OFF, Checks
from sftdist.data.holdout import Data, settle
from sftdist.data.keys import prompt_key
from sftdist.data.manifest import Provenance, data_manifest, rows_of
from sftdist.data.mask import MaskOptions
from sftdist.data.near import NEAR_VERSION, Near
from sftdist.data.problems import Ban, Problems
from sftdist.data.refusals import (
    CONTRADICTION,
    UnfitError,
    Watched,
    gather,
    limits_of,
    too_few,
    unsound,
    with_coverage,
)
from sftdist.data.report import Preparation, data_report
from sftdist.data.schema import Conversation
from sftdist.data.shards import Piece, works
from sftdist.data.sources import (
    Part,
    Source,
    chunks,
    conversations,
    fingerprint,
    not_at_rest,
    parse_chunk,
    parts_of,
    places,
    read_chunk,
)
from sftdist.data.split import SPLIT_VERSION, split_of
from sftdist.data.store import HOLDOUT, STORE_FORMAT, TRAIN, VALIDATION, TokenStore
from sftdist.data.template import ChatTemplate
from sftdist.data.versions import SCHEMA_VERSION
from sftdist.data.vocabulary import VOCABULARY_VERSION, texts_of, train_tokenizer
from sftdist.data.workers import Workers

BAD_ROWS = "bad_rows.jsonl"
LOCK = "lock"
FEW_CHUNKS = 4  # an input of fewer chunks than this is done before a shard is written or a process started
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
class Prepared:
    """Open stores by source, those of the user's own validation and holdout files, the template, the report, and the
    data manifest (`data.manifest`)."""

    stores: dict[str, TokenStore]
    held_out: dict[str, TokenStore]
    template: ChatTemplate
    report: dict[str, Any]
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Survey:
    """What prepare would have to do: the sources without a store, and how many rows they have."""

    missing: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Task:
    """One store to have: the job that makes it, its content key, and the sources whose prompts it must not hold."""

    job: Job
    ingredients: dict[str, Any]
    path: Path
    forbidden: tuple[SourceRequest, ...]

    @property
    def name(self) -> str:
        return self.job.source.name

    @property
    def work(self) -> Path:
        """The folder of the shards that the store is made of, there only until it is."""
        return self.path.with_name(f".{self.path.name}.work")


def prepare(
    request: PrepareRequest, say: Callable[[str], None] = lambda line: None, tick: Callable[[str], None] | None = None
) -> Prepared:
    """Make or find every store, check them, and report. `tick` is told again and again how far it is; by default `say`
    is, now and then.

    `DataError` with all problems of all sources at once; its last line is the overrides that would go on.
    """
    roles = _roles(request)
    parts = _all_parts(roles)
    template = _template(request, parts, say)
    tasks = _tasks(request, roles, parts, template)
    tick = tick or at_most_every(SAY_EVERY_SECONDS, say)
    workers = Workers([task.job for task in tasks], request.workers)
    try:
        done = [_have_store(request, task, number, workers, say, tick) for number, task in enumerate(tasks)]
    finally:
        workers.close()
    done = [replace(found, store=with_coverage(found.store)) for found in done]
    stores = [found.store for found in done]
    watched = [
        _watched(request, entry, task, store) for (entry, _), task, store in zip(roles, tasks, stores, strict=True)
    ]
    problems = gather(request.store_dir / BAD_ROWS, watched)
    wrong = [*_unfit(request, stores), *_refusals(request, watched, problems)]
    holdout = _settle_holdout(request, stores, say) if not wrong else {}
    report = {**data_report(done, problems, template), "holdout": holdout, "required": _required(request)}
    if wrong:
        raise UnfitError("\n".join(wrong), report)
    by_name = {store.name: store for store in stores}
    provenance = {entry.source.name: Provenance(entry.licence, entry.origin) for entry, _ in roles}
    train = {entry.source.name for entry in request.sources}
    return Prepared(
        stores={name: store for name, store in by_name.items() if name in train},
        held_out={name: store for name, store in by_name.items() if name not in train},
        template=template,
        report=report,
        manifest=data_manifest(stores, provenance, holdout),
    )


def _settle_holdout(
    request: PrepareRequest, stores: Sequence[TokenStore], say: Callable[[str], None]
) -> dict[str, Any]:
    """Hold what is held out to its lock where one is named; what the report and the manifest say of it."""
    by: dict[str, Any] = {"data.holdout": "a file"}
    if request.holdout is None:
        by = {"data.holdout_fraction": request.holdout_fraction}
    rules = [name for name, on in asdict(request.rules).items() if on]
    made_with = {"split_version": SPLIT_VERSION, **by, "data.normalise": ", ".join(rules)}
    data = Data([rows_of(store) for store in stores], made_with)
    lock = None if request.holdout_lock is None else settle(request.holdout_lock, request.lock, data, say)
    return {"rows": data.count(), "locked": lock is not None, "version": None if lock is None else lock.version}


def survey(request: PrepareRequest, at_most: int) -> Survey:
    """Which stores are missing and how many raw rows they would take (counted up to `at_most`); tokenises nothing."""
    roles = _roles(request)
    parts = _all_parts(roles)
    trained = None if request.vocabulary is None else _vocabulary_path(request, parts)
    if trained is not None and not trained.is_dir():
        missing = [entry.source.name for entry, _ in roles]
    else:
        tasks = _tasks(request, roles, parts, _template(request, parts, lambda line: None))
        missing = [task.name for task in tasks if not task.path.is_dir()]
    rows = 0
    for chunk in chain.from_iterable(chunks(parts[name]) for name in missing):
        rows += len(chunk.rows)
        if rows >= at_most:
            break
    return Survey(tuple(missing), min(rows, at_most))


# --- what is asked for --------------------------------------------------------------------------------


def _roles(request: PrepareRequest) -> list[tuple[SourceRequest, int | None]]:
    """Every source with the split that all its rows belong to, or None where the hash decides."""
    roles: list[tuple[SourceRequest, int | None]] = [(entry, None) for entry in request.sources]
    roles += [(request.validation, VALIDATION)] if request.validation else []
    roles += [(request.holdout, HOLDOUT)] if request.holdout else []
    names = [entry.source.name for entry, _ in roles]
    if len(set(names)) != len(names):
        raise ConfigError(f"data.sources: given the names {', '.join(names)}, required each name once")
    return roles


def _all_parts(roles: Sequence[tuple[SourceRequest, int | None]]) -> dict[str, list[Part]]:
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
    return _template(request, _all_parts(_roles(request)), say)


def _template(request: PrepareRequest, parts: dict[str, list[Part]], say: Callable[[str], None]) -> ChatTemplate:
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


def _tasks(
    request: PrepareRequest,
    roles: Sequence[tuple[SourceRequest, int | None]],
    parts: dict[str, list[Part]],
    template: ChatTemplate,
) -> list[Task]:
    evaluation = _evaluation_files(request)
    prints = {name: fingerprint(entry.source, parts[name]) for entry, _ in roles for name in [entry.source.name]}
    contamination = Contamination.load(evaluation, request.near) if evaluation and request.near is not None else None
    fixed = {VALIDATION: request.validation, HOLDOUT: request.holdout}
    tasks = []
    for entry, split in roles:
        # A prompt of the user's holdout is kept out of validation and training, one of validation out of training.
        later = (VALIDATION, HOLDOUT) if split is None else (HOLDOUT,) if split == VALIDATION else ()
        forbidden = tuple(other for role in later if (other := fixed[role]) is not None)
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
            "near": None if request.near is None else {"version": NEAR_VERSION, **asdict(request.near)},
            **job.checks.ingredients(),
            "decontaminate": [CONTAMINATION_VERSION, *map(sha256_file, evaluation)] if contamination else None,
            "split": {"split": split, "validation": job.validation, "holdout": job.holdout},
            "mask": {k: str(v) for k, v in vars(entry.mask).items()},
            "held_out": [prints[other.source.name] for other in forbidden],
        }
        key = sha256_json(ingredients)[:KEY_DIGITS]
        tasks.append(Task(job, ingredients, request.store_dir / f"{entry.source.name}-{key}", forbidden))
    return tasks


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


# --- having a store -----------------------------------------------------------------------------------


def _have_store(
    request: PrepareRequest,
    task: Task,
    number: int,
    workers: Workers,
    say: Callable[[str], None],
    tick: Callable[[str], None],
) -> Preparation:
    if _is_whole(task, say=None):
        remove_abandoned(task.path)  # as large as a store, and nobody will write this one again
        return Preparation(TokenStore.open(task.path), reused=True, changed=[])
    changed = changed_ingredients(task.path, task.name, task.ingredients)
    if changed:
        say(f"{task.name}: tokenised again, for these have changed: {', '.join(changed)}")
    with alone(task.work / LOCK, lambda who: say(f"{task.name}: waiting for {who}, which prepares the same store")):
        try:
            if made := not _is_whole(task, say):
                _make_store(request, task, number, workers, tick)
        except OSError:
            # Without locks others work on the same store, and have published it and tidied up before we were through.
            if not _is_whole(task, say=None):
                raise
            made = False
        _remove_work(task)
    return Preparation(TokenStore.open(task.path), reused=not made, changed=changed)


def _is_whole(task: Task, say: Callable[[str], None] | None) -> bool:
    """Whether the store is there; a damaged one is taken away where it may be said, else left as it is."""
    if not task.path.is_dir():
        return False
    damaged = verify_directory(task.path)
    if damaged and say is not None:
        say(f"{task.name}: the store is damaged and is written again ({damaged[0]})")
        with suppress(FileNotFoundError):  # another process has found it, too
            remove_path(task.path)
    return not damaged


def _make_store(
    request: PrepareRequest, task: Task, number: int, workers: Workers, tick: Callable[[str], None]
) -> None:
    stats = _input_stats(task.job.parts)

    def verify() -> None:
        if _input_stats(task.job.parts) != stats:
            _remove_work(task)
            raise not_at_rest(task.job.parts)

    build_store(
        task.path,
        task.job,
        _pieces(task, number, workers),
        decide=partial(
            decide,
            deduplicate=request.deduplicate,
            near=request.near,
            near_duplicates=request.near_duplicates,
            contradictions=request.contradictions,
        ),
        ingredients=task.ingredients,
        work=task.work,
        tick=tick,
        verify=verify,
    )


def _pieces(task: Task, number: int, workers: Workers) -> Iterator[Piece]:
    """The encoded input, shard by shard: of a large one in files that outlive this process."""
    found = places(task.job.parts)
    first = list(islice(found, FEW_CHUNKS))
    if len(first) < FEW_CHUNKS:
        return (encode_chunk(task.job, read_chunk(place, task.job.parts)) for place in first)
    for torn in task.work.glob("*.tmp"):
        torn.unlink(missing_ok=True)
    return workers.make(works(number, chain(first, found), task.work))


def _remove_work(task: Task) -> None:
    with suppress(FileNotFoundError):
        remove_path(task.work)
    remove_abandoned(task.work)


def changed_ingredients(path: Path, name: str, ingredients: dict[str, Any]) -> list[str]:
    """How the newest other store of the same source differs from the one that is wanted."""
    folders = [f for f in path.parent.glob(f"{name}-*") if f != path and (f / "store.json").is_file()]
    manifests = [read_json(folder / "store.json") for folder in sorted(folders, key=lambda f: -f.stat().st_mtime_ns)]
    newest = next((m for m in manifests if m.get("name") == name), None)
    if newest is None:
        return []
    before = newest["ingredients"]
    return [key for key in {**before, **ingredients} if before.get(key) != ingredients.get(key)]


def _prompts(source: Source) -> Iterator[bytes]:
    return (prompt_key(normalise(row, Rules())[0]) for row in conversations(source) if isinstance(row, Conversation))


def _input_stats(parts: Iterable[Part]) -> list[tuple[int, int]]:
    stats = [part.file.stat() for part in parts if part.file is not None]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


# --- the trained vocabulary ---------------------------------------------------------------------------


def _vocabulary_path(request: PrepareRequest, parts: dict[str, list[Part]]) -> Path:
    prints = [fingerprint(entry.source, parts[entry.source.name]) for entry in request.sources]
    fractions = [request.validation_fraction, request.holdout_fraction]
    key = sha256_json([VOCABULARY_VERSION, request.vocabulary, prints, fractions])[:KEY_DIGITS]
    return request.store_dir / f"tokenizer-{key}"


def _trained_vocabulary(request: PrepareRequest, parts: dict[str, list[Part]], say: Callable[[str], None]) -> Path:
    path = _vocabulary_path(request, parts)
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


# --- what is wrong ------------------------------------------------------------------------------------


def _watched(request: PrepareRequest, entry: SourceRequest, task: Task, store: TokenStore) -> Watched:
    name = entry.source.name
    bans = [
        (BREACH, entry.on_breach, Ban(f"{name}: {BREACH}", "against the contract", f"data.sources.{name}.on_breach")),
        (CUT_OFF, request.cut_off, Ban(CUT_OFF, "with an answer that is cut off or empty", "data.cut_off")),
        (
            CONTRADICTION,
            request.contradictions,
            Ban(CONTRADICTION, "with another answer to the same prompt", "data.contradictions"),
        ),
    ]
    shown = {part.name: part.shown for part in task.job.parts}
    return Watched(store, shown, {kind: ban for kind, policy, ban in bans if policy is OnFinding.error})


def _refusals(request: PrepareRequest, watched: Sequence[Watched], problems: Problems) -> list[str]:
    limits = limits_of(watched, max_bad_rows=request.max_bad_rows, max_refused=request.max_refused)
    refusal = problems.refusal(limits, request.store_dir / BAD_ROWS)
    return [] if refusal is None else [refusal]


def _unfit(request: PrepareRequest, stores: Sequence[TokenStore]) -> list[str]:
    """What is wrong with stores as wholes, and what there is too little of in all of them together."""
    found = [problem for store in stores if (problem := unsound(store)) is not None]
    required = _required(request)
    return [*found, *too_few([store.manifest["coverage"] for store in stores], required)]


def _required(request: PrepareRequest) -> dict[str, dict[str, int]]:
    return {"tags": dict(request.require_tags), "origins": dict(request.require_origins)}
