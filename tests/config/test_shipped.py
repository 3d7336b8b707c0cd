"""Files that come with the package: where they are found, and that those of the working directory come first."""

import re
from pathlib import Path

import pytest

from llmdistill.config import keys, load_experiment, shipped
from llmdistill.config.prompts import Prompts
from llmdistill.curation.contamination import _read
from llmdistill.curation.steps import step_inputs
from llmdistill.data.tables import files_hash
from llmdistill.evaluation.tasks import files_of, read_tasks
from llmdistill.prompting.sources import read_source
from llmdistill.prompting.template import PromptTemplate
from tests.conftest import ROOT


def test_what_is_not_in_the_working_directory_is_found_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find("prompts/instruct.yaml") == ROOT / "prompts/instruct.yaml"
    own = tmp_path / "prompts/instruct.yaml"
    own.parent.mkdir()
    own.write_text("mine")
    assert shipped.find("prompts/instruct.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    "path", ["prompts/nothing.yaml", "prompts/seeds", "README.md", "docs/install.md", "/prompts/instruct.yaml", ""]
)
def test_nothing_else_is_looked_for_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find(path) == Path(path)


def test_an_experiment_elsewhere_reads_them_under_the_names_that_it_says(tmp_path, monkeypatch):
    """Ids and lineages depend on the names, which must not depend on where the package is installed."""
    monkeypatch.chdir(tmp_path)
    seeds = Prompts(source="prompts/seeds/general.jsonl", template="prompts/instruct.yaml")
    entries = list(read_source(seeds))
    assert len(entries) == 240
    assert entries[2].place == {"file": "prompts/seeds/general.jsonl", "line": 3}
    (name,) = files_hash("prompts/seeds/general.jsonl", "prompts.source")
    assert name == "prompts/seeds/general.jsonl"
    template = PromptTemplate(Path("prompts/instruct.yaml"), "prompts.template")
    assert template.render(entries[2].fields, "x")[0]["content"] == entries[2].fields["instruction"]
    assert template.file == Path("prompts/instruct.yaml")
    assert files_of(read_tasks(["configs/tasks/facts.yaml"])) == {
        f"configs/tasks/{name}": ROOT / "configs/tasks" / name for name in ("facts.yaml", "facts.jsonl")
    }


def test_steps_of_curate_elsewhere_read_them_too(experiment_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["configs/tasks/facts.jsonl", "configs/tasks/facts.yaml"]
    steps = f"[{{contamination: {{against: [{', '.join(files)}]}}}}, {{judge: {{teacher: {{model: a/b}}}}}}]"
    inputs = step_inputs(load_experiment(experiment_file, [("curate", steps)]).curate)
    assert {*files, "prompts/judge.yaml"} < inputs.keys()
    assert all(next(_read(Path(file), "against"))[0].startswith(file) for file in files)


def test_messages_name_pages_that_are_there():
    sources = [file.read_text() for file in ROOT.glob("llmdistill/**/*.py")]
    pages = {name for text in sources for name in re.findall(r"\bpage\([\"'](\w+)[\"']\)", text)}
    assert {"formats", "export", "distributed"} <= pages
    assert all(shipped.page(name).is_file() for name in pages)


def test_help_names_no_file_that_an_installed_user_has_not():
    for key, _, text in keys():
        for path in re.findall(r"(?:configs|prompts|docs|examples)/[\w./-]+", text):
            assert shipped.find(path) != Path(path) or Path(path).is_file(), f"{key}: {path}"
            assert not path.startswith(("docs", "examples")), key
