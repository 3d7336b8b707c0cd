"""Silences messages of libraries for their own developers; the user's settings are kept."""

import logging
import os
import warnings

# Read by torch and vLLM when they are imported, here and in the processes that they start.
_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-torch._library.triton",  # it warns that there is no Triton on a CPU
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_LOGGERS = ("torchao", "torch.utils._pytree", "torch._library.triton")


def quiet_libraries() -> None:
    """Call this before torch or vLLM is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if os.environ["PYTHONWARNINGS"] == _ENVIRONMENT["PYTHONWARNINGS"]:
        warnings.filterwarnings("ignore", category=FutureWarning)
