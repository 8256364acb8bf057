"""A checkpoint as an export reads it: one CPU process, no engine, no GPU, none of the training data.

`run_dir/model/` is written when training begins: the model without its weights (config, generation settings, tokenizer
with its template). With it a full fine-tune's checkpoint is a model; a LoRA run's needs its base, too, which is found
by `model.path` and recognised by its content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from sftdist.core.distributed import World
from sftdist.core.errors import CheckpointError
from sftdist.core.settings import Init, Method, TrainConfig
from sftdist.core.storage import publish_directory, read_json, write_json
from sftdist.data.template import ChatTemplate
from sftdist.model.attention import choose
from sftdist.model.backends.interface import Documents
from sftdist.model.config import load_config
from sftdist.model.load import load_model, weight_hashes
from sftdist.model.lora import attach
from sftdist.model.loss import LossModel
from sftdist.model.quantised import is_quantised, quantise, whole, whole_shape
from sftdist.model.text_part import outside_text
from sftdist.training.build import engine_spec, lora_spec
from sftdist.training.checkpoint_files import STATE, read_tensors
from sftdist.training.export import ExportSpec
from sftdist.training.zero_config import COMPUTE_DTYPE

OUTLINE = "model"
_FACTS = "facts.json"
_GENERATION = "generation.json"
_CPU = torch.device("cpu")
_LIBRARIES = 700 * 2**20  # what Python, torch and transformers take by themselves
_LAYER_COPIES = 4  # of the largest tensor in float32: base, merged, their difference, and it rounded


@dataclass(frozen=True)
class Outline:
    """A run's model without its weights. `token_rows`: ids whose rows train beside an adapter."""

    config: PreTrainedConfig
    generation: GenerationConfig
    template: ChatTemplate
    token_rows: tuple[int, ...]


def write_outline(run_dir: Path, model: PreTrainedModel, template: ChatTemplate, token_rows: Sequence[int]) -> None:
    """Write `run_dir/model/` where it is not there yet."""
    folder = run_dir / OUTLINE
    if folder.is_dir():
        return
    generation = model.generation_config or GenerationConfig()
    facts = {"token_rows": list(token_rows), "stop_ids": list(template.stop_ids), "arguments": template.arguments}
    with publish_directory(folder) as temp:
        model.config.save_pretrained(str(temp))
        template.save(temp)
        write_json(temp / _GENERATION, generation.to_diff_dict())
        write_json(temp / _FACTS, facts)


def read_outline(run_dir: Path) -> Outline:
    """What `write_outline` wrote. Raises CheckpointError where it is not there."""
    folder = run_dir / OUTLINE
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not there: it holds the tokenizer and the model's config, and training writes it before its "
            "first step. Start the run's training command once more, then export."
        )
    facts = read_json(folder / _FACTS)
    saved = ChatTemplate.load(str(folder))
    template = ChatTemplate.of(saved.tokenizer, saved.text, arguments=facts["arguments"], stop_ids=facts["stop_ids"])
    return Outline(
        AutoConfig.from_pretrained(folder),
        GenerationConfig.from_dict(read_json(folder / _GENERATION)),
        template,
        tuple(facts["token_rows"]),
    )


class SavedModel:
    """A checkpoint with its base, in the precision of the run: all that an export asks of a live engine.

    The values are memory maps of the checkpoint's files, so they stay readable when the run prunes it. Raises
    CheckpointError where checkpoint, base and configuration do not belong together.
    """

    def __init__(self, cfg: TrainConfig, path: Path, outline: Outline) -> None:
        header = read_json(path / STATE)
        index = header["parameters"]
        self.world = World(0, 1, 0, _CPU)
        self.spec = engine_spec(cfg)
        self.updates = int(header["counters"]["updates"])
        self._values = {name: tensors["value"] for name, tensors in read_tensors(path, index, index)}
        _require_base(cfg, header["base"], path)
        model = _build(cfg, outline, header["base"], COMPUTE_DTYPE[self.spec.precision])
        self._fill(model, path)
        self.module = LossModel(model, num_sources=1).eval()

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        documents = Documents.of_lengths([len(ids)], _CPU)
        output = self.module.model(input_ids=ids[None], use_cache=False, **documents.model_arguments())
        logits: Tensor = output.logits[0].float()
        return logits

    def parameters(self, *, trainable_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, _ in self.module.model.named_parameters():
            if name in self._values or not trainable_only:
                yield name, self.value(name)

    def value(self, name: str) -> Tensor:
        if name in self._values:
            return self._values[name]
        return whole(self.module.model.get_parameter(name))

    def release(self) -> None:
        """Give the host memory of the weights back; only their names and shapes are used afterwards."""
        for module in self.module.modules():
            if isinstance(module, nn.Linear) and is_quantised(module.weight):  # bitsandbytes' class cannot go to meta
                module.weight = nn.Parameter(torch.empty(whole_shape(module.weight), device="meta"))
        self.module.to("meta")

    @torch.no_grad()
    def _fill(self, model: torch.nn.Module, path: Path) -> None:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if trained.keys() != self._values.keys():
            wrong = sorted(trained.keys() ^ self._values.keys())
            raise CheckpointError(f"{path}: it does not hold what this configuration trains: {', '.join(wrong[:5])}")
        for name, parameter in trained.items():
            if parameter.shape != self._values[name].shape:
                found, wanted = list(self._values[name].shape), list(parameter.shape)
                raise CheckpointError(f"{path}: {name} is {found}, but this configuration makes it {wanted}")
            parameter.copy_(self._values[name])


def expected_memory(cfg: TrainConfig, outline: Outline, spec: ExportSpec) -> int:
    """Bytes of host memory that the export of a checkpoint will need at its peak, the fresh process included."""
    shapes = [tensor.shape.numel() for tensor in _on_meta(outline.config).parameters()]
    held = 4 if _needs_float32(cfg) else COMPUTE_DTYPE[cfg.precision.value].itemsize
    checking = sum(shapes) * COMPUTE_DTYPE[spec.dtype].itemsize
    reading = sum(shapes) * held + min(spec.shard_bytes, checking) + _LAYER_COPIES * 4 * max(shapes)
    return max(reading + _LIBRARIES, checking + 2 * _LIBRARIES)


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _needs_float32(cfg: TrainConfig) -> bool:
    """Random numbers are those of the run in float32 only."""
    return cfg.tune.method != Method.full and cfg.model.init == Init.random


def _build(cfg: TrainConfig, outline: Outline, base: Mapping[str, Any] | None, dtype: torch.dtype) -> torch.nn.Module:
    """The model as it was when training began; a full fine-tune's weights are those of the checkpoint, so its base is
    read only where that holds more than trained parameters."""
    skeleton = _on_meta(outline.config)
    trained_alone = skeleton.state_dict().keys() <= dict(skeleton.named_parameters(remove_duplicate=False)).keys()
    trained_alone = trained_alone and not outside_text(skeleton)
    adapted = cfg.tune.method != Method.full
    from_base = cfg.model.init == Init.pretrained and (adapted or not trained_alone)
    revision = base["revision"] if base is not None else cfg.model.revision
    model = load_model(
        config=load_config(cfg.model.path, revision, None) if from_base else outline.config,
        path=cfg.model.path if from_base else None,
        revision=revision,
        init="pretrained" if from_base else "random",
        seed=cfg.seed,
        dtype=torch.float32 if _needs_float32(cfg) else dtype,
        attention=choose("auto", _CPU, dtype, outline.config).name,
        vocab_rows=outline.config.get_text_config(decoder=True).vocab_size,
    )
    model.generation_config = outline.generation
    built: torch.nn.Module = model
    if cfg.tune.method == Method.qlora:
        quantise(model, double_quant=cfg.tune.double_quant, dtype=dtype, device=_CPU)
    if adapted:
        built, _ = attach(model, lora_spec(cfg), train_rows=outline.token_rows)
    for parameter in built.parameters():  # as the engine has them in its forward
        if not is_quantised(parameter):
            parameter.data = parameter.data.to(dtype)
    return built


def _require_base(cfg: TrainConfig, saved: Mapping[str, Any] | None, path: Path) -> None:
    """The base of a LoRA checkpoint may have moved, but not changed."""
    if saved is None or not saved["files"]:
        return
    found = weight_hashes(Path(str(cfg.model.path)))
    wrong = sorted(name for name in {**saved["files"], **found} if saved["files"].get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{path}: it belongs to other weights than model.path={cfg.model.path} holds "
            f"({', '.join(wrong[:3])}); give the folder that training began with as model.path"
        )
