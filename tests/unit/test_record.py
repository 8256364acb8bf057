"""docs/record.py, and that every terminal session in the pages is what a real run has printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import record
from tests.conftest import ROOT

RECORDED = record.pages()
PAGE = """# A page

<!-- recorded -->
```bash
echo "step 1  loss 5.87  tokens/s 1,160"
echo "run runs/quickstart-df659e6f"
```

Some words.

```text
step 9  loss 0.01  tokens/s 3
...
```

<!-- recorded: exit 3 -->
```bash
exit 3
```

```bash
echo never run
```
"""


def test_pages_are_recorded() -> None:
    assert {"tour.md", "exactness.md", "templates.md", "mixtures.md"} <= {page.name for page in RECORDED}


@pytest.mark.parametrize("page", RECORDED, ids=lambda page: page.name)
def test_a_page_shows_what_was_printed(page: Path) -> None:
    session = record.session_file(page).read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert record.unrecorded(text, session) == []


@pytest.mark.parametrize("page", RECORDED, ids=lambda page: page.name)
def test_nothing_of_the_machine_stands_in_a_session(page: Path) -> None:
    session = record.session_file(page).read_text(encoding="utf-8")
    assert not [word for word in ("/tmp/", "/root/", "/home/", "/work/", "site-packages") if word in session]


def test_blocks_are_found_with_their_codes_and_texts() -> None:
    assert [(step.code, step.shown is None) for step in record.steps(PAGE)] == [(0, False), (3, True)]


def test_a_page_is_recorded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SESSIONS", tmp_path / "sessions")
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert record.record(page) == []
    text = page.read_text()
    assert "```text\nstep 1  loss 5.87  tokens/s 1,160\n...\n```" in text, "the figures are those of the run"
    assert "echo never run" in text
    session = record.session_file(page).read_text()
    assert record.unrecorded(text, session) == []
    assert record.check(page) == []


def test_a_kept_folder_goes_on_with_the_blocks_that_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "SESSIONS", tmp_path / "sessions")
    page = tmp_path / "page.md"
    count = "<!-- recorded -->\n```bash\necho >>seen; ls; wc -l <seen\n```\n\n```text\n```\n"
    page.write_text(count)
    record.record(page, tmp_path / "kept")
    page.write_text(page.read_text() + count.replace("ls", "pwd"))
    record.record(page, tmp_path / "kept")
    assert "```text\nseen\n1\n```" in page.read_text()
    assert "```text\n.\n2\n```" in page.read_text(), "the first block was run once, and no folder of this machine shows"


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("loss 5.87", "loss 5.88", "step 1  loss 5.88  tokens/s 1,160"),  # a figure that was never printed
        ("exit 3\n", "exit 4\n", "its commands are not those of the session"),
    ],
)
def test_a_page_that_was_changed_by_hand_is_seen(
    right: str, wrong: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "SESSIONS", tmp_path / "sessions")
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    record.record(page)
    changed = page.read_text().replace(f"```text\nstep 1  {right}", f"```text\nstep 1  {wrong}")
    changed = changed.replace(f"```bash\n{right}", f"```bash\n{wrong}")
    assert record.unrecorded(changed, record.session_file(page).read_text()) == [said]


def test_output_that_no_longer_comes_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("step 9  loss", "step 9  nll"))
    assert record.check(page) == ["step 9  nll 0.01  tokens/s 3"]


def test_another_exit_code_is_told(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("exit 3\n", "exit 4\n"))
    with pytest.raises(RuntimeError, match="ended with 4, not 3"):
        record.check(page)


@pytest.mark.parametrize(
    ("line", "like"),
    [
        ("check  6/10 leak 0.0e+00 (0.4 s)", "check 10/10 leak 3.1e-05 (12.0 s)"),
        ("run runs/quickstart-df659e6f", "run runs/quickstart-1234567a"),
        ("1 rows ───────", "12 rows ───"),
    ],
)
def test_figures_do_not_count(line: str, like: str) -> None:
    assert record.mask(line) == record.mask(like)
    assert record.mask(line) != record.mask(f"x{line}")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", RECORDED, ids=lambda page: page.name)
def test_every_session_still_prints_what_the_pages_show(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert record.check(page) == []
