"""A tiny Gemma 3 with a vision tower, as a user's own model folder: its files have the names of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from sftdist.data.template import ChatTemplate
from tests.models import shape
from tests.tokenizers import byte_tokenizer

PROCESSOR = {"preprocessor_config.json": {"do_resize": True}, "processor_config.json": {"image_seq_length": 4}}
_SPECIALS = ("<|im_start|>", "<|im_end|>", "<boi>", "<eoi>", "<image>")
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def tiny_gemma3(tokens: int = 128, dtype: torch.dtype = torch.bfloat16) -> Gemma3ForConditionalGeneration:
    """Random weights; the last three ids are those of pictures."""
    text = {key: value for key, value in shape("gemma3", vocab_size=tokens).items() if key != "model_type"}
    text["tie_word_embeddings"] = True
    ids = {"boi_token_index": tokens - 3, "eoi_token_index": tokens - 2, "image_token_index": tokens - 1}
    config = Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4, **ids)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).to(dtype)


def gemma3_folder(path: Path) -> Path:
    """Weights, tokenizer with a ChatML template, and the files of its processor."""
    template = ChatTemplate.of(byte_tokenizer(specials=_SPECIALS), "chatml")
    tiny_gemma3(len(template.tokenizer)).save_pretrained(path)
    file = path / "model.safetensors"
    tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    template.save(path)
    for name, text in PROCESSOR.items():
        (path / name).write_text(json.dumps(text))
    return path


def of_the_tower(name: str) -> bool:
    return "vision_tower" in name or "multi_modal_projector" in name
