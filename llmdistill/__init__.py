"""llmdistill: distil a large language model into a small one with synthetic data."""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "DistillConfig": "llmdistill.training.trainer",
    "DistillTrainer": "llmdistill.training.trainer",
    "load_dataset": "llmdistill.data.dataset",
    "push_to_hub": "llmdistill.data.hub",
}
__all__ = ["DistillConfig", "DistillTrainer", "load_dataset", "push_to_hub"]


def __getattr__(name: str) -> Any:
    """Import torch and TRL only when a class that needs them is asked for."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
