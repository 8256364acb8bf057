"""Which model answered: the sha256 of every file that decides its answers. No torch: the registry asks this, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from sftdist.core.errors import ConfigError
from sftdist.core.processes import usable_cores
from sftdist.core.storage import read_json, sha256_file, sha256_json
from sftdist.evals.report import ModelFacts

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
# In the folder itself: what lies below (an export's adapter) is no part of the model.
DECIDING = (
    *WEIGHTS,
    "*.safetensors.index.json",
    "pytorch_model*.bin.index.json",
    "config.json",
    "generation_config.json",
    ADAPTER_CONFIG,
    "base_quantization.json",  # a base in 4 bits answers otherwise
    "tokenizer*",
    "chat_template.*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
)
_BASE = "base/"  # begins the names of an adapter's base


def identify(folder: Path) -> ModelFacts:
    """The model in a folder; of an adapter with the base that it names, whose files are called `base/...`.

    Reads every byte, several files at a time. Raises ConfigError where the folder holds no model, or where an adapter's
    base is no folder of this machine.
    """
    files = dict(_deciding(folder))
    if (base := adapter_base(folder)) is not None:
        files |= {f"{_BASE}{name}": path for name, path in _deciding(base)}
    with ThreadPoolExecutor(usable_cores()) as pool:  # hashing lets other threads run
        hashes = dict(zip(files, pool.map(sha256_file, files.values()), strict=True))
    return ModelFacts(str(folder), sha256_json(hashes), hashes)


def require_model(folder: Path) -> None:
    """Raises ConfigError where a folder holds neither a model nor an adapter; reads no weights."""
    for _ in _deciding(folder):
        pass


def weights_sha256(facts: ModelFacts) -> str:
    """SHA-256 over the weights alone: equal for two folders that differ in tokenizer, template or settings only."""
    return sha256_json(
        {name: value for name, value in facts.files.items() if _is_one_of(name.rpartition("/")[2], WEIGHTS)}
    )


def adapter_base(folder: Path) -> Path | None:
    """The folder of the base that an adapter names; None for a model that is no adapter. Raises ConfigError where the
    adapter names none, or one that is not here."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    named = read_json(file).get("base_model_name_or_path")
    if not named or not Path(named).is_dir():
        raise ConfigError(
            f"{file}: given base_model_name_or_path={named or 'nothing'}, required the folder of the adapter's base; "
            "run the command where that folder is, correct it there, or merge the adapter: sftdist export run.dir=R"
        )
    return Path(named)


def _deciding(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of the files that decide, in order of names."""
    found = sorted(path for path in folder.glob("*") if path.is_file() and _is_one_of(path.name, DECIDING))
    names = [path.name for path in found]
    if not any(_is_one_of(name, WEIGHTS) for name in names):
        raise ConfigError(
            f"{folder}: given a folder without weights, required a model's or an adapter's "
            "(config.json and model*.safetensors, or adapter_config.json and adapter_model.safetensors)"
        )
    if "config.json" not in names and ADAPTER_CONFIG not in names:
        raise ConfigError(f"{folder}: given weights without config.json, required a model's whole folder")
    yield from zip(names, found, strict=True)


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
