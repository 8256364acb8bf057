"""A configuration as plain data: in a run directory, between ranks, and as the hash that names a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import TypeVar

from sftdist.core.errors import ConfigError
from sftdist.core.migrations import version_issue
from sftdist.core.settings import CONFIG_VERSION, TrainConfig
from sftdist.core.storage import sha256_json, write_text
from sftdist.core.typed import build, to_plain

T = TypeVar("T", bound=TrainConfig, default=TrainConfig)
FILE = "config.yaml"
# A run keeps its name, and can be resumed, when only these change. The version says how a file is written, not what is
# trained: a run that was begun with an earlier one goes on.
NOT_HASHED = (
    *("config_version", "run", "tracking", "launch", "sweep", "zero", "checkpoint", "eval", "dry_run"),
    *("evals", "gate", "auto", "registry"),
)
# And these keys of sections that count: a layer that is recomputed gives the same bits as one that was kept, so a run
# may resume where there is less memory.
NOT_HASHED_KEYS = ("model.activation_checkpointing", "model.recompute_layers", "train.hooks", "train.profile")
IDENTITY = ("run.dir", "run.name")
SECTIONS = tuple(item.name for item in fields(TrainConfig))


def to_dict(cfg: TrainConfig) -> dict[str, Any]:
    """The configuration as plain mappings, lists and scalars."""
    plain: dict[str, Any] = to_plain(cfg)
    return plain


def from_dict(values: Mapping[str, Any], schema: type[T] = TrainConfig) -> T:  # type: ignore[assignment]
    """The configuration that `to_dict` gave, in this version or an earlier one. Raises ConfigError with all issues."""
    issues: list[str] = []
    cfg = read_values(values, schema, issues)
    if issues:
        raise ConfigError(issues)
    return cfg


def read_values(values: Mapping[str, Any], schema: type[T], issues: list[str], source: str = "") -> T:
    """Plain values as a configuration of this version; each fault is added to `issues`, and the default used instead.

    `source` is put before each issue. Raises ConfigError for a later version, whose keys are not ours to judge.
    """
    if issue := version_issue(values.get("config_version", CONFIG_VERSION)):
        raise ConfigError([*issues, source + issue])
    found: list[str] = []
    cfg = build(schema, values, found)
    cfg.config_version = CONFIG_VERSION
    issues += [source + text for text in found]
    return cfg


def of_run(cfg: TrainConfig) -> TrainConfig:
    """What a run keeps of a command's configuration: the command's own keys are no part of a run."""
    return TrainConfig(**{name: getattr(cfg, name) for name in SECTIONS})


def to_yaml(cfg: TrainConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True)


def write_config(run_dir: Path, cfg: TrainConfig) -> None:
    """Write `run_dir/config.yaml` in one step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / FILE, to_yaml(cfg))


def require_run(folder: str | Path | None, key: str = "run.dir") -> Path:
    """The run directory that `key` names. Raises ConfigError where it is none."""
    path = None if folder is None else Path(folder).expanduser()
    if path is None or not (path / FILE).is_file():
        given = "nothing" if folder is None else folder
        raise ConfigError(f"{key}: given {given}, required the directory of a run (it holds {FILE})")
    return path


def read_config(run_dir: Path, schema: type[T] = TrainConfig) -> T:  # type: ignore[assignment]
    """The configuration in `run_dir/config.yaml`. Raises ConfigError."""
    path = run_dir / FILE
    if not path.is_file():
        raise ConfigError(f"{path}: not there; give the directory of a run (it holds {FILE})")
    issues: list[str] = []
    cfg = read_values(read_yaml(path), schema, issues, f"{path}: ")
    if issues:
        raise ConfigError(issues)
    return cfg


def config_hash(cfg: TrainConfig) -> str:
    """SHA-256, in hex, of what is trained: without the sections that a resume may change and a command's own keys."""
    return sha256_json(hashed_part(cfg))


def identifies_run(key: str) -> bool:
    """Whether a run's name, directory or hash depends on this key, or on one below it."""
    section = key.partition(".")[0].partition("[")[0]
    hashed = section in SECTIONS and section not in NOT_HASHED and key not in NOT_HASHED_KEYS
    return hashed or any(f"{name}.".startswith(f"{key}.") for name in IDENTITY)


def hashed_part(cfg: TrainConfig) -> dict[str, Any]:
    """What `config_hash` hashes."""
    part = {name: to_plain(getattr(cfg, name)) for name in SECTIONS if name not in NOT_HASHED}
    for section, _, key in (name.partition(".") for name in NOT_HASHED_KEYS):
        del part[section][key]
    if not part["code"]:  # a run without code of the user's keeps the hash, and so the name, that it always had
        del part["code"]
    return part


def differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """`{key: (old value, new value)}` over what `config_hash` hashes: what a resume may not change."""
    before, after = _flat(hashed_part(old)), _flat(hashed_part(new))
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, also where a key stands twice and YAML would take the last."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: given {type(values).__name__}, required a mapping of keys")
    return values


class _EachKeyOnce(yaml.SafeLoader):
    """A key that stands twice in a mapping is an error; what `<<` brings in may be replaced."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return node


def one_line(error: Exception) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
