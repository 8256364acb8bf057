"""How long torchrun leaves its ranks to save after a signal, before it kills them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

TORCHRUN_SECONDS = 30.0  # its default: a large model is not saved in that time
_OPTION = "--shutdown-timeout"
_VARIABLES = ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")


def torchrun_grace() -> float | None:
    """Seconds; None where no torchrun started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    command = Path(f"/proc/{os.getppid()}/cmdline")
    words = command.read_bytes().decode("utf-8", "replace").split("\0") if command.exists() else []
    return shutdown_timeout(words, os.environ)


def shutdown_timeout(words: Sequence[str], environment: Mapping[str, str]) -> float:
    """As torchrun reads it: from its command line, else from the environment, else its default."""
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") == _OPTION:
            return float(value if equals else words[number + 1])
    return next((float(environment[name]) for name in _VARIABLES if name in environment), TORCHRUN_SECONDS)
