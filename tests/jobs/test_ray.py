"""What Ray starts, without a cluster; tests/integration/test_ray.py has a real one."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmdistill.config import load_experiment
from llmdistill.config.machine import Precision
from llmdistill.data import shards
from llmdistill.data.shards import EVERYTHING, Share
from llmdistill.errors import BusyError
from llmdistill.runs import lock
from llmdistill.runs.record import read_run
from llmdistill.workflow.plan import stages
from tests.conftest import ROOT

pytest.importorskip("ray", reason="Ray is not installed")

from llmdistill.jobs import ray_driver

HOLDER = """
import sys, time
from pathlib import Path
from llmdistill.runs import lock
with lock.alone([Path(sys.argv[1])], "refresh"):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def stage(experiment_file):
    return stages(load_experiment(experiment_file))[0]


def test_paths_begin_where_the_job_was_submitted(tmp_path, monkeypatch):
    """Ray starts its processes elsewhere."""
    monkeypatch.chdir("/")
    ray_driver.Actor(tmp_path)
    assert Path.cwd() == tmp_path
    monkeypatch.chdir("/")
    assert ray_driver.command_of(["sh", "-c", "touch here; exit 3"], tmp_path) == 3
    assert (tmp_path / "here").exists()


def test_a_stage_keeps_others_out_and_is_seen(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.1)
    data = tmp_path / "run/data"
    with subprocess.Popen([sys.executable, "-c", HOLDER, data], stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout.readline() == "holds\n"
        with pytest.raises(BusyError, match="`refresh` is running here"):
            ray_driver._make(stage, ray_driver.NoShards(data))
        holder.kill()
    seen, store = [], shards._store

    def look(*arguments):
        seen.append([path.name for path in (tmp_path / "run").glob(".*")])
        return store(*arguments)

    monkeypatch.setattr(shards, "_store", look)
    ray_driver._make(stage, EVERYTHING)
    assert [sorted(names) for names in seen] == [[".data.lock", ".progress"]] * 4
    assert not list((tmp_path / "run").glob(".*"))


def test_what_is_missing_is_known_and_what_is_done_lacks_nothing(stage, tmp_path):
    data = tmp_path / "run/data"
    ray_driver._make(stage, plan := ray_driver.NoShards(data))
    assert plan.missing == [0, 1, 2, 3]
    ray_driver._make(stage, Share(1, 2))
    ray_driver._make(stage, half := ray_driver.NoShards(data))
    assert half.missing == [0, 2]
    ray_driver._make(stage, EVERYTHING)
    assert plan.missing == []
    assert read_run(data)["status"] == "done"
    ray_driver._make(stage, again := ray_driver.NoShards(data))
    assert again.missing == []


def test_the_head_does_not_decide_what_the_actors_compute_in(stage, tmp_path, monkeypatch):
    """It may have no accelerator: vLLM then does not even know its device."""
    with monkeypatch.context() as patch:
        patch.setattr(shards, "teacher_precision", lambda teacher: pytest.fail("the head was asked"))
        ray_driver._make(stage, ray_driver.NoShards(tmp_path / "run/data"))
    assert not (tmp_path / "run/data/run.json").exists()
    monkeypatch.setattr(shards, "teacher_precision", lambda teacher: Precision("bfloat16", "the actor computes in it"))
    ray_driver._make(stage, Share(1, 2))
    assert read_run(tmp_path / "run/data")["precision"]["dtype"] == "bfloat16"


def test_what_a_worker_made_is_in_the_store(experiment_file, tmp_path):
    (stage, *_) = stages(load_experiment(experiment_file, [("store", f"file://{tmp_path}/store")]))
    ray_driver._make(stage, EVERYTHING)
    elsewhere = load_experiment(experiment_file, [("store", f"file://{tmp_path}/store"), ("output", f"{tmp_path}/elsewhere")])
    ray_driver._make(stages(elsewhere)[0], plan := ray_driver.NoShards(tmp_path / "elsewhere/data"))
    assert plan.missing == []
    assert read_run(tmp_path / "elsewhere/data")["status"] == "done"
