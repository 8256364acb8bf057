"""The peer of `benchmarks/step.py`: TRL's SFTTrainer on the rows, tokenizer and model shape it is given.

Run by `benchmarks/step.py`, alone (`python benchmarks/peer_trl.py ...`) or under torchrun (one process per rank).
The last line is `RESULT` and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

TRAINING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DTYPES = ("bf16_weights", "bf16_autocast", "fp32")


class Clock(TrainerCallback):
    """Notes when each optimizer step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


class CountingTrainer(SFTTrainer):
    """SFTTrainer that counts the real tokens of every forward (packs are padding-free, so all of theirs are)."""

    tokens_seen = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        self.tokens_seen += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)


class TokenMarks(TrainerCallback):
    """Notes the token count at the end of each step."""

    def __init__(self) -> None:
        self.trainer: CountingTrainer | None = None
        self.marks: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.marks.append(self.trainer.tokens_seen)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="folder with the model's config.json")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines with `messages`")
    parser.add_argument("--pack-tokens", type=int, default=2048)
    parser.add_argument("--packs-per-step", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--padded", type=int, default=0, help="so many rows a micro-batch, padded; 0: packs")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    return parser.parse_args()


def build(args: argparse.Namespace, clock: Clock, marks: TokenMarks) -> CountingTrainer:
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.chat_template = TRAINING_TEMPLATE
    weights = torch.bfloat16 if args.dtype == "bf16_weights" else torch.float32
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config), dtype=weights)
    rows = datasets.load_dataset("json", data_files=str(args.rows), split="train", cache_dir=str(args.work / "cache"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = SFTConfig(
        output_dir=str(args.work / "out"),
        max_length=args.pack_tokens,
        packing=not args.padded,
        packing_strategy="bfd",
        train_sampling_strategy="group_by_length" if args.padded else "random",
        assistant_only_loss=True,
        per_device_train_batch_size=args.padded or 1,
        gradient_accumulation_steps=args.packs_per_step // world,
        max_steps=args.steps,
        bf16=args.dtype == "bf16_autocast",
        gradient_checkpointing=False,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta2=0.95,
        use_cpu=True,
        save_strategy="no",
        logging_steps=args.steps,  # logging costs TRL a few per cent
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = CountingTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[clock, marks]
    )
    marks.trainer = trainer
    return trainer


def main() -> None:
    args = arguments()
    set_seed(0)
    clock, marks = Clock(), TokenMarks()
    trainer = build(args, clock, marks)
    began = time.perf_counter()
    trainer.train()
    seconds = clock.ends[-1] - clock.ends[args.warmup - 1]
    tokens = torch.tensor(float(marks.marks[-1] - marks.marks[args.warmup - 1]))
    if dist.is_initialized():
        dist.all_reduce(tokens)
    if int(os.environ.get("RANK", "0")) == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "tokens_per_second": tokens.item() / seconds,
            "tokens": tokens.item(),
            "seconds": seconds,
            "train_seconds": time.perf_counter() - began,
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "attention": trainer.model.config._attn_implementation,
            "losses": losses,
            "dtype": args.dtype,
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "threads": torch.get_num_threads(),
        }
        sys.stdout.write("RESULT " + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
