"""From the `data` and `model` sections of a config to what prepare is asked for, for every command that needs data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftdist.core.errors import ConfigError, DataAbsentError
from sftdist.core.processes import usable_cores
from sftdist.core.settings import (
    DataSettings,
    Leaks,
    ModelSettings,
    NearDuplicates,
    NormaliseSettings,
    SourceSettings,
)
from sftdist.data.clean import Rules
from sftdist.data.mask import MaskOptions
from sftdist.data.near import Near
from sftdist.data.pipeline import Prepared, PrepareRequest, SourceRequest, prepare, survey
from sftdist.data.schema import SCHEMA_VERSION, is_label_origin
from sftdist.data.sources import Source, in_memory
from sftdist.data.versions import is_known

SMALL_ROWS = 50_000  # what `train` prepares by itself


def request_of(
    data: DataSettings,
    model: ModelSettings,
    *,
    dataset: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    held_out_alone: bool = False,
) -> PrepareRequest:
    """What the (composed) settings ask for; `dataset` and `tokenizer` in memory take the place of theirs.

    `held_out_alone`: files that are held out will do, without a source to train on.
    """
    if dataset is not None:
        sources: tuple[SourceRequest, ...] = (SourceRequest(in_memory(dataset, "train", "dataset"), _mask(data)),)
    else:
        if issues := [issue for name, settings in data.sources.items() for issue in _label_issues(name, settings)]:
            raise ConfigError(issues)
        sources = tuple(source_of(name, settings, data) for name, settings in data.sources.items())
    if not sources and not (held_out_alone and (data.val or data.holdout)):
        raise ConfigError("data.train: given nothing, required a file, folder, glob, list or hub:NAME")
    return PrepareRequest(
        sources=sources,
        store_dir=Path(data.store_dir),
        validation=_held_out("validation", "data.val", data.val, data),
        holdout=_held_out("holdout", "data.holdout", data.holdout, data),
        tokenizer=tokenizer or model.tokenizer or model.path,
        revision=model.revision,
        vocabulary=model.vocabulary if tokenizer is None else None,
        chat_template=model.chat_template,
        template_args=model.template_args,
        add_tokens=tuple(model.add_tokens),
        validation_fraction=data.val_fraction,
        holdout_fraction=data.holdout_fraction,
        rules=_rules(data.normalise),
        deduplicate=data.deduplicate,
        near=_near(data),
        near_duplicates=data.near.duplicates,
        contradictions=data.contradictions,
        cut_off=data.cut_off,
        decontaminate=tuple(Path(path) for path in _paths(data.decontaminate)),
        leaks=data.leaks,
        holdout_lock=None if data.holdout_lock is None else Path(data.holdout_lock).expanduser(),
        require_tags=data.require.tags,
        require_origins=data.require.origins,
        max_bad_rows=data.max_bad_rows,
        max_refused=data.max_refused,
        workers=data.workers or usable_cores(),
    )


def source_of(name: str, settings: SourceSettings, data: DataSettings) -> SourceRequest:
    """One train source as the config describes it; `key` is where the user wrote its path."""
    source = Source(
        name=name,
        path=_paths(settings.path),
        key="data.train" if data.train is not None else f"data.sources.{name}.path",
        shape=settings.shape,
        row_function=settings.row_function,
        reader=settings.reader,
        hub_split=settings.hub_split,
        hub_config=settings.hub_config,
        hub_revision=settings.hub_revision,
        schema_version=settings.schema_version,
        label_origin=settings.label_origin,
    )
    return SourceRequest(
        source=source,
        mask=_mask(data, settings),
        contract=None if settings.contract is None else Path(settings.contract),
        on_breach=settings.on_breach,
        licence=settings.licence,
        origin=settings.origin,
    )


def _label_issues(name: str, settings: SourceSettings) -> Iterator[str]:
    """What a source says about rows that say nothing themselves has to be what a row may say."""
    version, origin = settings.schema_version, settings.label_origin
    if version is not None and not is_known(version):
        yield f"data.sources.{name}.schema_version: given {version}, required 1 to {SCHEMA_VERSION}"
    if origin is not None and not is_label_origin(origin):
        yield f"data.sources.{name}.label_origin: given {origin!r}, required human or synthetic:MODEL"


def prepare_small(request: PrepareRequest, command: str, say: Callable[[str], None]) -> Prepared:
    """Prepare unless that would keep a training job waiting: then `DataError` names the `command` to run first."""
    todo = survey(request, at_most=SMALL_ROWS)
    if todo.rows >= SMALL_ROWS:
        given = f"{', '.join(todo.missing)}: no token store for {todo.rows:,} rows or more"
        raise DataAbsentError(
            f"{given}; at most {SMALL_ROWS:,} are tokenised inside a training job; run first:\n{command}"
        )
    return prepare(request, say)


def _held_out(name: str, key: str, path: Any, data: DataSettings) -> SourceRequest | None:
    if path is None:
        return None
    # How the rows are read is what the only source says; with several sources the shape is detected.
    settings = next(iter(data.sources.values())) if len(data.sources) == 1 else SourceSettings()
    source = Source(
        name,
        _paths(path),
        key=key,
        shape=settings.shape,
        row_function=settings.row_function,
        reader=settings.reader,
        hub_split=settings.hub_split,
        hub_config=settings.hub_config,
        hub_revision=settings.hub_revision,
        schema_version=settings.schema_version,
    )
    return SourceRequest(source, _mask(data, settings))


def _mask(data: DataSettings, settings: SourceSettings | None = None) -> MaskOptions:
    train_on = settings.train_on if settings is not None and settings.train_on is not None else data.train_on
    return MaskOptions(train_on, data.reasoning, data.expand_turns, tuple(data.allow_unrendered))


def _rules(settings: NormaliseSettings) -> Rules:
    return Rules(
        line_ends=settings.line_ends,
        unicode_nfc=settings.unicode_nfc,
        trailing_blanks=settings.trailing_blanks,
        template_trim=settings.template_trim,
    )


def _near(data: DataSettings) -> Near | None:
    """Signatures cost as much time as all the rest: they are made where something asks for them."""
    wanted = data.near.duplicates is not NearDuplicates.off or data.leaks is not Leaks.off or data.decontaminate
    return Near(data.near.threshold, data.near.shingle) if wanted else None


def _paths(path: Any) -> tuple[str, ...]:
    return (path,) if isinstance(path, str) else tuple(str(entry) for entry in path or ())
