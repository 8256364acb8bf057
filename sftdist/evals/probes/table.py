"""A contract on markdown tables (https://github.github.com/gfm/#tables-extension-)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sftdist.data.answer_rules import Breach, Check, Fault, unknown
from sftdist.data.rowerror import show

KEYS = ("columns", "min_rows", "max_rows", "only")
_DELIMITER = re.compile(r":?-+:?")
_CELL_END = re.compile(r"(?<!\\)\|")


def table_check(value: Any) -> Check:
    """A check that an answer has a table whose rows all have as many cells as its header; the first one counts.

    `value` is true or an object: `columns`, the names in the header, in order; `min_rows` and `max_rows`, below the
    header; `only`, whether nothing may stand beside the table. Raises `Fault` for anything else.
    """
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        raise Fault(f"given {show(value)}, required true or an object with {', '.join(KEYS)}")
    for key in value:
        if key not in KEYS:
            raise Fault(unknown(str(key), KEYS))
    columns, only = value.get("columns"), value.get("only", False)
    low, high = value.get("min_rows", 0), value.get("max_rows")
    if columns is not None and not (isinstance(columns, list) and columns and all(isinstance(c, str) for c in columns)):
        raise Fault(f"given {show(columns)}, required a list of names", ".columns")
    if not isinstance(only, bool):
        raise Fault(f"given {show(only)}, required true or false", ".only")
    for key, bound in (("min_rows", low), ("max_rows", high)):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
            raise Fault(f"given {show(bound)}, required a whole number of at least 0", f".{key}")

    def check(answer: str) -> Iterator[Breach]:
        header, rows, beside = _first_table(answer)
        if not header:
            yield Breach("table", show(answer), "a markdown table")
            return
        uneven = next((row for row in rows if len(row) != len(header)), None)
        if uneven is not None:
            yield Breach("table", f"a row of {len(uneven)} cells", f"{len(header)}, as in its header")
        if columns is not None and header != [column.strip() for column in columns]:
            yield Breach("table.columns", show(header), show(columns))
        if len(rows) < low or (high is not None and len(rows) > high):
            bounds = f"at least {low}" + ("" if high is None else f" and at most {high}")
            yield Breach("table.rows", str(len(rows)), bounds)
        if only and beside:
            yield Breach("table.only", "text beside the table", "the table and nothing else")

    return check


def _first_table(text: str) -> tuple[list[str], list[list[str]], bool]:
    """Header, rows below, and whether there is any text beside; an empty header where there is no table."""
    lines = text.strip().splitlines()
    for place in range(1, len(lines)):
        header, delimiter = _cells(lines[place - 1]), _cells(lines[place])
        if "|" in lines[place - 1] and len(header) == len(delimiter) and all(map(_DELIMITER.fullmatch, delimiter)):
            end = next((i for i in range(place + 1, len(lines)) if "|" not in lines[i]), len(lines))
            rows = [_cells(line) for line in lines[place + 1 : end]]
            return header, rows, place > 1 or end < len(lines)
    return [], [], True


def _cells(line: str) -> list[str]:
    """The cells of a row, with or without bars around it."""
    line = line.strip().removeprefix("|")
    cells = _CELL_END.split(line)
    return [cell.strip() for cell in (cells[:-1] if len(cells) > 1 and not cells[-1].strip() else cells)]
