"""TRL's column of the GPU benchmark: SFTTrainer on the same conversations, in the fastest setting that it runs in.

    python -m benchmarks.gpu_trl < JOBS      # started by benchmarks/gpu.py where trl and datasets are there

Packs by `bfd`, without padding; the loss on the assistant's tokens alone (labels, as its own assistant mask gives
them); its fused head; gradient checkpointing as ours; weights and AdamW's moments in bf16, which is its fastest and
keeps no float32 masters.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.gpu_shapes import FULL, TINY, chosen, documents, real, shape
from benchmarks.gpu_worker import Job, first_line, serve
from benchmarks.machine import ROOT
from sftdist.model.config import load_config

WARMUP = 2  # steps
STEPS = 4  # timed ones
RANK = 16


class Clock(TrainerCallback):
    """The end of each optimizer step, the device waited for, and the tokens up to there."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.seen = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.tokens.append(self.seen)


class CountingTrainer(SFTTrainer):
    """SFTTrainer that counts the tokens of every forward; without padding all of them are real."""

    clock: Clock

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.clock.seen += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *args, **kwargs)


def peer(job: Job) -> dict[str, Any]:
    """Tokens/s of the fastest of `job["settings"]` (attention, whether with Liger, recomputation); all are tried once
    as long as `trial_seconds` last, one that is marked `only_if_none` where no other ran. RuntimeError if none does."""
    until = time.monotonic() + float(job["trial_seconds"])
    tried, best = [], None
    for setting in job["settings"]:
        if best is not None and setting.get("only_if_none"):
            continue
        if best is not None and time.monotonic() > until:
            tried.append(f"{_words(setting)}: no time left")
            continue
        figures, reason = _attempt(job, setting)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tried.append(f"{_words(setting)}: {figures['tokens_per_second']:,.0f} tokens/s" if figures else reason)
        if figures and (best is None or figures["tokens_per_second"] > best["tokens_per_second"]):
            best = {**figures, "setting": setting}
    if best is None:
        raise RuntimeError(f"TRL ran in no setting: {'; '.join(tried)}")
    return {**best, "tried": tried}


def _words(setting: dict[str, Any]) -> str:
    loss = "Liger" if setting["liger"] else "its fused head"
    return f"{setting['attention']}, {loss}, {'all' if setting['recompute'] else 'nothing'} recomputed"


def _attempt(job: Job, setting: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    try:
        return run(job, setting), ""
    except torch.OutOfMemoryError:
        return None, f"{_words(setting)}: out of memory"
    except (RuntimeError, ValueError, ImportError, TypeError, AttributeError) as error:
        if isinstance(error, torch.AcceleratorError):
            raise
        return None, f"{_words(setting)}: {first_line(error)}"  # an attention that is not there, mostly


def run(job: Job, setting: dict[str, Any]) -> dict[str, Any]:
    """One setting: `WARMUP` steps, then the median rate of `STEPS` steps."""
    sizes = TINY if job["tiny"] else FULL
    mapping = shape(job["model"], sizes.tiny, job.get("layers"))
    rows = chosen(real(Path(job["rows"]), sizes), job["packs"], sizes.pack, load_config(None, None, mapping).to_dict())
    device = torch.device(job["device"])
    model, adapter = _model(job, mapping, setting, device)
    clock = Clock()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = CountingTrainer(
            model=model,
            args=_config(Path(folder), job, setting, sizes.pack),
            train_dataset=_rows(rows, int(mapping["vocab_size"])),
            processing_class=_tokenizer(),
            callbacks=[clock],
            peft_config=adapter,
        )
        trainer.clock = clock
        trainer.train()
    steps = range(WARMUP, WARMUP + STEPS)
    rates = [(clock.tokens[i] - clock.tokens[i - 1]) / (clock.ends[i] - clock.ends[i - 1]) for i in steps]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"tokens_per_second": median(rates), "peak_bytes": peak}


def _model(job: Job, mapping: dict[str, Any], setting: dict[str, Any], device: torch.device) -> tuple[Any, Any]:
    config = load_config(None, None, mapping)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=setting["attention"])
    if job["method"] == "full":
        return model, None
    return model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules="all-linear")


def _config(folder: Path, job: Job, setting: dict[str, Any], pack_tokens: int) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        max_length=pack_tokens,
        packing=True,
        packing_strategy="bfd",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=job["packs"],
        max_steps=WARMUP + STEPS,
        bf16=False,  # the weights are bf16 themselves
        gradient_checkpointing=setting["recompute"],
        use_liger_kernel=setting["liger"],
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        use_cpu=job["device"] == "cpu",
        save_strategy="no",
        logging_steps=WARMUP + STEPS,  # its logging waits for the device
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def _rows(packs: list[list[list[int]]], vocabulary: int) -> datasets.Dataset:
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for seed, pack in enumerate(packs):
        for document in documents(pack, vocabulary, seed):
            ids = document.ids.tolist()
            found["input_ids"].append(ids)
            found["labels"].append([n if w else -100 for n, w in zip(ids, document.weights, strict=True)])
    return datasets.Dataset.from_dict(found)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Any: the rows are token ids already, and the trainer asks for its padding token alone."""
    file = ROOT / "sftdist" / "assets" / "base" / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>", pad_token="<|pad|>")


if __name__ == "__main__":
    serve({"peer": peer})
