"""Our rows of the GPU benchmark: training steps, attention and loss kernels, the matmul rate, memory.

python -m benchmarks.gpu_ours < JOBS      # started by benchmarks/gpu.py
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.gpu_shapes import FULL, TINY, Sizes, batches, chosen, long_tail, real, shape
from benchmarks.gpu_worker import Absent, Job, first_line, serve
from sftdist.core.distributed import World
from sftdist.data.loader import Batch
from sftdist.model import cost
from sftdist.model.attention import choose
from sftdist.model.backends.interface import Documents, LayerArguments
from sftdist.model.backends.registry import PREFERENCE, open_backend, runs_on
from sftdist.model.compiled import compile_layers
from sftdist.model.config import load_config
from sftdist.model.kernels import choose_kernels
from sftdist.model.load import load_model
from sftdist.model.lora import LoraSpec, attach
from sftdist.model.loss import IGNORED, LossModel, chunked_ce
from sftdist.model.text_part import causal_lm, decoder_of
from sftdist.training.meter import peak_flops
from sftdist.training.optimizer import OptimizerSpec
from sftdist.training.replicated import Replicated
from sftdist.training.zero_config import EngineSpec

DTYPE = torch.bfloat16
RANK = 16  # of LoRA
LR = 1e-5
BACKWARD = 2.5  # FLOPs of flash attention's backward over its forward: five products, the scores made again, for two
COMPILING = 40.0  # seconds that torch.compile may need beyond a trial
ROOM = 0.92  # of the GPU's memory that a prediction may fill before a setting is tried


@dataclass(frozen=True)
class Setting:
    """What is tried: kernels auto | torch, torch.compile, and how many layers are recomputed."""

    kernels: str = "torch"
    compiled: bool = False
    recompute: int = 0

    def __str__(self) -> str:
        recomputed = f"{self.recompute} layers recomputed" if self.recompute else "nothing recomputed"
        return f"{self.kernels} kernels, {'compiled, ' if self.compiled else ''}{recomputed}"


class Trainer(Protocol):
    """What is used of an `Engine`."""

    def forward_backward(self, batch: Batch, *, scale: float, last: bool) -> Any: ...

    def step(self, lr: float) -> Any: ...

    def close(self) -> None: ...


class Plain:
    """ZeRO 0 where deepspeed, and so the engine, cannot be imported: the same core, the same arithmetic."""

    def __init__(self, module: LossModel, optimizer: OptimizerSpec, spec: EngineSpec, world: World) -> None:
        self._core, self._device = Replicated(module, optimizer, spec, world), world.device

    def forward_backward(self, batch: Batch, *, scale: float, last: bool) -> Any:
        fields = batch.to(self._device).inputs()
        fields["weights"] = torch.full((len(batch.ids),), scale, device=self._device)
        output = self._core.forward(fields)
        self._core.backward(output.sum, last)
        return output

    def step(self, lr: float) -> Any:
        norm, applied = self._core.step(lr)
        if not applied:
            raise RuntimeError(f"the gradient norm is {norm}: nothing was updated")
        return norm

    def close(self) -> None:
        self._core.close()


def open_engine(stage: int) -> tuple[Callable[..., Trainer], str]:
    """The engine's class and its name; ZeRO 0 has one without deepspeed."""
    try:
        return cast("Callable[..., Trainer]", import_module("sftdist.training.engine").Engine), f"ZeRO {stage}"
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        if stage > 0:
            raise Absent("deepspeed is not installed") from error
        return Plain, "ZeRO 0 without the engine (deepspeed is absent)"


@dataclass(frozen=True)
class Bench:
    """One row of training: where it runs and on what. `mapping`: the model's config."""

    job: Job
    device: torch.device
    sizes: Sizes
    mapping: dict[str, Any]

    @property
    def method(self) -> str:
        return str(self.job["method"])

    @property
    def layers(self) -> int:
        return int(self.mapping["num_hidden_layers"])

    def setup(self, setting: Setting, pack: int | None = None) -> cost.Setup:
        trainable = None if self.method == "full" else cost.lora_parameters(self.mapping, RANK)
        return cost.Setup(
            stage=int(self.job.get("stage", 0)),
            world=1,
            pack_tokens=pack or self.sizes.pack,
            trainable=trainable,
            checkpointing=setting.recompute > 0,
            recompute_layers=setting.recompute,
            quantised=self.method == "qlora",
            offload=bool(self.job.get("offload")),
            loss_chunk=self.sizes.chunk,
        )

    def predicted(self, setting: Setting, pack: int | None = None) -> dict[str, float]:
        return cost.memory(self.mapping, self.setup(setting, pack))

    def fits(self, setting: Setting) -> bool:
        if self.device.type != "cuda":
            return True
        return sum(self.predicted(setting).values()) < ROOM * torch.cuda.get_device_properties(0).total_memory


def bench(job: Job) -> Bench:
    sizes = sizes_of(job)
    mapping = shape(job["model"], sizes.tiny, job.get("layers"))
    return Bench(job, torch.device(job["device"]), sizes, load_config(None, None, mapping).to_dict())


def sizes_of(job: Job) -> Sizes:
    return TINY if job["tiny"] else FULL


def build(row: Bench, setting: Setting) -> tuple[Trainer, LossModel, str]:
    """Random weights on the device in bf16, the adapter, the engine; and a line that says how it runs."""
    torch.compiler.reset()
    config = load_config(None, None, shape(row.job["model"], row.sizes.tiny, row.job.get("layers")))
    attention = choose("auto", row.device, DTYPE, config)
    kernels = choose_kernels(setting.kernels, row.device, config, compiled=setting.compiled)
    with torch.device(row.device):  # 8 B random numbers take a second there, minutes on the host
        model = load_model(
            config=config,
            path=None,
            init="random",
            dtype=DTYPE,
            attention=attention.name,
            activation_checkpointing=setting.recompute > 0,
            recompute_layers=setting.recompute if 0 < setting.recompute < row.layers else None,
            liger=kernels.layers == "liger",
        )
    module: nn.Module = model
    if row.method == "qlora":
        module = quantised(model)
    if row.method != "full":
        module, _ = attach(cast(Any, module), LoraSpec(r=RANK))
    if setting.compiled:
        compile_layers(module)
    loss = LossModel(module, num_sources=1, chunk=row.sizes.chunk, row_losses=kernels.row_losses)
    stage = int(row.job.get("stage", 0))
    spec = EngineSpec(stage, "bf16", "optimizer" if row.job.get("offload") else "none", max_grad_norm=1.0)
    make, name = open_engine(stage)
    engine = make(loss, OptimizerSpec(), spec, World(0, 1, 0, row.device))
    return engine, loss, f"{name}, attention {attention.name}, {kernels}"


def quantised(model: nn.Module) -> nn.Module:
    """The linear layers at 4 bit, as `tune.method=qlora` makes them."""
    try:
        import_module("bitsandbytes")
        quant = import_module("sftdist.model.backends.quant")
    except ImportError as error:
        raise Absent(f"QLoRA: {first_line(error)}") from error
    return cast(nn.Module, quant.quantise(model))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], object], device: torch.device, rounds: int, warmup: int = 1) -> list[float]:
    """Wall seconds of each round, the device waited for on both sides."""
    found = []
    for number in range(warmup + rounds):
        wait(device)
        began = time.perf_counter()
        action()
        wait(device)
        if number >= warmup:
            found.append(time.perf_counter() - began)
    return found


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def step_of(engine: Trainer, packs: Sequence[Batch]) -> Callable[[], None]:
    """One optimizer step over these packs."""
    targets = sum(int((pack.targets != IGNORED).sum()) for pack in packs)

    def step() -> None:
        for number, pack in enumerate(packs):
            engine.forward_backward(pack, scale=1.0 / targets, last=number == len(packs) - 1)
        engine.step(LR)

    return step


@dataclass(frozen=True)
class Speed:
    """Of one setting on one set of packs; FLOPs per step by the true formula, and as if every weight were trained."""

    tokens: int
    seconds: float
    flops: float
    flops_as_full: float

    def figures(self) -> dict[str, float]:
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "flops_per_second": self.flops / self.seconds,
            "flops_per_second_as_full": self.flops_as_full / self.seconds,
            "flops_per_token": self.flops / self.tokens,
            "step_seconds": self.seconds,
            "tokens_per_step": self.tokens,
        }


def speed(row: Bench, engine: Trainer, packs: Sequence[Batch]) -> Speed:
    device = row.device
    ready = [pack.pinned() for pack in packs] if device.type == "cuda" else list(packs)
    found = seconds_of(step_of(engine, ready), device, row.sizes.rounds)
    lengths = [length for pack in packs for length in pack.lengths]
    targets = sum(int((pack.targets != IGNORED).sum()) for pack in packs)
    rank = 0 if row.method == "full" else RANK
    flops = cost.train_flops(row.mapping, lengths, targets, method=row.method, r=rank)
    return Speed(sum(lengths), median(found), flops, cost.train_flops(row.mapping, lengths, targets))


def train(job: Job) -> dict[str, Any]:
    """Try settings within `trial_seconds`, then measure the fastest on both sets of lengths, and its memory.

    The first is torch's kernels with the fewest recomputed layers that are predicted to fit; then the fused kernels,
    torch.compile, and more recomputation, each kept where it is faster.
    """
    row = bench(job)
    vocabulary = int(row.mapping["vocab_size"])
    sets = {name: rows(Path(job["rows"]), row.sizes) for name, rows in SETS.items()}
    packs = {
        name: batches(chosen(rows, job["packs"], row.sizes.pack, row.mapping), vocabulary)
        for name, rows in sets.items()
    }
    trials = Trials(row, packs["real"], time.monotonic() + float(job["trial_seconds"]))
    best = trials.fastest()
    figures: dict[str, Any] = best.speed.figures() | {
        "setting": str(best.setting),
        "runs": best.runs,
        "tried": trials.lines,
    }
    figures["recomputed_layers"] = best.setting.recompute
    engine = trials.live(best.setting)
    peak = peak_of(row, lambda: speed(row, engine, packs["long tail"]).figures())
    figures["long_tail"] = peak.result
    parts = row.predicted(best.setting)
    figures |= {"predicted_bytes": sum(parts.values()), "predicted_parts": parts, "peak_bytes": peak.bytes}
    figures["layers"] = row.layers
    trials.drop()
    return figures


SETS: dict[str, Callable[[Path, Sizes], list[list[int]]]] = {
    "real": real,
    "long tail": lambda path, sizes: long_tail(sizes),
}


@dataclass(frozen=True)
class Peak:
    """`bytes`: most that was allocated on the GPU meanwhile; None on a CPU, where nobody counts."""

    result: Any
    bytes: int | None


def peak_of(row: Bench, action: Callable[[], Any]) -> Peak:
    if row.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(row.device)
    result = action()
    return Peak(result, torch.cuda.max_memory_allocated(row.device) if row.device.type == "cuda" else None)


@dataclass(frozen=True)
class Trial:
    setting: Setting
    speed: Speed
    runs: str


class Trials:
    """Settings of one row, one engine alive at a time."""

    def __init__(self, row: Bench, packs: Sequence[Batch], until: float) -> None:
        self._row, self._packs, self._until = row, packs, until
        self._engine: Trainer | None = None
        self._module: LossModel | None = None
        self._setting: Setting | None = None
        self._longest = 0.0  # seconds that a trial took
        self.lines: list[str] = []

    def fastest(self) -> Trial:
        """Raises RuntimeError where not even the most sparing setting runs."""
        layers = self._row.layers
        best: Trial | None = None
        for count in (0, layers // 2, layers):
            best = self._try(Setting(recompute=count), needed=True)
            if best is not None:
                break
        if best is None:
            raise RuntimeError(f"no setting fits: {'; '.join(self.lines)}")
        least = best.setting.recompute
        best = self._better(best, Setting("auto", False, least))
        if self._row.device.type == "cuda":
            best = self._better(best, Setting(best.setting.kernels, True, least))
        else:
            self.lines.append("torch.compile: tried on a GPU only")
        for count in (layers // 2, layers):
            if count > least:
                best = self._better(best, Setting(best.setting.kernels, best.setting.compiled, count))
        return best

    def _better(self, best: Trial, setting: Setting) -> Trial:
        found = self._try(setting)
        return found if found is not None and found.speed.seconds < best.speed.seconds else best

    def _try(self, setting: Setting, *, needed: bool = False) -> Trial | None:
        needs = self._longest + (COMPILING if setting.compiled else 0.0)
        if not needed and time.monotonic() + needs > self._until:
            self.lines.append(f"{setting}: no time left")
            return None
        if setting.recompute < self._row.layers and not self._row.fits(setting):
            gib = sum(self._row.predicted(setting).values()) / cost.GIB
            self.lines.append(f"{setting}: {gib:.0f} GiB predicted, not tried")
            return None
        began = time.monotonic()
        trial, reason = self._run(setting)
        if not setting.compiled:
            self._longest = max(self._longest, time.monotonic() - began)
        if trial is None:
            self.drop()
            self.lines.append(f"{setting}: {reason}")
            return None
        self.lines.append(f"{setting}: {trial.speed.tokens / trial.speed.seconds:,.0f} tokens/s")
        return trial

    def _run(self, setting: Setting) -> tuple[Trial | None, str]:
        try:
            self.live(setting)
            assert self._engine is not None
            return Trial(setting, speed(self._row, self._engine, self._packs), self._runs), ""
        except torch.OutOfMemoryError:
            return None, "out of memory"
        except RuntimeError as error:
            # a compiler that is not there, or a kernel that refuses: the other settings may do. A lost context is
            # for the whole process, and told to the parent.
            if isinstance(error, torch.AcceleratorError):
                raise
            return None, f"failed: {first_line(error)}"

    def live(self, setting: Setting) -> Trainer:
        """The engine of a setting: the one that is there, or a new one."""
        if self._setting != setting or self._engine is None:
            self.drop()
            self._engine, self._module, self._runs = build(self._row, setting)
            self._setting = setting
        return self._engine

    def drop(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._setting = None
        self._module = None
        gc.collect()
        if self._row.device.type == "cuda":
            torch.cuda.empty_cache()


def matmul(job: Job) -> dict[str, Any]:
    """The bf16 rate of a large square product on random data: what a step can at best reach here."""
    device, side = torch.device(job["device"]), sizes_of(job).matmul
    left, right = (torch.randn(side, side, device=device).to(DTYPE) for _ in range(2))
    calls = 50 if device.type == "cuda" else 5  # long enough for the clocks to settle

    def products() -> None:
        for _ in range(calls):
            left @ right

    found = seconds_of(products, device, rounds=5, warmup=2)
    is_cuda = device.type == "cuda"
    return {
        "flops_per_second": 2.0 * side**3 * calls / median(found),
        "data_sheet": peak_flops(device, 1),
        "device": torch.cuda.get_device_name(device) if is_cuda else "CPU",
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if is_cuda else None,
        "torch": torch.__version__,
    }


def attention(job: Job) -> dict[str, Any]:
    """Each backend on one pack of real lengths, one with a long tail, and one document that fills a pack."""
    device, sizes = torch.device(job["device"]), sizes_of(job)
    mapping = shape("llama8b", sizes.tiny)
    lengths = {
        name: list(batches(chosen(rows(Path(job["rows"]), sizes), 1, sizes.pack, mapping), 512)[0].lengths)
        for name, rows in SETS.items()
    }
    lengths["one document"] = [sizes.pack]
    rows: list[dict[str, Any]] = []
    for name in PREFERENCE:
        backend = open_backend(name)
        reason = backend if isinstance(backend, str) else runs_on(backend, device, DTYPE, *_head_sizes(sizes))
        for kind, given in lengths.items():
            if reason:
                rows.append({"backend": name, "lengths": kind, "absent": reason})
            else:
                rows.append(
                    {"backend": name, "lengths": kind, **attention_row(cast(Any, backend), given, sizes, device)}
                )
    return {"rows": rows}


def _head_sizes(sizes: Sizes) -> tuple[int, int, int]:
    heads, keys, size = sizes.attention
    return size, heads, keys


def attention_row(backend: Any, lengths: list[int], sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Forward and backward seconds, FLOP/s by the pairs that a causal mask leaves."""
    heads, keys, size = sizes.attention
    tensors = [
        torch.randn(1, count, sum(lengths), size, device=device).to(DTYPE).requires_grad_()
        for count in (heads, keys, keys)
    ]
    documents = Documents.of_lengths(lengths, device)
    arguments = LayerArguments(scaling=size**-0.5)
    output = backend(*tensors, documents, arguments)
    gradient = torch.randn_like(output)
    with torch.no_grad():
        forward = median(seconds_of(lambda: backend(*tensors, documents, arguments), device, 5, warmup=2))
    backward = median(
        seconds_of(lambda: torch.autograd.grad(output, tensors, gradient, retain_graph=True), device, 5, warmup=2)
    )
    flops = 4.0 * heads * size * sum(cost.visible_pairs(length, None) for length in lengths)
    return {
        "forward_seconds": forward,
        "backward_seconds": backward,
        "forward_flops_per_second": flops / forward,
        "backward_flops_per_second": BACKWARD * flops / backward,
    }


def loss(job: Job) -> dict[str, Any]:
    """Forward and backward of the head with its loss over one pack, half of whose tokens are supervised."""
    device, sizes = torch.device(job["device"]), sizes_of(job)
    config = load_config(None, None, shape("llama8b", sizes.tiny))
    torch.manual_seed(0)
    hidden = (torch.randn(sizes.pack, sizes.hidden, device=device) * 0.5).to(DTYPE)
    head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False, device=device, dtype=DTYPE)
    head.weight.data.normal_(std=0.02)
    targets = torch.randint(0, sizes.vocabulary, (sizes.pack,), device=device)
    targets[torch.arange(sizes.pack, device=device) % 2 == 0] = IGNORED
    index = (targets != IGNORED).nonzero().squeeze(1)
    kernels = choose_kernels("auto", device, config)

    def ours(row_losses: Any) -> Callable[[Tensor], Tensor]:
        def run(given: Tensor) -> Tensor:
            return chunked_ce(given[index], head, targets[index], None, sizes.chunk, row_losses=row_losses).total

        return run

    def plain(given: Tensor) -> Tensor:
        return cross_entropy(head(given).float(), targets, ignore_index=IGNORED, reduction="sum")

    variants: dict[str, Callable[[Tensor], Tensor] | str] = {"plain": plain, "ours, torch": ours(None)}
    fused = "; ".join(kernels.rejected) or "the fused kernel was not chosen"
    variants["ours, triton"] = ours(kernels.row_losses) if kernels.loss == "triton" else fused
    variants["Liger"] = liger_loss(head, targets, device)
    rows: list[dict[str, Any]] = []
    reference: float | None = None
    for name, run in variants.items():
        if isinstance(run, str):
            rows.append({"loss": name, "absent": run})
            continue
        figures, value = loss_row(run, hidden, head, device, sizes.rounds)
        reference = value if reference is None else reference
        rows.append({"loss": name, **figures, "difference": abs(value - reference) / abs(reference)})
    return {"rows": rows, "logits_bytes": 2.0 * sizes.pack * sizes.vocabulary}


def liger_loss(head: nn.Linear, targets: Tensor, device: torch.device) -> Callable[[Tensor], Tensor] | str:
    """Liger's fused linear cross-entropy over the whole pack, or why it cannot be measured."""
    if device.type != "cuda":
        return "Liger's kernels run on CUDA"
    try:
        made = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        return first_line(error)
    function = made(ignore_index=IGNORED, reduction="sum")
    return lambda given: cast(Tensor, function(head.weight, given, targets))


def loss_row(
    run: Callable[[Tensor], Tensor], hidden: Tensor, head: nn.Linear, device: torch.device, rounds: int
) -> tuple[dict[str, Any], float]:
    """Seconds, and the most bytes beyond what was there before; gradients of both inputs are made and dropped."""

    def once() -> Tensor:
        given = hidden.detach().requires_grad_()
        total = run(given)
        torch.autograd.grad(total, (given, head.weight))
        return total.detach()

    found = seconds_of(once, device, rounds, warmup=2)
    before = allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    value = float(once())
    extra = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    return {"seconds": median(found), "extra_bytes": extra}, value


def memory(job: Job) -> dict[str, Any]:
    """A long pack and a large vocabulary: the peak against weights + states + gradients + measured activations."""
    row = bench(job)
    setting = Setting("auto", False, row.layers if job["recompute"] else 0)
    vocabulary = int(row.mapping["vocab_size"])
    sizes = row.sizes
    rows = chosen(real(Path(job["rows"]), sizes), 1, sizes.long_pack, row.mapping)
    (pack,) = batches(rows, vocabulary)
    engine, module, runs = build(row, setting)
    marks: list[int] = []
    decoder = decoder_of(causal_lm(module.model))
    hooks = [
        decoder.register_forward_pre_hook(lambda *_: marks.append(allocated(row.device))),
        decoder.register_forward_hook(lambda *_: marks.append(allocated(row.device))),
    ]
    step = step_of(engine, [pack])
    step()
    standing = allocated(row.device)  # between two steps: weights, masters, moments, and what else is kept
    marks.clear()
    peak = peak_of(row, step)
    for hook in hooks:
        hook.remove()
    stored = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    kept = marks[1] - marks[0]
    floor = 2 * stored + 16 * trained + kept  # bf16 weights; masters, gradients and two moments in float32
    parts = row.predicted(setting, sizes.long_pack)
    engine.close()
    is_cuda = row.device.type == "cuda"
    return {
        "setting": str(setting),
        "runs": runs,
        "tokens": len(pack.ids),
        "vocabulary": vocabulary,
        "peak_bytes": peak.bytes,
        "floor_bytes": floor if is_cuda else None,
        "standing_bytes": standing if is_cuda else None,
        "activation_bytes": kept if is_cuda else None,
        "state_bytes": 2 * stored + 16 * trained,
        "predicted_bytes": sum(parts.values()),
        "predicted_parts": parts,
        "is_finite": all(math.isfinite(size) for size in parts.values()),
    }


if __name__ == "__main__":
    serve({"matmul": matmul, "train": train, "attention": attention, "loss": loss, "memory": memory})
