"""A policy file: prompts with the stance that a model should take, and what it must not say.

YAML with `prompts`, a list; or JSONL with one of them a line. Each has `prompt` (the user's text) or `messages`, and
may have `id`, `system`, `stance` (refuse, comply, deflect), `forbidden` (regular expressions), `reference`, `tags`,
`instructions` (see `probes.instructions`) and further `checks`. `tags` beside `prompts` holds for all of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sftdist.core.errors import DataError
from sftdist.core.settings import RowShape
from sftdist.data.answer_rules import unknown
from sftdist.data.contract_file import read_contract_file, read_file
from sftdist.data.jsonline import decode_line
from sftdist.data.rowerror import RowError, show
from sftdist.data.schema import Conversation, Reject, parse
from sftdist.evals.prompts import Prompt

CHECKS = ("stance", "forbidden", "instructions")
KEYS = ("id", "prompt", "system", "messages", "reference", "tags", "checks", *CHECKS)


def policy_prompts(value: Any, source: str = "safety") -> list[Prompt]:
    """The prompts of a file, of several, or of a list of entries as a file has them; none for None.

    Raises DataError for an entry that cannot be asked, ConfigError for a file that cannot be read.
    """
    several = value if isinstance(value, list | tuple) else [] if value is None else [value]
    found = [prompt for place, one in enumerate(several, 1) for prompt in _prompts_of(one, place, source)]
    seen: set[str] = set()
    for prompt in found:
        if prompt.id in seen:
            raise DataError(f"evals.policy: given the id {prompt.id} twice, required ids that differ; rename one")
        seen.add(prompt.id)
    return found


def read_policy(path: Path, source: str) -> list[Prompt]:
    """The prompts of one file; an entry without an id is called by the file and its place in it."""
    return [
        _prompt(entry, f"{path.stem}-{place}", source, f"{path}:{place}", tags) for place, entry, tags in _entries(path)
    ]


def _prompts_of(one: Any, place: int, source: str) -> list[Prompt]:
    if isinstance(one, str | Path):
        return read_policy(Path(one), source)
    return [_prompt(one, f"policy-{place}", source, f"evals.policy[{place - 1}]", ())]


def _entries(path: Path) -> Iterator[tuple[int, Any, tuple[str, ...]]]:
    content = read_file(path)
    if path.suffix in (".jsonl", ".ndjson"):
        for place, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield place, _decoded(line, f"{path}:{place}"), ()
        return
    values = read_contract_file(path, content)
    for key in values:
        if key not in ("prompts", "tags"):
            raise DataError(f"{path}: {unknown(key, ('prompts', 'tags'))}")
    prompts = values.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        raise DataError(f"{path}: prompts: given {show(prompts)}, required a list of prompts")
    for place, entry in enumerate(prompts, 1):
        yield place, entry, tuple(values.get("tags") or ())


def _decoded(line: bytes, where: str) -> object:
    try:
        return decode_line(line, torn=False)
    except RowError as problem:
        raise DataError(f"{where}: {problem.field}: given {problem.given}, required {problem.required}") from None


def _prompt(entry: Any, name: str, source: str, where: str, tags: tuple[str, ...]) -> Prompt:
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: given {show(entry)}, required a mapping with prompt and stance")
    for key in entry:
        if key not in KEYS:
            raise DataError(f"{where}: {unknown(str(key), KEYS)}")
    if ("prompt" in entry) == ("messages" in entry):
        raise DataError(f"{where}: given {'both' if 'prompt' in entry else 'neither'}, required prompt or messages")
    found = _parsed(entry, name, where, tags)
    checks = {**(entry.get("checks") or {}), **{key: entry[key] for key in CHECKS if key in entry}}
    return Prompt(
        id=f"{source}/{found.id}",
        source=source,
        messages=found.messages[:-1],
        reference=entry.get("reference"),
        tags=found.tags,
        turn=sum(message.role == "assistant" for message in found.messages[:-1]),
        checks=checks,
    )


def _parsed(entry: Mapping[str, Any], name: str, where: str, tags: tuple[str, ...]) -> Conversation:
    """The conversation as a row of the data would have it: with an answer at its end."""
    messages = _messages(entry)
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages: given {show(messages)}, required a list of messages")
    row = {
        "id": entry.get("id", name),
        "messages": [*messages, {"role": "assistant", "content": entry.get("reference") or "-"}],
        "tags": [*tags, *(entry.get("tags") or ())],
    }
    found = parse(row, RowShape.messages, file=where, line=0, id=None)
    if isinstance(found, Reject):
        raise DataError(f"{where}: {found.field}: given {found.given}, required {found.required}")
    if len(found.messages) > 1 and found.messages[-2].role == "assistant":
        raise DataError(f"{where}: given a last message of the assistant, required one that is to be answered")
    return found


def _messages(entry: Mapping[str, Any]) -> Any:
    if "messages" in entry:
        return entry["messages"]
    system = [{"role": "system", "content": entry["system"]}] if "system" in entry else []
    return [*system, {"role": "user", "content": entry["prompt"]}]
