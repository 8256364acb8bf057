"""The ledger of looks at the holdout."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

from sftdist.evals.looks import LOOKS, look, looks

fork = multiprocessing.get_context("fork")


def test_each_look_is_a_line_and_is_counted(tmp_path: Path) -> None:
    stores = tmp_path / "not" / "there"
    assert looks(stores) == []
    assert [look(stores, Path("runs/a/export")), look(stores, Path("runs/b/export"))] == [1, 2]
    assert [line["model"] for line in looks(stores)] == ["runs/a/export", "runs/b/export"]
    assert all(line["time"].endswith("Z") for line in looks(stores))


def test_a_line_that_a_killed_process_left_unfinished_is_no_look(tmp_path: Path) -> None:
    look(tmp_path, Path("a"))
    with (tmp_path / LOOKS).open("a") as file:
        file.write('{"time": "2026-')
    assert look(tmp_path, Path("b")) == 2
    assert [json.loads(line)["model"] for line in (tmp_path / LOOKS).read_text().splitlines()] == ["a", "b"]


def _look(folder: Path) -> None:
    for _ in range(20):
        look(folder, Path("a"))


def test_no_look_is_lost_where_several_processes_look(tmp_path: Path) -> None:
    processes = [fork.Process(target=_look, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(looks(tmp_path)) == 60
