"""How far the answers are, for people: prompts per second of what is asked, not of what was known."""

from __future__ import annotations

import pytest

from sftdist.evals.pace import Pace, _lines, shown


def test_the_pace_counts_only_what_was_asked() -> None:
    now = [100.0]
    pace = Pace(lambda: now[0])
    assert pace.words(40, 100) == "40 known from before"
    now[0] += 10
    assert pace.words(70, 100) == "3.0 prompts/s, left 0:00:10"


def test_lines_are_few_and_the_last_one_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    tell = _lines("tuned", lambda: now[0])
    for done in range(101):
        tell(done, 100)
        now[0] += 0.25
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tuned: 0/100 answers, 0 known from before"
    assert lines[1] == "tuned: 40/100 answers, 4.0 prompts/s, left 0:00:15"
    assert len(lines) == 4
    assert lines[-1] == "tuned: 100/100 answers, 4.0 prompts/s, left 0:00:00"


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for is_main in (False, True):
        with shown("base", is_main=is_main) as tell:
            tell(3, 3)
    assert capsys.readouterr().out == "base: 3/3 answers, 3 known from before\n"
