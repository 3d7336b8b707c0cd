"""What the engine `vllm` asks of vLLM before a model is loaded; tests/integration/test_vllm.py has real ones."""

import os
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("total", "free", "reads", "share"),
    [
        (80, 79.5, False, 0.92),  # vLLM's own default
        (8, 7.2, False, 0.87),  # a desktop has the rest
        (80, 79.5, True, 0.89),  # 2 GiB less of 80
        (24, 23.5, True, 0.83),
    ],
)
def test_vllm_takes_no_more_of_a_gpu_than_is_free(monkeypatch, total, free, reads, share):
    """With doubles in the place of the GPU and its driver's library."""
    from vllm.platforms import current_platform
    from vllm.third_party import pynvml

    from llmdistill.teachers.vllm import _share_of_memory

    assert _share_of_memory(reads) is None, "there is no GPU here"
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(
        type(current_platform), "visible_device_id_to_physical_device_id", lambda *given: given[-1], raising=False
    )
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda number: number)
    memory = SimpleNamespace(total=total * 2**30, free=free * 2**30)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: memory)
    assert _share_of_memory(reads) == pytest.approx(share)
