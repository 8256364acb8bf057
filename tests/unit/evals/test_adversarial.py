"""The prompts that ship with the package: enough of each kind, each with checks that can be held against an answer."""

from __future__ import annotations

from sftdist.evals.adversarial import adversarial_prompts
from sftdist.evals.probes.safety import check_safety


def test_every_prompt_can_be_asked_and_checked() -> None:
    prompts = adversarial_prompts()
    assert len({prompt.id for prompt in prompts}) == len(prompts) >= 20
    for prompt in prompts:
        check_safety(prompt)
        assert prompt.source == "adversarial"
        assert prompt.checks
