"""What the documentation says is there, is there."""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import llmdistill
from llmdistill.cli import _OTHERS, COMMANDS, _parser
from llmdistill.config import Experiment, keys
from llmdistill.config.help import merged
from llmdistill.config.prompts import Prompts, PromptStep
from llmdistill.data.targets import KINDS
from llmdistill.losses import DIVERGENCES
from llmdistill.prompting.plan import Plan
from tests.factories import make_row, write_rows

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SAME = {
    "teachers.NAME": "teacher",
    "curate.N.judge.teacher": "teacher",
    "curate.N.best_of.judge": "curate.N.judge",
    "eval.win_rate.judge": "teacher",
}


def test_the_configuration_page_has_every_key_as_its_docstring_says():
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == runpy.run_path(str(ROOT / "docs/build.py"))["configuration_page"](), "run `python docs/build.py`"
    assert f"## teachers\n\n{Experiment.help_texts()['teachers']}\n" in page, "what the key means, not what one teacher is"
    for again, first in SAME.items():  # the same section twice: its keys are listed once
        assert below(again) == below(first)
        assert f"| `{again}.…` |" in page
    listed = [row for row in keys() if not row[0].startswith(tuple(f"{again}." for again in SAME))]
    assert re.findall(r"^\| `([^`…]+)` \|", page, flags=re.M) == [key for key, _, _ in merged(listed)]


def below(key):
    return [name.removeprefix(f"{key}.") for name, _, _ in keys() if name.startswith(f"{key}.")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:configs|prompts|docs|examples|benchmarks|llmdistill|tests)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_overrides_in_the_docs_exist(page):
    text = page.read_text()
    for command in re.findall(r"^\s*(?:\$ )?llmdistill (\w+)", text, flags=re.M):
        assert command in {*COMMANDS, *_OTHERS}, command
    sections = {key.partition(".")[0] for key, _, _ in keys()}
    for key in re.findall(rf"--((?:{'|'.join(sections)})\.[\w.]+)", text):
        assert is_key(key.rstrip(".")) or key in WRONG, key


WRONG = ("train.aplha",)  # what the pages show as mistyped
FREE = ("train.args.", "rounds.args.", "teacher.engine_args.")


def is_key(key):
    """Whether an override names a key or a section; a number is an entry of a list."""
    known = {name for name, _, _ in keys()}
    shape = re.sub(r"\.\d+(?=\.|$)", ".N", key)
    return key.startswith(FREE) or any(name == shape or name.startswith(f"{shape}.") for name in known)


def test_an_override_that_is_not_a_key_is_found():
    right = ("train.alpha", "curate.0.repetition.max_share", "jobs.slurm.workers", "train.args.bf16", "student.lora")
    wrong = (*WRONG, "curate.0.repetition.max", "curate.x", "jobs.slurm.worker", "rounds.evry", "score.from")
    assert all(map(is_key, right))
    assert not any(map(is_key, wrong))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_of_the_commands_in_the_docs_exist(page):
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    sections = {f"--{key.partition('.')[0]}" for key, _, _ in keys()}  # as a whole: --curate '[]'
    for command, rest in re.findall(r"^\s*(?:\$ )?llmdistill (\w+)(.*)$", page.read_text(), flags=re.M):
        for flag in re.findall(r"(?<=\s)--[a-z][\w-]*(?=[\s=]|$)", rest.partition(" #")[0]):
            assert flag in commands.choices[command]._option_string_actions or flag in sections, f"{command} {flag}"


def test_every_shipped_configuration_is_named_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for path in ROOT.glob("configs/*.yaml"):
        assert f"configs/{path.name}" in text


def test_the_readmes_experiment_is_the_shipped_one():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert block == (ROOT / "configs/qwen3-1.7b.yaml").read_text()


def test_every_template_and_step_has_its_entry_with_an_example():
    page = (ROOT / "docs/prompts.md").read_text()
    for path in ROOT.glob("prompts/*.yaml"):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `prompts/{path.name}` |")]
        assert "“" in row
    for name in PromptStep.step_types():
        entry = page.split(f"### `{name}`\n")[1].split("\n### ")[0].split("\n## ")[0]
        assert "```yaml" in entry
        assert "*" in entry.split("```")[-1]


def test_the_yaml_on_the_prompts_page_is_what_is_read():
    page = (ROOT / "docs/prompts.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.S)
    assert (ROOT / "prompts/question.yaml").read_text() in blocks
    sections = [yaml.safe_load(block)["prompts"] for block in blocks if block.startswith("prompts:")]
    assert len(sections) == 1 + len(PromptStep.step_types())
    for section in sections:
        Plan(Prompts.model_validate(section))


def test_every_divergence_has_its_row_with_a_paper():
    rows = [line for line in (ROOT / "docs/losses.md").read_text().splitlines() if line.startswith("| `")][1:]
    assert [row.split("`")[1] for row in rows] == list(DIVERGENCES)
    assert all("](https://arxiv.org/abs/" in row for row in rows)


@pytest.mark.parametrize("kind", ["sampled", "topk", "multinomial"])
def test_a_reader_written_from_the_format_page_reads_it(kind, tmp_path, monkeypatch):
    """The page's own code, with numpy and pyarrow only, against the package's decoder."""
    generator = np.random.default_rng(0)
    logprobs = torch.from_numpy(generator.normal(size=(7, 300)) * 3).log_softmax(-1)
    kept = {"topk": 64, "sampled": 16, "multinomial": 50}[kind]
    ids = KINDS[kind].keep(logprobs, kept, torch.rand(7, KINDS[kind].uniforms(kept)))
    soft = KINDS[kind].from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
    write_rows(tmp_path / "runs/demo/data", [make_row("a", [1, 2], np.arange(7), None, soft)], kind, 300, n=kept)

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/dataset.md").read_text(), flags=re.S)
    reader = next(block for block in blocks if "kind: sampled" in block)
    by_kind = next(block for block in blocks if f"kind: {kind}" in block)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    if kind == "sampled":
        exec(reader, names)
        assert names["ids"].tolist() == soft.ids_NK.tolist()
        np.testing.assert_allclose(names["weight"], np.exp(soft.logweights_NK), rtol=1e-5)
        return
    opening = "".join(line + "\n" for line in reader.splitlines() if line.startswith(("import", "row =")))
    exec(opening + by_kind, names)
    if kind == "topk":
        assert names["ids"].tolist() == soft.ids_NK.tolist()
        np.testing.assert_allclose(names["p"], np.exp(soft.logprobs_NK), rtol=5e-3)
        np.testing.assert_allclose(names["p"].sum(1) + names["tail"], 1, rtol=1e-6)
    else:
        for position, (ids, weight) in enumerate(zip(names["ids"], names["weight"], strict=True)):
            held = soft.counts_NK[position] > 0
            assert ids.tolist() == soft.ids_NK[position][held].tolist()
            np.testing.assert_allclose(weight, soft.counts_NK[position][held] / kept)


def test_every_page_is_in_the_sites_navigation():
    named = re.findall(r"^ +- (?:Home: )?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert sorted(named) == sorted(
        [*(page.name for page in ROOT.glob("docs/*.md")), "changelog.md", "contributing.md", "security.md"]
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; `--strict` makes a broken link or a docstring that cannot be read an error."""
    if not (ROOT / ".mkdocs/mkdocs").is_dir():
        pytest.skip("MkDocs is not there: `make .mkdocs`")
    directory = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / '.mkdocs'}", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


def test_the_site_has_every_page_and_can_be_searched(site):
    for page in [*(ROOT / "docs").glob("*.md"), Path("changelog.md"), Path("contributing.md")]:
        assert (site / page.with_suffix(".html").name).is_file()
    found = {entry["location"] for entry in json.loads((site / "search/search_index.json").read_text())["docs"]}
    assert {"losses.html#fused-loss", "curation.html#best_of", "api.html#llmdistill.losses.divergences.forward_kl"} <= found


def test_the_site_loads_nothing_from_other_hosts(site):
    """Links may lead elsewhere; what a browser loads for a page may not."""
    other = r"""["']?(?:https?:)?//"""
    loaded = rf"<(?:script|img|iframe|source)\b[^>]*\bsrc={other}|<link\b[^>]*\bhref={other}|@import|url\({other}"
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert not re.search(loaded, file.read_text()), file


def test_the_api_reference_has_what_the_package_exports(site):
    page = (site / "api.html").read_text()
    for name in set(llmdistill.__all__) - {"losses"}:
        assert re.search(rf'id="llmdistill\.[\w.]+\.{name}"', page), name
    for name in llmdistill.losses.DIVERGENCES:
        assert f'id="llmdistill.losses.divergences.{name}"' in page, name
