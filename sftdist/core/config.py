"""From YAML groups and command-line overrides to one typed, checked configuration. The only hydra import.

Hydra reads overrides, searches the groups and merges them onto the defaults of the dataclass tree; unknown keys and
wrong types are found afterwards by `core.typed`, all at once, whether a key came with a `+`, without, or from a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sftdist.core.errors import ConfigError
from sftdist.core.mix import lambdas_of, normalised
from sftdist.core.rules import check
from sftdist.core.settings import DataSettings, SourceSettings, TrainConfig
from sftdist.core.storage import sha256_json, write_text
from sftdist.core.typed import build, to_plain

__all__ = ["check", "compose", "config_hash", "from_dict", "presets", "read_config", "to_dict", "write_config"]

T = TypeVar("T", bound=TrainConfig)
FILE = "config.yaml"
# A run keeps its name, and can be resumed, when only these change.
NOT_HASHED = ("run", "tracking", "launch", "zero", "checkpoint", "eval", "dry_run")
_BASE = "sftdist"
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)


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
    words = _read_overrides([*([f"exp={exp}"] if exp else []), *overrides])
    with _conf():
        container = _merge(words, schema)
        issues = words.issues
        cfg = build(schema, container, issues)
        _expand(cfg, words)
    issues += check(cfg, complete=complete)
    issues += [issue for rule in checks for issue in rule(cfg)]
    if issues:
        raise ConfigError(list(dict.fromkeys(issues)))
    cfg.run.name = cfg.run.name or _name(cfg)
    cfg.run.dir = cfg.run.dir or f"runs/{cfg.run.name}"
    return cfg


def to_dict(cfg: TrainConfig) -> dict[str, Any]:
    """The configuration as plain mappings, lists and scalars."""
    plain: dict[str, Any] = to_plain(cfg)
    return plain


def from_dict(values: Mapping[str, Any], schema: type[T] = TrainConfig) -> T:  # type: ignore[assignment]
    """The configuration that `to_dict` gave. Raises ConfigError with all issues."""
    issues: list[str] = []
    cfg = build(schema, values, issues)
    if issues:
        raise ConfigError(issues)
    return cfg


def to_yaml(cfg: TrainConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True)


def write_config(run_dir: Path, cfg: TrainConfig) -> None:
    """Write `run_dir/config.yaml` in one step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / FILE, to_yaml(cfg))


def read_config(run_dir: Path, schema: type[T] = TrainConfig) -> T:  # type: ignore[assignment]
    """The configuration in `run_dir/config.yaml`. Raises ConfigError."""
    path = run_dir / FILE
    if not path.is_file():
        raise ConfigError(f"{path}: not there; give the directory of a run (it holds {FILE})")
    return from_dict(_read_yaml(path), schema)


def config_hash(cfg: TrainConfig) -> str:
    """SHA-256, in hex, of what is trained: without the sections that a resume may change and a command's own keys."""
    return sha256_json(hashed_part(cfg))


def hashed_part(cfg: TrainConfig) -> dict[str, Any]:
    """What `config_hash` hashes."""
    return {name: to_plain(getattr(cfg, name)) for name in _FIELDS if name not in NOT_HASHED}


def presets() -> list[str]:
    """The names of conf/exp, the package's and the working directory's."""
    with _conf():
        return _options("exp")


@dataclass
class _Words:
    """The overrides, read: values by key, one choice per group, and what could not be read."""

    groups: dict[str, str] = field(default_factory=dict)
    values: list[Override] = field(default_factory=list)
    issues: list[str] = field(default_factory=list)

    def value(self, key: str) -> Any:
        """The last value that was given for a key, else None."""
        found = [word.value() for word in self.values if word.key_or_group == key and not word.is_delete()]
        return found[-1] if found else None


_FIELDS = tuple(item.name for item in fields(TrainConfig))


def _read_overrides(overrides: Sequence[str]) -> _Words:
    words, parser = _Words(), OverridesParser.create()
    for text in overrides:
        try:
            word = parser.parse_override(text)
        except HydraException:
            words.issues.append(_unreadable(text))
            continue
        key = word.key_or_group
        if word.is_sweep_override():
            words.issues.append(f"{key}: given several values, required one; for a list write '{key}=[a,b]'")
        elif key in _group_names() and isinstance(word.value(), str | int) and not word.is_delete():
            words.groups[key] = str(word.value())
        elif key == "mix":
            words.issues.append("mix: unknown key; did you mean data.mix?")
        else:
            words.values.append(word)
    return words


def _unreadable(text: str) -> str:
    key, equals, value = text.partition("=")
    if text.startswith("-"):
        return f"{text}: unknown option; see --help"
    if not equals or not key:
        return f"{text}: given a word without '=', required key=value"
    escaped = value.replace('"', '\\"')
    return f"{key}: the value has characters that need quotes; write '{key}=\"{escaped}\"'"


@contextmanager
def _conf() -> Iterator[None]:
    """Hydra with the package's conf and the working directory's ./conf on its search path."""
    package, own = conf_folder(), Path.cwd() / "conf"
    search = [f"file://{own}"] if own.is_dir() and own.resolve() != package.resolve() else []
    node = {"defaults": ["_self_", *({name: None} for name in _group_names())], "hydra": {"searchpath": search}}
    ConfigStore.instance().store(name=_BASE, node=node)
    with initialize_config_dir(version_base="1.3", config_dir=str(package)):
        yield


def conf_folder() -> Path:
    """The package's conf: inside of it where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def _group_names() -> list[str]:
    """The groups, those of ./conf too; exp is the last, so that a preset can override the groups that it uses."""
    folders = [conf_folder(), Path.cwd() / "conf"]
    found = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    return [*sorted((found & set(_FIELDS)) - {"exp"}), "exp"]


def _options(group: str) -> list[str]:
    return list(GlobalHydra.instance().config_loader().get_group_options(group))


def _merge(words: _Words, schema: type[TrainConfig]) -> dict[str, Any]:
    """Defaults, then an existing run or the groups and the preset, then the command line: as a plain container."""
    merged = OmegaConf.create(to_plain(schema()))
    run_dir = words.value("run.dir")
    try:
        if "exp" not in words.groups and isinstance(run_dir, str) and (Path(run_dir) / FILE).is_file():
            merged = OmegaConf.merge(merged, _read_yaml(Path(run_dir) / FILE))
        chosen = {group: name for group, name in words.groups.items() if _chosen(group, name, words)}
        composed = hydra_compose(_BASE, overrides=[f"{group}={_quoted(name)}" for group, name in chosen.items()])
        layers = [composed, *(hydra_compose(f"{group}/{name}") for group, name in chosen.items() if group != "exp")]
        # A group that the command line chooses wins over what the preset says about the same keys.
        for layer in layers:
            OmegaConf.set_struct(layer, False)
            merged = OmegaConf.merge(merged, layer)
        if "exp" in chosen:
            if not isinstance(merged.exp, str):
                words.issues.append(f"conf/exp/{chosen['exp']}.yaml: its first line must be '# @package _global_'")
            merged.exp = chosen["exp"]
        for word in words.values:
            _apply(merged, word, words.issues)
        container: dict[str, Any] = OmegaConf.to_container(merged, resolve=True)  # type: ignore[assignment]
    except _COMPOSITION_ERRORS as error:
        raise ConfigError([*words.issues, f"conf: {_one_line(error)}"]) from error
    return container


def _chosen(group: str, name: str, words: _Words) -> bool:
    """Whether a group has this file; an issue with the names it has where it has not."""
    available = _options(group)
    if name in available:
        return True
    close = get_close_matches(name, available, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    path = "; to give a folder or a hub name, use model.path=" if group == "model" else ""
    words.issues.append(f"{group}={name}: not in conf/{group}, which has {', '.join(available)}{meant}{path}")
    return False


def _apply(merged: DictConfig, word: Override, issues: list[str]) -> None:
    key = word.key_or_group
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(merged, parent) if parent else merged
    if word.is_delete():
        if not isinstance(node, DictConfig) or leaf not in node:
            issues.append(f"~{key}: there is no such key to remove")
        else:
            del node[leaf]
    elif parent and node is not None and not isinstance(node, DictConfig):
        issues.append(f"{key}: unknown key; {parent} holds one value and has no keys below it")
    else:
        OmegaConf.update(merged, key, word.value(), merge=isinstance(word.value(), dict), force_add=True)


def _expand(cfg: TrainConfig, words: _Words) -> None:
    """Turn the short forms of the data section into sources with paths and lambdas."""
    data = cfg.data
    if data.train is not None:
        train = data.sources.get("train", SourceSettings())
        train.path = data.train
        data.sources = {"train": train}
    if data.mix is not None:
        mix = _named_mix(data.mix, words.issues) if isinstance(data.mix, str) else data.mix
        lambdas, issues = lambdas_of(mix, list(data.sources)) if mix is not None else ({}, [])
        words.issues += issues
        for name, lam in lambdas.items():
            data.sources[name].lam = lam
        data.mix = None
    elif all(source.lam is not None and source.lam >= 0 for source in data.sources.values()):
        given = {name: source.lam or 0.0 for name, source in data.sources.items()}
        for name, lam in normalised(given).items() if sum(given.values()) else ():
            data.sources[name].lam = lam
    _join_paths(data)


def _named_mix(name: str, issues: list[str]) -> Any:
    available = _options("mix")
    if name in available:
        return to_plain(OmegaConf.to_container(hydra_compose(f"mix/{name}"))["mix"])  # type: ignore[index,call-overload]
    close = get_close_matches(name, available, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    issues.append(f"data.mix={name}: not in conf/mix, which has {', '.join(available)}{meant}")
    return None


def _join_paths(data: DataSettings) -> None:
    def joined(path: Any) -> Any:
        if isinstance(path, list):
            return [joined(part) for part in path]
        if not isinstance(path, str) or path.startswith("hub:") or data.dir is None:
            return path
        folder = Path(data.dir)
        return path if Path(path).is_relative_to(folder) else str(folder / path)

    for name, source in data.sources.items():
        if data.train is None or name != "train":
            source.path = joined(source.path)


def _name(cfg: TrainConfig) -> str:
    exp = re.sub(r"[^A-Za-z0-9_.-]", "-", cfg.exp)
    return f"{exp}-{os.environ.get('SLURM_JOB_ID') or config_hash(cfg)[:8]}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML ({_one_line(error)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: given {type(values).__name__}, required a mapping of keys")
    return values


def _quoted(name: str) -> str:
    return f"'{name}'"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
