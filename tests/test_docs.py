"""What the documentation says is there, is there."""

import re
from pathlib import Path

import pytest

from llmdistill.cli import STAGES
from llmdistill.config import keys

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def test_every_key_is_on_the_configuration_page_with_its_meaning():
    page = (ROOT / "docs/configuration.md").read_text()
    rows = [f"| `{key}` | {kind.lower().replace('|', ' or ')} | {text.replace('|', ' or ')} |" for key, kind, text in keys()]
    missing = [row for row in rows if row not in page]
    assert not missing, "put these rows on the page:\n" + "\n".join(missing)
    assert sum(line.startswith("| `") for line in page.splitlines()) == len(rows), "the page has rows of keys that are gone"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:configs|prompts|docs|examples|benchmarks|llmdistill)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_overrides_in_the_docs_exist(page):
    known = {key for key, _, _ in keys()}
    text = page.read_text()
    for command in re.findall(r"^(?:\$ )?llmdistill (\w+)", text, flags=re.M):
        assert command in {*STAGES, "inspect"}, command
    for key in re.findall(r"--((?:teacher|prompts|generate|targets|student|train|eval)\.[\w.]+)", text):
        free = key.startswith(("train.args.", "teacher.engine_args."))
        assert key in known or free or "did you mean" in text.split(key, 1)[1], key


def test_every_shipped_configuration_is_named_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for path in ROOT.glob("configs/*.yaml"):
        assert f"configs/{path.name}" in text
