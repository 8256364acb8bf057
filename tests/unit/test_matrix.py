"""launch/matrix.sh: the versions that it tries are the bounds of pyproject.toml, and what the page says."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT

SCRIPT = (ROOT / "launch/matrix.sh").read_text(encoding="utf-8")
PAGE = (ROOT / "docs/machines.md").read_text(encoding="utf-8")


def bounds() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {one.name: one for one in map(Requirement, project["dependencies"])}


def tried(row: str) -> dict[str, Version]:
    line = re.search(rf'^    {row}\) echo "(.*)" ;;$', SCRIPT, re.M)
    assert line is not None
    return {name: Version(version) for name, _, version in (word.partition("==") for word in line[1].split())}


def pinned() -> dict[str, Version]:
    lines = (ROOT / "launch/constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name: Version(version) for name, _, version in (line.partition("==") for line in lines if line[0] != "#")}


def test_the_oldest_are_the_lower_bounds() -> None:
    for name, version in tried("oldest").items():
        lowest = next(Version(one.version) for one in bounds()[name].specifier if one.operator == ">=")
        assert version == lowest, name


def test_the_newest_are_within_the_bounds_and_no_older_than_those_of_the_tests() -> None:
    for name, version in tried("newest").items():
        assert bounds()[name].specifier.contains(version), name
        assert version >= pinned()[name], name


def test_the_page_names_them() -> None:
    for row in ("oldest", "newest"):
        for name in ("torch", "transformers"):
            assert f"{tried(row)[name]}" in PAGE, (row, name)


def test_every_file_that_it_runs_is_there() -> None:
    block = re.search(r"^tests=\(\n(.*?)^\)$", SCRIPT, re.M | re.S)
    assert block is not None
    files = block[1].split()
    assert len(files) >= 10
    assert all((ROOT / file).exists() for file in files)


def test_all_the_tests_end_with_it() -> None:
    assert "launch/matrix.sh" in (ROOT / "launch/test.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [["older"], ["oldest", "newer"]])
def test_a_row_that_there_is_not_installs_nothing(words: list[str]) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "launch/matrix.sh"), *words], capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 2
    assert "required oldest or newest" in done.stderr
