"""The page in a browser: nothing wider than the window, no error, every word readable, the values under a pointer."""

from __future__ import annotations

from pathlib import Path

import pytest

from logratio.benchmarks.report import main

from ._chromium import Page, browser, chromium
from ._folders import completion, completions, folder, options, preference, sampled

pytestmark = pytest.mark.skipif(browser() is None, reason="needs Chromium or Chrome")
LONG = "a-name-of-a-run-that-somebody-made-of-all-its-options-learning_rate=0.00001-beta=0.1-seed=42"

OVERFLOW = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('pre') &&
  e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.getAttribute('class'))"""
CONTRAST = """(() => {
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => { v /= 255;
    return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!c.startsWith('rgba(0, 0, 0, 0')) return c; } return 'rgb(255, 255, 255)'; };
  const found = [];
  for (const e of document.querySelectorAll('h1,h2,h3,p,th,td,a,small,code,pre,dt,dd,summary,svg text')) {
    const style = getComputedStyle(e), ink = e.tagName == 'text' ? style.fill : style.color;
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), e.tagName]);
  }
  return found.sort((x, y) => x[0] - y[0])[0]; })()"""
SMALLEST = """Math.min(...[...document.querySelectorAll('svg text')].map((e) => { const svg = e.closest('svg');
  return parseFloat(getComputedStyle(e).fontSize) * svg.clientWidth / svg.viewBox.baseVal.width; }))"""


@pytest.fixture(scope="module")
def page() -> Page:
    with chromium() as tab:
        yield tab


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A run with rollouts, and several over each other, with names, texts and options of any length."""
    root = tmp_path_factory.mktemp("pages")
    said = [{"step": s, "kind": kind, "text": LONG * 3} for s, kind in ((0, "note"), (7, "alarm"), (12345, "end"))]
    one = folder(root / "one", [sampled(step) for step in range(1, 101)], options("grpo"), notes=said)
    texts = ["x" * 3000, "<b>no markup</b> " * 100, "short", "line\n" * 50]
    completions(one, [completion(s, texts[s % 4], s % 3, prompt="p" * 300) for s in range(1, 101)])
    config = options()
    config["data"]["dataset_name"] = ["folder/" * 30 + "rows.jsonl"] * 3
    steps = [preference(s) for s in range(1, 101)]
    several = [folder(root / f"{LONG}{i}", steps, config, notes=said) for i in range(4)]
    assert main([str(one)]) == 0
    assert main([*map(str, several), "--output", str(root / "several.html")]) == 0
    return {"one": one / "report.html", "several": root / "several.html"}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["one", "several"])
def test_it_fits_and_is_readable(page: Page, pages: dict[str, Path], name: str, width: int, dark: bool):
    page.open(pages[name], width, dark=dark)
    page.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.value("innerWidth") == width
    assert page.value("document.documentElement.scrollWidth") == width
    assert page.value(OVERFLOW) == []
    contrast, where = page.value(CONTRAST)
    assert contrast >= 4.5, where
    assert page.value(SMALLEST) >= 9
    ground = page.value("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (not dark)
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in page.requests if url.startswith("file:")]) == 1


def test_the_values_under_the_pointer_are_told(page: Page, pages: dict[str, Path]):
    page.open(pages["several"], 1440, dark=False)
    told = page.value(
        """(() => { const plot = document.querySelector('svg.plot'), at = plot.getBoundingClientRect();
        plot.dispatchEvent(new PointerEvent('pointermove', {clientX: at.right - 16 * at.width / 420, clientY: at.top}));
        const box = document.getElementById('readout');
        return box.hidden ? null : [...box.children].map((e) => e.textContent); })()"""
    )
    assert told[0] == "step 100" and len(told) == 1 + 2 * 4  # training and evaluation of each run
    assert told[1].startswith(LONG) and float(told[1].removeprefix(f"{LONG}0")) == pytest.approx(0.01, abs=1e-3)
    page.value("document.querySelector('svg.plot').dispatchEvent(new PointerEvent('pointerleave'))")
    assert page.value("document.getElementById('readout').hidden")
