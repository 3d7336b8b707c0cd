"""The notebook of examples/ runs from its first cell to its last, with little data."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.factories import write_tiny_for_vllm

NOTEBOOK = ROOT / "examples/task.ipynb"
SMALL = """
TEACHER, EXAMPLES, INPUTS, TRAIN = {teacher!r}, 20, 24, {{"max_steps": 2, "per_device_train_batch_size": 2}}
MORE = ["--teacher.dtype", "float32", "--generate.max_tokens", 4, "--curate", [{{"finish_reason": {{"keep": ["length"]}}}}]]
EVAL = {{"held_out": 0.2, "own_prompts": 0, "timed_requests": 0, "samples": 0, "sample_tokens": 2, "resamples": 200}}
EVAL["tasks"] = ["task.yaml"]
MORE += ["--student.prune.layers", 1, "--eval", EVAL]
"""


def test_its_outputs_are_those_of_one_run_from_the_first_cell_to_the_last():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = json.dumps([output.get("text") for output in outputs])
    assert not re.search(r"\\u001b|/tmp/|/home/|/root/", text)
    assert "the student keeps" in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nbclient") is None, reason="nbclient is not installed")
def test_it_runs(smollm2, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(path).resolve()) for path in [ROOT, *paths]))  # from elsewhere
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += SMALL.format(teacher=str(write_tiny_for_vllm(tmp_path / "tiny", smollm2)))
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    here = tmp_path / "runs/notebook/experiment"
    assert (here / "runs/first/report.html").is_file()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
