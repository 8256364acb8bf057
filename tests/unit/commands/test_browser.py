"""The two pages as a person sees them, in a real browser."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from sftdist.commands.inspect_page import write_html
from sftdist.data.report_page import page
from tests.browser import Seen, look, needs_browser
from tests.reports import EVIL, full

pytestmark = needs_browser
REPORT = """
  const lost = document.querySelector("#lengths figure:nth-child(2) rect.lost");
  return {
    lost: getComputedStyle(lost).fill,
    trained: getComputedStyle(document.querySelector("#samples u")).textDecorationLine,
    bold: document.querySelectorAll("b, img, script:not(body > script:last-of-type)").length,
    charts: [...document.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect().width),
  };
"""
INSPECT = """
  const style = query => getComputedStyle(document.querySelector(query));
  const said = document.getElementById("token"), told = [];
  const text = document.querySelector("article pre");
  text.focus();
  for (let n = 0; n < 2; n++)
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  told.push(said.textContent);
  document.querySelector("article u i").dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  told.push(said.textContent);
  document.querySelectorAll("article")[1].querySelector("u i").click();
  told.push(said.textContent);
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  told.push(said.textContent);
  const line = e => { for (; e && e.tagName !== "PRE"; e = e.parentElement)
    if (getComputedStyle(e).textDecorationLine.includes("underline")) return true; return false; };
  const of = underlined => [...document.querySelectorAll("article i")].filter(e => line(e) === underlined)
    .map(e => e.textContent).join("");
  return {
    told, underlined: of(true), plain: of(false), full: style("article:nth-of-type(1) u").backgroundColor,
    half: style("u[data-w]").backgroundColor, borders: ["system", "user", "assistant", "tool"].map(
      role => style(`.m.${role}`).borderLeftStyle + style(`.m.${role}`).borderLeftColor),
    said: getComputedStyle(document.querySelector("pre .m.user"), "::before").content,
  };
"""


def rows() -> list[dict[str, Any]]:
    """Two conversations of all roles, the second trained with half the weight; in a pack, with hostile text."""
    said = [("system", "Be"), ("user", EVIL), ("assistant", "yes\n"), ("tool", "x" * 300), ("assistant", "東京 🗼")]
    found = []
    for number, weight in enumerate((1.0, 0.5)):
        tokens: list[dict[str, Any]] = []
        text = ""
        for place, (role, content) in enumerate(said):
            for piece, on in ((f"<{role}>", False), (content, role == "assistant")):
                start, text = len(text), text + piece
                token = {"id": 100 * (number + 1) + len(tokens), "text": piece, "start": start, "end": len(text)}
                kind = {"role": role, "turn": int(place > 2), "supervised": on, "weight": weight if on else 0.0}
                tokens.append({**token, **kind})
        pack = {"number": 0, "packs": 1, "documents": 2, "tokens": 20, "pack_tokens": 32, "start": 10 * number}
        found.append({"id": EVIL, "text": text, "tokens": tokens, "supervised_text": [], "refused": None, "pack": pack})
    return found


def inspected() -> str:
    out = io.StringIO()
    write_html(rows(), out)
    return out.getvalue()


def is_sound(seen: Seen, width: int) -> None:
    assert seen.console == []
    assert seen.found["width"] == width
    assert seen.found["needs"] <= width  # no horizontal scroll bar
    assert seen.found["faint"] == []
    assert seen.found["small"] == 0
    assert seen.found["requests"] == []
    assert seen.lines > 100


def test_the_report_on_a_telephone(tmp_path: Path) -> None:
    seen = look(page(full()), tmp_path, REPORT, width=400)
    is_sound(seen, 400)
    assert "hatch" in seen.found["lost"]
    assert seen.found["trained"] == "underline"
    assert seen.found["bold"] == 0
    assert all(width > 300 for width in seen.found["charts"])


def test_the_tokens_on_a_telephone_and_by_key_pointer_and_finger(tmp_path: Path) -> None:
    seen = look(inspected(), tmp_path, INSPECT, width=400)
    is_sound(seen, 400)
    assert seen.found["underlined"] == "yes\n東京 🗼" * 2
    assert EVIL in seen.found["plain"]
    by_key, by_pointer, by_finger, at_last = seen.found["told"]
    assert by_key == 'id 101 "Be" · token 2 of 10 · system, turn 0 · not supervised'
    assert by_pointer == 'id 105 "yes\\n" · token 6 of 10 · assistant, turn 0 · supervised, weight 1'
    assert by_finger == 'id 205 "yes\\n" · token 6 of 10 · assistant, turn 0 · supervised, weight 0.5'
    assert at_last == ""
    assert len(set(seen.found["borders"])) == 4
    assert len({border.split("rgb")[0] for border in seen.found["borders"]}) == 4  # not told by colour alone
    assert seen.found["full"] != seen.found["half"]
    assert "attr(data-role)" in seen.found["said"] or "user" in seen.found["said"]


@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 760, 1400])
def test_both_pages_at_other_widths_and_in_the_dark(tmp_path: Path, width: int, dark: bool) -> None:
    is_sound(look(page(full()), tmp_path, REPORT, width=width, dark=dark), width)
    is_sound(look(inspected(), tmp_path, INSPECT, width=width, dark=dark), width)


@pytest.mark.long
@pytest.mark.parametrize(
    ("given", "instead", "wrong"),
    [
        ("</h1>", '</h1><script src="http://127.0.0.1:9/x.js"></script>', "requests"),
        ("</h1>", "</h1><script>missing()</script>", "console"),
        ("</h1>", '</h1><p style="width:900px">wide</p>', "needs"),
        ("</h1>", '</h1><p style="color:#aaa">faint</p>', "faint"),
        ("</h1>", '</h1><p style="font-size:7px">small</p>', "small"),
        ("text-decoration: underline 2px", "text-decoration: none", "underlined"),
        ("<body>", '<body style="display:none">', "lines"),
    ],
)
def test_a_page_that_is_wrong_is_seen(tmp_path: Path, given: str, instead: str, wrong: str) -> None:
    shown = inspected()
    assert given in shown
    seen = look(shown.replace(given, instead), tmp_path, INSPECT, width=400)
    found = {
        "console": seen.console != [],
        "requests": seen.found["requests"] != [],
        "needs": seen.found["needs"] > 400,
        "faint": seen.found["faint"] != [],
        "small": seen.found["small"] > 0,
        "underlined": seen.found["underlined"] == "",
        "lines": seen.lines < 100,
    }
    assert found[wrong], seen


@pytest.mark.long
def test_2_000_rows_are_a_page_of_some_megabytes_that_opens_at_once(tmp_path: Path) -> None:
    tokens = [
        {"id": 1000 + i, "text": "word ", "start": 5 * i, "end": 5 * i + 5, "role": "user" if i < 100 else "assistant"}
        | {"turn": 0, "supervised": i >= 105, "weight": float(i >= 105)}
        for i in range(200)
    ]
    row = {"id": "r", "text": "word " * 200, "tokens": tokens, "supervised_text": [], "refused": None}
    with (tmp_path / "many.html").open("w", encoding="utf-8") as out:
        write_html(({**row, "id": f"r{i}"} for i in range(2000)), out)
    shown = (tmp_path / "many.html").read_text(encoding="utf-8")
    assert len(shown) < 20 * 400_000
    timing = 'return { loaded: performance.getEntriesByType("navigation")[0].domContentLoadedEventEnd };'
    probe = shown.replace("</body>", "<style>article { content-visibility: auto }</style></body>")
    seen = look(probe.replace("!important", ""), tmp_path, timing, width=800)
    assert 0 < seen.found["loaded"] < 10_000  # ms, also on a slow machine
