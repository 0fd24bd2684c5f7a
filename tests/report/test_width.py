"""The page in Chromium: nothing wider than the window, and a hint on what scrolls."""

from __future__ import annotations

import shutil

import pytest

from llamafactory_ext.report.page import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

MEASURE = """[...document.querySelectorAll('.wide')].map(box => ({
    out_of_sight: box.scrollWidth - box.clientWidth,
    hint: box.querySelector('.room').getBoundingClientRect().height,
    seen: box.querySelector('.hint').getBoundingClientRect().right <= window.innerWidth,
}))"""


@pytest.fixture(scope="module")
def page(large_sweep):
    sync_api = pytest.importorskip("playwright.sync_api")
    address = f"file://{write_report(large_sweep.output, large_sweep.output / 'report')}"
    with sync_api.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page()
        opened.goto(address)
        yield opened
        browser.close()


@pytest.mark.parametrize("width", [390, 1024, 1440])
def test_what_is_wider_than_the_window_scrolls_and_says_so(width, page):
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(MEASURE)
    assert len(boxes) == page.locator("figure, table").count()
    for box in boxes:
        assert (box["hint"] > 15) is (box["out_of_sight"] > 0), box
        assert box["seen"] or not box["hint"]
    assert any(box["hint"] for box in boxes) or width > 390
