"""Full fine-tuning where it fits into memory, else LoRA, else QLoRA: the planner decides, and its figures are the
reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sftdist.commands.init_parts.data_facts import DataFacts
from sftdist.commands.init_parts.machine import Machine
from sftdist.commands.init_parts.model_facts import ModelFacts
from sftdist.commands.init_parts.size import Size
from sftdist.core.errors import ConfigError
from sftdist.core.settings import Method, Precision, TrainConfig
from sftdist.model import cost, timing
from sftdist.training.build import planned_trainable
from sftdist.training.choices import Choice, choices, fastest_that_fits

KEPT = ("zero.offload",)  # an optimizer in the host's memory costs more time than LoRA costs quality
NAMES = {Method.full: "a full fine-tune", Method.lora: "LoRA", Method.qlora: "QLoRA"}


@dataclass(frozen=True)
class Fitting:
    """The setting that is taken, with the size of a step that fits beside it, and why no other method was."""

    choice: Choice
    size: Size
    why: str

    @property
    def method(self) -> Method:
        return self.choice.cfg.tune.method

    def trained(self, model: ModelFacts) -> int:
        """Parameters that are trained."""
        found = planned_trainable(self.choice.cfg, model.shape)
        return model.parameters if found is None else found


def choose_method(model: ModelFacts, data: DataFacts, size: Size, machine: Machine) -> Fitting:
    """Raises ConfigError where nothing fits."""
    over: list[str] = []
    for method in _methods(model, machine):
        found = []
        for pack in dict.fromkeys((size.pack_tokens, size.max_len)):
            sized = _with_pack(size, pack, machine.cluster.gpus)
            cfg = _configuration(model, sized, machine, method)
            step = timing.full_packs(
                model.shape, sized.packs, pack, max(1, min(pack, round(data.mean))), _supervised(data)
            )
            best = fastest_that_fits(cfg, model.shape, machine.cluster, step, machine.budget, KEPT, offload=False)
            if best is not None:
                return Fitting(best, sized, _why(best, machine, over))
            found += choices(cfg, model.shape, machine.cluster, step, machine.budget, KEPT, offload=False)
        least = min(one.needed for one in found) / cost.GIB
        over.append(f"{NAMES[method]} needs at least {least:.1f} GiB")
    raise ConfigError(
        f"--model: given {model.path} of {model.size} parameters for {machine}, required one that fits: "
        f"{', '.join(over)}; give more or larger GPUs (--gpus, --gpu), or a smaller model"
    )


def _methods(model: ModelFacts, machine: Machine) -> list[Method]:
    """Those that can be: 4 bits are for GPUs, and not for fused experts."""
    four_bits = not machine.on_cpu and not cost.shape_of(model.shape).expert_layers
    return [Method.full, Method.lora, *([Method.qlora] if four_bits else [])]


def _with_pack(size: Size, pack: int, gpus: int) -> Size:
    """About the same tokens a step in smaller packs, equally many for each GPU."""
    if pack == size.pack_tokens:
        return size
    return replace(size, pack_tokens=pack, packs=gpus * round(size.packs * size.pack_tokens / pack / gpus))


def _configuration(model: ModelFacts, size: Size, machine: Machine, method: Method) -> TrainConfig:
    cfg = TrainConfig(precision=Precision(machine.precision))
    cfg.model.path = model.path
    cfg.data.max_len = size.max_len
    cfg.train.pack_tokens, cfg.train.packs_per_step = size.pack_tokens, size.packs
    cfg.train.epochs = size.epochs
    cfg.tune.method = method
    return cfg


def _supervised(data: DataFacts) -> float:
    return float(data.targets.sum() / data.lengths.sum())


def _why(best: Choice, machine: Machine, over: list[str]) -> str:
    need = f"{best.needed / cost.GIB:.1f} of {machine.gib:.1f} GiB"
    name = NAMES[best.cfg.tune.method]
    if not over:
        return f"Every weight is trained, since {name} fits: {need}, by the planner."
    return f"By the planner {'; '.join(over)} of {machine.gib:.1f} GiB; {name} fits with {need}."
