"""Who is talked to: the folder of a run's export, a release, an adapter or any model, its base, and how they are asked.

Everything that decides an answer is what `sftdist evaluate` would take: template arguments and the number of new tokens
of the run's configuration, the stop ids of both models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sftdist.core import snapshot
from sftdist.core.agent import STATUS
from sftdist.core.errors import ConfigError
from sftdist.core.releases import RELEASE
from sftdist.core.settings import Init, TrainConfig
from sftdist.evals.identity import adapter_base, require_model
from sftdist.evals.request import EXPORT
from sftdist.evals.voice import Voice
from sftdist.release.models import model_folder

_SHOWN = 5


@dataclass(frozen=True)
class Asked:
    """What the command line names. `run`: a run directory, or whatever `model` may be; `model`: a folder, adapter,
    release or name on the Hub; `base_model` in place of the base that the run or the adapter names."""

    run: str | None
    model: str | None
    step: int | None
    base: bool
    base_model: str | None
    chat_template: str | None
    registry: Path


@dataclass(frozen=True)
class Models:
    """The folders by name, in the order in which they answer, and the voice of all of them. `settings`: of the run that
    made the model, None where nobody knows it. `note`: what is not as it would be in an evaluation."""

    folders: dict[str, Path]
    voice: Voice
    settings: TrainConfig | None
    note: str | None = None


def find_models(asked: Asked) -> Models:
    """Raises ConfigError where there is no such model, or no base though one is asked for."""
    settings = snapshot.read_config(Path(str(asked.run)).expanduser()) if is_run(asked.run) else None
    folder = _folder(asked)
    require_model(folder)
    if settings is None:
        settings = _settings_near(folder)
    base, note = _base(asked, folder, settings)
    voice = Voice.load(
        folder,
        *([] if base is None else [base]),
        arguments={} if settings is None else settings.model.template_args,
        optional=[] if settings is None else settings.data.allow_unrendered,
        chat_template=asked.chat_template,
    )
    first = {"base": base} if base is not None and (asked.base or asked.base_model is not None) else {}
    return Models({**first, "tuned" if first else "model": folder}, voice, settings, note)


def is_run(name: str | None) -> bool:
    """A release holds the configuration of its run, too, and is none."""
    if name is None:
        return False
    folder = Path(name).expanduser()
    return (folder / snapshot.FILE).is_file() and not (folder / RELEASE).is_file()


def _folder(asked: Asked) -> Path:
    if asked.model is not None:
        return _named("--model", asked.model, asked.registry)
    if not is_run(asked.run):
        return _named("R", str(asked.run), asked.registry)
    run_dir = Path(str(asked.run)).expanduser()
    name = EXPORT if asked.step is None else f"{EXPORT}-step-{asked.step:08}"
    if (run_dir / name).is_dir():
        return run_dir / name
    there = sorted(path.name for path in run_dir.glob(f"{EXPORT}*") if path.is_dir())[-_SHOWN:]
    step = "" if asked.step is None else f" step={asked.step}"
    raise ConfigError(
        f"{run_dir}: given a run without {name}, required an exported model ({', '.join(there) or 'it has none'}); "
        f"make one of a checkpoint with sftdist export run.dir={run_dir}{step}, or give --step N or --model FOLDER"
    )


def _named(key: str, name: str, registry: Path) -> Path:
    try:
        return model_folder(registry, name)
    except ConfigError as problem:
        raise ConfigError([f"{key}: {issue}" for issue in problem.issues]) from problem


def _settings_near(folder: Path) -> TrainConfig | None:
    """Of the run that an export or its adapter lies in, or of the run that a release was made of."""
    if (folder / RELEASE).is_file():
        return snapshot.read_config(folder) if (folder / snapshot.FILE).is_file() else None
    homes = folder.resolve().parents[:2]
    return next((snapshot.read_config(home) for home in homes if is_run(str(home)) and (home / STATUS).is_file()), None)


def _base(asked: Asked, folder: Path, settings: TrainConfig | None) -> tuple[Path | None, str | None]:
    """The base, and a note where one is named that is not here. One that nobody wants to talk to only has a say in what
    ends an answer, as it has in an evaluation: it is not fetched for that."""
    if asked.base_model is not None:
        return _with_weights("--base-model", _named("--base-model", asked.base_model, asked.registry)), None
    if (own := adapter_base(folder)) is not None:
        return own, None
    known = settings is not None and settings.model.init is Init.pretrained
    name = settings.model.path if settings is not None and known else None
    if not asked.base:
        if name is None or Path(name).is_dir():
            return None if name is None else Path(name), None
        return None, f"the base of its run, {name}, is no folder here: an answer ends at the model's own stop ids"
    if settings is None or name is None:
        raise ConfigError(f"--base: nobody has written down what the base of {folder} is; give --base-model FOLDER")
    try:
        found = model_folder(asked.registry, name, settings.model.revision)
    except ConfigError as problem:
        words = (
            f"--base: the run of {folder} began with {name}, which is not here ({problem}); give --base-model FOLDER"
        )
        raise ConfigError(words) from problem
    return _with_weights("--base", found), None


def _with_weights(key: str, folder: Path) -> Path:
    try:
        require_model(folder)
    except ConfigError as problem:
        raise ConfigError([f"{key}: {issue}" for issue in problem.issues]) from problem
    return folder
