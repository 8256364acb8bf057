"""What a page that we write is made of: its elements, and whatever in it does not belong there."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# Every element of our own templates. Text of a row that became an element is one that is not among them, or has
# another attribute.
WORDS_OF_ELEMENTS = (
    "html head meta title style body header main section article figure figcaption h1 h2 h3 h4 p ul li dl dt dd table "
    "caption tr th td details summary div span small strong code pre u i s output script svg defs pattern path rect "
    "line text br thead ins del circle polyline"
)
WORDS_OF_ATTRIBUTES = (
    "lang charset name content class id style title tabindex role scope open width height x y x1 x2 y1 y2 dx d "
    "text-anchor patternunits patterntransform aria-label aria-hidden aria-live data-role data-turn data-w "
    "viewbox preserveaspectratio cx cy r points colspan"
)
ELEMENTS, ATTRIBUTES = set(WORDS_OF_ELEMENTS.split()), set(WORDS_OF_ATTRIBUTES.split())


class Page(HTMLParser):
    """Reads a page; `pres`, `trained` and `ids` are those of the rows that `inspect` shows."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self.pres: list[list[str]] = []
        self.trained: list[list[str]] = []
        self.ids: list[str] = []
        self.refusals = 0
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in ELEMENTS:
            self.foreign.append(f"<{tag}>")
        self.foreign += [f"{tag} {name}={value}" for name, value in attrs if name not in ATTRIBUTES]
        self.refusals += given.get("class") == "refused"
        if tag == "pre":
            self.pres.append([])
            self.trained.append([])
        elif tag == "i" and "pre" in self._open:
            self.pres[-1].append("")
            if "u" in self._open:
                self.trained[-1].append("")
        elif tag == "code" and "details" in self._open:
            self.ids.append("")
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            self.foreign.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if "style" in self._open or "script" in self._open:
            self.foreign += re.findall(r"@import|url\((?!#)[^)]*\)|https?:[^\s\"']*|\bimport\b|\bfetch\b", data)
        if "i" in self._open and "pre" in self._open:
            self.pres[-1][-1] += data
            if "u" in self._open:
                self.trained[-1][-1] += data
        elif "code" in self._open and self.ids:
            self.ids[-1] += data


def parsed(page: str) -> Page:
    found = Page()
    found.feed(page)
    return found


def foreign_parts(page: str) -> list[str]:
    """What a self-contained page of ours must not have: elements and attributes that our templates do not use (text
    that was not escaped; `src` and `href`), and references to anything outside in a style or script."""
    return parsed(page).foreign
