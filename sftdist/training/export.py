"""Export to a Hugging Face folder, shard by shard, and proven in a fresh process before it gets its name.

A full run gives a model folder; a LoRA run the merged model with the adapter folder in `adapter/`, or the adapter
alone. Rank 0 holds one shard and one tensor at a time. The files are written beside the final folder, checked by
`export_check` there, and renamed when every check has passed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sftdist.core.errors import CheckpointError
from sftdist.core.storage import commit_directory, temporary_directory, write_json, write_manifest
from sftdist.data.message import Message
from sftdist.data.render import CLOCK
from sftdist.data.template import ChatTemplate
from sftdist.model.lora import merged_parameters, save_adapter
from sftdist.model.loss import causal_lm
from sftdist.training.engine import Engine
from sftdist.training.export_check import LOGITS, PROBE, Probe, problems_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER = "adapter"
INDEX = "model.safetensors.index.json"
_CHECK = "sftdist.training.export_check"
_PROBE_ROWS, _PROBE_TOKENS = 3, 24


@dataclass(frozen=True)
class ExportSpec:
    """`dtype`: fp32 | bf16 | fp16. `merge`: a LoRA run's export is the merged model, its adapter beside it."""

    dtype: str = "bf16"
    shard_bytes: int = 4 * 2**30
    merge: bool = True


def export_model(engine: Engine, template: ChatTemplate, folder: Path, spec: ExportSpec | None = None) -> Path:
    """Write, prove and publish the trained model; an older export of the same name is replaced. Collective.

    Raises CheckpointError on every rank when a file cannot be written, or when the exported folder, loaded by a fresh
    process, is not the live model: the folder then keeps what it held.
    """
    spec = spec or ExportSpec()
    world, model = engine.world, engine.module.model
    logits = [engine.logits(row) for row in probe_rows(causal_lm(model))]
    temp = Path(world.broadcast_object(str(temporary_directory(folder)) if world.is_main else None))
    error = None
    adapted = is_adapted(engine)
    if adapted:
        tensors = {name: value.cpu() for name, value in engine.parameters(trainable_only=True)}
        error = _on_main(engine, lambda: _write_adapter(model, tensors, temp / ADAPTER if spec.merge else temp))
    if error is None and (spec.merge or not adapted):
        error = _write_shards(engine, temp, spec)
    if error is None:
        error = _on_main(engine, lambda: _finish(engine, template, temp, folder, spec, logits))
    if world.is_main:
        shutil.rmtree(temp, ignore_errors=True)
    world.barrier()
    if error is not None:
        raise CheckpointError(f"the export to {folder} failed: {error}")
    return folder


def verify_export(folder: Path, probe: Path | None = None, *, timeout_seconds: float = 1800.0) -> None:
    """Check an exported folder in a fresh process: manifest, tensors, load, and the logits and ids of a probe.

    Raises CheckpointError that names the file or the tensor.
    """
    listed = problems_of(folder)  # cheap, and here, so that a wrong file is named without loading anything
    if listed:
        raise CheckpointError(f"{folder} is not what was exported: {'; '.join(listed[:5])}")
    arguments = [sys.executable, "-m", _CHECK, str(folder), *([str(probe)] if probe else [])]
    done = subprocess.run(arguments, capture_output=True, text=True, env=_plain_environment(), timeout=timeout_seconds)
    if done.returncode:
        reason = done.stdout.strip() or done.stderr.strip()[-500:]
        raise CheckpointError(f"{folder} does not pass the check in a fresh process: {reason}")


def is_adapted(engine: Engine) -> bool:
    """True where adapters train, and the model underneath does not."""
    return engine.module.model is not causal_lm(engine.module.model)


def probe_rows(model: PreTrainedModel) -> list[Tensor]:
    """Token rows spread over the vocabulary, the same every time."""
    rows = int(model.config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(rows, (_PROBE_TOKENS,), generator=generator) for _ in range(_PROBE_ROWS)]


def _write_shards(engine: Engine, folder: Path, spec: ExportSpec) -> str | None:
    """Stream every tensor to rank 0's disk; the error, the same on every rank, or None."""
    model = causal_lm(engine.module.model)
    shards = _Shards(folder, spec.shard_bytes)
    for name, value in _tensors(engine):
        if engine.world.is_main:
            converted = revert_weight_conversion(model, {name: value.to("cpu", DTYPES[spec.dtype])})
            for exported, tensor in converted.items():
                shards.add(exported, tensor.contiguous())
    return _on_main(engine, shards.finish)


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model underneath, gathered one after another; a tied one comes once."""
    model = engine.module.model
    if is_adapted(engine):
        yield from merged_parameters(model, engine.value)
    else:
        yield from engine.parameters()
    underneath = causal_lm(model)
    stored = set(underneath.state_dict())
    yield from ((name, buffer) for name, buffer in underneath.named_buffers() if name in stored)


class _Shards:
    """Safetensors files of at most `limit` bytes (or one larger tensor). An error is kept until `finish` raises it:
    the other ranks count on this one in their collectives."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._pending: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._written: list[list[str]] = []
        self._error: OSError | SafetensorError | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._size + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def _flush(self) -> None:
        if self._error is None:
            try:
                save_file(self._pending, self._folder / f"part-{len(self._written)}", metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                self._error = error
        self._written.append(list(self._pending))
        self._pending, self._size = {}, 0

    def finish(self) -> None:
        """Give the shards their names, which hold their number, and write the index."""
        self._flush()
        if self._error is not None:
            raise self._error
        count = len(self._written)
        names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        names = ["model.safetensors"] if count == 1 else names
        for number, name in enumerate(names):
            (self._folder / f"part-{number}").rename(self._folder / name)
        if count > 1:
            where = {tensor: name for name, part in zip(names, self._written, strict=True) for tensor in part}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
            write_json(self._folder / INDEX, index)


def _write_adapter(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    state = save_adapter(model, tensors, folder)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")


def _finish(
    engine: Engine, template: ChatTemplate, temp: Path, folder: Path, spec: ExportSpec, logits: Sequence[Tensor]
) -> None:
    """Config, tokenizer and manifest; then the proof; then the name."""
    model = causal_lm(engine.module.model)
    template.save(temp)
    if spec.merge or not is_adapted(engine):
        write_json(temp / "generation_config.json", generation_config(model, template))
        config = copy.deepcopy(model.config)
        config.dtype = DTYPES[spec.dtype]
        for part in (config, config.get_text_config(decoder=True)):
            part.use_cache = True  # off in training, and needed by everybody who generates
        config.save_pretrained(str(temp))
        if (temp / ADAPTER).is_dir():
            template.save(temp / ADAPTER)
    write_manifest(temp)
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch)
        write_probe(probe, model, template, logits, tolerance_of(engine.spec.precision, spec.dtype))
        verify_export(temp, probe)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)
    commit_directory(temp, folder)


def generation_config(model: PreTrainedModel, template: ChatTemplate) -> dict[str, Any]:
    """The model's own generation settings, with every token that ends a turn: the template's and the tokenizer's."""
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.eos_token_id = sorted(template.stop_ids)
    config.bos_token_id = template.tokenizer.bos_token_id
    config.pad_token_id = template.tokenizer.pad_token_id
    config.use_cache = True
    return dict(config.to_diff_dict())


def tolerance_of(precision: str, dtype: str) -> float:
    """How far logits may be from the live ones (root mean square): the rounding of the coarser of the two."""
    return 1e-5 if precision == dtype == "fp32" else 3e-2


def write_probe(
    folder: Path, model: PreTrainedModel, template: ChatTemplate, logits: Sequence[Tensor], tolerance: float
) -> None:
    """What the fresh process compares with: rows of ids, the live model's logits, and the ids of a rendered prompt."""
    rows = torch.stack(probe_rows(model))
    live = torch.stack([part.float().cpu() for part in logits])
    save_file({"ids": rows, "logits": live}, folder / LOGITS)
    prompt = [Message(role="user", content="What is 2 + 3?  Say it  twice.")]
    ids = template.encode_prompt(prompt)
    text = template.render(prompt, add_generation_prompt=True)
    messages = [{"role": message.role, "content": message.content} for message in prompt]
    probe = Probe(messages, text, list(map(int, ids)), template.arguments, CLOCK.isoformat(), tolerance)
    (folder / PROBE).write_text(json.dumps(vars(probe)), encoding="utf-8")


def _on_main(engine: Engine, work: Any) -> str | None:
    """Do something on rank 0; what went wrong, the same on every rank, or None."""
    error = None
    if engine.world.is_main:
        try:
            work()
        except (OSError, SafetensorError, CheckpointError, subprocess.TimeoutExpired) as failure:
            error = str(failure)
    outcome: str | None = engine.world.broadcast_object(error)
    return outcome


def _plain_environment() -> dict[str, str]:
    """Without torchrun's variables, and without GPUs: the training ranks hold those."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC_", "GROUP_"))}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK"):
        kept.pop(key, None)
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
