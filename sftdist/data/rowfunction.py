"""A user's row function by import path: `package.module:function`, row -> row | None | list of rows."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from sftdist.core.errors import ConfigError


@lru_cache
def load_row_function(path: str) -> Callable[[Any], Any]:
    """The function behind an import path; modules in the working directory are found too."""
    module, name = _module(path)
    function = vars(module).get(name)
    if not callable(function):
        raise ConfigError(f"row_function: given {path}, required a function of {module.__name__}; it has no {name}()")
    return function


def row_function_source(path: str) -> dict[str, str]:
    """The name, and the hash of the whole module: what the function calls may have changed as well."""
    load_row_function(path)
    module, _ = _module(path)
    source = Path(module.__file__ or "").read_bytes()
    return {"name": path, "sha256": hashlib.sha256(source).hexdigest()}


def _module(path: str) -> tuple[ModuleType, str]:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"row_function: given {path}, required package.module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module), name
    except ImportError as problem:
        raise ConfigError(f"row_function: given {path}, required a module that imports: {problem}") from problem
