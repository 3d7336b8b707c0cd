"""The precision that models compute in if the configuration does not set it: the best for this machine.

Nothing here imports torch until a decision is needed, and on a CPU not even then.
"""

import functools
import os
import platform
import subprocess
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from llmdistill.errors import InputError

ComputeDtype = Literal["bfloat16", "float16", "float32", "auto"]  # auto: decided elsewhere, as given in the reason

Runtime = Literal["torch", "vllm"]

# Instructions that make a matrix product in bfloat16 faster than in float32, by their names in /proc/cpuinfo. Without them
# it is emulated, and 5 to 20 times slower.
_BFLOAT16_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16", "svebf16": "Arm SVE BF16"}
# Values of ONEDNN_MAX_CPU_ISA with which oneDNN, which computes the products on x86, may use these instructions.
_ONEDNN_WITH_BFLOAT16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10", "ALL", "DEFAULT")


@dataclass(frozen=True)
class Precision:
    """The precision that a model computes in, and the reason, for messages."""

    dtype: ComputeDtype
    reason: str

    def __str__(self) -> str:
        return f"{self.dtype}: {self.reason}" if self.dtype != "auto" else self.reason

    @property
    def recorded(self) -> dict[str, str]:
        """The entry in `run.json` and `dataset.json`."""
        return asdict(self)


def inference_precision(asked: str = "auto", runtime: Runtime = "torch") -> Precision:
    """The precision for inference.

    Args:
        asked: the configuration's `dtype`; used as given unless `auto`.
        runtime: the library whose view of the device decides.
    """
    if asked != "auto":
        return _as_asked(asked)
    return _vllm_precision() if runtime == "vllm" else _torch_precision()


def training_precision(use_cpu: bool = False, bf16: bool | None = None, fp16: bool = False) -> Precision:
    """The precision of matrix products in training; weights and sums are in float32.

    Args:
        use_cpu: whether to train on the CPU even if there is an accelerator.
        bf16: that of `trl.SFTConfig`; used as given unless None.
        fp16: that of `trl.SFTConfig`; used if true.
    """
    if bf16 is not None or fp16:
        return _as_asked("bfloat16" if bf16 else "float16" if fp16 else "float32")
    found = cpu_precision() if use_cpu else _torch_precision()
    if found.dtype == "float16" and not torch_device().startswith("cuda"):
        return Precision("float32", f"{found.reason}, and training in float16 needs CUDA")
    return found


def cpu_precision() -> Precision:
    """The precision for this machine's CPU."""
    return of_cpu(_cpu_flags(), os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA"))


def of_cpu(flags: Collection[str], onednn_limit: str | None = None) -> Precision:
    """The precision for a CPU with these instructions.

    Args:
        flags: the instructions, by their names in /proc/cpuinfo.
        onednn_limit: the value of ONEDNN_MAX_CPU_ISA, if set.
    """
    name = next((text for flag, text in _BFLOAT16_INSTRUCTIONS.items() if flag in flags), None)
    if name is None:
        return Precision("float32", "this processor has no bfloat16 instructions")
    if onednn_limit and not onednn_limit.upper().startswith(_ONEDNN_WITH_BFLOAT16):
        return Precision("float32", f"ONEDNN_MAX_CPU_ISA={onednn_limit} disables this processor's bfloat16 instructions")
    return Precision("bfloat16", f"this processor has bfloat16 instructions ({name})")


def of_cuda(name: str, capability: tuple[int, int]) -> Precision:
    """The precision for an NVIDIA GPU.

    Args:
        name: name of the GPU.
        capability: its compute capability; tensor cores support bfloat16 from 8.0 and float16 from 7.0.
    """
    if capability >= (8, 0):
        return Precision("bfloat16", f"{name} supports it")
    if capability >= (7, 0):
        return Precision("float16", f"{name} has no bfloat16")
    return Precision("float32", f"{name} has neither bfloat16 nor fast float16")


def of_apple(chip: str, is_macos_14: bool) -> Precision:
    """The precision for an Apple GPU; Metal emulates bfloat16 on the first two generations.

    Args:
        chip: name of the chip, such as `Apple M3 Pro`.
        is_macos_14: whether the system is macOS 14 or later, which Metal's bfloat16 needs.
    """
    if is_macos_14 and not chip.startswith(("Apple M1", "Apple M2")):
        return Precision("bfloat16", f"{chip} supports it")
    return Precision("float16", f"{chip} has no bfloat16" if is_macos_14 else "bfloat16 needs macOS 14")


def _as_asked(dtype: str) -> Precision:
    return Precision(dtype, "as configured")  # type: ignore[arg-type]


def torch_device() -> str:
    """The device that torch uses: the accelerator if there is one."""
    import torch

    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


@functools.cache
def _torch_precision() -> Precision:
    """The precision for the device that torch uses; of several GPUs, the least capable decides."""
    import torch

    kind = torch_device().split(":")[0]
    if kind == "cpu":
        return cpu_precision()
    if kind == "cuda" and torch.version.hip is None:
        capability, number = min((torch.cuda.get_device_capability(n), n) for n in range(torch.cuda.device_count()))
        return of_cuda(torch.cuda.get_device_name(number), capability)
    if kind == "mps":
        return of_apple(_sysctl("machdep.cpu.brand_string"), torch.backends.mps.is_macos_or_newer(14, 0))
    backend = getattr(torch, kind)
    name = backend.get_device_name() if hasattr(backend, "get_device_name") else kind
    if hasattr(backend, "is_bf16_supported") and backend.is_bf16_supported(including_emulation=False):
        return Precision("bfloat16", f"{name} supports it")
    return Precision("float32", f"{name} is not known to support bfloat16")


@functools.cache
def _vllm_precision() -> Precision:
    """The precision for the device that vLLM uses, determined without a CUDA context in this process.

    Raises:
        InputError: if vLLM finds no device.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return cpu_precision()
    if current_platform.is_unspecified():
        raise InputError(
            "vLLM found no device that it was built for; use a machine that has one, or set teacher.engine to transformers"
        )
    name, capability = current_platform.get_device_name(), current_platform.get_device_capability()
    if current_platform.is_cuda() and capability is not None:
        return of_cuda(name, (capability.major, capability.minor))
    best = str(current_platform.supported_dtypes[0]).removeprefix("torch.")
    return Precision(best, f"the first that vLLM lists for {name}")  # type: ignore[arg-type]


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """The processor's instructions, by their names in /proc/cpuinfo; of several processors, those common to all."""
    if platform.system() == "Darwin":
        return frozenset({"bf16"} if _sysctl("hw.optional.arm.FEAT_BF16") == "1" else ())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    each = [set(line.partition(":")[2].split()) for line in lines if line.lower().startswith(("flags", "features"))]
    return frozenset(set.intersection(*each)) if each else frozenset()


def _sysctl(name: str) -> str:
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()
