"""Pages without any outside file: styles, script and figures are in them, and whatever comes from data is escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

FOLDER = Path(__file__).parent / "page_templates"


def page_template(name: str, filters: Mapping[str, Callable[..., Any]] | None = None) -> Template:
    """A template of our pages; an unknown name in it is an error, text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"words": _words, "figure": _figure, "columns": _columns, "plain": _plain, **(filters or {})}
    environment.tests |= {"table": _is_table}
    return environment.get_template(name)


def _is_table(value: Any) -> bool:
    """A list of mappings: its columns are their keys."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _columns(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all items, in the order in which they appear."""
    return list(dict.fromkeys(key for item in table for key in item))


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    """What is neither a mapping nor a list."""
    return {key: value for key, value in section.items() if not isinstance(value, Mapping | list)}


def _words(key: str) -> str:
    return str(key).replace("_", " ")


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
