"""A user's row function by import path, `package.module:function`: row -> row | None | list of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from sftdist.core.extension import load_function, require_call, source_of

ROW_FUNCTION = "row_function"  # the key of a source


@lru_cache
def load_row_function(path: str) -> Callable[[Any], Any]:
    """The row function behind an import path."""
    function = load_function(path, ROW_FUNCTION)
    return require_call(function, path, ROW_FUNCTION, "a function (row) -> row, None or a list of rows", {})


def row_function_source(path: str) -> dict[str, str]:
    """Its name, and the hash of its module and of what that uses of its own folder."""
    load_row_function(path)
    return source_of(path, ROW_FUNCTION)
