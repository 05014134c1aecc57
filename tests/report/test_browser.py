"""A report in a real browser: nothing is asked of any host, everything can be seen, wide and narrow, light and dark.

With LIMBECK_SCREENSHOTS=FOLDER the pages are kept as pictures, to look at.
"""

import os
from pathlib import Path

import pytest
from chromium import PROGRAM, Chromium
from made_runs import make_demo, make_run

from limbeck.report import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no chromium here: apt-get install chromium, as .ci/run does"),
]

LOOK = """(() => {
  document.querySelectorAll('details').forEach(part => part.open = OPEN);
  const width = document.documentElement.clientWidth;
  const shown = [...document.querySelectorAll('svg, img, table.heat, figure, pre, h1, h2, h3, dd')].map(part => {
    const box = part.getBoundingClientRect();
    return {what: part.tagName + ' ' + (part.getAttribute('aria-label') || part.textContent || '').slice(0, 60),
            fits: box.width > 0 && box.height > 0 && box.left >= 0 && box.right <= width + 0.5};
  });
  const letters = [...document.querySelectorAll('svg text')].map(part => {
    const box = part.getBoundingClientRect(), home = part.closest('.card').getBoundingClientRect();
    return {what: part.textContent, fits: box.left >= home.left && box.right <= home.right && box.height >= 10};
  });
  return {width: width, scroll: document.documentElement.scrollWidth, shown: shown, letters: letters,
          ground: getComputedStyle(document.body).backgroundColor};
})()"""

CONTRAST = """(() => {
  const pen = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
  const bright = colours => {
    pen.clearRect(0, 0, 1, 1);
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3)
      .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const weak = [];
  const parts = 'h1,h2,h3,p,dt,dd,a,li,summary,th,td,caption,figcaption,pre b,pre q,span,text';
  for (const part of document.querySelectorAll(parts)) {
    if (!part.textContent.trim()) continue;
    const grounds = [];
    for (let at = part; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    const style = getComputedStyle(part), ink = part.tagName === 'text' ? style.fill : style.color;
    const [a, b] = [bright(grounds), bright([...grounds, ink])].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) weak.push(part.tagName + ' ' + part.textContent.slice(0, 40) + ' ' + ratio.toFixed(2));
  }
  return weak;
})()"""


@pytest.fixture(scope="module")
def browser():
    with Chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    found = {"run": make_run(folder / "run"), "demo": make_demo(folder / "demo")}
    return {name: write_report(path)[0] for name, path in found.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["run", "demo"])
def test_everything_can_be_seen(browser, pages, name, width, scheme):
    browser.open(pages[name], width, scheme)
    for opened in ("false", "true"):
        seen = browser.run(LOOK.replace("OPEN", opened))
        assert seen["width"] == width
        assert seen["scroll"] <= width, "the page scrolls sideways"
        assert len(seen["shown"]) > 20
        assert [part["what"] for part in seen["shown"] + seen["letters"] if not part["fits"]] == []
        dark = sum(map(int, seen["ground"].removeprefix("rgb(").rstrip(")").split(","))) < 3 * 128
        assert dark == (scheme == "dark")
        if opened == "false" and "LIMBECK_SCREENSHOTS" in os.environ:
            browser.picture(Path(os.environ["LIMBECK_SCREENSHOTS"]) / f"{name}-{width}-{scheme}.png")
    assert browser.problems() == []
    assert browser.run(CONTRAST) == []


def test_the_guard_sees_a_page_that_asks_for_something(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://localhost:9/a.png'><script>console.error('no')</script>")
    browser.open(page, 400, "light")
    assert "http://localhost:9/a.png" in browser.problems()
    assert len(browser.problems()) >= 2
