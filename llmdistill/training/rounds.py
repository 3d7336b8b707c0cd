"""Training on rows made during training: every few steps, by the current student."""

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from llmdistill.models.loading import hand_back_memory


class RoundRows(torch.utils.data.Dataset[Any]):
    """As many rows as the steps of a round take.

    They are the round's rows in random order, repeated if there are too few; if there are too many, some are left out.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.rows: Any = None
        self._order = np.empty(0, dtype=np.int64)

    def fill(self, rows: Any, seed: int) -> None:
        """Continue with the rows of another round."""
        self.rows, self._order = rows, np.random.default_rng(seed).permutation(len(rows))

    def __len__(self) -> int:
        return self.places

    def __getitem__(self, place: int) -> Any:
        return self.rows[int(self._order[place % len(self._order)])]


def train_in_rounds(trainer: Any, every: int, rows_of: Callable[[int, Any], Any]) -> None:
    """Turn the trainer's epochs into rounds of `every` steps, each on its own rows.

    The trainer asks for the first batch of an epoch after `on_epoch_begin`, and for none of the next one before, so rows are
    made with the weights of the last step. A training that resumes from a checkpoint within a round asks for the rows of that
    round again.

    Args:
        trainer: a `DistillTrainer` in a single process.
        every: optimiser steps per round.
        rows_of: returns the rows of a round as a `load_dataset`; called with its number, from 0, and the student in evaluation
            mode. Its random numbers do not affect those of the training, and SIGTERM ends it immediately.
    """
    at_once = signal.getsignal(signal.SIGTERM)
    rows = RoundRows(round_places(trainer.args, every))

    class Rounds(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            number = state.global_step // every
            student = trainer.accelerator.unwrap_model(trainer.model)
            hand_back_memory()  # for the engines
            student.eval()
            with trainer.paused(), _own_random_numbers(), _on_sigterm(at_once):
                found = rows_of(number, student)
            student.train()
            rows.fill(trainer.learned_rows(found), args.seed + number)

    trainer.train_dataset = rows
    trainer.add_callback(Rounds())


def round_places(arguments: Any, every: int) -> int:
    """Number of rows that this many steps take, from the training arguments of a single process."""
    return int(every * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Isolate the random numbers drawn inside: a round written before a stop is not written again after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _on_sigterm(handler: Any) -> Iterator[None]:
    """Handle SIGTERM here instead of in the trainer, which would wait for the end of the next step."""
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
