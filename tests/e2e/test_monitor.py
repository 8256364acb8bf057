"""`sftdist monitor` on a release in a registry: exit codes for cron, the report, the page, the holdout asked again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sftdist import cli, monitor
from sftdist.assets import desk
from sftdist.core import releases
from sftdist.core.settings import PublishConfig, RowShape
from sftdist.core.snapshot import write_config
from sftdist.core.storage import read_json, read_jsonl, write_json, write_jsonl, write_manifest
from sftdist.data.message import Message
from sftdist.data.schema import Conversation, parse
from sftdist.evals.aggregate import metrics_of, rows_of
from sftdist.evals.decoding import Decoding
from sftdist.evals.features import features_of
from sftdist.evals.generate import ask
from sftdist.evals.lineup import Measures, probes_of
from sftdist.evals.live import Forms, answer_counts, write_forms
from sftdist.evals.profile import PROFILE, ProfiledPrompt, profile_of
from sftdist.evals.prompts import Prompt
from sftdist.evals.report import ROWS, EvalReport, ModelFacts
from sftdist.evals.suite import scored
from sftdist.release import registry
from tests.browser import look, needs_browser
from tests.chat_server import said, serving
from tests.evaluated import BASE
from tests.live_prompts import answer, prompt
from tests.pages import foreign_parts

PROFILED, HELD_OUT, LIVE = range(600), range(600, 660), range(660, 800)
QUESTIONS = 24
TOKENS = 8
EVIL = "</script><b>bold</b> <img src=http://evil.example/x> {{ 7 * 7 }}"
Row = dict[str, Any]


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with `bot@v1`: the quickstart's base model, a profile, a schema, and its evaluation."""
    home = tmp_path_factory.mktemp("monitored")
    write_json(home / "ticket.json", desk.SCHEMA)

    def fill(folder: Path) -> registry.Entries:
        shutil.copytree(BASE, folder, dirs_exist_ok=True)
        write_forms(folder, {}, {"format": home / "ticket.json"})
        held = [(s, i) for s in ("domain", "format") for i in HELD_OUT]
        profile = profile_of(ProfiledPrompt(prompt(s, i), s) for s in ("domain", "format") for i in PROFILED)
        asked = features_of([prompt(*one) for one in held])
        counts = answer_counts(profile.model, asked, [answer(*one) for one in held], Forms.read(folder))
        replace(profile, answers=counts.to_json()).write(folder / PROFILE)
        _evaluated(folder)
        return {}

    registry.release(home / "registry", "bot", fill, lambda draft: {})
    return home


def _evaluated(folder: Path) -> None:
    """What the base model says to a few prompts that it can answer."""
    prompts = [
        Prompt(f"general/{i}", "general", (Message("user", f"Say again: {desk.PRODUCTS[i % 12]} {i}"),), "lamp")
        for i in range(QUESTIONS)
    ]
    decoding = Decoding(max_new_tokens=TOKENS)
    said = ask(folder, prompts, max_new_tokens=TOKENS)
    probes = probes_of(Measures(["task", "behaviour"]))
    prompts = [replace(one, reference=answer.text) for one, answer in zip(prompts, said, strict=True)]
    given = scored(prompts, {one.id: answer for one, answer in zip(prompts, said, strict=True)}, probes)
    known = {metric.name: metric for probe in probes for metric in probe.metrics}
    facts = ModelFacts("bot", "0" * 64)
    report = EvalReport("now", "holdout", facts, None, decoding.facts(), {}, metrics_of(prompts, known, given, None))
    report.write(folder / "report")
    write_jsonl(folder / "report" / ROWS, rows_of(prompts, given, None))
    cfg = PublishConfig()
    cfg.evals.probes = ["task", "behaviour"]
    cfg.data.store_dir = str(folder.parent / "none here")
    write_config(folder / "report", cfg)


@pytest.fixture
def home(registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the registry; the reports of each test are its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "registry").symlink_to(registered / "registry")
    return tmp_path


def traffic(name: str, rows: Iterable[Row]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def usual() -> list[Row]:
    return [{"prompt": prompt(s, i), "answer": answer(s, i)} for s in ("domain", "format") for i in LIVE]


def shifted() -> list[Row]:
    """A fifth comes from another source."""
    return [*usual(), *({"prompt": prompt("general", i)} for i in range(70))]


def run(*words: str) -> int:
    return cli.main(["monitor", "release=bot@v1", "report=out", *words])


def test_usual_traffic_is_no_drift(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic("live.jsonl", usual())
    assert run("traffic=live.jsonl") == 0
    assert "no drift" in capsys.readouterr().out
    report = read_json(Path("out/monitor.json"))
    assert (report["drift"], report["regressed"], report["release"]) == (False, False, "bot@v1")
    assert report["traffic"]["answers"] == report["traffic"]["rows"] == 280
    assert {"length", "language", "words", "topic", "source", "typical", "out_of_profile", "answer_length"} <= {
        one["name"] for one in report["statistics"]
    }
    assert foreign_parts(Path("out/monitor.html").read_text()) == []


def test_drift_is_exit_4_with_examples_and_rows_to_label(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic("live.jsonl", [*shifted(), *[{"prompt": f"{EVIL} number {i} of many"} for i in range(3)]])
    assert run("traffic=live.jsonl", "to_label=next/rows.jsonl", "to_label_rows=30") == 4
    shown = capsys.readouterr().out
    assert "prompts that are hardly like those of the profile" in shown
    report = read_json(Path("out/monitor.json"))
    assert report["drift"]
    assert len(report["findings"]) >= 3
    assert foreign_parts(Path("out/monitor.html").read_text()) == []
    rows = list(read_jsonl(Path("next/rows.jsonl")))
    assert report["to_label"] == {"file": "next/rows.jsonl", "rows": len(rows)}
    assert 20 <= len(rows) <= 30
    general = {prompt("general", i) for i in range(70)}
    assert sum(row["messages"][-1]["content"] in general for row in rows) >= len(rows) - 4
    for row in rows:
        row["messages"].append({"role": "assistant", "content": "The answer."})
        assert isinstance(parse(row, RowShape.auto, file="rows.jsonl", line=1, id=None), Conversation)


def test_worse_answers_to_usual_prompts_are_drift(home: Path) -> None:
    rows = [
        row | ({"answer": "I'm sorry, but I can't help with that."} if i % 4 == 0 else {})
        for i, row in enumerate(usual())
    ]
    traffic("live.jsonl", rows)
    assert run("traffic=live.jsonl") == 4
    drifted = {one["name"] for one in read_json(Path("out/monitor.json"))["statistics"] if one["drift"]}
    assert {"refusal", "format.schema"} <= drifted
    assert not drifted & {"length", "language", "words", "topic", "source", "typical", "out_of_profile"}


def test_every_look_is_kept_and_the_release_is_not_touched(home: Path) -> None:
    traffic("live.jsonl", usual())
    (home / "own").mkdir()
    shutil.copytree(home / "registry" / "bot", home / "own" / "bot")
    for _ in range(2):
        assert cli.main(["monitor", "release=bot", "registry=own", "traffic=live.jsonl"]) == 0
    folder = home / "own" / "bot" / "monitor" / "v1"
    assert len(list(read_jsonl(folder / monitor.HISTORY))) == 2
    assert (folder / "monitor.html").is_file()
    assert registry.problems_of(releases.find(home / "own", "bot")) == []
    assert [one.version for one in releases.versions(home / "own", "bot")] == [1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["traffic=live.jsonl"], 2, "release: given nothing"),
        (["release=bot"], 2, "traffic: given nothing"),
        (["release=bto", "traffic=live.jsonl"], 2, "did you mean bot?"),
        (["release=bot@v7", "traffic=live.jsonl"], 2, "has v1"),
        (["release=bot", "traffic=live.jsonl", "endpoint=http://localhost:1/v1"], 2, "regression=true"),
        (["release=bot", "traffic=none.jsonl"], 3, "does not exist"),
        (["release=bot", "traffic=few.jsonl"], 3, "given 10 prompts, required at least 50"),
        (["release=bot", "traffic=bad.jsonl"], 3, "bad rows"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    traffic("live.jsonl", usual())
    traffic("few.jsonl", usual()[:10])
    traffic("bad.jsonl", [*usual()[:90], *[{"question": "?"}] * 2])
    assert cli.main(["monitor", *words]) == code
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_holdout_is_answered_as_when_it_was_published(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic("live.jsonl", usual())
    assert run("traffic=live.jsonl", "regression=true") == 0
    report = read_json(Path("out/monitor.json"))
    assert report["regression"]["prompts"] == QUESTIONS
    by_name = {one["name"]: one for one in report["regression"]["metrics"]}
    assert by_name["general.exact_match"]["published"] == by_name["general.exact_match"]["now"] == 1.0
    assert "as good as when it was published" in capsys.readouterr().out
    assert len(list(read_jsonl(home / "registry/bot/monitor/holdout-looks.jsonl"))) >= 1, "the look is counted"


def test_what_publish_measured_and_a_look_does_not_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the configuration of publish, not that of the training."""
    folder = altered(home, "report/report.json")
    found = read_json(folder / "report/report.json")
    found["metrics"]["all.loss"] = {**found["metrics"]["general.exact_match"], "higher_is_better": False}
    (folder / "report/report.json").write_text(json.dumps(found))
    resealed(folder)
    traffic("live.jsonl", usual())
    assert cli.main(["monitor", f"release={folder}", "report=out", "traffic=live.jsonl", "regression=true"]) == 0
    assert "not measured again: all.loss" in capsys.readouterr().out
    assert "Not measured again: all.loss." in Path("out/monitor.html").read_text()


@pytest.mark.parametrize("name", ["profile.json", "report/rows.jsonl", "report/config.yaml"])
def test_a_release_of_which_a_small_file_has_changed_is_compared_with_nothing(
    home: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = altered(home, name)
    with (folder / name).open("a") as file:
        file.write("\n")
    traffic("live.jsonl", usual())
    words = ["traffic=live.jsonl", *(["regression=true"] if name.startswith("report/") else [])]
    assert cli.main(["monitor", f"release={folder}", "report=out", *words]) == 4
    assert name in capsys.readouterr().err
    assert not Path("out").exists()


def altered(home: Path, name: str) -> Path:
    """A copy of the release, of which a file can be written."""
    folder = Path(shutil.copytree(home / "registry/bot/v1", home / "taken"))
    (folder / name).chmod(0o644)
    return folder


def resealed(folder: Path) -> None:
    (folder / "release.json").chmod(0o644)
    facts = {
        name: value for name, value in read_json(folder / "release.json").items() if name not in ("format", "files")
    }
    write_manifest(folder, name="release.json", facts=facts)


def test_a_served_model_that_answers_worse_is_found(home: Path) -> None:
    traffic("live.jsonl", usual())
    with serving((200, {}, {"data": [{"id": "bot"}]}), said("I do not know.")) as served:
        code = run("traffic=live.jsonl", "regression=true", f"endpoint={served.url}")
    assert code == 4
    report = read_json(Path("out/monitor.json"))
    assert (report["drift"], report["regressed"]) == (False, True)
    assert any("general.exact_match: 0.000 on the holdout asked again" in finding for finding in report["findings"])
    assert sum(path.endswith("/chat/completions") for path, _, _ in served.asked) == QUESTIONS
    assert {body["max_tokens"] for _, _, body in served.asked if body} == {TOKENS}


def test_a_release_whose_weights_have_changed_is_not_asked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic("live.jsonl", usual())
    shutil.copytree(home / "registry" / "bot", home / "own" / "bot")
    weights = home / "own" / "bot" / "v1" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    assert cli.main(["monitor", "release=bot", "registry=own", "traffic=live.jsonl", "regression=true"]) == 4
    assert "model.safetensors" in capsys.readouterr().err


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [pytest.param(1000, False, marks=pytest.mark.long), (380, True)])
def test_the_page_in_a_browser(home: Path, width: int, dark: bool) -> None:
    traffic("live.jsonl", [*shifted(), *[{"prompt": f"{EVIL} number {i} of many"} for i in range(3)]])
    assert run("traffic=live.jsonl") == 4
    report = read_json(Path("out/monitor.json"))
    probe = """return { shown: document.body.innerText, bars: document.querySelectorAll("#shares svg").length,
      rows: document.querySelectorAll("#statistics tr").length, verdict: document.querySelector("h1").innerText };"""
    seen = look(Path("out/monitor.html").read_text(), home, probe, width=width, dark=dark)
    assert seen.console == []
    assert seen.found["requests"] == []
    assert seen.found["needs"] <= seen.found["width"] == width
    assert seen.found["faint"] == []
    assert seen.found["small"] == 0
    assert "changed" in seen.found["verdict"]
    assert seen.found["rows"] == len(report["statistics"]) + 1
    assert seen.found["bars"] == sum(len(one["parts"]) for one in report["statistics"])
    assert all(finding.split(":")[0] in seen.found["shown"] for finding in report["findings"])
    assert report["examples"][0]["prompt"][:40] in seen.found["shown"]
