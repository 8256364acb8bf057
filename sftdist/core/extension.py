"""What a user brings along as Python, by import path `package.module:name`: found, checked, and known by its source."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import operator
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sftdist.core.errors import ConfigError
from sftdist.core.settings import TrainConfig

# What is trained depends on the source of these: its hash is part of the configuration's, as `code.KEY`.
TRAINED_BY = ("optimizer.name", "optimizer.schedule", "train.loss")
SHOWN = 160  # characters of a signature
FOREIGN = ("site-packages", "dist-packages")  # an environment may lie below the user's own folder


def is_import_path(value: Any) -> bool:
    """Whether a value names something of the user's own: `package.module:name`."""
    return isinstance(value, str) and ":" in value


def load_named(path: str, key: str) -> Any:
    """What stands behind the import path that is given under `key`; modules in the working directory are found too.

    Raises ConfigError where the path is none, the module cannot be imported, or has no such name.
    """
    module, name = _module(path, key)
    if name not in vars(module):
        raise ConfigError(f"{key}: given {path}, required a name that is in {module.__name__}; it has no {name}")
    return vars(module)[name]


def load_function(path: str, key: str) -> Callable[..., Any]:
    """The same, where it has to be a function or a class."""
    found = load_named(path, key)
    if not callable(found):
        raise ConfigError(f"{key}: given {path}, required a function or class; it is {type(found).__name__}")
    return found


def require_call(
    function: Callable[..., Any], path: str, key: str, form: str, *given: Any, **named: Any
) -> Callable[..., Any]:
    """The function, if it can be called with these arguments. `form`: how it is called, in the user's words.

    Raises ConfigError that shows the signature; a function that is written in C has none, and passes.
    """
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return function
    try:
        signature.bind(*given, **named)
    except TypeError as problem:
        own = f"{path.partition(':')[2]}{signature}"
        shown = own if len(own) <= SHOWN else own[:SHOWN] + "..."
        raise ConfigError(f"{key}: given {path}, required {form}; {problem}: it is {shown}") from problem
    return function


def raised(problem: BaseException) -> str:
    """An exception of the user's code in one line: what, and in which line of which file."""
    frames = traceback.extract_tb(problem.__traceback__)[1:]  # the first one is ours
    own = [frame for frame in frames if not set(Path(frame.filename).parts) & set(FOREIGN)] or frames
    text = " ".join(str(problem).split())
    last = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(problem).__name__}: {text}{last}"


def source_of(path: str, key: str) -> dict[str, str]:
    """The name, and the hash of the module and of what it uses of its own folder: what it calls may have changed, too.

    Raises ConfigError as `load_named` does.
    """
    load_named(path, key)
    module, _ = _module(path, key)
    digest = hashlib.sha256()
    for file in _own_files(module):
        digest.update(file.read_bytes())
    return {"name": path, "sha256": digest.hexdigest()}


def note_code(cfg: TrainConfig) -> list[str]:
    """Write into `cfg.code` the hash of each source that training depends on; issues of those that are not there."""
    issues: list[str] = []
    cfg.code = {}
    for key, path in trained_by(cfg).items():
        try:
            cfg.code[key] = source_of(path, key)["sha256"]
        except ConfigError as error:
            issues += error.issues
    return issues


def trained_by(cfg: TrainConfig) -> dict[str, str]:
    """The import paths that decide what is trained, by key."""
    found = {key: operator.attrgetter(key)(cfg) for key in TRAINED_BY}
    return {key: path for key, path in found.items() if is_import_path(path)}


def require_same_code(cfg: TrainConfig) -> None:
    """Raises ConfigError where this process would load another source than the one that the configuration names."""
    for key, path in trained_by(cfg).items():
        if key in cfg.code and source_of(path, key)["sha256"] != cfg.code[key]:
            raise ConfigError(
                f"{key}: given {path}, whose source on {socket.gethostname()} is not that of rank 0; required the same "
                "files on all hosts: start every rank in the same folder of a shared file system"
            )


def _own_files(module: ModuleType) -> list[Path]:
    """The files of a module and of the modules below its folder that it uses, directly or through one another."""
    folder = Path(module.__file__ or "").parent
    found: dict[str, Path] = {}
    pending = [module]
    while pending:
        used = pending.pop()
        file = Path(getattr(used, "__file__", None) or "")
        if used.__name__ in found or not file.is_file() or not _is_own(file, folder):
            continue
        found[used.__name__] = file
        for value in list(vars(used).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            pending += [sys.modules[name]] if isinstance(name, str) and name in sys.modules else []
    return [found[name] for name in sorted(found)]


def _is_own(file: Path, folder: Path) -> bool:
    return file.is_relative_to(folder) and not set(file.relative_to(folder).parts) & set(FOREIGN)


def _module(path: str, key: str) -> tuple[ModuleType, str]:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"{key}: given {path}, required package.module:name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module), name
    except Exception as problem:  # whatever the user's module raises
        said = str(problem) if isinstance(problem, ImportError) else raised(problem)
        raise ConfigError(f"{key}: given {path}, required a module that imports: {said}") from problem
