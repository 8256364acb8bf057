"""The page of an evaluation as a person sees it, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftdist.evals.page import page
from tests.browser import Seen, look, needs_browser
from tests.evaluations import everything
from tests.reports import EVIL

pytestmark = needs_browser
PROBE = """
  const seen = query => [...document.querySelectorAll(query)].filter(e => e.checkVisibility());
  const style = query => getComputedStyle(document.querySelector(query));
  const charts = seen(".metrics svg"), dots = [...document.querySelectorAll(".metrics circle.tuned")];
  return {
    verdict: document.querySelector("h1 .verdict").getBoundingClientRect().bottom,
    shown: document.body.innerText,
    foreign: document.querySelectorAll("b, img, a, script:not(body > script:last-of-type)").length,
    charts: charts.map(e => e.getBoundingClientRect().width),
    outside: dots.filter(e => { const one = e.getBoundingClientRect(), all = e.closest("svg").getBoundingClientRect();
      return one.left < all.left - 6 || one.right > all.right + 6; }).length,
    curves: seen("#curves polyline").map(e => e.getBoundingClientRect().height),
    struck: style("#regressions details del").textDecorationLine,
    added: style("#regressions details ins").textDecorationLine,
    dashes: [0, 1, 2].map(n => style(`#curves polyline.s${n}`).strokeDasharray),
    opened: seen("#regressions details[open]").length,
  };
"""


def shown(text: str = EVIL) -> str:
    given = dict(everything(text))
    return page(given.pop("report"), given.pop("rows"), given.pop("figures"), **given)


def is_sound(seen: Seen, width: int) -> None:
    assert seen.console == []
    assert seen.found["requests"] == []
    assert seen.found["width"] == width
    assert seen.found["needs"] <= width  # no horizontal scroll bar
    assert seen.found["faint"] == []
    assert seen.found["small"] == 0
    assert seen.lines > 100
    assert seen.found["foreign"] == 0
    assert seen.found["outside"] == 0
    assert len(seen.found["charts"]) == 10
    assert all(chart > 200 for chart in seen.found["charts"])
    assert len(seen.found["curves"]) >= 5
    assert all(curve > 3 for curve in seen.found["curves"][:3])  # hyperbolas
    assert seen.found["struck"] == "line-through"
    assert seen.found["added"] == "underline"
    assert len(set(seen.found["dashes"])) == 3
    assert seen.found["opened"] == 3


def test_on_a_telephone_every_figure_is_seen(tmp_path: Path) -> None:
    seen = look(shown(), tmp_path, PROBE, width=400)
    is_sound(seen, 400)
    assert seen.found["verdict"] < 900  # without scrolling
    for name, one in everything(EVIL)["figures"].items():
        assert one.base is not None
        for figure in (f"{one.tuned.value:.3f}", f"{one.base.value:.3f}"):
            assert figure in seen.found["shown"], name


@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 760, 1400])
def test_at_other_widths_and_in_the_dark(tmp_path: Path, width: int, dark: bool) -> None:
    is_sound(look(shown(), tmp_path, PROBE, width=width, dark=dark), width)


@pytest.mark.long
@pytest.mark.parametrize(
    ("given", "instead", "wrong"),
    [
        ("</h1>", '</h1><script src="http://127.0.0.1:9/x.js"></script>', "requests"),
        ("</h1>", '</h1><p style="width:900px">wide</p>', "needs"),
        ("table-layout: fixed", "display: none", "charts"),
        ("text-decoration: line-through", "text-decoration: none", "struck"),
        ('points="', 'data-w="', "curves"),
    ],
)
def test_a_page_that_is_wrong_is_seen(tmp_path: Path, given: str, instead: str, wrong: str) -> None:
    html = shown()
    assert given in html
    seen = look(html.replace(given, instead), tmp_path, PROBE, width=400)
    with pytest.raises(AssertionError) as found:
        is_sound(seen, 400)
    assert f'"{wrong}"' in str(found.traceback[-1].statement)
