"""The report in a real browser: it renders, pointing at a token shows what was expected there, and nothing is fetched."""

import os
import shutil
from pathlib import Path

import pytest

from llmdistill.config import Experiment
from llmdistill.stages.report import report
from tests.stages.test_report import HOSTILE, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    write_run(directory)
    report(Experiment.model_validate({"output": str(directory), "teacher": {"model": "m"}}))
    return directory / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_report_renders_and_asks_for_nothing(browser, page_file, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert asked == [page_file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page must not scroll sideways"
    assert page.locator("svg").count() > 5
    assert all(box and box["height"] > 20 for box in (figure.bounding_box() for figure in page.locator("figure svg").all()))
    token = page.locator(".token[tabindex]").first
    detail = token.locator(".detail")
    assert not detail.is_visible()
    token.hover()
    assert detail.is_visible()
    assert "1.25 nats" in detail.inner_text()
    assert "50.0%" in detail.inner_text()
    box = detail.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    page.mouse.move(0, 0)
    assert not detail.is_visible()
    page.locator(".token[tabindex]").nth(1).focus()
    assert page.locator(".detail").nth(1).is_visible()
    assert page.evaluate("document.querySelectorAll('script, img').length") == 0
    assert HOSTILE.splitlines()[0] in page.locator(".token").locator("visible=true").all_inner_texts()[6]
    assert said == []
    page.close()
