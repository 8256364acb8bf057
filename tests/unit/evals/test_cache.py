"""The cache of answers: a second run asks nothing, a kill costs one batch, and other ways of asking are other keys."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sftdist.evals.backends.interface import Engine, Ids
from sftdist.evals.cache import AnswerCache
from sftdist.evals.decoding import Decoding
from sftdist.evals.generate import answers
from sftdist.evals.prompts import Answer
from sftdist.evals.voice import Voice
from tests.evaluated import BASE, Counting, alone, ask_through, prompts

PROMPTS = prompts(8)
WAY = Decoding(max_new_tokens=6, batch_size=2)
FORK = multiprocessing.get_context("fork")


def _nothing_is_loaded(engine: Engine) -> Engine:
    raise AssertionError("the weights were loaded")


def test_a_second_run_loads_no_weights_and_says_the_same(tmp_path: Path) -> None:
    first = ask_through(tmp_path, PROMPTS, WAY)
    assert ask_through(tmp_path, PROMPTS, WAY, wrap=_nothing_is_loaded) == first
    assert first == ask_through(None, PROMPTS, WAY)


def test_a_longer_list_asks_only_what_is_new(tmp_path: Path) -> None:
    short = ask_through(tmp_path, PROMPTS[:3], WAY)
    calls: list[int] = []
    longer = ask_through(tmp_path, PROMPTS, WAY, wrap=lambda engine: Counting(engine, calls))
    assert longer[:3] == short
    assert sum(calls) == 4  # of eight prompts three are known, and the last one is the first again


@pytest.mark.parametrize(
    "other",
    [
        replace(WAY, dtype="bf16"),
        replace(WAY, batch_size=4),
        replace(WAY, max_new_tokens=7),
        replace(WAY, device="cuda"),
    ],
)
def test_another_way_of_asking_is_asked_anew(tmp_path: Path, other: Decoding) -> None:
    cache = AnswerCache(tmp_path, "model", "voice", WAY)
    cache.add({"key": Answer("a", 1, True)})
    assert AnswerCache(tmp_path, "model", "voice", WAY).read() == {"key": Answer("a", 1, True)}
    assert AnswerCache(tmp_path, "model", "voice", other).read() == {}
    assert AnswerCache(tmp_path, "other model", "voice", WAY).read() == {}
    assert AnswerCache(tmp_path, "model", "other voice", WAY).read() == {}


def test_where_the_batch_decides_a_changed_batch_is_asked_as_a_whole(tmp_path: Path) -> None:
    rounded = replace(WAY, dtype="bf16", batch_size=3)
    ask_through(tmp_path, PROMPTS[:6], rounded)
    calls: list[int] = []
    grown = ask_through(tmp_path, PROMPTS[:7], rounded, wrap=lambda engine: Counting(engine, calls))
    assert grown == ask_through(None, PROMPTS[:7], rounded)
    assert calls, "the prompt that is new was not asked"
    assert all(call == 3 for call in calls[:-1])


@dataclass
class _Plain:
    """An engine without a model, which says the prompt's first tokens; a forked process must not run torch. Kills its
    process in batch `dies_in`, as the kernel does where memory is short."""

    dies_in: int = 0
    calls: list[int] = field(default_factory=list)

    def continued(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
        self.calls.append(len(prompts))
        if len(self.calls) == self.dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return [prompt[:max_new_tokens] for prompt in prompts]


def _ask_plain(folder: Path | None, engine: _Plain) -> list[Answer]:
    voice = Voice.load(BASE)
    cache = None if folder is None else AnswerCache(folder, "model", voice.sha256, WAY)
    return answers(lambda: engine, PROMPTS, voice=voice, decoding=WAY, world=alone(), cache=cache)


def test_a_killed_run_keeps_the_batches_before(tmp_path: Path) -> None:
    process = FORK.Process(target=_ask_plain, args=(tmp_path, _Plain(dies_in=3)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (file,) = tmp_path.glob("*.jsonl")
    with file.open("ab") as torn:  # and the line that it was writing
        torn.write(b'{"key": "abc", "text": "hal')
    second, third = _Plain(), _Plain()
    assert _ask_plain(tmp_path, second) == _ask_plain(None, _Plain()) == _ask_plain(tmp_path, third)
    assert second.calls == [2, 1]  # seven different prompts, four of which were answered
    assert third.calls == []


def test_garbage_of_a_power_cut_is_asked_again(tmp_path: Path) -> None:
    first = ask_through(tmp_path, PROMPTS, WAY)
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], b"\x00" * 40, b"[1]", b'{"key": "x"}', *lines[3:]]))
    calls: list[int] = []
    assert ask_through(tmp_path, PROMPTS, WAY, wrap=lambda engine: Counting(engine, calls)) == first
    assert sum(calls) == 2


def _add_many(folder: Path, who: int) -> None:
    cache = AnswerCache(folder, "model", "voice", WAY)
    for number in range(100):
        cache.add({f"{who}-{number}": Answer("x" * 5000, number, True), f"same-{number}": Answer("y", number, True)})


def test_several_processes_write_at_the_same_time(tmp_path: Path) -> None:
    processes = [FORK.Process(target=_add_many, args=(tmp_path, who)) for who in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = AnswerCache(tmp_path, "model", "voice", WAY).read()
    assert len(found) == 300
    assert all(found[f"{who}-{number}"].tokens == number for who in range(2) for number in range(100))
