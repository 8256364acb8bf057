"""What the GPU benchmark measures on: model shapes, conversations' lengths, packs of random tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.machine import ROOT, SOURCES, shared_data
from sftdist.core.settings import RowShape
from sftdist.core.storage import read_json, read_jsonl
from sftdist.data.loader import Batch, Document, pack_documents
from sftdist.data.packing import CostModel, pack_grid
from sftdist.data.schema import Conversation, parse
from sftdist.model import cost

PREPARED = ROOT / "benchmarks" / "gpu_rows.json"
SCALE = 4  # the packs of exp=chat_small hold 2,048 tokens, these 8,192
CHARACTERS = 4  # of English text in a token, about
MARKUP = 4  # tokens of a chat template around a message
SAMPLE = 3000  # conversations that are kept


@dataclass(frozen=True)
class Sizes:
    """How much is measured. `pack`, `long_pack`: tokens; `rounds`: timed repetitions, their median counts; `matmul`:
    side of the square product; `attention`: (query heads, key heads, head size); `vocabulary`, `hidden`: of the loss
    kernel; `chunk`: positions whose logits exist at a time."""

    pack: int
    long_pack: int
    rounds: int
    matmul: int
    attention: tuple[int, int, int]
    vocabulary: int
    hidden: int
    chunk: int
    tiny: bool


FULL = Sizes(8192, 16384, 4, 8192, (32, 8, 128), 128_256, 4096, 2048, False)
TINY = Sizes(256, 512, 2, 128, (4, 2, 16), 512, 64, 64, True)


def shape(name: str, tiny: bool = False, layers: int | None = None) -> dict[str, Any]:
    """The config mapping of a model by name: llama8b, qwen0.5b, qwen1.5b, or qwen1.5b-248k with a larger vocabulary."""
    found = _llama() if name == "llama8b" else _qwen(name)
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        found |= sizes | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024 if "248k" in name else 512}
        found |= {"bos_token_id": 0, "eos_token_id": 1}
    return found if layers is None else found | {"num_hidden_layers": layers}


def _llama() -> dict[str, Any]:
    preset = yaml.safe_load((ROOT / "conf" / "model" / "llama8b.yaml").read_text(encoding="utf-8"))
    return dict(preset["shape"])


def _qwen(name: str) -> dict[str, Any]:
    """Qwen2.5: https://huggingface.co/Qwen/Qwen2.5-1.5B/blob/main/config.json and its smaller sister."""
    sizes = {"qwen0.5b": (896, 4864, 24, 14), "qwen1.5b": (1536, 8960, 28, 12)}
    hidden, intermediate, layers, heads = sizes[name.removesuffix("-248k")]
    return {
        "model_type": "qwen2",
        "vocab_size": 248_320 if name.endswith("-248k") else 151_936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 151_643,
        "eos_token_id": 151_643,
    }


# Conversations: signed token counts of their messages in order, positive where they are supervised (the assistant's).
Turns = list[int]


def prepare(path: Path) -> int:
    """Write the lengths of real conversations: counts alone, no text. Returns how many there are."""
    folder, found = shared_data(), []
    for name in SOURCES:
        for line, row in enumerate(read_jsonl(folder / name), start=1):
            conversation = parse(row, RowShape.auto, file=name, line=line, id=None)
            if isinstance(conversation, Conversation):
                found.append([_turn(message.role, message.content or "") for message in conversation.messages])
    chosen = [found[int(place)] for place in np.linspace(0, len(found) - 1, min(SAMPLE, len(found)))]
    about = f"messages of real conversations in tokens of {CHARACTERS} characters, the assistant's positive"
    path.write_text(json.dumps({"about": about, "conversations": chosen}) + "\n", encoding="utf-8")
    return len(chosen)


def _turn(role: str, text: str) -> int:
    tokens = -(-len(text) // CHARACTERS) + MARKUP
    return tokens if role == "assistant" else -tokens


def real(path: Path, sizes: Sizes) -> list[Turns]:
    """The prepared conversations with their lengths scaled to the packs; a longer one than a pack is cut."""
    scale = 0.5 if sizes.tiny else SCALE
    rows = read_json(path)["conversations"]
    return [_cut([int(np.sign(n) * max(1, round(abs(n) * scale))) for n in turns], sizes.pack) for turns in rows]


def long_tail(sizes: Sizes) -> list[Turns]:
    """Lognormal lengths (median 400, sigma 1, as in benchmarks/packing.py) up to a whole pack; the second half of each
    conversation is supervised."""
    median = 12 if sizes.tiny else 400
    drawn = np.random.default_rng(0).lognormal(np.log(median), 1.0, 4000)
    lengths = np.clip(np.rint(drawn), 4, sizes.pack).astype(int)
    return [[-int(n // 2), int(n - n // 2)] for n in lengths]


def _cut(turns: Turns, room: int) -> Turns:
    kept: Turns = []
    for turn in turns:
        size = min(abs(turn), room)
        if size == 0:
            break
        kept.append(int(np.sign(turn)) * size)
        room -= size
    return kept


def chosen(rows: Sequence[Turns], packs: int, pack_tokens: int, mapping: dict[str, Any]) -> list[list[Turns]]:
    """Conversations in a seeded order, packed as a training packs them: `packs` packs, nearly full."""
    order = np.random.default_rng(1).permutation(len(rows))
    rows = [rows[place] for place in order]
    ends = np.cumsum([_length(row) for row in rows])
    # twice as many as fit: a training, too, chooses out of a window
    rows = rows[: int(np.searchsorted(ends, 2 * packs * pack_tokens)) + 1]
    lengths = np.array([_length(row) for row in rows], np.int64)
    model = CostModel(3 * cost.dense_flops(mapping), _training_terms(mapping))
    where = pack_grid(lengths, pack_tokens, packs, 1, attention=model.attention_of(lengths))
    return [[row for row, pack in zip(rows, where, strict=True) if pack == number] for number in range(packs)]


def _training_terms(mapping: dict[str, Any]) -> tuple[tuple[float, int | None], ...]:
    return tuple((3 * flops, window) for flops, window in cost.attention_terms(mapping))


def _length(turns: Turns) -> int:
    return sum(abs(turn) for turn in turns)


def documents(pack: Sequence[Turns], vocabulary: int, seed: int = 0) -> list[Document]:
    """Random tokens for the conversations of one pack."""
    generator = np.random.default_rng(seed)
    made = []
    for turns in pack:
        weights = np.concatenate([np.full(abs(turn), float(turn > 0), np.float32) for turn in turns])
        ids: NDArray[np.int32] = generator.integers(2, vocabulary, len(weights)).astype(np.int32)
        made.append(Document(ids, weights, 0, ""))
    return made


def batches(packs: Sequence[Sequence[Turns]], vocabulary: int) -> list[Batch]:
    return [pack_documents(documents(pack, vocabulary, seed)) for seed, pack in enumerate(packs)]
