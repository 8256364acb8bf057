"""The prompts that ship with the package: enough of each kind, each with checks that can be held against an answer."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from sftdist.evals.adversarial import adversarial_prompts
from sftdist.evals.probes.behaviour import behaviour_probe
from sftdist.evals.probes.format import format_probe
from sftdist.evals.probes.instructions import instructions_of
from sftdist.evals.probes.safety import check_safety, safety_probe
from sftdist.evals.prompts import Answer
from tests.conftest import ROOT
from tests.unit.evals.adversarial_answers import ANSWERS, NO

LEAST = {"injection": 25, "conflict": 20, "format": 25, "unsafe": 25, "harmless": 25}


def test_there_are_enough_of_each_kind_and_no_two_are_the_same() -> None:
    prompts = adversarial_prompts()
    kinds = Counter(prompt.tags[0] for prompt in prompts)
    assert set(kinds) == set(LEAST)
    assert {kind: kinds[kind] for kind in LEAST if kinds[kind] < LEAST[kind]} == {}
    assert len(prompts) >= 120
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len({prompt.messages for prompt in prompts}) == len(prompts)


def test_every_prompt_is_checked_by_something_that_can_be_read() -> None:
    for prompt in adversarial_prompts():
        assert prompt.source == "adversarial"
        assert prompt.id.startswith(f"adversarial/{prompt.tags[0]}-")
        assert prompt.checks
        check_safety(prompt)
        if "instructions" in prompt.checks:
            instructions_of(prompt)
        if "schema" in prompt.checks:
            Draft202012Validator.check_schema(prompt.checks["schema"])


PROMPTS = {prompt.id.partition("/")[2]: prompt for prompt in adversarial_prompts()}
BETTER = {"over_refusal": 0.0}  # the best score of a metric, where it is not 1
STANCE = {"refuse": NO, "comply": "It is easy: take the blue one.", "deflect": "I can only help with orders."}


def kept(id: str, text: str) -> bool:
    """Whether an answer keeps everything that the prompt's checks ask for."""
    probes = (safety_probe(), behaviour_probe(), format_probe())
    wanted = ("refusal", "over_refusal", "deflection", "forbidden_free", "instructions_strict", "schema_valid")
    scores = {k: v for probe in probes for k, v in probe.score(PROMPTS[id], Answer(text, 1, True)).items()}
    return all(scores[name] == BETTER.get(name, 1.0) for name in wanted if name in scores)


def test_every_prompt_with_checks_of_its_own_has_its_answers() -> None:
    assert set(ANSWERS) == {id for id, prompt in PROMPTS.items() if set(prompt.checks) != {"stance"}}


@pytest.mark.parametrize("id", sorted(ANSWERS))
def test_checks_tell_a_good_answer_from_a_bad_one(id: str) -> None:
    good, bad = ANSWERS[id]
    assert kept(id, good)
    assert not kept(id, bad)


@pytest.mark.parametrize("id", sorted(set(PROMPTS) - set(ANSWERS)))
def test_a_stance_alone(id: str) -> None:
    stance = PROMPTS[id].checks["stance"]
    assert kept(id, STANCE[stance])
    assert not kept(id, STANCE["refuse" if stance == "comply" else "comply"])


def test_a_wheel_holds_them(tmp_path: Path) -> None:
    """Built as pip does, from a copy: hatchling takes what lies under the package and is not ignored."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("conf", "slurm", "launch", "sftdist/evals"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {file.relative_to(ROOT).as_posix() for file in (ROOT / "sftdist" / "evals").rglob("*.yaml")}
    assert len(wanted) >= 6
    assert wanted <= held
