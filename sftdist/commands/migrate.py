"""`sftdist migrate FILE`: a YAML of Axolotl, LLaMA-Factory or TRL as an experiment of ours, every key accounted for."""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sftdist.commands.migrate_peers.account import Account, Kind
from sftdist.commands.migrate_peers.page import experiment, report, table
from sftdist.commands.migrate_peers.peers import PEERS, migrate, whose
from sftdist.commands.migrate_peers.rule import Peer
from sftdist.core.errors import ConfigError
from sftdist.core.mix import expand
from sftdist.core.rules import check
from sftdist.core.settings import TrainConfig
from sftdist.core.shipped import shipped_folder
from sftdist.core.snapshot import read_values, read_yaml
from sftdist.core.storage import write_text

TO_DO = 1  # the exit code of a file that was written, and that does not run yet


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 where something has to be filled in before it runs; 2 where nothing was written."""
    given = _parser().parse_args(argv)
    try:
        if given.keys is not None:
            print("\n".join(table(PEERS[given.keys])))
            return 0
        return _migrate(given)
    except ConfigError as error:
        print(f"sftdist migrate: error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sftdist migrate",
        description="Turns a YAML file of Axolotl, LLaMA-Factory or TRL (trl sft --config) into conf/exp/NAME.yaml, "
        "and says what was carried over, what was not, and what means something else here.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the peer's YAML file")
    parser.add_argument("--name", help="of the experiment; default: the file's name")
    parser.add_argument("--folder", type=Path, default=Path(), help="conf/exp is written below it; default: here")
    parser.add_argument("--from", dest="peer", choices=PEERS, help="whose file it is; default: its keys say")
    parser.add_argument(
        "--gpus", type=_count, default=1, metavar="N", help="of the peer's job: its step is batch x accumulation x GPUs"
    )
    parser.add_argument("--keep-going", action="store_true", help="write the file in spite of unknown keys")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument("--keys", choices=PEERS, help="print what becomes of each key of a peer, as a table")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"given {text}, required a whole number of at least 1")
    return int(text)


def _migrate(given: argparse.Namespace) -> int:
    if given.file is None:
        raise ConfigError("given no file; required a YAML file of Axolotl, LLaMA-Factory or TRL")
    if not given.file.is_file():
        raise ConfigError(f"{given.file}: not there; give the YAML file that the peer trains with")
    values = read_yaml(given.file)
    if odd := [key for key in values if not isinstance(key, str)]:
        raise ConfigError(f"{given.file}: given the keys {', '.join(map(repr, odd))}, required names; correct the file")
    peer = PEERS[given.peer] if given.peer else whose(values)
    name = _checked(given.name) if given.name else _name(given.file, peer)
    target = given.folder / "conf" / "exp" / f"{name}.yaml"
    if target.exists() and not given.force:
        raise ConfigError(f"{target}: is there already; give another --name, or --force to replace it")
    account = migrate(values, peer, folder=Path(), gpus=given.gpus)
    unknown = [note.key for note in account.notes if note.kind is Kind.unknown]
    _look_over(account)
    print(f"{given.file}: {peer.title}, {len(values)} keys")
    print("\n".join(["", *report(account), ""]))
    if unknown and not given.keep_going:
        raise ConfigError(
            f"{given.file}: {', '.join(unknown)}: not known as keys of {peer.title}; nothing was written. Correct "
            "or remove them, or leave them out with --keep-going"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, experiment(account, peer, given.file.name, name))
    print(f"written: {target}")
    print(f"next: sftdist prepare +exp={name}, sftdist plan +exp={name}, sftdist train +exp={name}")
    return TO_DO if account.needs else 0


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigError(f"--name: given {name!r}, required letters, digits, '_' and '-'")
    if name in _shipped():
        raise ConfigError(f"--name: given {name}, the name of a preset that sftdist brings; give another")
    return name


def _name(file: Path, peer: Peer) -> str:
    """The file's; `lora.yml` is a common one, and +exp=lora would find the preset of that name first."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", file.name.partition(".")[0]).strip("_-") or "migrated"
    return f"{name}_{peer.name}" if name in _shipped() else name


def _shipped() -> set[str]:
    return {path.stem for path in (shipped_folder("conf") / "exp").glob("*.yaml")}


def _look_over(account: Account) -> None:
    """What the rules of a configuration still find in the file is to be done before it runs."""
    tree: dict[str, object] = {}
    for key, value in account.values.items():
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            inner = node.setdefault(section, {})
            assert isinstance(inner, dict)
            node = inner
        node[leaf] = copy.deepcopy(value)
    issues: list[str] = []
    cfg = read_values(tree, TrainConfig, issues)
    issues += expand(cfg.data, lambda name: (None, [f"data.mix={name}: no mixture of that name"]))
    for issue in dict.fromkeys([*issues, *check(cfg)]):
        account.need(issue)


if __name__ == "__main__":
    sys.exit(main())
