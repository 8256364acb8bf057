"""A release on the Hugging Face Hub: the card first, then what is missing, and the tag when every hash is right.

A push that breaks off has tagged nothing, and goes on where it was: what the Hub holds already is recognised by its
hash. Large files go up one by one and are not seen before the one commit that names them all.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from sftdist.core.errors import ConfigError, HubError
from sftdist.core.snapshot import one_line
from sftdist.core.storage import sha256_file
from sftdist.release.registry import HOLDOUT_ROWS

CARD = "README.md"
_KEPT = {".gitattributes"}  # the Hub's own
_PAUSES = (1.0, 4.0, 15.0, 60.0)  # seconds between tries
_BUSY = (408, 425, 429)
_OF_A_MODEL = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
T = TypeVar("T")


def require_card(text: str) -> None:
    """Raises ConfigError where the header of a model card is none that the Hub takes, as far as it can be told here."""
    before, *rest = text.split("---\n", 2)
    if before or len(rest) != 2:
        raise ConfigError(f"{CARD}: given no header, required one in YAML between two lines of ---")
    try:
        header = yaml.safe_load(rest[0])
        ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as problem:
        raise ConfigError(f"{CARD}: its header is no valid card ({one_line(problem)})") from problem
    if absent := [key for key, value in _flat(header) if value is None]:
        raise ConfigError(f"{CARD}: no value for {', '.join(absent)}; the Hub refuses such a header: leave the key out")
    for key, base in _flat(header):
        if key == "base_model":
            _require_id(key, str(base))


def push(
    folder: Path,
    repo: str,
    tag: str,
    *,
    private: bool = True,
    rows: bool = True,
    say: Callable[[str], None] = lambda text: None,
    pauses: tuple[float, ...] = _PAUSES,
) -> str:
    """Make the repository hold exactly the files of a release, tag it, and return its address.

    `rows=False` leaves out the files that show the holdout's prompts and the answers; a public repository is not given
    them. Raises HubError where the Hub refuses it, or cannot be reached in as many tries as there are `pauses`, and
    ConfigError where the name or the card cannot be right, or where everybody would see the holdout.
    """
    _require_id("hub", repo)
    text = (folder / CARD).read_text(encoding="utf-8")
    require_card(text)
    return _Push(folder, repo, tag, say, pauses, () if rows else HOLDOUT_ROWS).run(text, private)


class _Push:
    """One push under way."""

    def __init__(
        self,
        folder: Path,
        repo: str,
        tag: str,
        say: Callable[[str], None],
        pauses: tuple[float, ...],
        left_out: Sequence[str],
    ) -> None:
        if not sys.stderr.isatty():
            disable_progress_bars()  # in a log each of them would be many lines
        self._api = HfApi(library_name="sftdist")
        self._folder, self._repo, self._tag, self._say, self._pauses = folder, repo, tag, say, pauses
        files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self._files = sorted(set(files) - set(left_out))
        self._hashes: dict[tuple[str, bool], str] = {}

    def run(self, card: str, private: bool) -> str:
        address = f"{self._api.endpoint}/{self._repo}"
        self._patiently("making it", lambda: self._api.create_repo(self._repo, private=private, exist_ok=True))
        self._patiently("looking at who sees it", self._require_nobody_sees_the_holdout)
        self._patiently("checking the card", lambda: self._check_card(card))
        tagged = self._patiently("reading its tags", lambda: self._api.list_repo_refs(self._repo).tags)
        if self._tag in (ref.name for ref in tagged):
            if self._differences(self._tag):
                raise HubError(
                    f"{address}: it has a tag {self._tag} of other files; a published version is never changed: "
                    "push to another repository, or remove the tag there"
                )
            self._say(f"{address}: {self._tag} is there already, with the same files")
            return address
        revision = self._upload()
        if wrong := self._patiently("reading it back", lambda: self._differences(revision)):
            raise HubError(f"{address}: after the upload {', '.join(wrong[:5])} are not as they are here; push again")
        self._patiently("tagging it", lambda: self._make_tag(revision))
        self._say(f"{address}: {len(self._files)} files as they are here, tagged {self._tag}")
        return address

    def _require_nobody_sees_the_holdout(self) -> None:
        shown = [name for name in HOLDOUT_ROWS if name in self._files]
        if shown and not self._api.repo_info(self._repo).private:
            raise ConfigError(
                f"{self._repo}: given a public repository, where everybody would see the holdout's prompts and the "
                f"answers ({', '.join(shown)}); leave them out (release push --without-rows, publish hub_rows=false), "
                "or push to a private one"
            )

    def _check_card(self, card: str) -> None:
        """The Hub's own judgement, before anything is uploaded."""
        try:
            ModelCard(card).validate()
        except ValueError as problem:
            raise HubError(f"the Hub refuses the model card {self._folder / CARD}: {problem}") from problem

    def _upload(self) -> str:
        """Upload what is missing; the commit that holds it all."""
        wrong = self._patiently("reading it", lambda: self._differences("main"))
        if not wrong:
            return str(self._patiently("reading it", lambda: self._api.repo_info(self._repo).sha))
        local = set(self._files)
        new = [CommitOperationAdd(name, self._folder / name) for name in wrong if name in local]
        old = [CommitOperationDelete(name) for name in wrong if name not in local]
        for number, one in enumerate(new, 1):
            self._say(f"{number} of {len(new)} files to upload: {one.path_in_repo}")
            upload = partial(self._api.preupload_lfs_files, self._repo, [one], free_memory=False)
            self._patiently(f"uploading {one.path_in_repo}", upload)
        done = self._patiently(
            "the commit",
            lambda: self._api.create_commit(self._repo, [*new, *old], commit_message=f"sftdist release {self._tag}"),
        )
        return str(done.oid)

    def _make_tag(self, revision: str) -> None:
        self._api.create_tag(self._repo, tag=self._tag, revision=revision)

    def _differences(self, revision: str) -> list[str]:
        """The files that are not there as they are here: missing, other, or only there."""
        tree = self._api.list_repo_tree(self._repo, recursive=True, revision=revision)
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        wrong = [name for name in self._files if name not in there or not self._is_same(name, there[name])]
        return wrong + sorted(set(there) - set(self._files) - _KEPT)

    def _is_same(self, name: str, there: RepoFile) -> bool:
        if (self._folder / name).stat().st_size != there.size:
            return False
        if there.lfs is not None:
            return self._hash(name, large=True) == there.lfs.sha256
        return self._hash(name, large=False) == there.blob_id

    def _hash(self, name: str, *, large: bool) -> str:
        """The hash by which the Hub knows a file: sha256 of a large one, git's own of the others."""
        if (name, large) not in self._hashes:
            path = self._folder / name
            self._hashes[name, large] = sha256_file(path) if large else _git_hash(path)
        return self._hashes[name, large]

    def _patiently(self, what: str, work: Callable[[], T]) -> T:
        """Try again where the fault may pass: a lost connection, a server that is busy or broken."""
        for pause in (*self._pauses, None):
            try:
                return work()
            except OfflineModeIsEnabled:
                raise HubError(f"{self._repo}: HF_HUB_OFFLINE is set; unset it to push to the Hub") from None
            except (HTTPError, RuntimeError, ConnectionError) as problem:  # RuntimeError: what an upload ends with
                if not _may_pass(problem):
                    raise HubError(f"{self._repo}: {what} was refused: {_words(problem)}") from problem
                if pause is None:
                    raise HubError(
                        f"{self._repo}: {what} failed {len(self._pauses) + 1} times ({_words(problem)}). The release "
                        f"is in the registry, and nothing is tagged {self._tag} there; push it again: sftdist release "
                        "push, which uploads only what is missing"
                    ) from problem
                self._say(f"{what} failed ({_words(problem)}); the next try is in {pause:g} s")
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")


def _may_pass(problem: Exception) -> bool:
    """Whether another try may end better; the cause of an upload's failure is what counts."""
    cause = problem.__cause__ if isinstance(problem, RuntimeError) else problem
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code >= 500 or cause.response.status_code in _BUSY
    return True


def _words(problem: Exception) -> str:
    cause = problem.__cause__ if isinstance(problem, RuntimeError) and problem.__cause__ else problem
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


def _git_hash(path: Path) -> str:
    """What git calls a file of this content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _require_id(key: str, name: str) -> None:
    try:
        validate_repo_id(name)
    except ValueError as problem:
        raise ConfigError(f"{key}: given {name!r}, required a name on the Hub such as my-team/support-bot") from problem


def _flat(value: object, key: str = "") -> Iterable[tuple[str, object]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _flat(inner, key)
    else:
        yield key, value


def is_repository(name: str) -> bool:
    """Whether a name can be that of a repository: OWNER/NAME."""
    return name.count("/") == 1 and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def downloaded(repo: str, revision: str | None = None) -> Path:
    """The files of a model on this machine, as transformers keeps them. Raises ConfigError where they cannot be had."""
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_OF_A_MODEL))
    except (HTTPError, OSError, ValueError) as problem:
        raise ConfigError(f"{repo}: given no folder, and the Hub does not give it: {one_line(problem)}") from problem
