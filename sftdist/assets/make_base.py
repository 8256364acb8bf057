"""Make the quickstart's base model: `python -m sftdist.assets.make_base OUT [--steps N] [--work DIR]`.

Plain PyTorch, one process, no DeepSpeed: a Llama of 1.8 M parameters learns `base_text` from random weights.
It goes on from the last state in `--work` when stopped; what a step sees depends on its number alone. The shipped
weights saw 5,000 steps before `base_text.soup` was there and 800 with it.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
from collections.abc import Iterable
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sftdist.assets import desk, vocabulary
from sftdist.assets.base_text import documents

log = logging.getLogger(__name__)

VOCABULARY = 800
ROW = 256  # tokens in a row of whole documents
KNOWN, UNKNOWN = 1.0, 0.1  # loss weight of what can be known, and of what is drawn at random
IGNORED = -100
WORD = re.compile("( [a-z]|[A-Z])[a-z]{2,}")
HELD_OUT = 10**9  # seed of the text that no step sees


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A new tokenizer, from the base text and the words of the sources, so that neither is long in tokens."""
    texts = [item.text for item in islice(documents(HELD_OUT + 1), 6000)]
    for source in desk.ROWS:
        texts += [text for row in desk.rows(source) for text in desk.texts(row)]
    return vocabulary.train(texts, VOCABULARY)


def shipped_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the shipped base: it stays as it is when the sources get another wording."""
    return PreTrainedTokenizerFast.from_pretrained(str(resources.files("sftdist.assets") / "base"))


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Random weights for the quickstart's shape."""
    torch.manual_seed(seed)
    stops = tokenizer.convert_tokens_to_ids([vocabulary.TURN_END, vocabulary.END_OF_TEXT])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return model


def whole_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The words that are one token together with the space before them, or with their capital letter."""
    words = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return [word.strip() for word in words if WORD.fullmatch(word)]


def fill_rows(
    encoded: Iterable[tuple[np.ndarray, np.ndarray]], rows: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole documents side by side, first fit, until `rows` rows of `ROW` tokens have no room: ids and loss weights."""
    ids, weights = np.full((rows, ROW), pad), np.zeros((rows, ROW), np.float32)
    used = np.zeros(rows, int)
    for tokens, known in encoded:
        room = np.flatnonzero(used + len(tokens) <= ROW)
        if not len(room):
            if len(tokens) <= ROW:
                break
            continue
        row = room[0]
        where = slice(used[row], used[row] + len(tokens))
        ids[row, where] = tokens
        weights[row, where] = np.where(known, KNOWN, UNKNOWN)
        used[row] += len(tokens)
    return torch.from_numpy(ids), torch.from_numpy(weights)


def make_batch(tokenizer: PreTrainedTokenizerFast, seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and loss weights `[rows, ROW]` of one seed."""
    items = list(islice(documents(seed, whole_words(tokenizer)), rows * 4))
    encoding = tokenizer([item.text for item in items], return_offsets_mapping=True, add_special_tokens=False)
    encoded = []
    for item, ids, offsets in zip(items, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        starts = np.array([start for start, _ in offsets])
        known = np.zeros(len(ids), bool)
        for start, end in item.answers:
            known |= (starts >= start) & (starts < end)
        encoded.append((np.array(ids), known))
    return fill_rows(encoded, rows, tokenizer.pad_token_id)


def losses(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and correctness of every next token, `[rows, ROW - 1]`."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits.float()
    loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return loss.view(len(ids), -1), logits.argmax(-1) == ids[:, 1:]


@torch.no_grad()
def measure(model: LlamaForCausalLM, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Mean loss and accuracy over the tokens of held-out text that can be known."""
    ids, weights = batch
    loss, right = losses(model, ids)
    known = weights[:, 1:] == KNOWN
    return loss[known].mean().item(), right[known].float().mean().item()


def lr_at(step: int, steps: int, peak: float) -> float:
    """Up over 100 steps, level, and down to a twentieth over the last three tenths."""
    down = (steps - step) / (0.3 * steps)
    return peak * min(1.0, (step + 1) / 100, max(0.05, down))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Run to `args.steps`, from the state in `args.work` where there is one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    state_file, step, began = args.work / "state.pt", 0, time.monotonic()
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    held_out, first = make_batch(tokenizer, HELD_OUT, 64), step
    while step < args.steps:
        ids, weights = make_batch(tokenizer, args.seed + step, args.rows)
        loss, _ = losses(model, ids)
        loss = (loss * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.steps, args.lr)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0 or step == args.steps:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, state_file)
            held_loss, accuracy = measure(model, held_out)
            seconds = (time.monotonic() - began) / (step - first)
            log.info(
                "step %d loss %.3f held-out %.4f right %.4f %.2f s/step",
                step,
                loss.item(),
                held_loss,
                accuracy,
                seconds,
            )


def main() -> None:
    """Parse the command line, train, and write an HF folder with bf16 weights to `OUT`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/base"))
    parser.add_argument("--steps", type=int, default=5800)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--new-tokenizer", action="store_true", help="learn one instead of taking the shipped one")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer() if args.new_tokenizer else shipped_tokenizer()
    model = make_model(tokenizer, args.seed)
    log.info("%d parameters, %d tokens", model.num_parameters(), len(tokenizer))
    train(model, tokenizer, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
