"""What docs/serving.md says to other programs, read from it: its Modelfiles, and the lines that start a server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

PAGE = "docs/serving.md"
# Go's templates as Ollama uses them here, as Jinja: both cut white space at a dash.
_GO = (
    (r"range \.Messages", "for message in messages"),
    (r"end", "endfor"),
)


@dataclass(frozen=True)
class Modelfile:
    """One of Ollama's (https://docs.ollama.com/modelfile)."""

    source: str
    template: str
    stops: tuple[str, ...]
    greedy: bool

    @classmethod
    def read(cls, text: str) -> Modelfile:
        template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.M | re.S)
        source = re.search(r"^FROM (\S+)$", text, re.M)
        assert template is not None, "without a TEMPLATE Ollama would ask with no template at all"
        assert source is not None
        stops = tuple(re.findall(r'^PARAMETER stop "?(.*?)"?$', text, re.M))
        return cls(source[1], template[1], stops, re.search(r"^PARAMETER temperature 0$", text, re.M) is not None)

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt that Ollama would ask with."""
        text = self.template
        for go, jinja in _GO:
            text = re.sub(rf"\{{\{{(-?)\s*{go}\s*(-?)\}}\}}", rf"{{%\1 {jinja} \2%}}", text)
        text = re.sub(r"\{\{(-?)\s*\.(Role|Content)\s*(-?)\}\}", lambda at: _field(at[1], at[2], at[3]), text)
        assert not re.search(r"\{\{-?\s*\.", text), f"tests/serving.py does not know all of {self.template}"
        return Environment(keep_trailing_newline=True).from_string(text).render(messages=messages)


def _field(left: str, name: str, right: str) -> str:
    return f"{{{{{left} message.{name.lower()} {right}}}}}"


def modelfiles(root: Path) -> list[Modelfile]:
    """Of the page, in order."""
    return [Modelfile.read(block) for block in _blocks(root) if block.startswith("FROM ")]


def lines(root: Path, program: str) -> list[str]:
    """The command lines of a program in the page."""
    return [line for block in _blocks(root) for line in block.splitlines() if line.startswith(program)]


def _blocks(root: Path) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", (root / PAGE).read_text(encoding="utf-8"), re.M | re.S)
