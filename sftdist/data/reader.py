"""A user's reader by import path, `package.module:function`: a file of any format -> its rows, one mapping each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sftdist.core.errors import DataError
from sftdist.core.extension import load_function, raised, require_call, source_of
from sftdist.data.rowerror import show

READER = "reader"  # the key of a source


def read_with(path: str, file: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, one after another. DataError where the reader raises or gives what is no row."""
    reader = require_call(load_function(path, READER), path, READER, "a function (file: Path) -> rows", file)
    number = 0
    try:
        rows = reader(file)
        if not isinstance(rows, Iterable):
            raise _fault(path, file, f"gave {type(rows).__name__}, required rows: a list, or a function with yield")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                raise _fault(path, file, f"gave {show(row)} as row {number}, required a mapping such as a dict")
            yield row
    except DataError:
        raise
    except Exception as problem:  # whatever the user's reader raises
        raise _fault(path, file, f"raised {raised(problem)} after {number} rows, required all rows") from problem


def reader_source(path: str) -> dict[str, str]:
    """Its name, and the hash of its module and of what that uses of its own folder."""
    return source_of(path, READER)


def _fault(path: str, file: Path, said: str) -> DataError:
    return DataError(f"{file}: {READER}: {path} {said}")
