"""A conversation in a terminal, line by line: what is typed goes to every model, and each answers as it goes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module, util
from typing import TextIO

from sftdist.core.errors import DataError
from sftdist.data.message import Message
from sftdist.evals.conversation import Talk

HELP = """\
/system TEXT  begin anew with this system message; without TEXT: without one
/reset        begin anew with the same system message
/undo         take the last message and its answers back
/quit         end; so does Ctrl-D
Ctrl-C breaks an answer off. A line that ends with \\ goes on in the next one."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal:
    """`read(prompt)` gives a line or raises EOFError, `out` is the screen."""

    def __init__(self, talks: Mapping[str, Talk], out: TextIO, read: Callable[[str], str]) -> None:
        self._talks, self._out, self._read = talks, out, read

    def run(self) -> None:
        """Until the input ends."""
        while (line := self._line()) is not None:
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line.strip():
                self._ask(line)

    def _line(self) -> str | None:
        lines: list[str] = []
        try:
            while True:
                lines.append(self._read("... " if lines else "you> "))
                if not lines[-1].endswith("\\"):
                    return "\n".join(lines)
                lines[-1] = lines[-1][:-1]
        except EOFError:
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:  # at the prompt: the line is given up
            self._say("\n")
            return ""

    def _command(self, line: str) -> bool:
        """Carry a command out; whether the conversation goes on."""
        word, _, text = line.strip().partition(" ")
        if word in ("/quit", "/exit", "/q"):
            return False
        if word == "/system":
            self._begin([Message("system", text.strip())] if text.strip() else [])
        elif word == "/reset":
            talk = next(iter(self._talks.values()))
            self._begin([one for one in talk.messages[:1] if one.role == "system"])
        elif word == "/undo":
            for talk in self._talks.values():
                users = [at for at, one in enumerate(talk.messages) if one.role == "user"]
                del talk.messages[users[-1] if users else len(talk.messages) :]
        else:
            self._say(("" if word == "/help" else f"there is no command {word}\n") + HELP + "\n")
        return True

    def _begin(self, messages: list[Message]) -> None:
        for talk in self._talks.values():
            talk.messages = list(messages)

    def _ask(self, text: str) -> None:
        for name, talk in self._talks.items():
            self._say(f"{name}> ")
            try:
                answer = talk.answer(text, lambda part: self._say(visible(part)))
            except KeyboardInterrupt:
                self._say(" (broken off)\n")
                continue
            except DataError as problem:
                self._say(f"({problem})\n")
                continue
            self._say("\n" if answer.finished else f" (cut off after {answer.tokens} tokens: --max-new-tokens)\n")

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def visible(text: str) -> str:
    """Without control characters that a terminal would obey: a model may say anything."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def line_editing() -> None:
    """Arrow keys and history at the prompt, where Python has them."""
    if util.find_spec("readline") is not None:
        import_module("readline")  # by name: it writes to the screen when it is loaded
