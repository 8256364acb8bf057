"""Does a released folder answer? A process of its own, which knows nothing but the files, loads it and asks it.

`python -m sftdist.fresh_answer FOLDER` prints the answer as JSON and ends with 0, or with 1 and the reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from sftdist.core.distributed import World, die_with_parent
from sftdist.core.errors import CheckpointError, SftdistError
from sftdist.core.storage import read_json
from sftdist.data.message import Message
from sftdist.evals.backends.hf import DTYPES
from sftdist.evals.decoding import Decoding
from sftdist.evals.engines import load_engine
from sftdist.evals.generate import answers
from sftdist.evals.prompts import Prompt
from sftdist.evals.voice import Voice
from sftdist.training.export_proof import plain_environment

QUESTION = "What can you help me with?"
_NEW_TOKENS = 16
_CPU = torch.device("cpu")


def answer_of(folder: Path) -> str:
    """What the model in a folder says to a first question, on the CPU of a fresh process.

    Raises CheckpointError with that process's words where it cannot be loaded or does not answer.
    """
    done = subprocess.run(
        [sys.executable, "-m", "sftdist.fresh_answer", str(folder)],
        env=plain_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        said = json.loads(done.stdout.strip().rpartition("\n")[2]) if done.returncode == 0 else None
    except ValueError:
        said = None
    if said is None:
        words = (done.stderr.strip() or done.stdout.strip())[-800:]
        raise CheckpointError(f"{folder}: a fresh process cannot load it and ask it: {words or done.returncode}")
    return str(said["answer"])


def ask(folder: Path) -> str:
    """The answer here and now, in the dtype that the folder's config names."""
    named = str(read_json(folder / "config.json").get("dtype", "")).removeprefix("torch.")
    dtype = next((name for name, kind in DTYPES.items() if str(kind).endswith(f".{named}")), "fp32")
    decoding, voice = Decoding(_NEW_TOKENS, 1, dtype=dtype), Voice.load(folder)
    prompt = Prompt("first", "first", (Message("user", QUESTION),))
    world = World(0, 1, 0, _CPU)
    (said,) = answers(
        lambda: load_engine(folder, voice, decoding, _CPU), [prompt], voice=voice, decoding=decoding, world=world
    )
    return said.text


def main(arguments: Sequence[str]) -> int:
    die_with_parent()
    logging.disable_progress_bar()
    try:
        print(json.dumps({"answer": ask(Path(arguments[0]))}))
    except (SftdistError, OSError, ValueError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
