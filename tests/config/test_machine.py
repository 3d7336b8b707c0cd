"""What models compute in, on machines of all kinds."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from llmdistill.config import machine
from llmdistill.config.machine import of_apple, of_cpu, of_cuda
from llmdistill.errors import InputError

AVX2 = {"sse4_2", "avx", "avx2", "fma", "f16c"}


@pytest.mark.parametrize(
    ("flags", "limit", "dtype"),
    [
        (AVX2, None, "float32"),
        (AVX2 | {"avx512f", "avx512_vnni"}, None, "float32"),  # Cascade Lake
        (AVX2 | {"avx512f", "avx512_bf16"}, None, "bfloat16"),  # Zen 4
        (AVX2 | {"avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}, None, "bfloat16"),  # Sapphire Rapids
        (AVX2 | {"avx512_bf16", "amx_bf16"}, "AVX2", "float32"),
        (AVX2 | {"avx512_bf16", "amx_bf16"}, "avx512_core_vnni", "float32"),
        (AVX2 | {"avx512_bf16", "amx_bf16"}, "AVX512_CORE_AMX", "bfloat16"),
        (AVX2 | {"avx512_bf16"}, "DEFAULT", "bfloat16"),
        ({"asimd", "asimddp"}, None, "float32"),  # Neoverse N1
        ({"asimd", "asimddp", "bf16", "i8mm"}, None, "bfloat16"),  # Neoverse V1
        (set(), None, "float32"),
    ],
)
def test_a_cpu_computes_in_bfloat16_where_it_has_instructions_for_it(flags, limit, dtype):
    found = of_cpu(flags, limit)
    assert found.dtype == dtype
    assert str(found).startswith(f"{dtype}: ")


def test_the_reason_names_what_is_missing():
    assert str(of_cpu(AVX2)) == "float32: this processor has no bfloat16 instructions"
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in of_cpu({"amx_bf16"}, "AVX2").reason


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [
        ("Tesla P40", (6, 1), "float32"),
        ("Tesla V100", (7, 0), "float16"),
        ("Tesla T4", (7, 5), "float16"),
        ("A100", (8, 0), "bfloat16"),
        ("RTX 4090", (8, 9), "bfloat16"),
        ("H100", (9, 0), "bfloat16"),
        ("RTX PRO 6000", (12, 0), "bfloat16"),
    ],
)
def test_gpus(name, capability, dtype):
    assert of_cuda(name, capability).dtype == dtype
    assert name in of_cuda(name, capability).reason


def test_apple():
    assert of_apple("Apple M3 Max", True).dtype == "bfloat16"
    assert of_apple("Apple M1", True).dtype == of_apple("Apple M3", False).dtype == "float16"


@pytest.mark.parametrize(
    ("device", "found", "arguments", "dtype"),
    [
        ("cpu", of_cpu(AVX2), {}, "float32"),
        ("cpu", of_cpu({"amx_bf16"}), {}, "bfloat16"),
        ("cuda", of_cuda("T4", (7, 5)), {}, "float16"),
        ("mps", of_apple("Apple M1", True), {}, "float32"),  # no gradient scaler there
        ("cpu", of_cpu(AVX2), {"bf16": True}, "bfloat16"),  # what is asked for counts
        ("cpu", of_cpu({"amx_bf16"}), {"bf16": False}, "float32"),
        ("cuda", of_cuda("A100", (8, 0)), {"fp16": True}, "float16"),
    ],
)
def test_training(monkeypatch, device, found, arguments, dtype):
    monkeypatch.setattr(machine, "torch_device", lambda: device)
    monkeypatch.setattr(machine, "_torch_precision", lambda: found)
    assert machine.training_precision(**arguments).dtype == dtype


def test_what_is_asked_for_counts():
    assert str(machine.inference_precision("float16")) == "float16: as configured"


def test_a_vllm_that_finds_no_device_says_so(monkeypatch):
    """As its package for CUDA where there is no GPU; a name has such a device none."""
    platform = SimpleNamespace(is_cpu=lambda: False, is_unspecified=lambda: True)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    machine._vllm_precision.cache_clear()
    with pytest.raises(InputError, match="vLLM found no device that it was built for"):
        machine.inference_precision(runtime="vllm")


def test_this_machine_agrees_with_torch():
    """Torch's own reading of the processor is an independent one."""
    import torch

    has = torch.cpu.get_capabilities()
    flags = machine._cpu_flags()
    for name in machine._BFLOAT16_INSTRUCTIONS:
        if name in has:
            assert (name in flags) == has[name]
