"""The stock templates of the installed trl package, and an oracle for masks that uses transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import trl
from transformers import PreTrainedTokenizerBase

from sftdist.data.schema import Conversation, Message

FOLDER = Path(trl.__file__).parent / "chat_templates"
STOCK = sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training"))
TAGGED = sorted(stem for stem in STOCK if (FOLDER / f"{stem}_training.jinja").is_file())
VISION = ("idefics3", "llava_next", "smolvlm")  # content as parts
# What each family's model emits to end a turn, written down by hand.
MARKERS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
# What gpt-oss and Gemma 4 list beside it, in generation_config.json, and what GLM's next message begins with.
TOOL_STOPS = ("<|call|>", "<|tool_response>", "<|observation|>")

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": 'the "old" town', "days": 2}},
}


def system(text: str) -> Message:
    return Message("system", text)


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, **fields: Any) -> Message:
    return Message("assistant", text, **fields)


def talk(id: str, *messages: Message, tools: Sequence[dict[str, Any]] = ()) -> Conversation:
    return Conversation(id, messages, tuple(tools))


SINGLE = talk("single", user("Hello"), assistant("Hi there."))
SYSTEM = talk("system", system("Be brief."), user("Hello"), assistant("Hi there."))
MULTI = talk("multi", user("One"), assistant("two"), user("Three"), assistant("four"), user("Five"), assistant("six"))
UNICODE = talk("unicode", user("Où est 東京? 🗼"), assistant("é 🗼 a\u200d日本 ﷽"))
SPACE = talk("space", user("  lead and trail \n"), assistant("\n\n  indented\n    code \n\n"))
ECHO = talk("echo", user("Hello"), assistant("Hello"), user("Hello"), assistant("Hello"))
PLAIN = (SINGLE, SYSTEM, MULTI, UNICODE, SPACE, ECHO)
TOOLS = talk(
    "tools",
    user("Weather?"),
    assistant("", tool_calls=(CALL,)),
    Message("tool", "sunny", name="get_weather", tool_call_id="abcdefgh1"),
    assistant("It is sunny."),
    tools=(TOOL,),
)
REASONING = talk("reasoning", user("2+2?"), assistant("4", reasoning="Two and two\nmake four."))
ALL = (*PLAIN, TOOLS, REASONING)


def trimmed(conversation: Conversation, roles: frozenset[str]) -> Conversation:
    """As the rule `template_trim` of cleaning leaves it."""
    messages = tuple(replace(m, content=m.content.strip()) if m.role in roles else m for m in conversation.messages)
    return replace(conversation, messages=messages)


def stock_text(stem: str) -> str:
    return (FOLDER / f"{stem}.jinja").read_text(encoding="utf-8")


def tagged_text(stem: str) -> str:
    return (FOLDER / f"{stem}_training.jinja").read_text(encoding="utf-8")


def marker_of(stem: str) -> str:
    return MARKERS[max((key for key in MARKERS if stem.startswith(key)), key=len)]


def dicts(messages: Sequence[Message], *, parts: bool = False) -> list[dict[str, Any]]:
    """Messages as a user of transformers writes them."""
    found = []
    for m in messages:
        fields = {
            "role": m.role,
            "content": [{"type": "text", "text": m.content}] if parts else m.content,
            "reasoning_content": m.reasoning,
            "tool_calls": list(m.tool_calls) or None,
            "name": m.name,
            "tool_call_id": m.tool_call_id,
        }
        found.append({key: value for key, value in fields.items() if value is not None})
    return found


def runs(weights: Sequence[float]) -> list[tuple[int, int]]:
    """Ranges [start, end) of tokens with a weight."""
    edges = [
        i for i in range(len(weights) + 1) if (i > 0 and weights[i - 1] > 0) != (i < len(weights) and weights[i] > 0)
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


def assert_mask(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    ids: Sequence[int],
    weights: Sequence[float],
    marker: str,
    *,
    turns: Sequence[int] | None = None,
    parts: bool = False,
    behind: str | None = "",
    **arguments: Any,
) -> None:
    """The ids are the conversation as transformers renders it, and `behind` it what the template leaves unwritten
    (None: the last turn is rendered without what its prompt begins); each trained turn follows exactly what serving
    sends, holds its message and ends with the marker."""
    shared = {"tools": list(conversation.tools) or None, "tokenize": False, **arguments}
    whole = tokenizer.apply_chat_template(dicts(conversation.messages, parts=parts), **shared)
    assert behind is None or tokenizer.decode(ids) == whole + behind
    spoken = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    expected = [spoken[turn] for turn in (range(len(spoken)) if turns is None else turns)]
    found = runs(weights)
    assert len(found) == len(expected), "one supervised run for each trained turn"
    for index, (start, end) in zip(expected, found, strict=True):
        message = conversation.messages[index]
        before = dicts(conversation.messages[:index], parts=parts)
        sent = tokenizer.apply_chat_template(before, add_generation_prompt=True, **shared)
        assert tokenizer.decode(ids[:start]) == sent, "what precedes the span is what serving sends"
        span = tokenizer.decode(ids[start:end])
        assert message.content in span
        assert (message.reasoning or "").strip() in span
        stops = (marker, *TOOL_STOPS) if message.tool_calls else marker
        assert span.endswith(stops), "the end of the turn is supervised, and nothing behind it"
        for call in message.tool_calls:
            assert call["function"]["name"] in span
