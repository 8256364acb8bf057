"""A push to a Hub that drops lines, breaks, refuses and lies: only the rest is uploaded again, the tag comes last."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import close_session

from sftdist.core.errors import ConfigError, HubError
from sftdist.release import hub as hub_module
from sftdist.release.hub import push, require_card
from tests.hub_server import Hub, serving

CARD = "---\nlicense: mit\ntags:\n- a\n---\n# A model\n"
PAUSES = (0.0, 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "v1"
    (made / "adapter").mkdir(parents=True)
    (made / "README.md").write_text(CARD)
    for number in range(3):
        (made / f"model-{number}.safetensors").write_bytes(bytes([number]) * (1000 + number))
    (made / "adapter" / "adapter_model.safetensors").write_bytes(b"adapter" * 100)
    (made / "adapter" / "adapter_config.json").write_text("{}")
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    made = Hub()
    with serving(made) as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client itself waits half a minute in each try
        close_session()  # the client of an earlier test knows that it is offline
        yield made
    close_session()


def test_everything_is_there_and_tagged(folder: Path, hub: Hub) -> None:
    said: list[str] = []
    assert push(folder, "me/bot", "v1", say=said.append, pauses=PAUSES) == f"{hub.url}/me/bot"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(hub.tree("v1") or {}) == names | {".gitattributes"}
    assert len(hub.uploaded) == 4
    assert hub.asked["card"] >= 1
    assert said[-1].endswith("6 files as they are here, tagged v1")


def test_everybody_never_sees_the_holdout(folder: Path, hub: Hub) -> None:
    (folder / "report").mkdir()
    for name in ("report.json", "rows.jsonl", "report.html"):
        (folder / "report" / name).write_text("{}")
    hub.private = False
    with pytest.raises(ConfigError, match=r"given a public repository, .*\(report/rows.jsonl, report/report.html\)"):
        push(folder, "me/bot", "v1", pauses=PAUSES)
    assert len(hub.commits) == 1, "nothing was sent"
    push(folder, "me/bot", "v1", rows=False, pauses=PAUSES)
    there = set(hub.tree("v1") or {})
    assert "report/report.json" in there
    assert not {"report/rows.jsonl", "report/report.html"} & there
    hub.private = True
    push(folder, "me/bot", "v2", pauses=PAUSES)
    assert "report/rows.jsonl" in (hub.tree("v2") or {})


@pytest.mark.long
def test_a_second_push_does_nothing_and_a_changed_release_is_refused(folder: Path, hub: Hub) -> None:
    push(folder, "me/bot", "v1", pauses=PAUSES)
    said: list[str] = []
    push(folder, "me/bot", "v1", say=said.append, pauses=PAUSES)
    assert said == [f"{hub.url}/me/bot: v1 is there already, with the same files"]
    assert (len(hub.commits), len(hub.uploaded)) == (2, 4)
    (folder / "model-1.safetensors").write_bytes(b"x" * 1001)
    with pytest.raises(HubError, match="it has a tag v1 of other files; a published version is never changed"):
        push(folder, "me/bot", "v1", pauses=PAUSES)
    assert len(hub.uploaded) == 4


@pytest.mark.long
def test_the_next_version_uploads_what_is_new_and_removes_what_is_gone(folder: Path, hub: Hub) -> None:
    push(folder, "me/bot", "v1", pauses=PAUSES)
    (folder / "model-2.safetensors").unlink()
    (folder / "model-1.safetensors").write_bytes(b"new" * 500)
    push(folder, "me/bot", "v2", pauses=PAUSES)
    assert len(hub.uploaded) == 5
    assert "model-2.safetensors" not in (hub.tree("v2") or {})
    assert "model-2.safetensors" in (hub.tree("v1") or {}), "the earlier version is as it was"


@pytest.mark.long
@pytest.mark.parametrize("status", [0, 500, 503, 429])
def test_a_hub_that_fails_at_the_third_file(folder: Path, hub: Hub, status: int) -> None:
    """It goes on with that file, also in the next push; nothing is tagged or committed before."""

    def fails(method: str, path: str) -> int | None:
        return status if path.startswith("/store/") and len(hub.uploaded) == 2 and method == "PUT" else None

    hub.fault = fails
    with pytest.raises(HubError, match="failed 3 times") as refused:
        push(folder, "me/bot", "v1", pauses=PAUSES)
    assert "push it again: sftdist release push, which uploads only what is missing" in str(refused.value)
    assert (len(hub.commits), hub.tags, len(hub.uploaded)) == (1, {}, 2)
    hub.fault = lambda method, path: None
    push(folder, "me/bot", "v1", pauses=PAUSES)
    assert len(hub.uploaded) == len(set(hub.uploaded)) == 4
    assert list(hub.tags) == ["v1"]


@pytest.mark.long
def test_a_fault_that_passes_costs_a_pause(folder: Path, hub: Hub) -> None:
    left = {"PUT": 1, "POST": 1, "GET": 1}

    def once(method: str, path: str) -> int | None:
        left[method] -= 1
        return 0 if left[method] == 0 else None

    hub.fault = once
    said: list[str] = []
    push(folder, "me/bot", "v1", say=said.append, pauses=(*PAUSES, 0.0))
    assert list(hub.tags) == ["v1"]
    assert any("the next try is in 0 s" in line for line in said)


def test_a_refused_card_stops_everything_before_the_first_upload(folder: Path, hub: Hub) -> None:
    hub.card = '"license" must be one of [apache-2.0, mit]'
    with pytest.raises(HubError, match=r"the Hub refuses the model card .*must be one of"):
        push(folder, "me/bot", "v1", pauses=PAUSES)
    assert (hub.uploaded, len(hub.commits), hub.tags) == ([], 1, {})
    assert hub.asked["card"] == 1, "it is not asked again"


@pytest.mark.parametrize("status", [403])
def test_a_refusal_is_not_tried_again(folder: Path, hub: Hub, status: int) -> None:
    hub.fault = lambda method, path: status
    said: list[str] = []
    with pytest.raises(HubError, match="me/bot: making it was refused"):
        push(folder, "me/bot", "v1", say=said.append, pauses=PAUSES)
    assert said == []


def test_files_that_arrive_as_others_are_not_tagged(folder: Path, hub: Hub) -> None:
    hub.corrupt = True
    with pytest.raises(HubError, match=r"after the upload README.md, adapter/adapter_config.json are not as they are"):
        push(folder, "me/bot", "v1", pauses=PAUSES)
    assert hub.tags == {}


def test_offline_and_bad_names_are_said_at_once(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="hub: given 'no good'"):
        push(folder, "no good", "v1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(folder, "me/bot", "v1", pauses=PAUSES)
    assert not hub.asked


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("# no header", "given no header"),
        ("---\nlicense: [mit\n---\n", "its header is no valid card"),
        ("---\njust words\n---\n", "its header is no valid card"),
        ("---\nlicense: null\n---\n", "no value for license"),
        ("---\nmodel-index:\n- name: a\n  results: [{task: {type: b}}]\n---\n", "its header is no valid card"),
        ("---\nbase_model: /data/my base\n---\n", "base_model: given '/data/my base'"),
    ],
)
def test_cards_that_the_hub_would_refuse(card: str, words: str) -> None:
    """A server's own rules are its own; these are known here, without one. (`config: null`: transformers#28137.)"""
    with pytest.raises(ConfigError, match=words):
        require_card(card)
    require_card(CARD)
    assert hub_module.CARD == "README.md"
