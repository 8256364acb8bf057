"""Greedy answers by vLLM (the only import of it; `engines.load_engine` opens this file where vLLM is installed).

By its documented interface: `LLM`, `SamplingParams` and prompts of token ids (https://docs.vllm.ai, 0.11 and later).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from sftdist.core.errors import ConfigError
from sftdist.evals.backends.interface import Ids
from sftdist.evals.decoding import Decoding
from sftdist.evals.identity import adapter_base
from sftdist.evals.voice import Voice

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class VllmEngine:
    """A model on every GPU of this host that can share it; up to `batch_size` prompts are under way at a time."""

    def __init__(self, folder: Path, stop_ids: Sequence[int], decoding: Decoding, max_model_len: int | None) -> None:
        self._stop_ids = tuple(stop_ids)
        self._llm = LLM(
            model=str(folder),
            dtype=_DTYPES[decoding.dtype],
            seed=0,
            tensor_parallel_size=_gpus_for(folder),
            max_model_len=max_model_len,
            max_num_seqs=decoding.batch_size,
            enable_prefix_caching=False,  # what was asked before would decide which part of a prompt is computed anew
        )

    def continued(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
        # The folder's own stop ids are ignored: those of the voice hold for every model.
        greedy = SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            stop_token_ids=list(self._stop_ids),
            ignore_eos=True,
            detokenize=False,
        )
        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        said = [output.outputs[0] for output in self._llm.generate(asked, greedy, use_tqdm=False)]
        return [self._whole(tuple(one.token_ids), one.finish_reason) for one in said]

    def _whole(self, ids: Ids, reason: str | None) -> Ids:
        """With the stop id, which some versions leave out."""
        stopped = reason == "stop" and not (ids and ids[-1] in self._stop_ids)
        return (*ids, self._stop_ids[0]) if stopped else ids


def open_vllm(folder: Path, voice: Voice, decoding: Decoding) -> VllmEngine:
    """Raises ConfigError for what vLLM would answer to otherwise than the trained model: an adapter (token rows and
    DoRA are not known to it), or a vocabulary without the tokens of the template."""
    if adapter_base(folder) is not None:
        raise ConfigError(
            f"evals.engine=vllm: given the adapter {folder}, required a whole model; merge it (sftdist export "
            "run.dir=R export.merge=true), or set evals.engine=hf"
        )
    rows = AutoConfig.from_pretrained(folder).get_text_config(decoder=True).vocab_size
    if rows < voice.rows:
        raise ConfigError(
            f"evals.engine=vllm: {folder} has {rows} rows for tokens, but the template's tokenizer has {voice.rows}, "
            "and vLLM cannot add those that training began with; set evals.engine=hf"
        )
    return VllmEngine(folder, voice.stop_ids, decoding, voice.positions)


def _gpus_for(folder: Path) -> int:
    """The most GPUs that the attention heads can be dealt to evenly."""
    heads = AutoConfig.from_pretrained(folder).get_text_config(decoder=True).num_attention_heads
    return max(count for count in range(1, max(1, torch.cuda.device_count()) + 1) if heads % count == 0)
