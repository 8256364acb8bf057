"""`sftdist inspect`: the lines that other tools are built on, the two views, and the command itself."""

from __future__ import annotations

import html
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sftdist.commands.inspect import main, run
from sftdist.commands.inspect_page import write_html
from sftdist.core.config import compose
from sftdist.core.errors import ConfigError
from sftdist.core.settings import InspectConfig
from sftdist.data.template import BUILT_IN
from tests.pages import foreign_parts, parsed
from tests.tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parents[3]
SAID = [
    ("system", "Be <b>brief</b>."),
    ("user", "Où est 東京? 🗼"),
    ("assistant", "\n\né 🗼"),
    ("user", "Again"),
    ("assistant", "Again"),
]
QUESTION = {"role": "user", "content": "a"}
ROWS: list[Any] = [
    {"id": "first", "messages": [{"role": role, "content": text} for role, text in SAID]},
    {"id": "weighted", "messages": [QUESTION, {"role": "assistant", "content": "b", "weight": 0.5}]},
    {"id": "refused", "messages": [QUESTION, {"role": "assistant", "content": "b", "thinking": "c"}]},
    {"id": "bad", "messages": [{"role": "assistant", "content": "b"}]},
    "{broken",
    {"id": "first", "messages": [{"role": role, "content": text} for role, text in SAID]},  # a duplicate is shown too
]
KEYS = ["id", "text", "tokens", "supervised_text", "refused"]
TOKEN_KEYS = ["id", "text", "start", "end", "role", "turn", "supervised", "weight"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer alone, a template file and rows: all that inspect needs."""
    byte_tokenizer(specials=["<|im_start|>", "<|im_end|>"]).save_pretrained(tmp_path / "tokenizer")
    template = ROOT / "sftdist" / "data" / "builtin_templates" / f"{BUILT_IN[0]}.jinja"
    (tmp_path / "my.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        f"model.path={folder / 'tokenizer'}",
        f"model.chat_template={folder / 'my.jinja'}",
        f"data.train={folder / 'rows.jsonl'}",
        *more,
    ]


def inspect(folder: Path, *more: str, output: str = "jsonl") -> str:
    file = folder / f"out.{output}"
    run(compose(None, overrides(folder, f"output={output}", f"file={file}", *more), InspectConfig))
    return file.read_text(encoding="utf-8")


def lines(folder: Path, *more: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in inspect(folder, *more).splitlines()]


def test_every_row_in_file_order_has_the_line_of_the_contract(folder: Path) -> None:
    found = lines(folder)
    assert [line["id"] for line in found] == ["first", "weighted", "refused", "bad", "rows.jsonl:5", "first"]
    assert all(list(line) == KEYS for line in found)
    assert [line["refused"] is None for line in found] == [True, True, False, False, False, True]
    assert "rows.jsonl:4" in found[3]["refused"]
    assert "reasoning" in found[2]["refused"]
    assert found[0] == found[5]


def test_offsets_roles_turns_and_weights(folder: Path) -> None:
    line = lines(folder)[0]
    tokens = line["tokens"]
    assert all(list(token) == TOKEN_KEYS for token in tokens)
    assert all(line["text"][token["start"] : token["end"]] == token["text"] for token in tokens)
    assert "".join(token["text"] for token in tokens) == line["text"]
    assert line["supervised_text"] == ["\n\né 🗼<|im_end|>", "Again<|im_end|>"]
    for turn, text in enumerate(line["supervised_text"]):
        assert "".join(t["text"] for t in tokens if t["supervised"] and t["turn"] == turn) == text
    assert {t["role"] for t in tokens if t["supervised"]} == {"assistant"}
    for role, said in SAID:
        spoken = "".join(t["text"] for t in tokens if t["role"] == role)
        assert said in spoken
    assert {t["weight"] for t in tokens} == {0.0, 1.0}
    assert {t["weight"] for t in lines(folder)[1]["tokens"] if t["supervised"]} == {0.5}


def test_the_tokens_are_those_that_prepare_would_store(folder: Path) -> None:
    tokenizer = byte_tokenizer(specials=["<|im_start|>", "<|im_end|>"])
    line = lines(folder)[1]
    assert tokenizer.decode([token["id"] for token in line["tokens"]]) == line["text"]


def test_a_refused_row_is_shown_and_nothing_of_it_is_supervised(folder: Path) -> None:
    line = lines(folder)[2]
    assert line["text"].startswith("<|im_start|>user\na")
    assert not any(token["supervised"] for token in line["tokens"])
    assert line["supervised_text"] == [""]


def test_the_keys_of_train_apply(folder: Path) -> None:
    assert len(lines(folder, "limit=2")) == 2
    last = lines(folder, "limit=1", "data.train_on=last")[0]
    assert last["supervised_text"] == ["", "Again<|im_end|>"]
    expanded = lines(folder, "limit=1", "data.expand_turns=true")
    assert [line["id"] for line in expanded] == ["first#0", "first#1"]
    assert [line["supervised_text"] for line in expanded] == [["\n\né 🗼<|im_end|>"], ["", "Again<|im_end|>"]]
    dropped = lines(folder, "data.reasoning=drop")[2]
    assert dropped["refused"] is None


def test_a_marker_of_several_tokens(folder: Path) -> None:
    byte_tokenizer(specials=[]).save_pretrained(folder / "tokenizer")
    line = lines(folder, "limit=1")[0]
    assert line["supervised_text"][1] == "Again<|im_end|>"
    assert len([t for t in line["tokens"] if t["supervised"] and t["turn"] == 1]) > 6
    assert "".join(token["text"] for token in line["tokens"]) == line["text"]


def test_the_page_holds_every_token_its_id_and_its_weight(folder: Path) -> None:
    page = parsed(inspect(folder, output="html"))
    rows = [line for line in lines(folder) if line["tokens"]]
    assert page.pres == [[token["text"] for token in line["tokens"]] for line in rows]
    assert page.ids == [" ".join(str(token["id"]) for token in line["tokens"]) for line in rows]
    supervised = [[t["text"] for t in line["tokens"] if t["supervised"]] for line in rows]
    assert page.trained == supervised
    assert page.refusals == 3


HOSTILE = '</script><b onclick="x">&amp;</pre><img src=http://x.y/z>'


def test_the_page_is_one_file_and_escapes_text(folder: Path) -> None:
    token = {"id": 7, "text": HOSTILE, "start": 1, "end": 1 + len(HOSTILE), "role": HOSTILE, "turn": 0}
    tokens = [{**token, "supervised": True, "weight": 0.25}]
    row = {"id": HOSTILE, "text": f"<{HOSTILE}<b>", "tokens": tokens, "supervised_text": [], "refused": HOSTILE}
    out = io.StringIO()
    write_html([row], out)
    page = out.getvalue()
    assert foreign_parts(page) == []
    assert parsed(page).trained == [[HOSTILE]]
    assert 'data-w="0.25" style="--w:0.25"' in page
    escaped = html.escape(HOSTILE)
    for place in range(page.count(escaped)):  # what each of its places would be without escaping
        parts = page.split(escaped)
        wrong = escaped.join(parts[: place + 1]) + HOSTILE + escaped.join(parts[place + 1 :])
        assert foreign_parts(wrong) != []


@pytest.mark.parametrize(
    "wrong",
    [
        '<script src="a.js"></script>',
        '<link rel="stylesheet" href="a.css">',
        "<style>@import 'a.css';</style>",
        "<style>p { background: url(a.png) }</style>",
        "<script>fetch('a.json')</script>",
        "<p onclick='x()'></p>",
        "<p><b>of a row</b></p>",
    ],
)
def test_what_does_not_belong_into_a_page_is_seen(wrong: str) -> None:
    out = io.StringIO()
    write_html([], out)
    assert foreign_parts(out.getvalue()) == []
    assert foreign_parts(out.getvalue().replace("</main>", f"</main>{wrong}")) != []


def test_a_pack_is_headed_and_its_documents_say_where_they_are(folder: Path) -> None:
    rows = lines(folder, "limit=2")
    start = len(rows[0]["tokens"])
    common = {"packs": 2, "documents": 1, "tokens": 40, "pack_tokens": 64}
    packs = [{"number": 0, "start": 0, **common}, {"number": 1, "start": start, **common}]
    out = io.StringIO()
    write_html(({**row, "pack": pack} for row, pack in zip(rows, packs, strict=True)), out)
    page = out.getvalue()
    assert page.count('class="pack"') == 2
    assert "pack 2 of 2 <small>1 document, 40 of 64 tokens" in page
    assert f"{start:,} to {start + len(rows[1]['tokens']):,} of the pack" in page


def test_the_terminal_view_counts(folder: Path) -> None:
    shown = inspect(folder, output="terminal")
    assert "6 rows, 3 refused" in shown
    assert "refused: template drops the reasoning" in shown


def test_what_is_trained_can_be_told_where_there_are_no_colours(folder: Path) -> None:
    shown = inspect(folder, output="terminal")
    assert "⟦Again<|im_end|>⟧" in shown
    assert "⟦b<|im_end|>⟧(weight 0.5)" in shown
    assert "⟦a" not in shown


def test_config_errors(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"output.*pdf.*terminal.*html.*jsonl"):
        inspect(folder, output="pdf")
    base = [word for word in overrides(folder) if "chat_template" not in word]
    with pytest.raises(ConfigError, match="no chat template"):
        run(compose(None, base, InspectConfig))


@pytest.mark.parametrize("asked", ["step=1", "worst=3"])
def test_a_run_that_is_none_is_all_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    """Nothing of the model and the data that such a run would have brought along."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["inspect", "run.dir=runs/none", asked])
    assert main() == 2
    said = capsys.readouterr().err
    assert said.endswith("error: run.dir: given runs/none, required the directory of a run (it holds config.yaml)\n")
    assert len(said.splitlines()) == 1


def test_the_command_exits_0_on_refused_rows_and_loads_no_model_code(folder: Path) -> None:
    """In a fresh process: neither the engine nor any modelling code of transformers is imported."""
    code = (
        "import sys; from sftdist.commands.inspect import main; code = main(); "
        "heavy = [m for m in sys.modules if m.startswith(('deepspeed', 'peft', 'sftdist.model.load', "
        "'sftdist.training.build', 'sftdist.training.engine', 'transformers.modeling_utils'))]; "
        "print(heavy, file=sys.stderr); sys.exit(code or bool(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *overrides(folder, "output=jsonl", "limit=3")],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["first", "weighted", "refused"]
