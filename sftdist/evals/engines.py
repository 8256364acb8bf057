"""The engine that answers: transformers, or vLLM where it is installed."""

from __future__ import annotations

from importlib import import_module, util
from pathlib import Path

import torch

from sftdist.core.errors import ConfigError
from sftdist.evals.backends.hf import HfEngine
from sftdist.evals.backends.interface import Engine
from sftdist.evals.decoding import VLLM, Decoding
from sftdist.evals.voice import Voice


def require_engine(engine: str, world_size: int) -> None:
    """Raises ConfigError where this engine cannot run here, with what to change."""
    if engine != VLLM:
        return
    if util.find_spec(VLLM) is None:
        raise ConfigError(
            "evals.engine=vllm: vllm is not installed; install it with pip install 'sftdist[serve]', or set "
            "evals.engine=hf"
        )
    if world_size > 1:
        raise ConfigError(
            f"evals.engine=vllm: given {world_size} ranks, required one process, which uses every GPU of its host; "
            "start it without torchrun, or set evals.engine=hf"
        )


def load_engine(folder: Path, voice: Voice, decoding: Decoding, device: torch.device) -> Engine:
    """The model or adapter in a folder, ready to answer in this voice. Raises CheckpointError for a tensor that is
    missing, unknown or of another shape, ConfigError where the engine cannot run here."""
    if decoding.engine != VLLM:
        return HfEngine.load(folder, voice.stop_ids, dtype=decoding.dtype, device=device, rows=voice.rows)
    require_engine(decoding.engine, 1)
    # By name: the file imports vllm, which is not there everywhere.
    engine: Engine = import_module("sftdist.evals.backends.vllm").open_vllm(folder, voice, decoding)
    return engine
