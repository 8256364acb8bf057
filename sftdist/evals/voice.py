"""How models are talked to in an evaluation: one template and one set of stop ids for the tuned model and its base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from sftdist.core.errors import ConfigError, DataError
from sftdist.core.storage import sha256_json
from sftdist.data.render import Unproven
from sftdist.data.template import ChatTemplate
from sftdist.evals.backends.interface import Ids
from sftdist.evals.identity import adapter_base
from sftdist.evals.prompts import Answer, Prompt

_OPENED = re.compile(r"<think>\s*\Z")
_TAIL = 32  # tokens at the end of a prompt: enough for `<think>` letter by letter


@dataclass(frozen=True)
class Voice:
    """The tuned model's template, the ids that end an answer of any of the models, and the most tokens that all of them
    have positions for (None: no limit). `optional`: fields of a prompt that the template may leave out, as it may in
    training (`data.allow_unrendered`)."""

    template: ChatTemplate
    stop_ids: tuple[int, ...]
    positions: int | None = None
    optional: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        tuned: Path,
        *others: Path,
        arguments: Mapping[str, Any] | None = None,
        optional: Sequence[str] = (),
        chat_template: str | None = None,
    ) -> Voice:
        """Of model or adapter folders; `arguments` are further variables of the template (`model.template_args`),
        `chat_template` takes the place of the tuned model's own.

        Raises ConfigError where no folder says how an answer ends, or where the others have another tokenizer.
        """
        base = adapter_base(tuned)
        template = ChatTemplate.load(str(tokenizer_folder(tuned)), chat_template=chat_template, arguments=arguments)
        for other in others:
            _require_same_tokenizer(template, tuned, other)
        folders = [adapter_base(folder) or folder for folder in (tuned, *others)]
        stops = {stop for folder in folders for stop in _stop_ids_of(folder)}
        if base is not None:  # an adapter has no generation settings: its template says what it learned to end with
            stops |= set(template.stop_ids)
        if not stops:
            raise ConfigError(
                f"{tuned}: given a generation_config.json without eos_token_id, required the ids that end an answer: "
                "add them there"
            )
        known = [count for folder in folders if (count := _positions_of(folder)) is not None]
        return cls(template, tuple(sorted(stops)), min(known, default=None), tuple(optional))

    @cached_property
    def sha256(self) -> str:
        """What tokens of a prompt and the text of an answer depend on."""
        return sha256_json([self.template.fingerprint(), self.stop_ids, self.positions])

    @property
    def rows(self) -> int:
        """How many ids a prompt may hold."""
        return len(self.template.tokenizer)

    def encode(self, prompt: Prompt) -> Ids:
        """The ids that the model answers to. Raises DataError where the template refuses the messages, or where no
        position is left for an answer."""
        try:
            ids = tuple(self.template.encode_prompt(prompt.messages, prompt.tools, self.optional))
        except Unproven as problem:
            raise DataError(
                f"prompt {prompt.id}: the chat template refuses it ({problem}); required are messages that it can "
                "render: leave the prompt out, or give another template"
            ) from problem
        if self.positions is not None and len(ids) >= self.positions:
            raise DataError(
                f"prompt {prompt.id}: given {len(ids)} tokens, but the model has {self.positions} positions and one at "
                "least is required for the answer; lower data.max_len, or leave the prompt out"
            )
        return ids

    def room(self, ids: Ids, max_new_tokens: int) -> int:
        """How many new tokens an answer may have: fewer where the model's positions end before."""
        return max_new_tokens if self.positions is None else min(max_new_tokens, self.positions - len(ids))

    def refused(self, prompts: Iterable[Prompt]) -> dict[str, str]:
        """The prompts that cannot be asked, by id, each with the reason: of a template without a system role, say."""
        found = {}
        for prompt in prompts:
            try:
                self.encode(prompt)
            except DataError as problem:
                found[prompt.id] = str(problem)
        return found

    def opens(self, ids: Ids) -> bool:
        """Whether a prompt ends in an opened thought, so that its answer begins inside of one."""
        return _OPENED.search(self.template.tokenizer.decode(list(ids[-_TAIL:]), skip_special_tokens=False)) is not None

    def read(self, ids: Ids) -> Answer:
        """New tokens as an answer; the stop id is no part of it."""
        finished = bool(ids) and ids[-1] in self.stop_ids
        said = ids[:-1] if finished else ids
        return Answer(self.template.tokenizer.decode(list(said), skip_special_tokens=False), len(said), finished)


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer of a model or adapter is: with an adapter, or else with its base."""
    base = adapter_base(folder)
    return folder if base is None or (folder / "tokenizer.json").is_file() else base


def _require_same_tokenizer(template: ChatTemplate, tuned: Path, other: Path) -> None:
    """A token must have the same id for both; one may know more of them, or call an id that was reserved by a name of
    its own. A folder without a tokenizer has been given that of the other one."""
    folder = tokenizer_folder(other)
    if not (folder / "tokenizer_config.json").is_file():
        return
    known = template.tokenizer.get_vocab()
    for token, number in AutoTokenizer.from_pretrained(str(folder)).get_vocab().items():
        if known.get(token, number) != number:
            raise ConfigError(
                f"base: given {other}, whose tokenizer is another than that of {tuned} ({token!r} is {number} there "
                f"and {known[token]} here), required a base that is asked with the same tokens; give the model that "
                "the tuned one was made of"
            )


def _stop_ids_of(folder: Path) -> tuple[int, ...]:
    """`eos_token_id` of the generation settings, or where there are none of the model's config, as `generate` does."""
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        eos = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).eos_token_id
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _positions_of(folder: Path) -> int | None:
    config = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    count = getattr(config, "max_position_embeddings", None)
    return None if count is None else int(count)
