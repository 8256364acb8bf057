"""Benchmarks by lm-eval (the only import of it; `evals.benchmarks` opens this file where lm-eval is installed).

The model is ours, in memory, and is asked through the training template as everywhere else; tasks, prompts, filters and
scores are lm-eval's (https://github.com/EleutherAI/lm-evaluation-harness). Its own averages are not used: a value per
document is, so that two models can be compared on the same documents.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig, PreTrainedModel

from sftdist.core.errors import ConfigError, DataError
from sftdist.core.storage import sha256_json
from sftdist.data.message import Message
from sftdist.data.render import Unproven
from sftdist.evals.benchmarks import Measured
from sftdist.evals.voice import Voice

TASK_FILES = (".yaml", ".yml")
NO_FILTER = "none"
SEED = 1234  # of the examples, as lm-eval has it


class _Spoken(HFLM):
    """lm-eval's view of a model that is talked to in a voice. A prompt that does not fit is refused, not cut."""

    def __init__(self, model: PreTrainedModel, voice: Voice, batch_size: int, max_new_tokens: int) -> None:
        # The folder's own settings may ask for sampling or penalties, and fill what a call leaves open.
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=list(voice.stop_ids), pad_token_id=voice.stop_ids[0]
        )
        self._voice, self._new_tokens = voice, max_new_tokens
        # The template writes what stands at the begin of a text; the tokenizer must not write it again.
        super().__init__(
            pretrained=model,
            tokenizer=voice.template.tokenizer,
            batch_size=batch_size,
            max_length=voice.positions,
            add_bos_token=False,
        )

    @property
    def max_gen_toks(self) -> int:
        """Of tasks that do not say it."""
        return self._new_tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]
        begun = [] if add_generation_prompt else turns[-1:]  # the begin of the answer, given by the task
        try:
            text = self._voice.template.render(turns[: len(turns) - len(begun)], add_generation_prompt=True)
        except Unproven as problem:
            raise DataError(
                f"tasks: the chat template refuses a document's messages ({problem}); required are tasks that it can "
                "render: leave this one out, or give another template"
            ) from problem
        return text + "".join(turn.content for turn in begun)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        tokenizer = self._voice.template.tokenizer
        for request in requests:
            prompt, options = request.args
            room = self.max_length - int(options.get("max_gen_toks", self.max_gen_toks))
            self._require_room(len(self.tok_encode(prompt)), room)
        answers: list[str] = super().generate_until(requests, disable_tqdm=not sys.stderr.isatty())
        # An id that ends an answer is not always a special token that decoding leaves out.
        for end in map(tokenizer.decode, self._voice.stop_ids):
            answers = [answer.split(end)[0] for answer in answers]
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> Any:
        for _, prompt, continuation in requests:
            self._require_room(len(prompt) + len(continuation), self.max_length + 1)
        return super()._loglikelihood_tokens(requests, *args, **{**options, "disable_tqdm": not sys.stderr.isatty()})

    def _require_room(self, given: int, room: int) -> None:
        if given > room:
            raise DataError(
                f"tasks: given a prompt of {given} tokens, but the model has room for {max(room, 0)} of its "
                f"{self.max_length} positions; give fewer examples (num_fewshot), a lower max_gen_toks, or leave the "
                "task out"
            )


def run_tasks(
    model: PreTrainedModel, voice: Voice, tasks: Sequence[str], *, batch_size: int, max_new_tokens: int
) -> dict[str, Measured]:
    """The values of each document, by `<task>.<metric>`; where a task has filters, by `<task>.<metric>.<filter>`.

    `tasks` are names of lm-eval's or task files. Raises ConfigError for a task that there is not, DataError for data
    that cannot be loaded, prompts that do not fit and tasks without a number for each document.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager_of(tasks)
    try:
        loaded = manager.load(list(tasks))
    except (OSError, ValueError, KeyError) as problem:
        raise DataError(
            f"tasks={','.join(tasks)}: given a task that cannot be loaded ({type(problem).__name__}: {problem}); "
            "required are its files and data: names in a task file are relative to the working directory"
        ) from problem
    for task in loaded["tasks"].values():
        # As its command line does; that also asks git and pip about the machine, which nobody reads here.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    results = evaluate(
        _Spoken(model, voice, batch_size, max_new_tokens),
        loaded,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    measured: dict[str, Measured] = {}
    for task, samples in results["samples"].items():
        values = _values(task, samples, results["higher_is_better"][task])
        if not values:
            raise DataError(f"tasks: {task} has no number for each document, which intervals need; leave it out")
        measured |= values
    return measured


def _manager_of(tasks: Sequence[str]) -> TaskManager:
    """lm-eval's own tasks are only looked through where one is named: there are 14,000, which takes seconds."""
    files = [task for task in tasks if Path(task).suffix in TASK_FILES]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise ConfigError(f"tasks: given {missing[0]}, required a task file that exists")
    manager = TaskManager(include_defaults=len(files) < len(tasks))
    for task in tasks:
        if task not in files and task not in manager.task_index:
            near = get_close_matches(task, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else "see lm-eval ls tasks"
            raise ConfigError(f"tasks: given {task}, required a task of lm-eval or a task file; {hint}")
    return manager


def _values(task: str, samples: Sequence[Mapping[str, Any]], better: Mapping[str, bool]) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        for metric in sample["metrics"]:
            # A pair, say, which only the mean over all documents makes a number of (bleu, perplexity).
            if isinstance(sample[metric], int | float) and math.isfinite(sample[metric]):
                behind = "" if sample["filter"] == NO_FILTER else f".{sample['filter']}"
                name = f"{task}.{metric}{behind}"
                one = found.setdefault(name, Measured(task, metric, [], [], [], better.get(metric)))
                one.ids.append(f"{task}/{sample['doc_id']}")
                one.values.append(float(sample[metric]))
                one.asked.append(sha256_json([sample[f"{what}_hash"] for what in ("doc", "prompt", "target")]))
    return found
