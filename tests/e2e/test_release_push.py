"""`sftdist release push` as a user types it, to a Hub on this machine: what arrives, and what is refused first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sftdist.core.releases import Release
from sftdist.release.registry import Draft, Entries, release
from tests.hub_server import Hub, serving

CARD = "---\nlicense: mit\n---\n# A model\n"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    with serving(made):
        yield made


def published(folder: Path) -> Release:
    def fill(draft: Path) -> Entries:
        (draft / "model.safetensors").write_bytes(bytes(1000))
        (draft / "README.md").write_text(CARD)
        return {}

    def describe(draft: Draft) -> Mapping[str, Any]:
        return {"model_sha256": "abc"}

    return release(folder / "registry", "bot", fill, describe)


def push(folder: Path, hub: Hub, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    environment = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    return subprocess.run(
        [sys.executable, "-m", "sftdist.cli", "release", "push", *words],
        cwd=folder,
        env={**environment, **own, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_release_arrives_whole_and_tagged(tmp_path: Path, hub: Hub) -> None:
    made = published(tmp_path)
    done = push(tmp_path, hub, "bot@v1", "me/bot")
    assert done.returncode == 0, done.stderr
    names = {path.relative_to(made.path).as_posix() for path in made.path.rglob("*") if path.is_file()}
    assert set(hub.tree("v1") or {}) == {*names, ".gitattributes"}
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/bot: {len(names)} files as they are here, tagged v1"
    again = push(tmp_path, hub, "bot", "me/bot")
    assert again.stdout == f"{hub.url}/me/bot: v1 is there already, with the same files\n"


def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(tmp_path: Path, hub: Hub) -> None:
    made = published(tmp_path)
    for words, code, said in (
        (("bot@v7", "me/bot"), 2, "bot@v7"),
        (("bot@v1", "me/bot/more"), 2, "given 'me/bot/more', required a name on the Hub"),
    ):
        done = push(tmp_path, hub, *words)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert done.stderr.startswith("sftdist release: error: ")
        assert said in done.stderr
    (made.path / "README.md").chmod(0o644)
    (made.path / "README.md").write_text(CARD + "more\n")
    done = push(tmp_path, hub, "bot@v1", "me/bot")
    assert done.returncode == 4
    assert "bot@v1 is not what was published:\nregistry/bot/v1/README.md: 36 bytes" in done.stderr
    assert not hub.asked


def test_a_hub_that_refuses_is_said_in_one_line(tmp_path: Path, hub: Hub) -> None:
    published(tmp_path)
    hub.fault = lambda method, path: 403
    done = push(tmp_path, hub, "bot@v1", "me/bot")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("sftdist release: error: ")
    assert "me/bot" in line
    done = push(tmp_path, hub, "bot@v1", "me/bot", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "Traceback" not in done.stderr
