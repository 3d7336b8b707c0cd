"""What `run` says before it begins."""

import pytest

from llmdistill.config import load_experiment
from llmdistill.errors import InputError
from llmdistill.runs.pipeline import dry_run, run_pipeline
from tests.factories import write_experiment


def test_a_dry_run_shows_every_round_before_there_is_a_student(tiny, tmp_path, capsys):
    file = write_experiment(tiny, tmp_path)
    dry_run(load_experiment(file, [("rounds", "2"), ("targets.kind", "topk")]))
    said = capsys.readouterr().out
    for number in (1, 2):
        for command, directory in [("generate", "written/data"), ("score", "data"), ("curate", "curated"), ("train", "student")]:
            assert f"{command} would write" in said
            assert f"rounds/{number}/{directory}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("start", [dry_run, run_pipeline])
@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("curate", "[{contamination: {against: [nowhere.jsonl]}}]", r"nowhere\.jsonl"),
        ("eval.tasks", "[nowhere.yaml]", r"nowhere\.yaml: no such file"),
    ],
)
def test_what_later_stages_read_is_looked_for_before_the_first(tiny, tmp_path, start, key, value, error):
    file = write_experiment(tiny, tmp_path)
    with pytest.raises(InputError, match=error):
        start(load_experiment(file, [(key, value)]))
    assert not (tmp_path / "run").exists()
