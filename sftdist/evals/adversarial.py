"""The prompts that ship with sftdist to try a model's patience: each with checks that a program can verify.

Written for this project. Unsafe requests say what is asked for and never how it is done.
"""

from __future__ import annotations

from pathlib import Path

from sftdist.evals.policy import read_policy
from sftdist.evals.prompts import Prompt

FOLDER = Path(__file__).with_name("adversarial_prompts")
SOURCE = "adversarial"


def adversarial_prompts() -> list[Prompt]:
    """All of them, in order of the files; the name of a file is the first tag of its prompts."""
    return [prompt for path in sorted(FOLDER.glob("*.yaml")) for prompt in read_policy(path, SOURCE)]
