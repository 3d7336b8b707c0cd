"""What the engine `vllm` asks of vLLM before a model is loaded; tests/integration/test_vllm.py has real ones."""

import os

import pytest

from llmdistill.config import Generate, Teacher
from llmdistill.errors import InputError
from llmdistill.teachers import EngineSpec
from tests.factories import sized

pytest.importorskip("vllm", reason="vLLM is not installed")


def test_vllm_runs_the_model_runner_that_the_worker_extension_knows(monkeypatch):
    """Where nothing is set, vLLM takes its second one on a GPU; what the user has set stays."""
    from vllm import envs

    monkeypatch.setattr(os, "environ", {**os.environ})
    from llmdistill.teachers.vllm import VllmEngine, prepare_environment

    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    assert envs.VLLM_USE_V2_MODEL_RUNNER is None
    prepare_environment()
    assert envs.VLLM_USE_V2_MODEL_RUNNER is False
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    spec = EngineSpec(Teacher(model="a/b"), Generate(), sized("sampled", 4), [1], 64)
    with pytest.raises(InputError, match=r"VLLM_USE_V2_MODEL_RUNNER is 1 in .*; unset it, or set teacher\.engine"):
        VllmEngine(spec)
    assert envs.VLLM_USE_V2_MODEL_RUNNER is True
