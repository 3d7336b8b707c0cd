"""Replacements inside TRL, written for version 1.16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trl.trainer.sft_trainer as sft_trainer


@contextmanager
def adapters_on_the_output_layer() -> Iterator[None]:
    """Let `SFTTrainer` train adapters on the output layer, which it refuses because its own loss would bypass them."""
    found: Any = getattr(sft_trainer, "BaseTunerLayer", ())
    sft_trainer.BaseTunerLayer = ()
    try:
        yield
    finally:
        sft_trainer.BaseTunerLayer = found
