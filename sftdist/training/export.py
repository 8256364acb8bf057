"""Export to a Hugging Face folder, shard by shard, and proven in a fresh process before it gets its name.

A full run gives a model folder; a LoRA run the merged model with the adapter folder in `adapter/`, or the adapter
alone. Rank 0 holds one shard and one layer at a time (of a LoRA run all adapters, too), the other ranks one layer. The
files are written beside the final folder, checked by `export_check` there, and renamed when every check has passed.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.storage import (
    commit_directory,
    remove_path,
    temporary_directory,
    write_json,
    write_manifest,
)
from sftdist.data.template import ChatTemplate
from sftdist.model.lora import (
    ADAPTER_FILE,
    LayerMerge,
    merged_parameters,
    require_change,
    require_learned,
    save_adapter,
)
from sftdist.model.loss import LossModel
from sftdist.model.text_part import causal_lm, outside_text
from sftdist.training.export_proof import FreshCheck, probe_rows, tolerance_of, write_probe
from sftdist.training.shards import Shards
from sftdist.training.tensor_file import write_tensors
from sftdist.training.zero_config import COMPUTE_DTYPE, EngineSpec

ADAPTER = "adapter"
_POLL_SECONDS = 0.2


class Exportable(Protocol):
    """What an export reads: the live engine, or a checkpoint with its base. Every verb is collective over `world`.

    `module.model` says which parameters there are; they may be partitioned, so values come from the verbs. `updates`:
    optimizer updates that were applied; without one nothing can have been learned.
    """

    module: LossModel
    world: World
    spec: EngineSpec
    updates: int

    def logits(self, ids: Tensor) -> Tensor:
        """[T,V] float32 of one document [T]."""
        ...

    def parameters(self, *, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name in the wrapped model and whole float32 value, one after another; a tied one comes once."""
        ...

    def value(self, name: str) -> Tensor:
        """The whole float32 value of one of them."""
        ...


@dataclass(frozen=True)
class ExportSpec:
    """`dtype`: fp32 | bf16 | fp16. `merge`: a LoRA run's export is the merged model, its adapter beside it. `step`:
    that of the run, for the manifest."""

    dtype: str = "bf16"
    shard_bytes: int = 4 * 2**30
    merge: bool = True
    step: int | None = None


def export_model(
    source: Exportable,
    template: ChatTemplate,
    folder: Path,
    spec: ExportSpec | None = None,
    *,
    stopped: Callable[[], bool] | None = None,
    written: Callable[[], None] | None = None,
    say: Callable[[str], None] | None = None,
    check: FreshCheck | None = None,
) -> Path | None:
    """Write, prove and publish the trained model; an older export of the same name is replaced. Collective.

    `stopped` is asked on every rank between tensors and while the fresh process runs: where one says yes, nothing is
    left behind and the result is None. `written` is called when all values have been read. `check`: the fresh process,
    where it was started already. Raises CheckpointError on every rank when a file cannot be written, when the export is
    what training began with though updates were applied, or when the folder, loaded by a fresh process, is not the live
    model: the folder then keeps what it held.
    """
    job = _Job(source, template, spec or ExportSpec(), stopped, say or (lambda text: None), check or FreshCheck())
    world = source.world
    temp = Path(job.on_main(lambda: str(temporary_directory(folder))))
    end: CheckpointError | _GivenUp | None = None
    try:
        job.write(temp)
        if written is not None:
            written()
        job.prove(temp)
        job.on_main(lambda: _publish(temp, folder))
    except (CheckpointError, _GivenUp) as error:  # on every rank, or on none
        end = error
    finally:
        job.end()
        if world.is_main:
            shutil.rmtree(temp, ignore_errors=True)
    world.barrier()
    if isinstance(end, CheckpointError):
        raise CheckpointError(f"the export to {folder} failed: {end}") from end
    return None if end else folder


def is_adapted(source: Exportable) -> bool:
    """True where adapters train, and the model underneath does not."""
    return source.module.model is not causal_lm(source.module.model)


def is_adapter_alone(source: Exportable, spec: ExportSpec) -> bool:
    """True where the export will be an adapter, not a model."""
    return is_adapted(source) and not spec.merge


class _GivenUp(Exception):
    """A rank was asked to stop, and all ranks know."""


class _Job:
    """One export under way."""

    def __init__(
        self,
        source: Exportable,
        template: ChatTemplate,
        spec: ExportSpec,
        stopped: Callable[[], bool] | None,
        say: Callable[[str], None],
        check: FreshCheck,
    ) -> None:
        self._source, self._world, self._template, self._spec = source, source.world, template, spec
        self._stopped, self._say = stopped, say
        self._model = causal_lm(source.module.model)
        self._whole = not is_adapter_alone(source, spec)
        self._logits: list[torch.Tensor] = []
        self._check = check

    def write(self, folder: Path) -> None:
        """Every file of the export, the manifest last; and what the live model says to the probes."""
        self._go_on("exporting")
        self.on_main(lambda: self._check.start(adapter=not self._whole))
        self._logits = [self._source.logits(row) for row in probe_rows(self._model)]
        known: dict[str, dict[str, Any]] = {}
        if is_adapted(self._source):
            self._write_adapter(folder / ADAPTER if self._whole else folder)
        if self._whole:
            known = self._write_shards(folder)
        self.on_main(lambda: self._finish(folder, known))

    def prove(self, folder: Path) -> None:
        """In a fresh process on rank 0, while every rank may still be asked to stop."""
        with tempfile.TemporaryDirectory() as scratch:
            self.on_main(lambda: self._give(folder, Path(scratch)))
            while self._world.all_reduce_max(float(self._check.running())):
                self._go_on("checking the export")
                time.sleep(_POLL_SECONDS)
            self._go_on("checking the export")  # a signal to every process of the job has ended the check, too
            self.on_main(self._check.require_passed)

    def end(self) -> None:
        """No process is left behind."""
        self._check.kill()

    def _give(self, folder: Path, probe: Path) -> None:
        dtype = self._spec.dtype if self._whole else "fp32"
        tolerance = tolerance_of(self._source.spec.precision, dtype)
        write_probe(probe, self._model, self._template, self._logits, tolerance)
        self._check.give(folder, probe)

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, on every rank; where it fails there, every rank raises CheckpointError."""
        value, error = None, None
        if self._world.is_main:
            try:
                value = work()
            except (OSError, SafetensorError, CheckpointError) as failure:
                error = str(failure)
        value, error = self._world.broadcast_object((value, error))
        if error is not None:
            raise CheckpointError(error)
        return value

    def _go_on(self, phase: str) -> None:
        """Say what this rank is doing, and leave together with the others where one was asked to stop."""
        self._world.progress.note(phase)
        if self._stopped is not None and self._world.all_reduce_max(float(self._stopped())):
            raise _GivenUp

    def _write_adapter(self, folder: Path) -> None:
        """The adapter's tensors are gathered one after another; rank 0 keeps them: PEFT names them all at once."""
        tensors = {}
        for name, value in self._source.parameters(trainable_only=True):
            self._go_on("exporting")
            if self._world.is_main:
                tensors[name] = value.cpu()
            del value
        self.on_main(lambda: self._save_adapter(folder, tensors))

    def _save_adapter(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        folder.mkdir(exist_ok=True)
        state = save_adapter(self._source.module.model, tensors, folder)
        if self._source.updates:
            require_learned(state)
        write_tensors({name: tensor.contiguous() for name, tensor in state.items()}, folder / ADAPTER_FILE)

    def _write_shards(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Stream every tensor to rank 0's disk; what the manifest says of the files."""
        shards = Shards(folder, self._spec.shard_bytes)
        proofs: dict[str, LayerMerge] = {}
        dtype = COMPUTE_DTYPE[self._spec.dtype]
        for name, value in _tensors(self._source, dtype, proofs):
            self._go_on("exporting")
            if self._world.is_main:
                converted = revert_weight_conversion(self._model, {name: value.to("cpu", dtype)})
                for exported, tensor in converted.items():
                    shards.add(exported, tensor.contiguous())
                del converted, tensor
            del value  # before the next one is gathered
        if is_adapted(self._source):
            if self._source.updates:
                require_change(proofs, self._spec.dtype)
            if self._world.is_main:
                self._say(_describe(proofs, self._spec.dtype))
        entries: dict[str, dict[str, Any]] = self.on_main(shards.finish)
        return entries

    def _finish(self, folder: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
        """Config, tokenizer and manifest."""
        self._template.save(folder)
        if self._whole:
            write_json(folder / "generation_config.json", generation_config(self._model, self._template))
            config = copy.deepcopy(self._model.config)
            config.dtype = COMPUTE_DTYPE[self._spec.dtype]
            for part in (config, config.get_text_config(decoder=True)):
                part.use_cache = True  # off in training, and needed by everybody who generates
            config.save_pretrained(str(folder))
            copy_processor(self._model, folder)
            if (folder / ADAPTER).is_dir():
                self._template.save(folder / ADAPTER)
        write_manifest(folder, known, facts={"step": self._spec.step})


def copy_processor(model: PreTrainedModel, folder: Path) -> None:
    """What turns pictures and sound into inputs of a multimodal model, as it is beside the base."""
    source = model.config.name_or_path
    if not source or not outside_text(model):
        return
    revision = getattr(model.config, "_commit_hash", None)  # transformers sets it for what came from the Hub
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME):
        found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, folder / name)


def _tensors(source: Exportable, dtype: torch.dtype, proofs: dict[str, LayerMerge]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model underneath, gathered one after another; a tied one comes once."""
    model = source.module.model
    if is_adapted(source):
        yield from merged_parameters(model, source.value, dtype, proofs)
    else:
        yield from source.parameters()
    underneath = causal_lm(model)
    stored = set(underneath.state_dict())
    yield from ((name, buffer) for name, buffer in underneath.named_buffers() if name in stored)


def _publish(temp: Path, folder: Path) -> None:
    if folder.exists():
        remove_path(folder)
    commit_directory(temp, folder)


def _describe(proofs: Mapping[str, LayerMerge], dtype: str) -> str:
    """What the merge did, in a line."""
    changes = [proof.change for proof in proofs.values()]
    worst = min(proofs, key=lambda name: proofs[name].kept)
    return (
        f"merged {len(proofs)} layers in float32: their weights changed by {min(changes):.1e} to {max(changes):.1e} of "
        f"their size; rounded to {dtype}, at least {proofs[worst].kept:.0%} of the change is left ({worst})"
    )


def generation_config(model: PreTrainedModel, template: ChatTemplate) -> dict[str, Any]:
    """The model's own generation settings, with every token that ends a turn: the template's and the tokenizer's."""
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.eos_token_id = sorted(template.stop_ids)
    config.bos_token_id = template.tokenizer.bos_token_id
    config.pad_token_id = template.tokenizer.pad_token_id
    config.use_cache = True
    return dict(config.to_diff_dict())
