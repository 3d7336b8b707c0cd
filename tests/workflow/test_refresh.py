"""`refresh` before a version is begun; tests/integration/test_refresh.py has whole nights."""

import json

import pytest

from llmdistill.config import load_experiment
from llmdistill.workflow import refresh
from tests.factories import write_experiment


@pytest.fixture
def tonight(tiny, tmp_path, monkeypatch):
    """A night with so many prompts in the source: how often the stages were run, and the versions that there are."""
    runs = []
    monkeypatch.setattr(refresh, "run_stages", runs.append)
    monkeypatch.setattr(refresh, "_decide", lambda *_: {"promoted": True, "reason": "a test"})
    monkeypatch.setattr(refresh, "_promote", lambda *_: None)
    file = write_experiment(tiny, tmp_path)

    def night(count):
        prompts = "".join(json.dumps({"prompt": f"Say {number}."}) + "\n" for number in range(count))
        (tmp_path / "prompts.jsonl").write_text(prompts)
        refresh.refresh(load_experiment(file, [("refresh", "{replay: 0}")]))
        return len(runs), len(refresh._versions(tmp_path / "run"))

    return night


def test_too_few_prompts_wait_for_more(tonight, capsys):
    """`curate` or `eval` would end the version after the teacher has answered, and the next night would ask again."""
    assert tonight(3) == (0, 0)
    assert "waiting for more prompts: eval" in " ".join(capsys.readouterr().out.split())
    assert tonight(40) == (1, 1)
