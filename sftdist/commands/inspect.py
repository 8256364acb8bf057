"""`sftdist inspect`: what is trained, token by token, for every row of the sources in file order, or in one step.

But for `worst=N` no model is loaded, and nothing is written but the page or the lines that were asked for. A row that
cannot be parsed or whose mask cannot be proven is a line like any other, with the reason in `refused`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from sftdist.assets import quickstart
from sftdist.commands.inspect_page import write_html
from sftdist.commands.inspect_step import documents_of_step
from sftdist.commands.inspect_views import print_terminal
from sftdist.core.config import main as command_line
from sftdist.core.settings import InspectConfig
from sftdist.core.snapshot import require_run
from sftdist.data.clean import Rules, normalise
from sftdist.data.explain import explain
from sftdist.data.request import request_of
from sftdist.data.schema import Reject
from sftdist.data.sources import conversations
from sftdist.data.tasks import SourceRequest, template_of
from sftdist.data.template import ChatTemplate


@dataclass
class InspectResult:
    """How many lines were shown, and how many of them say why a row is refused."""

    rows: int = 0
    refused: int = 0


def run(cfg: InspectConfig) -> InspectResult:
    """Show the rows; refused ones are no failure. `ConfigError` and `DataError` as `prepare` raises them.

    With `step=N` they are the documents of that step (from 1), pack by pack, with `worst=N` the train rows that a
    checkpoint finds hardest; stores are made where there are none.
    """
    quickstart.lay_out(cfg)
    request = request_of(cfg.data, cfg.model)
    say = partial(print, file=sys.stderr)
    if cfg.worst is not None:
        # Found when it is asked for: every other view starts without the libraries that load models.
        lines = import_module("sftdist.commands.inspect_worst").worst_rows(cfg, request, say)
    elif cfg.step is None:
        lines = _lines(request.sources, request.rules, template_of(request, say), cfg.limit)
    else:
        lines = islice(documents_of_step(cfg, request, say), cfg.limit)
    result = InspectResult()
    with _output(cfg.file) as out:
        VIEWS[cfg.output](_counted(lines, result), out)
    return result


def main() -> int:
    """The command line: `sftdist inspect [+exp=NAME] [key=value ...]`."""
    return command_line(InspectConfig, run, "inspect", checks=[run_issues])


def run_issues(cfg: InspectConfig) -> list[str]:
    """Raises ConfigError where a run is named that is none, or `worst` has none: what else is missing then does not
    matter."""
    of_run = cfg.step is not None and cfg.exp == InspectConfig().exp and cfg.run.dir != f"runs/{cfg.run.name}"
    if of_run or cfg.worst is not None:
        require_run(cfg.run.dir)
    return []


def _lines(
    sources: Iterable[SourceRequest], rules: Rules, template: ChatTemplate, limit: int | None
) -> Iterator[dict[str, Any]]:
    rows = ((row, wanted.mask) for wanted in sources for row in conversations(wanted.source))
    for row, options in islice(rows, limit):
        if isinstance(row, Reject):
            yield {"id": row.id, "text": "", "tokens": [], "supervised_text": [], "refused": str(row)}
        else:
            yield from explain(template, normalise(row, rules, template.trimmed_roles)[0], options)


def _counted(rows: Iterable[dict[str, Any]], result: InspectResult) -> Iterator[dict[str, Any]]:
    for row in rows:
        result.rows += 1
        result.refused += row["refused"] is not None
        yield row


def write_jsonl(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    """One JSON object a line."""
    for row in rows:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")


VIEWS = {"terminal": print_terminal, "html": write_html, "jsonl": write_jsonl}


@contextmanager
def _output(file: str | None) -> Iterator[TextIO]:
    if file is None:
        yield sys.stdout
        return
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as out:
        yield out


if __name__ == "__main__":
    sys.exit(main())
