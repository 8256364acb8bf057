"""What the fresh process compares an exported folder with, and that process, seen from its parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sftdist.core.distributed import PARENT_VARIABLE
from sftdist.core.errors import CheckpointError
from sftdist.data.message import Message
from sftdist.data.render import CLOCK
from sftdist.data.template import ChatTemplate
from sftdist.model.lora import ADAPTER_CONFIG
from sftdist.training.export_check import LOGITS, PROBE, Probe, problems_of

# Importing PEFT takes longer than the rest of the check: only where there is an adapter to load.
_CHECK, _ADAPTER_CHECK = "sftdist.training.export_check", "sftdist.training.adapter_check"
_TIMEOUT_SECONDS = 3600.0
_PROBE_ROWS, _PROBE_TOKENS = 3, 24


class FreshCheck:
    """A process that knows nothing but the files checks an exported folder; it ends with this one.

    `start` lets it import what it needs, `give` says which folder: between the two the folder may still be written.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process; a pipe could fill up
        self._deadline = 0.0

    def start(self, *, adapter: bool) -> None:
        """`adapter`: the folder will hold an adapter alone. Once started, another start changes nothing."""
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", _ADAPTER_CHECK if adapter else _CHECK],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=plain_environment(),
        )

    def give(self, folder: Path, probe: Path | None = None) -> None:
        self._folder, self._deadline = folder, time.monotonic() + _TIMEOUT_SECONDS
        assert self._process is not None
        assert self._process.stdin is not None
        words = "\n".join(map(str, [folder, *([probe] if probe else [])]))
        with suppress(BrokenPipeError), self._process.stdin as pipe:  # it may have ended: its words are the verdict
            pipe.write(words.encode())

    def running(self) -> bool:
        """Whether it was given a folder and has no verdict yet; one that takes too long is killed."""
        if self._process is not None and time.monotonic() > self._deadline:
            self.kill()
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Give it up."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def require_passed(self) -> None:
        """Wait for its verdict. Raises CheckpointError with its words where that is not good."""
        while self.running():
            time.sleep(0.05)
        code = None if self._process is None else self._process.returncode
        if code != 0:
            self._output.seek(0)
            words = self._output.read().decode("utf-8", "replace").strip()[-800:]
            late = f"it was not done within {_TIMEOUT_SECONDS:.0f} s" if time.monotonic() > self._deadline else ""
            raise CheckpointError(
                f"{self._folder} does not pass the check in a fresh process: {late or words or f'it ended with {code}'}"
            )


def verify_export(folder: Path) -> None:
    """Check an exported folder in a fresh process: manifest, every tensor, and that it loads.

    Raises CheckpointError that names the file or the tensor.
    """
    listed = problems_of(folder)  # here, so that a wrong file is named without loading anything
    if listed:
        raise CheckpointError(f"{folder} is not what was exported: {'; '.join(listed[:5])}")
    check = FreshCheck()
    check.start(adapter=(folder / ADAPTER_CONFIG).is_file())
    check.give(folder)
    check.require_passed()


def probe_rows(model: PreTrainedModel) -> list[Tensor]:
    """Token rows spread over the vocabulary, the same every time."""
    rows = int(model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(rows, (_PROBE_TOKENS,), generator=generator) for _ in range(_PROBE_ROWS)]


def tolerance_of(precision: str, dtype: str) -> float:
    """How far logits may be from the live ones (root mean square): the rounding of the coarser of the two."""
    return 1e-5 if precision == dtype == "fp32" else 3e-2


def write_probe(
    folder: Path, model: PreTrainedModel, template: ChatTemplate, logits: Sequence[Tensor], tolerance: float
) -> None:
    """Rows of ids, the live model's logits, and the ids of a rendered prompt."""
    rows = torch.stack(probe_rows(model))
    live = torch.stack([part.float().cpu() for part in logits])
    save_file({"ids": rows, "logits": live}, folder / LOGITS)
    prompt = [Message(role="user", content="What is 2 + 3?  Say it  twice.")]
    ids = template.encode_prompt(prompt)
    text = template.render(prompt, add_generation_prompt=True)
    messages = [{"role": message.role, "content": message.content} for message in prompt]
    probe = Probe(messages, text, list(map(int, ids)), template.arguments, CLOCK.isoformat(), tolerance)
    (folder / PROBE).write_text(json.dumps(vars(probe)), encoding="utf-8")


def plain_environment() -> dict[str, str]:
    """For a process that ends with this one: without torchrun's variables, and without GPUs, which the ranks hold."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC_", "GROUP_"))}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK"):
        kept.pop(key, None)
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", PARENT_VARIABLE: str(os.getpid())}
