"""Greedy answers by transformers' `generate`, one padded batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from sftdist.evals.backends.interface import Ids
from sftdist.evals.identity import adapter_base
from sftdist.model.load import grow_vocabulary, load_strictly
from sftdist.model.lora import load_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(folder: Path, *, dtype: str, device: torch.device, rows: int) -> PreTrainedModel:
    """The model or adapter in a folder. `rows`: how many ids a prompt may hold; a base whose vocabulary is smaller
    gets the rows that training began with.

    Raises CheckpointError for a tensor that is missing, unknown or of another shape.
    """
    adapted = adapter_base(folder) is not None
    model = load_adapter(folder, DTYPES[dtype]).get_base_model() if adapted else load_strictly(folder, DTYPES[dtype])
    if model.get_input_embeddings().weight.shape[0] < rows:
        grow_vocabulary(model, rows)
    return model.to(device)


class _Teller(BaseStreamer):
    """Passes new ids on, one at a time; transformers begins with the prompt."""

    def __init__(self, prompt: int, tell: Callable[[int], None]) -> None:
        self._left, self._tell = prompt, tell

    def put(self, value: torch.Tensor) -> None:
        for token in value.flatten().tolist():
            if self._left:
                self._left -= 1
            else:
                self._tell(token)

    def end(self) -> None:
        """Whoever asked knows that it has ended."""


class HfEngine:
    """A model in memory, on one device."""

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int]) -> None:
        self._model, self._stop_ids = model.eval(), tuple(stop_ids)
        # The folder's own settings may ask for sampling or penalties, and fill what a call leaves open.
        model.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
        )

    @classmethod
    def load(cls, folder: Path, stop_ids: Sequence[int], *, dtype: str, device: torch.device, rows: int) -> HfEngine:
        """The model or adapter in a folder, as `load_model` has it."""
        return cls(load_model(folder, dtype=dtype, device=device, rows=rows), stop_ids)

    @torch.inference_mode()
    def continued(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
        width, pad, device = max(map(len, prompts)), self._stop_ids[0], self._model.device
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        output = self._model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens)
        return [self._cut(new) for new in output[:, width:].tolist()]

    @torch.inference_mode()
    def told(self, prompt: Ids, max_new_tokens: int, tell: Callable[[int], None]) -> Ids:
        """What `continued` says to this prompt alone; `tell` gets each id as soon as it is known, the stop id, too."""
        ids = torch.tensor([list(prompt)], device=self._model.device)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=_Teller(len(prompt), tell),
        )
        return self._cut(output[0, len(prompt) :].tolist())

    def _cut(self, ids: list[int]) -> Ids:
        """Without the padding after the first stop id."""
        end = next((place + 1 for place, token in enumerate(ids) if token in self._stop_ids), len(ids))
        return tuple(ids[:end])
