"""A user's function by import path, `package.module:function`; a row function is row -> row | None | list of rows."""

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

ROW_FUNCTION = "row_function"  # the key of a source


@lru_cache
def load_row_function(path: str) -> Callable[[Any], Any]:
    """The row function behind an import path."""
    return load_function(path, ROW_FUNCTION)


def load_function(path: str, key: str) -> Callable[..., Any]:
    """The function behind an import path that stands under `key`; modules in the working directory are found too."""
    module, name = _module(path, key)
    function = vars(module).get(name)
    if not callable(function):
        raise ConfigError(f"{key}: given {path}, required a function of {module.__name__}; it has no {name}()")
    return function


def row_function_source(path: str) -> dict[str, str]:
    """The name, and the hash of the module and of what it uses of its own folder: what the function calls may have
    changed as well."""
    load_row_function(path)
    module, _ = _module(path, ROW_FUNCTION)
    digest = hashlib.sha256()
    for file in _own_files(module):
        digest.update(file.read_bytes())
    return {"name": path, "sha256": digest.hexdigest()}


def _own_files(module: ModuleType) -> list[Path]:
    """The files of a module and of the modules below its folder that it uses, directly or through one another."""
    folder = Path(module.__file__ or "").parent
    found: dict[str, Path] = {}
    pending = [module]
    while pending:
        used = pending.pop()
        file = Path(getattr(used, "__file__", None) or "")
        if used.__name__ in found or not file.is_file() or not file.is_relative_to(folder):
            continue
        found[used.__name__] = file
        for value in list(vars(used).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            pending += [sys.modules[name]] if name in sys.modules else []
    return [found[name] for name in sorted(found)]


def _module(path: str, key: str) -> tuple[ModuleType, str]:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"{key}: given {path}, required package.module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module), name
    except ImportError as problem:
        raise ConfigError(f"{key}: given {path}, required a module that imports: {problem}") from problem
