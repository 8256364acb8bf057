"""Which roles a chat template strips of outer white space: found by rendering padded words, never by reading it."""

from __future__ import annotations

import json
from dataclasses import replace

from sftdist.data.render import (
    CALLING,
    PLAIN,
    Renderer,
    Shape,
    Structure,
    Unproven,
    as_dict,
    sentinel_messages,
    sentinel_tool,
)

PADDINGS = ("    ", "\n\n\n\n")  # some strip line feeds alone; longer than what a template writes around a text
# A template may strip the last turn, or the one before a tool call, and leave the others as they are.
STRUCTURES: tuple[Structure, ...] = (
    (Shape("system"), *PLAIN, *PLAIN),
    (Shape("developer"), *PLAIN),
    PLAIN * 2,
    (Shape("user"), Shape("assistant", reasoning=True)),
    CALLING,
    (Shape("user"), Shape("assistant", calls=1), *CALLING[2:]),
)


def trimmed_roles(renderer: Renderer) -> frozenset[str]:
    """The roles whose padded text is not in the render as it was given, in some structure that the template takes."""
    found: set[str] = set()
    for structure in STRUCTURES:
        for padding in PADDINGS:
            found |= _trimmed_in(renderer, structure, padding)
    return frozenset(found)


def _trimmed_in(renderer: Renderer, structure: Structure, padding: str) -> set[str]:
    messages, _ = sentinel_messages(structure)
    tools = [sentinel_tool()] if any(shape.calls for shape in structure) else []
    padded = [replace(m, content=f"{padding}{m.content}{padding}") if m.content else m for m in messages]
    try:
        dialect = renderer.dialect(messages, tools=bool(tools))
        text = renderer.render([as_dict(m, dialect) for m in padded], tools)
    except Unproven:
        return set()  # a structure that the template does not take
    return {m.role for m in padded if m.content not in text and json.dumps(m.content)[1:-1] not in text}
