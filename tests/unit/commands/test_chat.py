"""`sftdist chat`: who is talked to, what `--once` prints, what the terminal does, and each mistake with its message."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sftdist import evaluate
from sftdist.commands import chat
from sftdist.commands.chat_models import Asked, find_models
from sftdist.commands.chat_terminal import Terminal, visible
from sftdist.core.config import compose
from sftdist.core.settings import EvaluateConfig, TrainConfig
from sftdist.core.snapshot import write_config
from sftdist.core.storage import read_jsonl, write_json
from sftdist.evals.conversation import Talk
from sftdist.evals.voice import Voice
from sftdist.model.lora import ADAPTER_FILE
from tests.evaluated import BASE
from tests.spoken import Scripted

ROWS = (
    ("town: Osvak\nnumber: 80213", "What is the number?", "80213"),
    (None, "Echo: lamp 4711 Marela", "lamp 4711 Marela"),
    (None, "Say again: river and a longer one", "river and a longer one"),
)
LIMIT = 7


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`runs/one` with an export that is its base, which lies in `base`; the same as release bot@v1."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BASE, "base")
    shutil.copytree(BASE, "runs/one/export")
    cfg = TrainConfig()
    cfg.model.path, cfg.evals.max_new_tokens = "base", LIMIT
    write_config(Path("runs/one"), cfg)
    write_json(Path("runs/one/status.json"), {"state": "done"})
    shutil.copytree(BASE, "registry/bot/v1")
    write_config(Path("registry/bot/v1"), cfg)
    write_json(Path("registry/bot/v1/release.json"), {"name": "bot", "version": 1})
    Path("registry/bot/latest").write_text("v1\n")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = chat.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def asked(run: str | None = None, model: str | None = None, *, base: bool = False, other: str | None = None) -> Asked:
    return Asked(run, model, None, base, other, None, Path("registry"))


def test_the_answer_is_the_row_of_an_evaluation(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same prompts through evaluate, both models, in its batches."""
    rows = []
    for system, question, answer in ROWS:
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns})
    Path("val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["candidate=base", "base=base", "data.val=val.jsonl", "evals.probes=[task]", "evals.adversarial=false"]
    result = evaluate.run(compose(overrides=[*words, f"evals.max_new_tokens={LIMIT}"], schema=EvaluateConfig))
    found = {line["prompt"][-1]["content"]: line for line in read_jsonl(result.page.with_name("rows.jsonl"))}
    capsys.readouterr()
    for system, question, _ in ROWS:
        extra = () if system is None else ("--system", system)
        code, out, err = said(capsys, "runs/one", "--base", "--json", "--once", question, *extra)
        assert code == 0
        both = json.loads(out)
        for name in ("base", "tuned"):
            assert both[name]["text"] == found[question][name]
            assert both[name]["finished"] == found[question]["finished"][name]
        assert (f"cut off after {LIMIT} tokens" in err) == (not both["tuned"]["finished"])
    ends = {line["finished"]["tuned"] for line in found.values()}
    assert ends == {True, False}, "one of them is cut off at the limit of the run"


def test_once_prints_the_answer_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "runs/one", "--once", "Say again: river") == (0, "river\n", "")
    assert said(capsys, "bot", "--base", "--once", "Say again: river") == (0, "base> river\ntuned> river\n", "")


def test_once_reads_standard_input(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Say again: river\n"))
    assert said(capsys, "bot@v1", "--once", "-") == (0, "river\n", "")


def test_who_is_talked_to(home: Path) -> None:
    export, base, release = Path("runs/one/export"), Path("base"), Path("registry/bot/v1")
    assert find_models(asked("runs/one")).folders == {"model": export}
    assert find_models(asked("runs/one", base=True)).folders == {"base": base, "tuned": export}
    for name in ("bot", "bot@v1", "release:bot@v1", str(release)):
        assert find_models(asked(name, base=True)).folders == {"base": base, "tuned": release}, name
    assert find_models(asked(model="base")).folders == {"model": base}
    assert find_models(asked(model="base", other="bot")).folders == {"base": release, "tuned": base}
    assert find_models(asked("runs/one", "base", base=True)).folders == {"base": base, "tuned": base}
    near = find_models(asked(model="runs/one/export"))
    assert near.settings is not None
    assert near.settings.evals.max_new_tokens == LIMIT, "an export knows the run that it lies in"


def test_a_base_that_ends_answers_otherwise_has_its_say(home: Path) -> None:
    """As in an evaluation, also where nobody talks to it."""
    write_json(Path("base/generation_config.json"), {"eos_token_id": [5]})
    own = Voice.load(Path("runs/one/export")).stop_ids
    assert find_models(asked("runs/one")).voice.stop_ids == tuple(sorted({*own, 5}))
    shutil.rmtree("base")
    alone = find_models(asked("runs/one"))
    assert alone.voice.stop_ids == own
    assert alone.note is not None
    assert "base, is no folder here" in alone.note


def test_an_adapter_whose_base_is_gone_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = Path("runs/one/export")
    shutil.rmtree(adapter)
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": "nowhere", "peft_type": "LORA"})
    (adapter / ADAPTER_FILE).write_bytes(b"")
    code, _, err = said(capsys, "runs/one", "--once", "hi")
    assert code == 2
    assert "given base_model_name_or_path=nowhere, required the folder of the adapter's base" in err


WRONG: list[tuple[Sequence[str], int, str]] = [
    (["runs/two"], 2, "R: "),
    (["bot@v7"], 2, "R: bot@v7: given the version 'v7', but registry/bot has v1"),
    (["release:cot"], 2, "R: cot: given no release, required NAME@vN"),
    (["runs/one", "--step", "40"], 2, "without export-step-00000040, required an exported model (export); make one"),
    (["runs/one", "--step", "40"], 2, "sftdist export run.dir=runs/one step=40"),
    (["--model", "runs"], 2, "runs: given a folder without weights, required a model's or an adapter's"),
    (["--model", "base", "--base"], 2, "nobody has written down what the base of base is; give --base-model FOLDER"),
    (["runs/one", "--base-model", "runs"], 2, "--base-model: runs: given a folder without weights"),
    (["bot", "--once", "red " * 5000], 3, "tokens, but the model has"),
]


@pytest.mark.parametrize(("words", "code", "message"), WRONG)
def test_a_mistake_is_said(
    home: Path, capsys: pytest.CaptureFixture[str], words: Sequence[str], code: int, message: str
) -> None:
    once = [] if "--once" in words else ["--once", "hi"]
    found, out, err = said(capsys, *words, *once)
    assert (found, out) == (code, ""), err
    assert message in err
    assert err.startswith("sftdist chat: error: ")


def test_a_base_that_is_gone_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("base")
    code, _, err = said(capsys, "runs/one", "--base", "--once", "hi")
    assert code == 2
    assert "the run of runs/one/export began with base, which is not here" in err
    assert "give --base-model FOLDER" in err


def test_damaged_weights_are_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = Path("runs/one/export/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    code, out, err = said(capsys, "runs/one", "--once", "hi")
    assert (code, out) == (1, "")
    assert "runs/one/export: given weights that cannot be loaded" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "given nobody to talk to, required R (a run directory or a release) or --model DIR"),
        (["bot", "--json"], "given --json without --once"),
        (["bot", "--max-new-tokens", "0"], "required at least 1"),
    ],
)
def test_a_wrong_line_ends_with_2(capsys: pytest.CaptureFixture[str], words: Sequence[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        chat.main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# --- the terminal -------------------------------------------------------------------------------------


def conversation(lines: Sequence[str], ids: Sequence[int], breaks_after: int | None = None) -> tuple[str, Talk]:
    """What stands on the screen after these lines were typed, for a model that always says the same."""
    talk = Talk(Voice.load(BASE), Scripted(ids, breaks_after), 8)
    typed: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    out = io.StringIO()
    Terminal({"model": talk}, out, read).run()
    return out.getvalue(), talk


def river(*, finished: bool = True) -> list[int]:
    voice = Voice.load(BASE)
    ids = voice.template.tokenizer.encode("river", add_special_tokens=False)
    return [*ids, voice.stop_ids[0]] if finished else list(ids)


def test_the_commands() -> None:
    screen, talk = conversation(["one", "two\\", "more", "/undo", "", "/nix", "/quit", "three"], river())
    assert screen.startswith("model> river\nmodel> river\nthere is no command /nix\n/system TEXT")
    assert screen.count("model>") == 2, "nothing is asked after /quit, and no empty line"
    assert [one.content for one in talk.messages] == ["one", "river"]
    _, talk = conversation(["one", "/system Be brief.", "two", "/reset"], river())
    assert [(one.role, one.content) for one in talk.messages] == [("system", "Be brief.")]
    _, talk = conversation(["a\\", "b"], river())
    assert talk.messages[0].content == "a\nb"
    _, talk = conversation(["/undo", "/undo"], river())
    assert talk.messages == []


def test_what_was_cut_off_or_broken_off_says_so() -> None:
    screen, _ = conversation(["one"], river(finished=False))
    assert screen == f"model> river (cut off after {len(river(finished=False))} tokens: --max-new-tokens)\n"
    screen, talk = conversation(["one"], river(), breaks_after=1)
    assert screen.endswith(" (broken off)\n")
    assert [one.role for one in talk.messages] == ["user", "assistant"]


def test_a_terminal_obeys_no_answer() -> None:
    assert visible("a\x1b[2Jb\x07\n\tc\x9b") == "a\\x1b[2Jb\\x07\n\tc\\x9b"
