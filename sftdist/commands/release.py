"""`sftdist release list | verify | diff | rollback | push`: what is in the registry, and whether it is still that."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sftdist.commands.release_view import listing, rows_of_listing
from sftdist.core import snapshot
from sftdist.core.errors import CheckpointError, GateError, SftdistError
from sftdist.core.releases import RELEASE, find, names
from sftdist.core.table import columns
from sftdist.data.comparison import data_changes
from sftdist.data.manifest import MANIFEST
from sftdist.fresh_answer import QUESTION, answer_of
from sftdist.release.changelog import Changes, Contents, changes
from sftdist.release.hub import push
from sftdist.release.registry import in_registry, require_unchanged, rollback


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 for a release that does not exist, 4 for one that is not what was published, 1 where the Hub
    cannot be reached. argparse ends with 2 where an argument is wrong."""
    given = _parser().parse_args(argv)
    work: Callable[[argparse.Namespace], None] = _WORK[given.verb]
    try:
        work(given)
    except SftdistError as error:
        print(f"sftdist release: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sftdist release", description="The releases of a registry.")
    verbs = parser.add_subparsers(required=True, dest="verb")
    add = partial(_verb, verbs)
    one = add("list", "every release, the one in use marked")
    one.add_argument("name", nargs="?", help="of this name alone")
    one.add_argument("--json", action="store_true", help="for programs")
    one = add("verify", "every byte of a release, then load it in a fresh process and ask it one question")
    one.add_argument("release", metavar="NAME@vN", help="NAME alone is the one in use")
    one.add_argument("--bytes-only", action="store_true", help="do not load it")
    one = add("diff", "what changed from one release to another: data, mixture, settings, metrics, files")
    one.add_argument("old", metavar="A", help="NAME@vN")
    one.add_argument("new", metavar="B", help="NAME@vN")
    one.add_argument("--json", action="store_true", help="for programs")
    one.add_argument("--stores", type=Path, action="append", metavar="DIR", help="where the token stores are")
    one = add("rollback", "make another release the one in use; nothing is removed, and the log keeps it")
    one.add_argument("release", metavar="NAME@vN")
    one = add("push", "a release to the Hugging Face Hub; one that broke off goes on where it was")
    one.add_argument("release", metavar="NAME@vN")
    one.add_argument("repo", metavar="REPO", help="such as my-team/support-bot")
    one.add_argument("--public", action="store_true", help="a repository that is new is public; default: private")
    one.add_argument("--without-rows", action="store_true", help="leave out the holdout's prompts and the answers")
    return parser


def _verb(verbs: Any, name: str, words: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=words, description=words)
    parser.add_argument("--registry", type=Path, default=Path("registry"), metavar="DIR", help="default: registry")
    return parser


def show_list(given: argparse.Namespace) -> None:
    if given.name is not None:
        find(given.registry, given.name)  # a name that does not exist is an error, not an empty list
    wanted = [given.name] if given.name else names(given.registry)
    found = [row for name in wanted for row in listing(given.registry, name)]
    if given.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif not found:
        print(f"no release in {given.registry}")
    else:
        for line in columns(rows_of_listing(found)):
            print(line.rstrip())


def verify(given: argparse.Namespace) -> None:
    """Raises GateError with everything that is not as it was published."""
    release = find(given.registry, given.release)
    require_unchanged(release)
    facts = release.facts()
    size = sum(entry["bytes"] for entry in facts["files"].values())
    print(
        f"{release}: {len(facts['files'])} files, {size:,} bytes, each as it was published on {facts['created'][:10]}"
    )
    if not in_registry(release):
        print(f"{release.path}: lies in no registry, so that {RELEASE} itself is held against no log")
    if given.bytes_only:
        return
    try:
        answer = answer_of(release.path)
    except CheckpointError as problem:
        raise GateError(f"{release}: {problem}") from problem
    print(f"{release}: it loads in a fresh process; asked {QUESTION!r} it says {answer!r}")


def show_diff(given: argparse.Namespace) -> None:
    old, new = (find(given.registry, reference) for reference in (given.old, given.new))
    stores = given.stores or [Path(snapshot.read_config(one.path).data.store_dir) for one in (old, new)]
    data = data_changes(old.path / MANIFEST, new.path / MANIFEST, stores)
    found = changes(Contents.of(old.path), Contents.of(new.path), data)
    if given.json:
        print(json.dumps({"old": str(old), "new": str(new), **_plain(found)}, indent=2, ensure_ascii=False))
        return
    print(f"from {old} to {new}")
    for title, lines in found.sections().items():
        print(f"\n{title}")
        for line in lines:
            print(f"  {line}")


def _plain(found: Changes) -> dict[str, Any]:
    return {name: list(lines) for name, lines in vars(found).items()}


def roll_back(given: argparse.Namespace) -> None:
    before, now = rollback(given.registry, given.release)
    print(f"{now.name}: in use is v{now.version} now; before it was {before or 'nothing'}")


def push_one(given: argparse.Namespace) -> None:
    release = find(given.registry, given.release)
    require_unchanged(release)
    said, rows = partial(print, flush=True), not given.without_rows
    push(release.path, given.repo, f"v{release.version}", private=not given.public, rows=rows, say=said)


_WORK: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "list": show_list,
    "verify": verify,
    "diff": show_diff,
    "rollback": roll_back,
    "push": push_one,
}


if __name__ == "__main__":
    sys.exit(main())
