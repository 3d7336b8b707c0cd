"""The notebook of examples/ runs from its first cell to its last, with little data."""

import importlib.util
import os
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.factories import write_tiny_for_vllm

SMALL = """
TEACHER, EXAMPLES, INPUTS, TRAIN = {teacher!r}, 20, 24, {{"max_steps": 2, "per_device_train_batch_size": 2}}
MORE = ["--teacher.dtype", "float32", "--generate.max_tokens", 4, "--curate", [{{"finish_reason": {{"keep": ["length"]}}}}]]
EVAL = {{"held_out": 0.2, "own_prompts": 0, "timed_requests": 0, "samples": 0, "sample_tokens": 2, "resamples": 200}}
EVAL["tasks"] = ["task.yaml"]
MORE += ["--student.prune.layers", 1, "--eval", EVAL]
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nbclient") is None, reason="nbclient is not installed")
def test_it_runs(smollm2, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(path).resolve()) for path in [ROOT, *paths]))  # from elsewhere
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    notebook = nbformat.read(ROOT / "examples/task.ipynb", as_version=4)
    nbformat.validate(notebook)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += SMALL.format(teacher=str(write_tiny_for_vllm(tmp_path / "tiny", smollm2)))
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    here = tmp_path / "runs/notebook/experiment"
    assert (here / "runs/first/report.html").is_file()
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
