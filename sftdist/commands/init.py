"""`sftdist init NAME --model DIR --data FILE`: an experiment, a gate and a job for your own model and data, every value
with its reason."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sftdist.commands.init_parts.answer_kind import Kind
from sftdist.commands.init_parts.data_facts import SHOWN, DataFacts, look_at_data
from sftdist.commands.init_parts.files import texts_of
from sftdist.commands.init_parts.machine import machine_of
from sftdist.commands.init_parts.method import choose_method
from sftdist.commands.init_parts.model_facts import look_at_model
from sftdist.commands.init_parts.size import size_of
from sftdist.commands.init_parts.values import Seen, kind_in_words
from sftdist.core.errors import ConfigError, SftdistError
from sftdist.core.shipped import shipped_folder
from sftdist.core.storage import write_text
from sftdist.data.sources import Source, parts_of
from sftdist.data.summary import FEW_STEPS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
TO_DO = 1  # the exit code where files were written, and the data has to be mended before they run


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where rows of the data have to be mended first; 2 or 3 where nothing was written."""
    given = _parser().parse_args(argv)
    try:
        return _init(given)
    except SftdistError as error:
        print(f"sftdist init: error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sftdist init",
        description="Looks at a model and a data file, and writes conf/exp/NAME.yaml, conf/gate/NAME.yaml and "
        "slurm/NAME.sbatch with values that fit, each with its reason. It trains with: sftdist train +exp=NAME",
    )
    parser.add_argument("name", metavar="NAME", help="of the experiment and its gate")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model folder or Hub name")
    parser.add_argument("--data", required=True, metavar="FILE", help="a file, folder, glob or hub:NAME")
    parser.add_argument("--val", metavar="FILE", help="your own validation rows; default: a part of the data")
    parser.add_argument(
        "--gpus", type=_count, metavar="N", help="to train on; default: those of this machine, else one CPU rank"
    )
    parser.add_argument("--gpu", metavar="KIND", help="h100, a100, rtx-4090, ...; default: this machine's, or h100")
    parser.add_argument("--memory-gib", type=_above_zero, metavar="M", help="of one GPU; default: what it has")
    parser.add_argument("--folder", type=Path, default=Path(), help="the files are written below it; default: here")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"given {text}, required a whole number of at least 1")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"given {text}, required a number above 0")
    return value


def _init(given: argparse.Namespace) -> int:
    _refuse_name(given.name)
    planned = [given.folder / file for file in _files(given.name)]
    _refuse_present(planned, force=given.force)
    machine = machine_of(given.gpus, given.gpu, given.memory_gib)
    if given.val is not None:
        parts_of(Source("validation", given.val, key="--val"))
    model = look_at_model(given.model)
    data = look_at_data(given.data, model.chat)
    device = "cpu" if machine.on_cpu else "cuda"
    size = size_of(data, model.context, machine.cluster.gpus, device, own_validation=given.val is not None)
    fit = choose_method(model, data, size, machine)
    contract = None if data.answers.kind is Kind.text else _files(given.name)[-1]
    seen = Seen(given.name, model, data, machine, fit, given.val, contract)
    for file, text in texts_of(seen, given.folder).items():
        path = given.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    _report(seen, given.folder)
    return TO_DO if data.problems else 0


def _files(name: str) -> tuple[str, ...]:
    """What is written, the contract only where answers have a form."""
    return f"conf/exp/{name}.yaml", f"conf/gate/{name}.yaml", f"slurm/{name}.sbatch", f"conf/contract/{name}.yaml"


def _refuse_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(f"NAME: given {name!r}, required letters, digits, '_' and '-'")
    if taken := [file for file in _files(name) if (shipped_folder(file.partition("/")[0]).parent / file).is_file()]:
        raise ConfigError(f"NAME: given {name}, which sftdist has itself ({', '.join(taken)}); choose another")


def _refuse_present(paths: Sequence[Path], *, force: bool) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        raise ConfigError(f"{', '.join(there)}: there already; give another NAME, or --force to replace it")


def _report(seen: Seen, folder: Path) -> None:
    """On the screen: what was seen, what was chosen, what to do next."""
    data, size, fit = seen.data, seen.fit.size, seen.fit
    print(f"model    {seen.model.path}: {seen.model.size} parameters")
    print(f"data     {data.path}: {data.seen}; {data.mean:,.0f} tokens each; {kind_in_words(seen)}")
    print(f"machine  {seen.machine}")
    print(f"method   {fit.method.value}. {fit.why}")
    print(
        f"steps    about {size.steps:,} of {size.packs} x {size.pack_tokens:,} tokens in {size.epochs:g} epochs; "
        f"max_len {size.max_len:,}"
    )
    print()
    for line in _cautions(seen):
        print(line)
    for file in _files(seen.name):
        if file != _files(seen.name)[-1] or seen.contract is not None:
            print(f"written: {folder / file}")
    if folder.resolve() != Path.cwd():
        print(f"next: cd {folder}, then")
    words = f" {seen.machine.plan_words}" if seen.machine.plan_words else ""
    print(f"next: sftdist prepare +exp={seen.name}")
    print(f"      sftdist plan +exp={seen.name}{words}")
    print(f"      sftdist train +exp={seen.name}")
    print(f"or all of it, to a release: sftdist pipeline +exp={seen.name} name={seen.name}")


def _cautions(seen: Seen) -> list[str]:
    found = [*_problems(seen.data)]
    if seen.fit.size.steps < FEW_STEPS:
        found.append(
            f"NOTE: only about {seen.fit.size.steps} steps; a fine-tune usually needs {FEW_STEPS} or more: more data "
            "would help"
        )
    return [*found, ""] if found else []


def _problems(data: DataFacts) -> list[str]:
    if not data.problems:
        return []
    count = len(data.problems)
    return [
        f"BEFORE IT RUNS: {count:,} of {data.looked:,} rows that were looked at cannot be trained on. Mend them, or "
        "leave them out with data.max_bad_rows and data.max_refused; sftdist prepare lists them all. The first ones:",
        *(f"  {problem}" for problem in data.problems[:SHOWN]),
    ]


if __name__ == "__main__":
    sys.exit(main())
