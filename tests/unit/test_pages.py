"""The pages as a reader finds them: every link leads somewhere, and every page can be reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
_FENCE = re.compile(r"^( *)```.*?^\1```$", re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:tests|benchmarks|launch|slurm|conf|docs|sftdist)/[\w./-]+\.\w+)(?:::(\w+))?`")

FAULTS = {"S": 25, "A": 28, "B": 5, "C": 8}
# What an answer may lean on: a test, a command, a key, another page, a row of the table of promises.
_HELD = re.compile(r"`tests/|`sftdist |`[a-z]+\.[a-z_]+|\]\(|\(X\d")


def prose(text: str) -> str:
    """Without blocks, line for line."""
    return _FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path, text: str) -> list[str]:
    found = []
    for link in _LINK.findall(prose(text)):
        target, _, anchor = link.partition("#")
        if target.startswith(("https://", "http://")):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


OF_USERS = ("conf/exp/as_trl.yaml",)  # what a command of the page writes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_tests_are_there(page: Path) -> None:
    for file, test in _PATH.findall(prose(page.read_text(encoding="utf-8"))):
        if "NAME" in file or file in OF_USERS:
            continue
        assert (ROOT / file).exists(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_every_page_is_in_the_index() -> None:
    index = set(_LINK.findall((DOCS / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= index


def test_every_fault_of_the_table_has_a_test() -> None:
    rows = re.findall(r"^\| ([SABC]\d+) \|.*\| (.*) \|$", (DOCS / "faults.md").read_text(encoding="utf-8"), re.M)
    assert [row for row, _ in rows] == [f"{kind}{n + 1}" for kind, count in FAULTS.items() for n in range(count)]
    assert [row for row, tests in rows if not all(test for _, test in _PATH.findall(tests) or [("", "")])] == []


def test_every_answer_of_the_questions_names_what_holds_it() -> None:
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    answers = re.findall(r"^\*\*(.+?)\*\*(.*?)(?=^\*\*|^## |\Z)", page, re.M | re.S)
    assert len(answers) > 30
    assert [question for question, answer in answers if not _HELD.search(answer)] == []


def test_every_picture_is_used_and_small() -> None:
    used = {link for page in PAGES for link in _LINK.findall(page.read_text(encoding="utf-8"))}
    for picture in (DOCS / "pictures").iterdir():
        assert f"pictures/{picture.name}" in used, picture.name
        assert picture.stat().st_size < 300_000, picture.name


def test_wrong_pages_are_seen() -> None:
    page = DOCS / "x.md"
    text = "[a](nowhere.md) [b](data.md#no-such-title) [c](data.md#rows)\n```text\n[d](in-a-block.md)\n```\n"
    assert dead_links(page, text) == ["nowhere.md", "data.md#no-such-title"]
