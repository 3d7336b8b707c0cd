"""llmdistill: distil a large language model into a small one with synthetic data."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["DistillConfig", "DistillTrainer", "InputError", "load_dataset", "losses", "push_to_hub"]

if TYPE_CHECKING:
    from llmdistill import losses
    from llmdistill.data.dataset import load_dataset
    from llmdistill.data.hub import push_to_hub
    from llmdistill.errors import InputError
    from llmdistill.training.arguments import DistillConfig
    from llmdistill.training.trainer import DistillTrainer
else:  # torch and TRL are imported when something that needs them is asked for
    _MODULES = {
        "DistillConfig": "llmdistill.training.arguments",
        "DistillTrainer": "llmdistill.training.trainer",
        "InputError": "llmdistill.errors",
        "load_dataset": "llmdistill.data.dataset",
        "push_to_hub": "llmdistill.data.hub",
    }

    def __getattr__(name: str) -> Any:
        if name == "losses":
            return importlib.import_module("llmdistill.losses")
        if name in _MODULES:
            return getattr(importlib.import_module(_MODULES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
