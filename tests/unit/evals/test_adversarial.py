"""The prompts that ship with the package: enough of each kind, each with checks that can be held against an answer."""

from __future__ import annotations

from collections import Counter

import pytest
from jsonschema import Draft202012Validator

from sftdist.evals.adversarial import adversarial_prompts
from sftdist.evals.probes.instructions import instructions_of
from sftdist.evals.probes.safety import check_safety

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
