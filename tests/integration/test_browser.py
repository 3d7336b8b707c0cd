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


def contrasts(page) -> list[float]:
    """Of the text of every shade with what is behind it, by the formula of WCAG 2."""
    colours = page.evaluate(
        """() => {
            const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
            const painted = colours => {
                context.reset();
                for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
                return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
            };
            return [...document.querySelectorAll('.token')].map(token => {
                const behind = [];
                for (let at = token; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
                return [painted([getComputedStyle(token).color]), painted(behind)];
            });
        }"""
    )

    def luminance(colour):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (channel / 255 for channel in colour)]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    pairs = [sorted(map(luminance, pair)) for pair in colours]
    return [(high + 0.05) / (low + 0.05) for low, high in pairs]


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
    token, detail = page.locator("button.token").first, page.locator(".detail").first
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
    page.locator("button.token").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.locator(".detail").nth(1).is_visible()
    page.keyboard.press("Escape")
    assert not page.locator(".detail").nth(1).is_visible()
    assert page.evaluate("document.querySelectorAll('script, img').length") == 0
    assert HOSTILE.splitlines()[0] in page.locator("button.token").first.inner_text()
    assert min(contrasts(page)) >= 4.5  # WCAG 2.2, 1.4.3
    assert said == []
    page.close()


def test_the_tokens_can_be_skipped_with_the_keyboard(browser, page_file):
    page = browser.new_page()
    page.goto(page_file.as_uri())
    page.locator(".skip").first.focus()
    assert page.locator(".skip").first.bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.tokens')") is None
    page.close()
