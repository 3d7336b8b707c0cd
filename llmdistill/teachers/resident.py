"""Engines of micro-rounds: started once, they rest while the student trains; the student's continues with its new weights."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from llmdistill.errors import InputError
from llmdistill.teachers import Engine, EngineSpec, open_engine


class Resident:
    """The engine of a model, for one dataset after another.

    Args:
        model: which model it is.
        longest: length in tokens of the longest expected sequence; a longer one restarts the engine.
    """

    def __init__(self, model: Literal["teacher", "student"], longest: int) -> None:
        self.model, self.longest = model, longest
        self.student: Any = None
        """The student in training, whose weights generate; None before training, when those in the directory do."""
        self._engine: Engine | None = None

    def open(self, spec: EngineSpec) -> Engine:
        """The engine, ready for a dataset, as requested by `make_dataset`."""
        if self.model == "student" and spec.teacher.engine == "transformers":
            from llmdistill.teachers.transformers import TransformersEngine

            return TransformersEngine(spec, self.student and [self.student])
        weights = None if self.student is None else list(checkpoint_weights(self.student, Path(spec.teacher.model)))
        if self._engine is not None and spec.max_model_len > self.longest:
            self.close()
        if self._engine is None:
            self.longest = max(self.longest, spec.max_model_len)
            self._engine = open_engine(replace(spec, max_model_len=self.longest, beside_training=self.model))
        self._engine.wake(weights)
        self._engine.tokens = 0
        return self._engine

    def rest(self) -> None:
        """Let it rest: nothing will be generated or scored for a while."""
        if self._engine is not None:
            self._engine.rest()

    def close(self) -> None:
        """Stop the engine, if there is one."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def checkpoint_weights(model: Any, directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights in memory by the names under which `save_pretrained` would store them.

    Args:
        model: a `PreTrainedModel`.
        directory: the checkpoint that it was loaded from, whose names must match.

    Raises:
        InputError: if the names differ from those in the checkpoint, so that an engine would keep some old weights.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    found = revert_weight_conversion(model, remove_tied_weights_from_state_dict(model.state_dict(), model))
    stored = {name for file in directory.glob("*.safetensors") for name in _names(file)}
    if other := sorted(stored ^ found.keys()):
        raise InputError(
            f"rounds.every: {directory} and the student in memory differ in {', '.join(other[:4])}{' …' if other[4:] else ''}, "
            "so its weights cannot be passed to vLLM; set teacher.engine to transformers, or remove rounds.every"
        )
    yield from found.items()


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
