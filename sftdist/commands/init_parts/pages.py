"""The text of the files: the experiment, the gate, the contract and the job."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import yaml

from sftdist.commands.init_parts.value import Value
from sftdist.core.resolve import literal
from sftdist.core.snapshot import SECTIONS

WIDTH = 110


def experiment(name: str, head: Sequence[str], values: Sequence[Value], zero: tuple[int, str]) -> str:
    """The text of conf/exp/NAME.yaml. `zero`: the stage and why."""
    stage, why = zero
    lines = ["# @package _global_", *_comments(head), "defaults:", *_comment(why, 2)]
    lines += [f'  - override /zero: "{stage}"', "  - override /optimizer: adamw", f"  - override /gate: {quoted(name)}"]
    lines += ["  - _self_", ""]
    for section in SECTIONS:
        inside = [value for value in values if value.key.partition(".")[0] == section]
        if not inside:
            continue
        if inside[0].key == section:
            lines += [*_comment(inside[0].why), f"{section}: {_inline(inside[0].value)}"]
            continue
        lines.append(f"{section}:")
        for value in inside:
            lines += _comment(value.why, 2)
            lines += [f"  #   {value.command}"] if value.command else []
            lines += _pair(value.key.partition(".")[2], value.value)
    return "\n".join([*lines, ""])


def quoted(text: str) -> str:
    """A text that YAML reads as text, whatever it looks like."""
    return f'"{text}"'


def _pair(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"  {key}:"
        text = yaml.safe_dump(literal(dict(value)), sort_keys=False, allow_unicode=True, width=10_000)
        yield from (f"    {line}" for line in text.splitlines())
    else:
        yield f"  {key}: {_inline(value)}"


def _inline(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    text = yaml.safe_dump(literal(value), width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def number(value: float) -> str:
    """As YAML reads a number: 2.0e-5, 0.03, 2."""
    if value == int(value):
        return str(int(value))
    return f"{value:.1e}".replace("e-0", "e-") if value < 0.001 else f"{value:g}"


def _comments(lines: Sequence[str]) -> Iterator[str]:
    """A line that begins with a blank is to be copied, and stays one line."""
    for line in lines:
        yield from [f"# {line}".rstrip()] if line.startswith(" ") or not line else _comment(line)


def _comment(text: str, indent: int = 0) -> list[str]:
    start = f"{' ' * indent}# "
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False, break_on_hyphens=False
    )


def gate(head: Sequence[str], min_prompts: int, why: str, rules: Sequence[tuple[str, str]]) -> str:
    """The text of conf/gate/NAME.yaml; `rules`: each as YAML, with its reason, "" where the one before says it."""
    lines = [*_comments(head), *_comment(why), f"min_prompts: {min_prompts}", "rules:"]
    for rule, reason in rules:
        lines += [*(_comment(reason, 2) if reason else []), f"  - {rule}"]
    return "\n".join([*lines, ""])


def contract(head: Sequence[str], content: Mapping[str, Any]) -> str:
    """The text of conf/contract/NAME.yaml."""
    body = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=WIDTH)
    return "\n".join([*_comments(head), body])


def job(kind: str, values: Mapping[str, str]) -> str:
    """The text of slurm/NAME.sbatch; `kind`: node or nodes."""
    text = files("sftdist.commands.init_parts").joinpath("job_templates", f"{kind}.sbatch").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text
