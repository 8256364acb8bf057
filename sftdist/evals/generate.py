"""Batched greedy generation from a model folder: what the model answers, the same every time.

Prompts go through the training template, so the model is asked with the tokens it was trained on. Weights are
float32: in bf16 a greedy answer depends on the size of the batch, in float32 it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sftdist.core.errors import ConfigError
from sftdist.data.schema import Message
from sftdist.data.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated, without the stop token; `finished` is False where `max_new_tokens` cut it off."""

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Speaker:
    """A model with the template it is talked to through, and the ids that end its answers."""

    model: PreTrainedModel
    template: ChatTemplate
    stop_ids: tuple[int, ...]

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Speaker:
        """Float32 weights from a Hugging Face folder; raises ConfigError where it does not say how an answer ends."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        eos = model.generation_config.eos_token_id
        if eos is None:
            raise ConfigError(
                f"{folder}: given a generation_config.json without eos_token_id, required the ids that end an answer: "
                "add them there"
            )
        stop_ids = (eos,) if isinstance(eos, int) else tuple(eos)
        # The folder's own settings may ask for sampling or penalties, and fill what a call leaves open.
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
        )
        return cls(model, ChatTemplate.load(str(folder)), stop_ids)

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int = 256, batch_size: int = 32
    ) -> list[Answer]:
        """The greedy answer to each list of messages, in order.

        Prompts of like length share a batch, which leaves little padding; the answers do not depend on it.
        """
        encoded = [self.template.encode_prompt(list(messages)) for messages in prompts]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            new_ids = self._continue([encoded[index] for index in batch], max_new_tokens)
            answers |= {index: self._read(ids) for index, ids in zip(batch, new_ids, strict=True)}
        return [answers[index] for index in range(len(encoded))]

    def _continue(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        width, pad = max(map(len, prompts)), self.stop_ids[0]
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = self.model.device
        output = self.model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens
        )
        return output[:, width:].tolist()

    def _read(self, ids: list[int]) -> Answer:
        length = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        text = self.template.tokenizer.decode(ids[:length], skip_special_tokens=False)
        return Answer(text, length, length < len(ids))
