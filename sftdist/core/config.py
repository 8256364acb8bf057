"""From YAML groups and command-line overrides to one typed, checked configuration.

Hydra reads overrides, searches the groups and merges them onto the defaults of the dataclass tree; unknown keys and
wrong types are found afterwards by `core.typed`, all at once, whether a key came with a `+`, without, or from a file.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from typing_extensions import TypeVar

from sftdist.core.advice import Vocabulary
from sftdist.core.command import Command, run_command
from sftdist.core.conf_faults import COMPOSITION_ERRORS, explained
from sftdist.core.errors import ConfigError
from sftdist.core.extension import note_code
from sftdist.core.mix import expand
from sftdist.core.multirun import multirun
from sftdist.core.resolve import literal, resolved, resolved_text
from sftdist.core.rules import check
from sftdist.core.settings import DataConfig, EvaluateConfig, ExportConfig, TrainConfig
from sftdist.core.shipped import shipped_folder
from sftdist.core.snapshot import (
    FILE,
    SECTIONS,
    config_hash,
    differences,
    from_dict,
    read_config,
    read_values,
    read_yaml,
    to_dict,
    to_yaml,
    write_config,
)
from sftdist.core.typed import options, shown, to_plain
from sftdist.core.warm_start import name_folder
from sftdist.core.words import Words, read_words, word

__all__ = [
    "FILE",
    "check",
    "compose",
    "config_hash",
    "differences",
    "from_dict",
    "main",
    "presets",
    "read_config",
    "to_dict",
    "to_yaml",
    "write_config",
]
T = TypeVar("T", bound=TrainConfig, default=TrainConfig)
_BASE = "sftdist"
_PATHS = (
    *(("run", "dir"), ("data", "dir"), ("data", "store_dir")),
    *(("model", "path"), ("model", "tokenizer"), ("model", "chat_template")),
)


def compose(
    exp: str | None = None,
    overrides: Sequence[str] = (),
    schema: type[T] = TrainConfig,  # type: ignore[assignment]
    *,
    complete: bool = False,
    checks: Sequence[Callable[[T], list[str]]] = (),
) -> T:
    """The configuration of preset `exp` (a file of conf/exp) with Hydra overrides, resolved and checked.

    `data.train` has become the only source, `data.mix` the `lam` of each source, relative source paths are below
    `data.dir`, and `run.name` and `run.dir` are set. Without `exp`, an existing `run.dir=R` is the base. Raises
    ConfigError with all issues; `complete=False` leaves the absence of data, model and tokenizer to `check(cfg)`.
    `checks` are further rules.
    """
    with _conf():
        words = read_words(overrides, _vocabulary(schema))
        if exp is not None:
            words.groups.setdefault("exp", exp)
        container = _merge(words, schema)
        issues = words.issues
        cfg = read_values(container, schema, issues)
        issues += expand(cfg.data, _named_mix)
        _expand_home(cfg)
        issues += name_folder(cfg)
        if not words.refused:  # with a group missing, the rules would only report its absence again
            found = check(cfg, complete=complete)
            if found and complete and cfg.exp == TrainConfig().exp and not isinstance(cfg, EvaluateConfig):
                issues.append(f"exp: none is given; the presets are {', '.join(_options('exp'))}: add +exp=NAME")
            issues += _beside(issues, found)
            if not isinstance(cfg, DataConfig | ExportConfig):  # others keep what their run was begun with
                issues += note_code(cfg)
            cfg.run.name = cfg.run.name or _name(cfg)
            cfg.run.dir = cfg.run.dir or f"runs/{cfg.run.name}"
            issues += [issue for rule in checks for issue in rule(cfg)]
    if issues:
        raise ConfigError(list(dict.fromkeys(issues)))
    return cfg


def search_path() -> ConfigSearchPath:
    """Where Hydra looks for groups: conf, and the working directory's ./conf."""
    with _conf():
        found: ConfigSearchPath = GlobalHydra.instance().config_loader().get_search_path()
    return found


def _beside(issues: Sequence[str], found: Sequence[str]) -> list[str]:
    """The broken rules that do not only follow from a value which is an issue already, and which was left out."""
    keys = [issue.partition(":")[0] for issue in issues if ": unknown key" not in issue]
    named = [(rule.partition(":")[0], rule) for rule in found]
    return [
        rule
        for at, rule in named
        if not any(key in rule or f"{at}.".startswith(f"{key}.") or key.startswith(f"{at}.") for key in keys)
    ]


def presets() -> list[str]:
    """The names of conf/exp, the package's and the working directory's."""
    with _conf():
        return _options("exp")


def main(
    schema: type[T],
    run: Callable[[T], object],
    prog: str,
    argv: Sequence[str] | None = None,
    *,
    checks: Sequence[Callable[[T], list[str]]] = (),
    sweep_checks: Sequence[Callable[[T], list[str]]] = (),
    makes_runs: bool = False,
    settle: Callable[[T, frozenset[str]], T] | None = None,
) -> int:
    """The command line of `sftdist prog`: compose, check, `run(cfg)`; the exit code, which `run` may return.

    Under torchrun rank 0 composes and the others get its result, so that an error is printed once and every rank
    trains the same. `checks` are further rules on the configuration, reported together with all others, `sweep_checks`
    those for a job of a sweep (`-m`); `makes_runs`: what it does belongs to a run directory, so that each job of a
    sweep gets its own. `settle(cfg, given)` decides on rank 0 what is left to the machine; `given`: the keys that the
    command line names.
    """

    def load(overrides: Sequence[str]) -> T:
        return compose(None, overrides, schema, complete=True, checks=checks)

    def load_job(overrides: Sequence[str]) -> T:
        return compose(None, overrides, schema, complete=True, checks=[*checks, *sweep_checks])

    def sweep(words: Sequence[str]) -> int:
        return multirun(prog, load_job, words, search_path(), makes_runs=makes_runs)

    command: Command[T] = Command(
        name=prog,
        load=load,
        pack=to_dict,
        unpack=lambda values: from_dict(values, schema),
        show=to_yaml,
        help=lambda: help_text(schema, prog),
        sweep=sweep,
        run=run,
        settle=lambda cfg, overrides: cfg if settle is None else settle(cfg, given_keys(overrides, schema)),
    )
    return run_command(command, sys.argv[1:] if argv is None else argv)


def given_keys(overrides: Sequence[str], schema: type[TrainConfig] = TrainConfig) -> frozenset[str]:
    """The keys that a command line names; `zero=3` names zero.stage, which is all that its files hold."""
    with _conf():
        words = read_words(overrides, _vocabulary(schema))
    keys = [override.key_or_group for override in words.values]
    return frozenset([*keys, "zero.stage"] if "zero" in words.groups else keys)


def help_text(schema: type, prog: str) -> str:
    """The usage of a command: its presets and groups, and every key with its default and type."""
    with _conf():
        groups = {group: _options(group) for group in (*_group_names(), "mix")}
    rows = [(f"{key}={shown(default)}", words) for key, words, default in options(schema)]
    return "\n".join(
        [
            f"sftdist {prog} [+exp=NAME] [GROUP=NAME ...] [KEY=VALUE ...] [--cfg job] [-m] [--help]",
            "",
            *(f"{group}: {', '.join(names)}" for group, names in groups.items()),
            "",
            "--cfg job prints the resolved configuration",
            "-m runs one job per value of KEY=A,B; parallel=N at once; with hydra/launcher=slurm as a job array",
            "",
            *(f"  {left:<44} {right}" for left, right in rows),
        ]
    )


def _expand_home(cfg: TrainConfig) -> None:
    """`~` in a path: the shell leaves it alone after a `key=`."""
    for section, name in _PATHS:
        node = {"run": cfg.run, "model": cfg.model, "data": cfg.data}[section]
        value = getattr(node, name)
        if isinstance(value, str) and value.startswith("~"):
            setattr(node, name, str(Path(value).expanduser()))


class WorkingDirectoryConf(SearchPathPlugin):
    """Puts the working directory's ./conf on Hydra's search path, behind the package's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own = Path.cwd() / "conf"
        if own.is_dir() and own.resolve() != conf_folder().resolve():
            search_path.append("working-directory", f"file://{own}")


@contextmanager
def _conf() -> Iterator[None]:
    """Hydra with the package's conf and the working directory's ./conf on its search path."""
    Plugins.instance().register(WorkingDirectoryConf)
    groups = [{name: None} for name in _group_names()]
    ConfigStore.instance().store(name=_BASE, node={"defaults": ["_self_", *groups]})
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        yield


def conf_folder() -> Path:
    """The package's conf."""
    return shipped_folder("conf")


def _group_names() -> list[str]:
    """The groups, those of ./conf too; exp is the last, so that a preset can override the groups that it uses."""
    folders = [conf_folder(), Path.cwd() / "conf"]
    found = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    return [*sorted((found & set(SECTIONS)) - {"exp"}), "exp"]


def _vocabulary(schema: type[TrainConfig]) -> Vocabulary:
    return Vocabulary(_group_names(), _options, {key: kind for key, kind, _ in options(schema)})


def _options(group: str) -> list[str]:
    return list(GlobalHydra.instance().config_loader().get_group_options(group))


def _merge(words: Words, schema: type[TrainConfig]) -> dict[str, Any]:
    """Defaults, then an existing run or the groups and the preset, then the command line: as a plain container."""
    merged = OmegaConf.create(literal(to_plain(_base(words, schema))))
    try:
        chosen = {group: name for group, name in words.groups.items() if _chosen(group, name, words)}
        composed = hydra_compose(_BASE, overrides=[word(group, name) for group, name in chosen.items()])
        layers = [composed, *(hydra_compose(f"{group}/{name}") for group, name in chosen.items() if group != "exp")]
        # A group that the command line chooses wins over what the preset says about the same keys.
        for layer in layers:
            OmegaConf.set_struct(layer, False)
            merged = OmegaConf.merge(merged, layer)
        if "exp" in chosen:
            if not isinstance(merged.exp, str):
                words.refuse(f"conf/exp/{chosen['exp']}.yaml: its first line must be '# @package _global_'", "exp")
            merged.exp = chosen["exp"]
        _leave_replaced(merged, words)
        for override in words.values:
            _apply(merged, override, words.issues)
        return resolved(merged, words.issues)
    except COMPOSITION_ERRORS as error:
        raise ConfigError([*words.issues, explained(error, _group_names())]) from error


def _base(words: Words, schema: type[T]) -> T:
    """The defaults, or without a preset the existing run in `run.dir`, or the one that `replay` names."""
    replayed = resolved_text(words.value("replay"))
    run_dir = resolved_text(words.value("run.dir")) if replayed is None else replayed
    file = None if run_dir is None or "exp" in words.groups else Path(run_dir).expanduser() / FILE
    if file is None or not file.is_file():
        return schema()
    base = read_values(read_yaml(file), schema, words.issues, f"{file}: ")
    base.run.dir = run_dir  # the run may have been moved since
    return base


def _chosen(group: str, name: str, words: Words) -> bool:
    """Whether a group has this file; an issue with the names it has where it has not."""
    available = _options(group)
    if name in available:
        return True
    close = get_close_matches(Path(name).stem, available, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    path = "; to give a folder or a hub name, use model.path=" if group == "model" else ""
    words.refused.append(group)
    words.issues.append(f"{group}={name}: not in conf/{group}, which has {', '.join(available)}{meant}{path}")
    return False


def _leave_replaced(merged: DictConfig, words: Words) -> None:
    """Sources that are replaced or removed take along what the files of conf say of their answers."""
    train, sources, schemas = (
        OmegaConf.select(merged, key, throw_on_resolution_failure=False)
        for key in ("data.train", "data.sources", "evals.schemas")
    )
    if not isinstance(sources, DictConfig) or not isinstance(schemas, DictConfig):
        return
    removed = {override.key_or_group for override in words.values if override.is_delete()}
    replaced = words.value("data.train") is not None or train is not None or "data.sources" in removed
    for name in map(str, sources):
        if (replaced and name != "train") or f"data.sources.{name}" in removed:
            schemas.pop(name, None)


def _apply(merged: DictConfig, override: Override, issues: list[str]) -> None:
    key = override.key_or_group
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(merged, parent) if parent else merged
    if override.is_delete():
        if not isinstance(node, DictConfig) or leaf not in node:
            issues.append(f"~{key}: there is no such key to remove")
        else:
            del node[leaf]
    elif parent and node is not None and not isinstance(node, DictConfig):
        issues.append(f"{key}: unknown key; {parent} holds one value and has no keys below it")
    else:
        both = isinstance(override.value(), dict) and node is not None and _is_section(node, leaf)
        OmegaConf.update(merged, key, override.value(), merge=both, force_add=True)


def _is_section(node: DictConfig, name: str) -> bool:
    return not OmegaConf.is_interpolation(node, name) and isinstance(node.get(name), DictConfig)


def _named_mix(name: str) -> tuple[Any, list[str]]:
    """The mixture in conf/mix/NAME.yaml, or the issue that there is none."""
    available = _options("mix")
    if name not in available:
        close = get_close_matches(name, available, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        return None, [f"data.mix={name}: not in conf/mix, which has {', '.join(available)}{meant}"]
    return OmegaConf.to_container(hydra_compose(f"mix/{name}").mix), []


def _name(cfg: TrainConfig) -> str:
    exp = re.sub(r"[^A-Za-z0-9_.-]", "-", cfg.exp)
    return f"{exp}-{os.environ.get('SLURM_JOB_ID') or config_hash(cfg)[:8]}"
