"""The commands, keys and code blocks of README, docs, scripts and presets, and what is wrong with them.

A command of sftdist is composed, with every job of a sweep; an ordinary command line is parsed; of any other program
only what is known here passes, so that nobody adds a line that nothing checks.
"""

from __future__ import annotations

import ast
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from sftdist import cli
from sftdist.commands import pipeline
from sftdist.core import multirun, settings
from sftdist.core.config import compose, write_config
from sftdist.core.errors import SftdistError
from sftdist.core.snapshot import SECTIONS
from sftdist.core.storage import write_json
from sftdist.core.typed import ANY_NAME, options
from tests.conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "slurm").glob("*.s*"))]
PRESETS = sorted((ROOT / "conf").rglob("*.yaml"))

PROGRAMS = ("sftdist", "torchrun", "python", "bash", "sbatch")
# No program of ours, and none that could go stale.
FOREIGN = ("cd", "export", "squeue", "scancel", "cat", "ls", "source")
LANGUAGES = ("bash", "python", "yaml", "json", "jinja", "text", "")
SUFFIXES = (".json", ".jsonl", ".yaml", ".py", ".sh", ".sbatch", ".log", ".safetensors", ".md", ".html")
# In prose: a key with its section, with or without a value. In a comment: a command, up to two spaces.
_KEY = re.compile(rf"'?\+?((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+)(=.*)?'?")
_COMMAND = re.compile(rf"(?:^#? {{2,}}|: | {{2,}})((?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) \S.*?)(?= {{2,}}|$)")
# What stands for something, as a regular expression over whole words of a line.
PLACEHOLDERS = {
    "KEY=VALUE": "seed=1",
    "KEY=A,B": "seed=1,2",
    "HOST:PORT": "127.0.0.1:29500",
    "NAME": "quickstart",
    "EXP": "quickstart",
    "X": "quickstart",
    "R": "runs/quickstart",
    "DIR": "model",
    "DATA": "data",
    "FILE": "my.jsonl",
    "FOLDER": "runs",
    "N": "2",
}
# The command that gets the words behind a script's own options.
WORDS_OF = {
    "launch/local.sh": "train",
    "launch/multinode.sh": "train",
    "slurm/train.sbatch": "train",
    "slurm/sweep.sbatch": "train -m",
    "slurm/prepare.sbatch": "prepare",
    "slurm/evaluate.sbatch": "evaluate",
    "slurm/publish.sbatch": "publish",
    "slurm/pipeline.sbatch": "pipeline",
}
SBATCH = (
    *(
        "nodes",
        "ntasks-per-node",
        "cpus-per-task",
        "gpus-per-node",
        "gres",
        "mem",
        "time",
        "partition",
        "account",
        "qos",
    ),
    *("array", "signal", "dependency", "constraint", "exclusive", "job-name", "output", "parsable", "export"),
)
DOCKER = {
    **dict.fromkeys(("-f", "-t", "-v", "--build-arg", "--gpus", "--shm-size", "--stop-timeout", "--user"), True),
    "--rm": False,
}


@dataclass(frozen=True)
class Piece:
    """A text of a document to be checked: `kind` is command, key, python, yaml or fence (a block of no known kind)."""

    where: str
    kind: str
    text: str


# Reading


def pieces(path: Path, text: str | None = None) -> list[Piece]:
    """All that can be checked in a file; `text` instead of what it holds."""
    text = path.read_text(encoding="utf-8") if text is None else text
    reader = {".md": _of_markdown, ".yaml": _of_comments}.get(path.suffix, _of_comments)
    return [Piece(f"{path.name}:{line}", kind, found) for line, kind, found in reader(text)]


def _of_markdown(text: str) -> Iterator[tuple[int, str, str]]:
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        line, language, body = text.count("\n", 0, match.start()) + 2, match[1], match[2]
        if language == "bash":
            yield from ((line, "command", command) for command in _commands(body))
        elif language in ("python", "yaml"):
            yield line, language, body
        elif language not in LANGUAGES:
            yield line, "fence", language
    prose = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
    for match in re.finditer(r"`([^`\n]+)`", prose):
        line = prose.count("\n", 0, match.start()) + 1
        if match[1].split()[0] in (*PROGRAMS, "pip"):
            yield line, "command", match[1]
        elif key := _KEY.fullmatch(match[1]):
            yield from [(line, "key", key[1])] if not key[1].endswith(SUFFIXES) else []


def _of_comments(text: str) -> Iterator[tuple[int, str, str]]:
    """Commands in comments and usage texts: at the end of a line, or set off by two spaces on each side."""
    usage = False
    for number, line in enumerate(text.splitlines(), 1):
        usage = "<<'TEXT'" in line or (usage and line != "TEXT")
        if not usage and not line.startswith("#"):
            continue
        for match in _COMMAND.finditer(line):
            if any("=" in word or "/" in word or word.startswith(("-", "+")) for word in match[1].split()):
                yield number, "command", match[1]


def _commands(block: str) -> Iterator[str]:
    """The logical lines of a block of shell, without comments and without the text of a here-document."""
    block = re.sub(r"(<<'(\w+)'.*\n)(?:.*\n)*?\2$", r"\1", block, flags=re.M)
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        if line.split("#")[0].strip():
            yield line


# Checking


def write_modules(folder: Path) -> None:
    """The user's own modules of docs/extending.md: blocks of Python whose first line is their name."""
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"^```python\n# (my_\w+\.py)\n(.*?)^```$", text, re.M | re.S):
        (folder / name).write_text(code, encoding="utf-8")


class Workshop:
    """A folder with everything that a placeholder may stand for; what would run is only looked at."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        for name in ("model", "data", "stores"):
            (folder / name).mkdir()
        (folder / "my.jsonl").touch()
        write_modules(folder)
        patch.chdir(folder)
        for variable in ("RANK", "SLURM_JOB_ID", "SFTDIST_DATA"):
            patch.delenv(variable, raising=False)
        for run in ("runs/quickstart", "runs/llama8b-4711", str(_quickstart().run.dir)):
            write_config(folder / run, _quickstart())
        write_config(folder / "runs/lora", compose("quickstart", ["tune.method=lora"]))
        for version in (1, 3):
            release = folder / f"registry/support-bot/v{version}"
            release.mkdir(parents=True)
            write_json(release / "release.json", {"name": "support-bot", "version": version})
            write_json(release / "config.json", {})  # a whole model, and no adapter alone
        (release.parent / "latest").write_text("v1\n")
        patch.setattr(multirun, "_carry_out", lambda *given: 0)  # every job has been composed by then
        patch.setattr(ArgumentParser, "parse_args", _parse_only)

    def problem(self, piece: Piece) -> str | None:
        """What is wrong with a piece, or None."""
        try:
            _CHECKS[piece.kind](piece.text)
        except (_Wrong, SyntaxError, yaml.YAMLError, ValueError) as wrong:
            return f"{piece.where}: {piece.text.strip()}: {wrong}"
        return None


@cache
def _quickstart() -> settings.TrainConfig:
    return compose("quickstart")


class _Wrong(Exception):
    pass


class _Parsed(Exception):
    pass


_parse = ArgumentParser.parse_args


def _parse_only(parser: ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
    raise _Parsed(_parse(parser, args, namespace))


def _key(key: str) -> None:
    schemas = [
        value
        for value in vars(settings).values()
        if isinstance(value, type) and issubclass(value, settings.TrainConfig)
    ]
    known = [name for schema in schemas for name, _, _ in options(schema)]
    patterns = [re.escape(name).replace(re.escape(ANY_NAME), r"[^.]+") for name in known]
    if not any(
        re.fullmatch(rf"{pattern}(\..+)?", key) or name.startswith(f"{key}.")
        for name, pattern in zip(known, patterns, strict=True)
    ):
        raise _Wrong("there is no such key")


def _python(code: str) -> None:
    """It compiles, and every name that it imports is there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            found = import_module(str(node.module))  # of a lazy one a name is there when it is asked for
            missing = [alias.name for alias in node.names if not hasattr(found, alias.name)]
            if missing:
                raise _Wrong(f"{node.module} has no {', '.join(missing)}")


def _fence(language: str) -> None:
    raise _Wrong(f"a block of an unknown kind; tests/documents.py knows {', '.join(filter(None, LANGUAGES))}")


def _command(line: str) -> None:
    line = re.sub(r"\[[A-Z=, ]+\.\.\.\]", "", line)  # [KEY=VALUE ...]
    line, *cut = re.split(r"\s\.\.\.", line)
    for placeholder, value in PLACEHOLDERS.items():
        line = re.sub(rf"(?<![\w$]){placeholder}(?!\w)", value, line)
    for part in re.split(r"\s&&\s", line):
        words = [word for word in shlex.split(part, comments=True) if not re.match(r"\d?>(?!=)", word)]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            _one_command(words, whole=not cut)


def _one_command(words: Sequence[str], *, whole: bool) -> None:
    program, *rest = words
    if program in FOREIGN:
        return
    if program not in _RUNNERS:
        raise _Wrong(f"tests/documents.py does not know how to check {program!r}; teach it, or leave the line out")
    if rest:
        _RUNNERS[program](rest if whole else [word for word in rest if "=" not in word])


def _sftdist(words: Sequence[str]) -> None:
    name, *rest = words
    name = "train" if name == "quickstart" else name  # `sftdist X`
    if name not in cli.COMMANDS:
        raise _Wrong(f"there is no command {name}")
    if not rest:
        return  # the command as such
    if rest == ["-m"]:
        return
    sweeper = next((word.partition("=")[2] for word in rest if word.startswith("hydra/sweeper=")), "basic")
    if sweeper != "basic" and find_spec(f"hydra_plugins.hydra_{sweeper}_sweeper") is None:
        return
    composes = not signature(import_module(cli.COMMANDS[name][0]).main).parameters  # others have arguments to parse
    shown = ["--cfg", "job"] if composes and "-m" not in rest and "--help" not in rest else []
    said, code = StringIO(), None
    try:
        with redirect_stderr(said), redirect_stdout(StringIO()):
            code = str(cli.main([name, *rest, *shown]) or "")
    except _Parsed as parsed:
        overrides = vars(parsed.args[0]).get("overrides", [])
        if name == "pipeline":
            return _pipeline(overrides)
        return _sftdist(["train", *overrides]) if overrides else None
    except SystemExit as end:
        code = str(end.code or "")
    if code:
        raise _Wrong(f"exit code {code}: {said.getvalue().strip()}")
    return None


def _pipeline(overrides: Sequence[str]) -> None:
    try:
        pipeline.checked(overrides)
    except SftdistError as error:
        raise _Wrong(str(error)) from error


def _torchrun(words: Sequence[str]) -> None:
    try:
        given = _parse(get_args_parser(), list(words))
    except SystemExit as end:
        raise _Wrong("no command line of torchrun") from end
    if not given.module or not given.training_script.startswith("sftdist."):
        raise _Wrong("required -m sftdist.COMMAND")
    _sftdist([given.training_script.removeprefix("sftdist."), *given.training_script_args])


def _python_command(words: Sequence[str]) -> None:
    if words[0] == "-c":
        compile(words[1], "<command>", "exec")
    elif words[0] == "-m" and words[1].startswith("sftdist."):
        _sftdist([words[1].removeprefix("sftdist."), *words[2:]])
    elif words[0] == "-m":
        if find_spec(words[1]) is None:
            raise _Wrong(f"there is no module {words[1]}")
    else:
        _script(words)


def _script(words: Sequence[str]) -> None:
    """A file of the repository, with options that it knows; what it passes on is checked as that command."""
    file, *rest = words
    if not (ROOT / file).is_file():
        raise _Wrong(f"there is no file {file}")
    text = (ROOT / file).read_text(encoding="utf-8")
    while rest and (file not in WORDS_OF or rest[0].startswith("--")):
        word = rest.pop(0).partition("=")[0]
        if file not in WORDS_OF and not word.startswith("-") and file.endswith(".py"):
            continue
        if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text):
            raise _Wrong(f"{file} has no {word}")
        if file in WORDS_OF:
            rest.pop(0)  # its value
    if file in WORDS_OF:
        _words_of(file, rest)


def _words_of(file: str, words: Sequence[str]) -> None:
    command = WORDS_OF[file].split()
    if command[0] in cli.COMMANDS and words:
        _sftdist([*command, *words])


def _sbatch(words: Sequence[str]) -> None:
    rest = list(words)
    array = any(word.startswith("--array") for word in rest)
    while rest and rest[0].startswith("-"):
        option = rest.pop(0).removeprefix("--").partition("=")[0]
        if option not in SBATCH:
            raise _Wrong(f"tests/documents.py does not know sbatch's --{option}; add it where it exists")
    if not rest or not (ROOT / rest[0]).is_file():
        raise _Wrong(f"there is no file {' '.join(rest[:1])}")
    if rest[0] not in WORDS_OF:
        raise _Wrong(f"{rest[0]} is no job script of ours")
    if not array:
        _words_of(rest[0], rest[1:])
    elif len(rest) != 2:
        raise _Wrong("required one folder behind an array's script")


def _pip(words: Sequence[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"(?:sftdist|\.)\[(\w+)\]", " ".join(words)):
        if not re.search(rf"^{extra} = \[", project, re.M):
            raise _Wrong(f"there is no extra {extra}")


def _docker(words: Sequence[str]) -> None:
    """`docker build` of our file, or `docker run` of the image whose entry point is `sftdist`."""
    action, *rest = words
    rest = _without_options(rest, "docker", DOCKER)
    if action == "run" and rest[:1] == ["sftdist"]:
        _sftdist(rest[1:])
    elif action != "build" or "launch/Dockerfile" not in words or rest != ["."]:
        raise _Wrong("required docker build -f launch/Dockerfile ... . or docker run ... sftdist COMMAND")


def _apptainer(words: Sequence[str]) -> None:
    action, *rest = words
    rest = _without_options(rest, "apptainer", {"--nv": False, "--bind": True})
    if action == "exec" and rest[1:2] == ["sftdist"]:
        _sftdist(rest[2:])
    elif action == "run" and len(rest) > 1:
        _sftdist(rest[1:])
    elif action != "build" or len(rest) != 2 or not (ROOT / rest[1]).is_file():
        raise _Wrong("required apptainer build IMAGE.sif FILE, or exec IMAGE.sif sftdist COMMAND")


def _without_options(words: Sequence[str], program: str, known: Mapping[str, bool]) -> list[str]:
    """The words behind the options; `known`: whether one takes a value."""
    rest = list(words)
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option not in known:
            raise _Wrong(f"tests/documents.py does not know {program}'s {option}; add it where it exists")
        if known[option]:
            rest.pop(0)
    return rest


def _pytest(words: Sequence[str]) -> None:
    missing = [word for word in words if "/" in word and not (ROOT / word.partition("::")[0]).exists()]
    if missing:
        raise _Wrong(f"there is no {missing[0]}")


_RUNNERS = {
    "docker": _docker,
    "apptainer": _apptainer,
    "pytest": _pytest,
    "python3": _python_command,
    "sftdist": _sftdist,
    "torchrun": _torchrun,
    "python": _python_command,
    "bash": _script,
    "sbatch": _sbatch,
    "pip": _pip,
}
_CHECKS = {"command": _command, "key": _key, "python": _python, "yaml": yaml.safe_load, "fence": _fence}
