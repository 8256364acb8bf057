"""`sftdist inspect`: what is trained, token by token, for every row of the sources in file order.

No model is loaded, and nothing is written but the page or the lines that were asked for. A row that cannot be parsed
or whose mask cannot be proven is a line like any other, with the reason in `refused`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from sftdist.commands.inspect_views import print_terminal, write_html
from sftdist.core.config import main as command_line
from sftdist.core.errors import ConfigError
from sftdist.core.settings import DataSettings, InspectConfig, ModelSettings, SourceSettings
from sftdist.data.clean import normalise
from sftdist.data.explain import explain
from sftdist.data.mask import MaskOptions
from sftdist.data.schema import Reject
from sftdist.data.sources import Source, conversations
from sftdist.data.template import ChatTemplate

Planned = tuple[Source, MaskOptions]


@dataclass
class InspectResult:
    """How many lines were shown, and how many of them say why a row is refused."""

    rows: int = 0
    refused: int = 0


def run(cfg: InspectConfig) -> InspectResult:
    """Show the rows; refused ones are no failure. `ConfigError` and `DataError` as `prepare` raises them."""
    views = {"terminal": print_terminal, "html": write_html, "jsonl": write_jsonl}
    if cfg.output not in views:
        raise ConfigError(f"output={cfg.output}: required is one of {'|'.join(views)}; correct it")
    planned = sources_of(cfg.data)
    template = template_of(cfg.model)
    result = InspectResult()
    with _output(cfg.file) as out:
        views[cfg.output](_counted(_lines(planned, template, cfg.limit), result), out)
    return result


def main() -> int:
    """The command line: `sftdist inspect [+exp=NAME] [key=value ...]`."""
    return command_line(InspectConfig, run, "inspect")


def sources_of(data: DataSettings) -> list[Planned]:
    """The train sources of a config, each with its mask options; `data.train` replaces the preset's sources."""
    given = {"train": SourceSettings(path=data.train)} if data.train is not None else data.sources
    if not given:
        raise ConfigError("data.train: given nothing, required a file, glob, list or hub:NAME; set data.train=FILE")
    return [(_source(name, one, data), _options(one, data)) for name, one in given.items()]


def _source(name: str, settings: SourceSettings, data: DataSettings) -> Source:
    paths = [settings.path] if isinstance(settings.path, str) else list(settings.path or ())
    return Source(
        name=name,
        path=tuple(str(path) if data.train is not None else _under(data.dir, str(path)) for path in paths),
        key="data.train" if data.train is not None else f"data.sources.{name}.path",
        shape=settings.shape,
        row_function=settings.row_function,
        hub_split=settings.hub_split,
        hub_config=settings.hub_config,
        hub_revision=settings.hub_revision,
    )


def _under(folder: str | None, path: str) -> str:
    return path if folder is None or path.startswith("hub:") else str(Path(folder) / path)


def _options(settings: SourceSettings, data: DataSettings) -> MaskOptions:
    return MaskOptions(settings.train_on or data.train_on, data.reasoning, data.expand_turns)


def template_of(model: ModelSettings) -> ChatTemplate:
    """The tokenizer and template that the config names; no model is needed, a folder with a tokenizer is enough."""
    path = model.tokenizer or model.path
    if path is None:
        given = "model.path: given nothing" if model.vocabulary is None else "model.vocabulary without a made tokenizer"
        required = "a folder or Hub name with a tokenizer"
        raise ConfigError(f"{given}, required {required}; set model.path=DIR or model.tokenizer=DIR")
    return ChatTemplate.load(path, revision=model.revision, chat_template=model.chat_template)


def _lines(planned: Iterable[Planned], template: ChatTemplate, limit: int | None) -> Iterator[dict[str, Any]]:
    rows = ((row, options) for source, options in planned for row in conversations(source))
    for row, options in islice(rows, limit):
        if isinstance(row, Reject):
            yield {"id": row.id, "text": "", "tokens": [], "supervised_text": [], "refused": str(row)}
        else:
            yield from explain(template, normalise(row), options)


def _counted(rows: Iterable[dict[str, Any]], result: InspectResult) -> Iterator[dict[str, Any]]:
    for row in rows:
        result.rows += 1
        result.refused += row["refused"] is not None
        yield row


def write_jsonl(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    """One JSON object a line."""
    for row in rows:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextmanager
def _output(file: str | None) -> Iterator[TextIO]:
    if file is None:
        yield sys.stdout
        return
    with Path(file).expanduser().open("w", encoding="utf-8", newline="\n") as out:
        yield out
