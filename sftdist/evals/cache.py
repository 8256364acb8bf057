"""Answers that were given already: a file of JSON lines per model and way of asking, shared by processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftdist.core.storage import append_jsonl, sha256_json, write_json
from sftdist.evals.decoding import Decoding
from sftdist.evals.prompts import Answer


class AnswerCache:
    """The answers of one model (`model`: its sha256), asked in one way, in `folder`.

    `voice`: what prompts become tokens by and answers become text by (`Voice.sha256`). Only ever appended to, whole
    lines at a time: a killed process costs the line that it was writing, and several may write.
    """

    def __init__(self, folder: Path, model: str, voice: str, decoding: Decoding) -> None:
        self._context: dict[str, Any] = {"model": model, "voice": voice, "decoding": decoding.facts()}
        name = sha256_json(self._context)
        self._path, self._about = folder / f"{name}.jsonl", folder / f"{name}.json"

    def read(self) -> dict[str, Answer]:
        """The answers by key; the first one where two processes gave it. What cannot be read is asked again."""
        answers: dict[str, Answer] = {}
        if self._path.is_file():
            for line in self._path.read_bytes().split(b"\n"):
                key, answer = _read(line)
                if answer is not None:
                    answers.setdefault(key, answer)
        return answers

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append answers, all or none; a line that a killed process left unfinished is cut off first."""
        if not self._about.is_file():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._about, self._context)  # for people: the name of the file says nothing
        append_jsonl(self._path, [_line(key, answer) for key, answer in answers.items()])


def _line(key: str, answer: Answer) -> dict[str, Any]:
    """`opened` is known by the prompt, and is not kept."""
    return {"key": key, "text": answer.text, "tokens": answer.tokens, "finished": answer.finished}


def _read(line: bytes) -> tuple[str, Answer | None]:
    """A line's key and answer; no answer where the line is damaged, as after a power cut."""
    try:
        found = json.loads(line)
        return found.pop("key"), Answer(**found)
    except (ValueError, TypeError, KeyError, AttributeError):
        return "", None
