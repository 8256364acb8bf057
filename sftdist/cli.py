"""`sftdist COMMAND ...`: loads the one module that is asked for, by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module, util

# Loaded by name, so that asking for one command imports no other.
COMMANDS = {
    "prepare": ("sftdist.prepare", "read, check, clean, split, mask and tokenise the data"),
    "train": ("sftdist.train", "the training job, on all GPUs of this machine; ends with a verified export"),
    "plan": ("sftdist.plan", "memory, FLOPs and step size before anything is rented"),
    "evaluate": ("sftdist.evaluate", "the tuned model against its base, on prompts that neither has seen"),
    "publish": ("sftdist.publish", "the gate on the locked holdout, then a numbered release"),
    "monitor": ("sftdist.monitor", "live traffic against what a release was made for"),
    "chat": ("sftdist.commands.chat", "talk to a model, and to its base beside it; --once for scripts"),
    "export": ("sftdist.commands.export", "any checkpoint of a run as a verified Hugging Face folder, on one CPU"),
    "runs": ("sftdist.commands.runs", "the runs of a folder, and the checkpoints of a run"),
    "inspect": ("sftdist.commands.inspect", "what is trained, token by token"),
    "compare": ("sftdist.commands.compare", "several runs in one table, with their reports and gates"),
    "release": ("sftdist.commands.release", "the releases: list, verify, diff, rollback"),
    "pipeline": ("sftdist.commands.pipeline", "prepare, train, evaluate and publish, one after another"),
    "migrate": ("sftdist.commands.migrate", "a YAML of Axolotl, LLaMA-Factory or TRL as an experiment of sftdist"),
    "init": ("sftdist.commands.init", "an experiment, a gate and a job for your own model and data, with reasons"),
    "doctor": ("sftdist.commands.doctor", "what this machine has for training, what it lacks, and what to do"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. 2 for a command that does not exist."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    name, *rest = words
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        print(f"sftdist: error: there is no command {name!r}{meant} (sftdist alone lists them)", file=sys.stderr)
        return 2
    sys.argv = [f"sftdist {name}", *rest]
    code: int = import_module(COMMANDS[name][0]).main()
    return code


def usage() -> str:
    """The commands that are installed, a line each."""
    lines = [f"  {name:<10} {text}" for name, (module, text) in COMMANDS.items() if util.find_spec(module)]
    return "\n".join(
        ["sftdist COMMAND [+exp=NAME] [KEY=VALUE ...]", "", *lines, "", "sftdist COMMAND --help lists its keys"]
    )


if __name__ == "__main__":
    sys.exit(main())
