"""`sftdist chat R [--base] [--once TEXT]`: talk to a model as an evaluation asks it, in a terminal or from a script."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from sftdist.commands.chat_models import Asked, Models, find_models
from sftdist.commands.chat_terminal import Terminal, line_editing, visible
from sftdist.core.errors import CheckpointError, SftdistError
from sftdist.data.message import Message
from sftdist.evals.backends.hf import DTYPES, HfEngine
from sftdist.evals.conversation import Talk
from sftdist.evals.decoding import HF, Decoding
from sftdist.evals.prompts import Answer

INTERRUPTED = 130
_STDIN = "-"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 where there is no such model, 3 where the template refuses the message or it is too long, 1
    where the weights cannot be loaded, 130 after Ctrl-C. argparse ends with 2 where an argument is wrong."""
    parser = _parser()
    given = parser.parse_args(argv)
    if given.run is None and given.model is None:
        parser.error("given nobody to talk to, required R (a run directory or a release) or --model DIR")
    if given.json and given.once is None:
        parser.error("given --json without --once, required both")
    logging.disable_progress_bar()
    try:
        return talk(given)
    except SftdistError as error:
        print(f"sftdist chat: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sftdist chat",
        description="Talk to a model: the template, the stop ids and the greedy decoding of sftdist evaluate.",
    )
    add = parser.add_argument
    add(
        "run", nargs="?", metavar="R", help="a run directory (its export), a release NAME or NAME@vN, or a model folder"
    )
    add("--model", metavar="DIR", help="this folder, adapter or release; with R: asked as the models of that run are")
    add("--step", type=int, metavar="N", help="of a run: the export of step N (sftdist export run.dir=R step=N)")
    add("--base", action="store_true", help="ask the base that the model was made of, too")
    add("--base-model", metavar="DIR", help="ask this model, too, in place of the base that the run names")
    add("--once", metavar="TEXT", help="print the answer to TEXT (- reads it from standard input), and end")
    add("--json", action="store_true", help="with --once: text, tokens and finished of each model, for programs")
    add("--system", metavar="TEXT", help="the system message")
    add("--max-new-tokens", type=_count, metavar="N", help="default: evals.max_new_tokens of the run, else 256")
    add("--precision", choices=sorted(DTYPES), help="of the weights; default: that of evaluate, fp32 on a CPU")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--chat-template", metavar="NAME|FILE", help="chatml, llama3 or a file, in place of the model's own")
    add("--registry", type=Path, default=Path("registry"), metavar="DIR", help="default: registry")
    return parser


def _count(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"given {number}, required at least 1")
    return number


def talk(given: argparse.Namespace) -> int:
    """Answer once, or until the input ends."""
    models = find_models(
        Asked(given.run, given.model, given.step, given.base, given.base_model, given.chat_template, given.registry)
    )
    if models.note is not None:
        print(f"sftdist chat: {models.note}", file=sys.stderr)
    talks = _talks(models, given)
    if given.once is None:
        _in_terminal(models, talks)
        return 0
    text = sys.stdin.read().rstrip("\n") if given.once == _STDIN else given.once
    answers = {name: one.answer(text) for name, one in talks.items()}
    print(_as_json(answers) if given.json else _as_text(answers))
    for name, answer in answers.items():
        if not answer.finished:
            print(f"sftdist chat: {name}: cut off after {answer.tokens} tokens: --max-new-tokens", file=sys.stderr)
    return 0


def _talks(models: Models, given: argparse.Namespace) -> dict[str, Talk]:
    """A conversation with each model, loaded as an evaluation loads it."""
    evals = None if models.settings is None else models.settings.evals
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = given.precision or (None if evals is None or evals.precision is None else evals.precision.value)
    most = given.max_new_tokens or (Decoding.max_new_tokens if evals is None else evals.max_new_tokens)
    decoding = Decoding.on(device, max_new_tokens=most, batch_size=1, engine=HF, dtype=precision)
    begin = [] if given.system is None else [Message("system", given.system)]
    engines = {name: _engine(folder, models, decoding.dtype, device) for name, folder in models.folders.items()}
    return {name: Talk(models.voice, engine, most, list(begin)) for name, engine in engines.items()}


def _engine(folder: Path, models: Models, dtype: str, device: torch.device) -> HfEngine:
    try:
        return HfEngine.load(folder, models.voice.stop_ids, dtype=dtype, device=device, rows=models.voice.rows)
    except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise CheckpointError(
            f"{folder}: given weights that cannot be loaded ({reason}); required is a whole model: export it again, or "
            "give another folder"
        ) from problem


def _in_terminal(models: Models, talks: Mapping[str, Talk]) -> None:
    typed = sys.stdin.isatty()
    if typed:
        line_editing()
        for name, folder in models.folders.items():
            print(f"{name}: {folder}")
        print("greedy, as in sftdist evaluate; /help lists the commands, Ctrl-D ends")
    Terminal(talks, sys.stdout, lambda prompt: input(prompt if typed else "")).run()
    if typed:
        print()


def _as_text(answers: Mapping[str, Answer]) -> str:
    """As it was said; a name before each where there are two."""
    alone = len(answers) == 1
    shown = [answer.text if alone else f"{name}> {answer.text}" for name, answer in answers.items()]
    return "\n".join(map(visible, shown) if sys.stdout.isatty() else shown)


def _as_json(answers: Mapping[str, Answer]) -> str:
    plain = {name: asdict(answer) for name, answer in answers.items()}
    return json.dumps(plain, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
