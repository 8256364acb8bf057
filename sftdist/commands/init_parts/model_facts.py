"""What a model folder says of itself: its size, its context, and the chat template that it has or needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sftdist.data.template import ChatTemplate
from sftdist.model import cost
from sftdist.model.config import load_config

# A built-in template, and the marks by which one knows that a vocabulary was made for it.
MARKS = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|start_header_id|>", "<|eot_id|>")}
# Where a vocabulary has no marks of a chat: plain headers, and the end-of-text token ends every turn.
PLAIN = (
    "{%- for message in messages -%}{{- '### ' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '### assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class ModelFacts:
    """`shape`: its config as a mapping; `context`: the longest text in tokens, None where the config names none;
    `template`: what `model.chat_template` has to be, None where the tokenizer brings its own."""

    path: str
    shape: Mapping[str, Any]
    parameters: int
    context: int | None
    template: str | None
    why_template: str
    chat: ChatTemplate

    @property
    def size(self) -> str:
        """Its parameters in words: 8.0 B, 135 M."""
        for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
            if self.parameters >= unit:
                return f"{self.parameters / unit:.3g} {letter}"
        return str(self.parameters)


def look_at_model(path: str) -> ModelFacts:
    """Reads config and tokenizer, no weights. Raises ConfigError where one of them is not there or not usable."""
    shape = load_config(path, None, None).to_dict()
    ChatTemplate.load(path, chat_template="chatml")  # says what is wrong with a tokenizer
    tokenizer = AutoTokenizer.from_pretrained(path)
    template, why = _template_for(tokenizer)
    text = shape.get("text_config") or shape
    return ModelFacts(
        path=path,
        shape=shape,
        parameters=cost.parameters(shape).total,
        context=text.get("max_position_embeddings"),
        template=template,
        why_template=why,
        chat=ChatTemplate.load(path, chat_template=template),
    )


def _template_for(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, str]:
    if tokenizer.chat_template:
        return None, "The tokenizer brings its own chat template, which is what is trained and served."
    vocabulary = tokenizer.get_vocab()
    for name, marks in MARKS.items():
        if all(mark in vocabulary for mark in marks):
            return name, f"The tokenizer has no chat template; its vocabulary has the marks of {name} ({marks[0]})."
    return PLAIN, (
        "The tokenizer has no chat template and its vocabulary has no marks of one, so this one uses plain headers and "
        f"ends each turn with the token {tokenizer.eos_token}, at which generation stops."
    )
