"""A page in a real browser: headless Chromium, where there is one, looks at it and tells what a person would see."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: install the system's package `chromium`"
)
# Run in the page once it is loaded; every row is laid out, also those that are not on the screen.
PROBE = """
<style>article { content-visibility: visible !important; }</style>
<script>
function rgba(text) {
  const n = text.match(/[\\d.]+/g).map(Number);
  const unit = text.startsWith("color(srgb") ? 255 : 1;
  return [n[0] * unit, n[1] * unit, n[2] * unit, n[3] ?? 1];
}
function over(top, below) { return [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1); }
function ground(element) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
}
function light(colour) {
  const [r, g, b] = colour.map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(element) {  // WCAG 2.1, relative luminance
  const style = getComputedStyle(element), below = ground(element);
  const ink = over(rgba(element.closest("svg") ? style.fill : style.color), below);
  const [high, low] = [light(ink), light(below)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}
addEventListener("load", () => {
  const worded = [...document.querySelectorAll("body *:not(script, style, title)")].filter(e => e.checkVisibility() &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  const common = {
    width: innerWidth, needs: document.documentElement.scrollWidth,
    faint: [...new Set(worded.filter(e => contrast(e) < 4.5).map(e => `${e.tagName}.${e.className} ${contrast(e)}`))],
    small: worded.filter(e => parseFloat(getComputedStyle(e).fontSize) < 10).length,
    requests: performance.getEntriesByType("resource").map(e => e.name),
  };
  const special = (() => { %s })();
  parent.document.documentElement.dataset.found = JSON.stringify({ ...common, ...special });
});
</script>
"""


@dataclass(frozen=True)
class Seen:
    """What the probe returned, the messages of the console, and how many different lines of pixels there were."""

    found: dict[str, Any]
    console: list[str]
    lines: int


def look(page: str, folder: Path, probe: str = "return {};", *, width: int = 1000, dark: bool = False) -> Seen:
    """Open a page. `probe` is the body of a function in it that returns an object."""
    file, picture = folder / "page.html", folder / f"page-{width}{'-dark' if dark else ''}.png"
    # In a frame: Chromium's own window is never narrower than 500 pixels.
    inner = html.escape(page.replace("</body>", f"{PROBE.replace('%s', probe)}</body>"))
    frame = f'<iframe style="border:0; height:900px; width:{width}px" srcdoc="{inner}"></iframe>'
    file.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{frame}', encoding="utf-8")
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"),
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={max(width, 500)},900",
        f"--screenshot={picture}",
        "--dump-dom",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, f"the page did not load: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(html.unescape(found[1])), console, _different_lines(picture.read_bytes()))


def _different_lines(png: bytes) -> int:
    """How many different lines the (filtered) pixels of a PNG have: few where the picture is blank."""
    place, data = 8, b""
    while place < len(png):
        size, kind = int.from_bytes(png[place : place + 4]), png[place + 4 : place + 8]
        data += png[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += size + 12
    pixels, height = zlib.decompress(data), int.from_bytes(png[20:24])
    line = len(pixels) // height
    return len({pixels[start : start + line] for start in range(0, len(pixels), line)})
