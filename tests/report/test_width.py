"""The page in Chromium: nothing wider than the window, and a hint on what scrolls."""

from __future__ import annotations

import shutil

import pytest
from recorded_sweeps import RECIPE, make_refined_sweep, make_sweep, record, score, train

from llamafactory_ext.report import page as page_module
from llamafactory_ext.report.page import write_report
from llamafactory_ext.sweep.records import Record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

MEASURE = """[...document.querySelectorAll('.wide')].map(box => ({
    out_of_sight: box.scrollWidth - box.clientWidth,
    hint: box.querySelector('.room').getBoundingClientRect().height,
    seen: box.querySelector('.hint').getBoundingClientRect().right <= window.innerWidth,
}))"""


def failed_sweep(folder):
    """With a failure whose message is longer than any window, and a path that has no space."""
    recipe = RECIPE | {"model_name_or_path": "/a/long/path" * 20}
    axes = {"pref_loss": ["sigmoid", "minor_dpo"], "pref_beta": [0.02, 0.1]}
    sweep = make_sweep(folder, axes, recipe)
    failed, *others = sweep.cells()
    record(sweep, failed.name, "train", Record("failed", error="RuntimeError: " + "it went wrong " * 30))
    for cell in others:
        train(sweep, cell)
        score(sweep, cell.name, 5)
    return sweep


@pytest.fixture(scope="module", params=[failed_sweep, make_refined_sweep])
def page(request, tmp_path_factory):
    sync_api = pytest.importorskip("playwright.sync_api")
    sweep = request.param(tmp_path_factory.mktemp("wide"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "FIGURE_FILES", {"SVG": "svg"})  # what the page shows
        address = f"file://{write_report(sweep.output, sweep.output / 'report')}"
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
