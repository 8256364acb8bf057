"""`-m`: a sweep, by Hydra's own sweepers and launchers; each job is composed and run as `sftdist COMMAND WORDS`.

Hydra composes its own node alone, from the words that begin with `hydra`; the other words are the sweeper's.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sftdist.core.agent import PREEMPTED
from sftdist.core.errors import ConfigError
from sftdist.core.lock import RunLock
from sftdist.core.settings import TrainConfig
from sftdist.core.snapshot import one_line, to_dict
from sftdist.core.sweep import FILE, PROGRAM, Job, Outcome, Sweep, SweepStopped, shared_run, sweep_name
from sftdist.core.words import word

LAUNCHERS = {"torchrun": "TorchrunLauncher", "slurm": "SlurmLauncher"}
_PLUGINS = "hydra_plugins.sftdist_launchers"
_RUNS = "runs"
_SWEEPER = ("hydra/sweeper", "hydra.sweeper.")
_PARAMS = "hydra.sweeper.params"
_LAUNCHER = ("hydra/launcher", "hydra.launcher.")
_KINDS = {
    "integer": "a whole number",
    "float": "a number",
    "boolean": "true or false",
    "bool": "true or false",
    "listconfig": "a list",
}
Load = Callable[[Sequence[str]], TrainConfig]


def multirun(
    command: str,
    load: Load,
    argv: Sequence[str],
    search_path: ConfigSearchPath,
    *,
    makes_runs: bool,
    program: Sequence[str] = PROGRAM,
) -> int:
    """Carry out a sweep; the exit code: 0, 75 where a signal has stopped it, else that of the first job that failed.

    `load` composes and checks the words of a job, `search_path` is where conf's groups are; `makes_runs`: each job
    makes a run directory; each is started as `PROGRAM COMMAND WORDS`. Raises ConfigError before any job starts.
    """
    hydra_words, words = split_words(argv)
    load = _remembered(load)
    sweeps = {item.get_key_element(): item.is_sweep_override() for item in _read(words, load)}  # the last of a key
    loader = _Loader(load, search_path)
    with _explained():
        config = _hydra_node(loader, hydra_words)
        runs = Path(str(config.hydra.sweep.dir))
        name = sweep_name(command, [*words, *(item for item in hydra_words if _sets(item, _SWEEPER))])
        make = partial(_job, load, runs=runs if makes_runs else None, group=name)
        sweep = Sweep(command, runs / name, make, [key for key in sweeps if not sweeps[key]], program)
        config.hydra.sweep.dir = str(sweep.folder)  # where Hydra's sweepers put their files
        context = HydraContext(config_loader=loader, callbacks=Callbacks())
        task: Any = sweep  # Hydra hands it on to the launcher as it is
        sweeper = Plugins.instance().instantiate_sweeper(config=config, hydra_context=context, task_function=task)
    if config.hydra.runtime.choices["hydra/sweeper"] == "basic":
        jobs = _product(config.hydra.sweeper.params or {}, words)
        _compose_all(sweep, jobs)  # a typo in the last job is found before the first one starts
    with RunLock(sweep.folder, wait_seconds=1.0):
        return _carry_out(sweep, sweeper, words)


def _carry_out(sweep: Sweep, sweeper: Sweeper, words: list[str]) -> int:
    count = {0: "jobs", 1: "1 job"}.get(len(sweep.jobs), f"{len(sweep.jobs)} jobs")
    print(f"{sweep.folder.name}: {count} of sftdist {sweep.command}; see {sweep.folder / FILE}", flush=True)
    stopped = False
    try:
        with _explained():
            sweeper.sweep(words)
    except SweepStopped as end:
        stopped = True
        print(end, flush=True)
    except ValueError as error:  # Optuna has no best trial where all have failed
        if not sweep.code():
            raise
        print(f"hydra/sweeper: {error}", flush=True)
    finally:
        if any(outcome != Outcome() for outcome in sweep.outcomes.values()):
            print("\n".join(["", *sweep.table()]), flush=True)
    return PREEMPTED if stopped else sweep.code()


class _Loader(ConfigLoaderImpl):
    """Hydra's loader for its own node; a job's configuration is what our command makes of its words."""

    def __init__(self, load: Load, search_path: ConfigSearchPath) -> None:
        super().__init__(search_path)
        self._load = load

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        return OmegaConf.create(to_dict(self._load(sweep_overrides)))


def _hydra_node(loader: _Loader, hydra_words: Sequence[str]) -> DictConfig:
    """Hydra's configuration with our launchers; no process but this one sees it."""
    for module, name in LAUNCHERS.items():
        Plugins.instance().register(_plugin(module, name))
    chosen = any(_sets(item, ("hydra/launcher",)) for item in hydra_words)
    defaults = [f"hydra.sweep.dir={_RUNS}", *([] if chosen else ["hydra/launcher=torchrun"])]
    params = [item for item in hydra_words if _sets(item, (_PARAMS,))]
    others = [item for item in hydra_words if item not in params]
    _refuse_unknown(loader, defaults, _parsed(others))
    config = loader.load_configuration(None, [*defaults, *others], RunMode.MULTIRUN)
    if params:
        config.hydra.sweeper.params = _sweeper_params(params)
    return config


def _refuse_unknown(loader: _Loader, defaults: Sequence[str], given: Sequence[Override]) -> None:
    """Raises ConfigError for a launcher, sweeper or key that there is not: Hydra would speak of its own insides."""
    several = [
        f"{item.key_or_group}: given several values, required one for the whole sweep"
        for item in given
        if item.is_sweep_override()
    ]
    if several:
        raise ConfigError(several)
    groups = [item for item in given if "/" in item.key_or_group]
    issues = [issue for item in groups if (issue := _choice_issue(loader, item.key_or_group, item.value()))]
    if issues:
        raise ConfigError(issues)
    values = [
        item for item in given if item not in groups and (_sets(item.key_or_group, _LAUNCHER) or not item.is_add())
    ]
    if not values:
        return
    config = loader.load_configuration(None, [*defaults, *(str(item.input_line) for item in groups)], RunMode.MULTIRUN)
    for item in values:
        section, _, name = item.key_or_group.rpartition(".")
        node = OmegaConf.select(config, section)
        if not isinstance(node, DictConfig) or name not in node:
            if not isinstance(node, DictConfig):
                section = ".".join(section.split(".")[:2])
                node = OmegaConf.select(config, section)
            known = ", ".join(str(key) for key in node if key != "_target_")
            issues.append(f"{item.key_or_group}: unknown key; the keys of {section} are {known}")
    if issues:
        raise ConfigError(issues)


def _choice_issue(loader: _Loader, group: str, choice: Any) -> str | None:
    if group == "hydra/launcher" and choice not in LAUNCHERS:
        return f"{group}: given {choice}, required one that starts whole jobs: {', '.join(LAUNCHERS)}"
    known = loader.get_group_options(group)
    if group != "hydra/sweeper" or choice in known:
        return None
    if choice == "optuna":
        return f"{group}: given optuna, which is not installed; install it: pip install 'sftdist[sweep]'"
    return f"{group}: given {choice}, required one of {', '.join(known)}"


def _sweeper_params(words: Sequence[str]) -> dict[str, str]:
    """`hydra.sweeper.params={KEY:'A,B'}` and `hydra.sweeper.params.KEY=A,B`: Hydra itself takes it from files only."""
    found: dict[str, str] = {}
    for item in _parsed(words):
        key = item.key_or_group.removeprefix(_PARAMS).removeprefix(".")
        value = item.get_value_string() if item.is_sweep_override() else item.value()
        if key:
            found[key] = str(value)
        elif isinstance(value, dict):
            found |= {str(name): str(choices) for name, choices in value.items()}
        else:
            raise ConfigError(f"{_PARAMS}: given {value}, required keys with their choices, such as {{seed:'1,2'}}")
    return found


def _plugin(module: str, name: str) -> Any:
    """A launcher's class. An editable install of an earlier version does not have its folder on the path."""
    try:
        return vars(import_module(f"{_PLUGINS}.{module}"))[name]
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"-m: sftdist's Hydra launchers are not installed ({error}); install sftdist again"
        ) from error


def _job(load: Load, number: int, overrides: tuple[str, ...], *, runs: Path | None, group: str) -> Job:
    """A job with its final words. `runs`: the folder of its run directory, unless its configuration names one."""
    cfg = load(overrides)
    if runs is None or cfg.dry_run:
        return Job(number, overrides, overrides, None, cfg)
    run_dir = Path(str(cfg.run.dir))
    if run_dir == Path(_RUNS, str(cfg.run.name)):  # the default
        run_dir = runs / str(cfg.run.name)
    own = [word("run.name", str(cfg.run.name)), word("run.dir", str(run_dir))]
    own += [word("tracking.group", cfg.tracking.group or group)]
    return Job(number, overrides, (*overrides, *own), run_dir, cfg)


def _remembered(load: Load) -> Load:
    """Each job is composed once, and named by its own configuration."""

    @cache
    def composed(words: tuple[str, ...]) -> TrainConfig:
        with _without_job_id():
            return load(words)

    return lambda words: composed(tuple(words))


@contextmanager
def _without_job_id() -> Iterator[None]:
    """All jobs of a sweep that runs inside a SLURM job would have that job's name."""
    given = os.environ.pop("SLURM_JOB_ID", None)
    try:
        yield
    finally:
        if given is not None:
            os.environ["SLURM_JOB_ID"] = given


def _product(params: Mapping[str, str], words: Sequence[str]) -> list[list[str]]:
    """The overrides of every job, as Hydra's basic sweeper makes them."""
    with _explained():
        overrides = _parsed([*(f"{key}={value}" for key, value in params.items()), *words])
        jobs: list[list[str]] = BasicSweeper.split_arguments(overrides, None)[0]
    return jobs


def _compose_all(sweep: Sweep, jobs: Sequence[Sequence[str]]) -> None:
    """Compose every job. Raises ConfigError with all issues, each once."""
    issues: dict[str, list[int]] = {}
    shared: list[str] = []
    for number, overrides in enumerate(jobs):
        try:
            job = sweep.job(number, overrides)
        except ConfigError as error:
            for issue in error.issues:
                issues.setdefault(issue, []).append(number)
            continue
        same = shared_run(sweep.jobs.values(), job)
        shared += [same] if same else []
    if issues or shared:
        raise ConfigError([*(_of_jobs(numbers, len(jobs), issue) for issue, numbers in issues.items()), *shared])


def _of_jobs(numbers: Sequence[int], count: int, issue: str) -> str:
    """What is wrong in all jobs needs no numbers."""
    return issue if len(numbers) == count else f"job {', '.join(map(str, numbers))}: {issue}"


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for Hydra, and those of the jobs. `parallel=N` is short for hydra.launcher.parallel=N."""
    hydra_words, words = [], []
    for text in argv:
        if text.lstrip("+").startswith("parallel="):
            hydra_words.append(f"hydra.launcher.{text.lstrip('+')}")
        elif text.lstrip("+~").startswith(("hydra/", "hydra.")):
            hydra_words.append(_quoted(text))
        else:
            words.append(text)
    allowed = (*_LAUNCHER, *_SWEEPER, "hydra.sweep.dir=")
    issues = [
        f"{item.partition('=')[0]}: a sweep takes only hydra/launcher, hydra/sweeper, their keys and hydra.sweep.dir; "
        "where a job puts its files is run.dir"
        for item in hydra_words
        if not _sets(item, allowed)
    ]
    if issues:
        raise ConfigError(issues)
    return hydra_words, words


def _quoted(text: str) -> str:
    """`hydra.launcher.options=[--a=b,--c]` with quotes: Hydra's grammar reads no bare `--a=b`."""
    found = re.fullmatch(r"(hydra\.launcher\.options=)\[\s*(-[^'\"]*)\]", text)
    if found is None:
        return text
    options = re.split(r"\s*,\s*(?=-)", found[2].rstrip())  # a comma before anything else is the option's own
    quoted = ",".join(f"'{option}'" for option in options)
    return f"{found[1]}[{quoted}]"


def _sets(text: str, keys: tuple[str, ...]) -> bool:
    return text.lstrip("+~").startswith(keys)


def _parsed(words: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(words))


def _read(words: Sequence[str], load: Load) -> list[Override]:
    """Raises ConfigError where Hydra's grammar does not read a word, with what a single job would say of it."""
    parser, found, of_one_job = OverridesParser.create(), [], []
    for text in words:
        try:
            found.append(parser.parse_override(text))
        except HydraException:
            of_one_job.append(text)
            continue
        of_one_job += [] if found[-1].is_sweep_override() else [text]
    if len(found) < len(words):
        load(of_one_job)
        raise ConfigError(f"-m: given {shlex.join(words)}, which cannot be read; write each word as KEY=VALUE")
    return found


@contextmanager
def _explained() -> Iterator[None]:
    """What Hydra refuses is the user's to mend."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_said(error)) from error


def _said(error: Exception) -> str:
    """What Hydra says of its own node, in the user's words."""
    message, cause = one_line(error), " ".join(str(error.__cause__).split())
    if found := re.match(r"Error merging override (\S+?)=(.*)", message):
        key, given = found.groups()
        wanted = re.search(r"could not be converted to (\w+)|is not a (?:valid )?(\w+)", cause)
        kind = _KINDS.get((wanted[1] or wanted[2]).lower()) if wanted else None
        return f"{key.lstrip('+')}: given {given or 'nothing'}, required {kind or 'a value of another type'}"
    if found := re.search(r"Could not find '(\S+)/(\S+)' Available options in '.+?': (.+?) Config search", message):
        return f"{found[1]}: given {found[2]}, required one of {', '.join(found[3].split())}"
    if found := re.match(r"Could not override '(hydra/sweeper/.+?)'\. No match", message):
        return f"{found[1]}: this sweeper has none; add hydra/sweeper=optuna, or remove it"
    if found := re.search(r"unexpected keyword argument '(\w+)'.* full_key: (\S+)", message):
        return f"{found[2]}.{found[1]}: unknown key; remove it"
    return f"-m: {message}"
