"""What the tests of answers share: prompts for the quickstart's base, an engine that counts, and the way to ask it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch

from sftdist.core.distributed import World
from sftdist.data.message import Message
from sftdist.evals.backends.interface import Engine, Ids
from sftdist.evals.cache import AnswerCache
from sftdist.evals.decoding import Decoding
from sftdist.evals.engines import load_engine
from sftdist.evals.generate import answers
from sftdist.evals.identity import identify
from sftdist.evals.prompts import Answer, Prompt
from sftdist.evals.voice import Voice

BASE = Path(str(files("sftdist.assets") / "base"))
CPU = torch.device("cpu")
WORDS = ("lamp 4711 Marela", "river", "red green blue", "Osvak 80213 Tibo is here", "one", "a b c d e f g h i")


def alone() -> World:
    """One process."""
    return World(0, 1, 0, CPU)


def prompts(count: int) -> list[Prompt]:
    """Of very different lengths, one of them twice."""
    asks = ("Echo: ", "Say again: ", "Quote: ")
    talks = [asks[n % 3] + " ".join([*WORDS[n % 6 :], *WORDS][: n % 5 + 1]) for n in range(count - 1)]
    return [Prompt(f"test/{n}", "test", (Message("user", talk),)) for n, talk in enumerate([*talks, talks[0]])]


@dataclass
class Counting:
    """An engine that notes how many prompts each call had."""

    engine: Engine
    calls: list[int] = field(default_factory=list)

    def continued(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
        self.calls.append(len(prompts))
        return self.engine.continued(prompts, max_new_tokens)


def ask_through(
    cache_folder: Path | None,
    asked: Sequence[Prompt],
    decoding: Decoding,
    world: World | None = None,
    wrap: Callable[[Engine], Engine] = lambda engine: engine,
) -> list[Answer]:
    """What evaluate does for one model."""
    voice = Voice.load(BASE)
    cache = None
    if cache_folder is not None:
        cache = AnswerCache(cache_folder, identify(BASE).sha256, voice.sha256, decoding)
    world = world or alone()

    def load() -> Engine:
        return wrap(load_engine(BASE, voice, decoding, world.device))

    return answers(load, asked, voice=voice, decoding=decoding, world=world, cache=cache)
