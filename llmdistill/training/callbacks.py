"""Trainer callbacks: show progress, and end with a checkpoint on SIGTERM."""

import json
import signal
from pathlib import Path
from typing import Any

from llmdistill.errors import InputError
from llmdistill.runs.progress import StageBar

_WATCHED = ("loss", "kl", "ce", "agreement", "hidden", "attention", "grad_norm", "learning_rate")


def stop_with_a_checkpoint(trainer: Any) -> Any:
    """Make SIGTERM end the training with a checkpoint after the current step; a second one ends it immediately.

    Processes receive the signal at different moments, so they agree after every step: all stop after the same one.
    """
    import torch
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        asked = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            at_once = signal.getsignal(signal.SIGTERM)

            def ask(signum: int, frame: Any) -> None:
                self.asked = True
                signal.signal(signal.SIGTERM, at_once)

            signal.signal(signal.SIGTERM, ask)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.world_size > 1:
                asked = torch.tensor(float(self.asked), device=args.device)
                self.asked = bool(trainer.accelerator.reduce(asked, reduction="sum") > 0)
            if self.asked:
                control.should_save = control.should_training_stop = True

    stop = Stop()
    trainer.add_callback(stop)
    return stop


def same_rows_a_step(trainer: Any, checkpoint: str | None) -> None:
    """Store the number of rows per step in every checkpoint, and refuse to continue from one with a different number.

    Raises:
        InputError: if there are more or fewer processes than before the stop.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class RowsAStep(TrainerCallback, ExportableState):
        def __init__(self, rows: int) -> None:
            self.rows = rows

        def state(self) -> dict[str, Any]:
            return {"args": {"rows": self.rows}, "attributes": {}}

    args = trainer.args
    rows = before = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if checkpoint:
        kept = json.loads(Path(checkpoint, "trainer_state.json").read_text()).get("stateful_callbacks", {})
        before = kept.get(RowsAStep.__name__, {}).get("args", {}).get("rows", rows)
    if before != rows:
        raise InputError(
            f"{checkpoint} was trained with {before:,} rows per step, here it would be {rows:,}, so rows would be skipped or "
            "trained on twice; start as many processes as before"
        )
    trainer.add_callback(RowsAStep(rows))


def last_checkpoint(directory: Path) -> str | None:
    """The newest complete checkpoint; the trainer writes its state last."""
    finished = []
    for candidate in directory.glob("checkpoint-*"):
        try:
            finished.append((int(json.loads((candidate / "trainer_state.json").read_text())["global_step"]), str(candidate)))
        except (OSError, ValueError, KeyError):
            continue
    return max(finished)[1] if finished else None


def trained_tokens(history: list[dict[str, Any]]) -> int:
    """Completion tokens trained on up to the last log, including those before a resume."""
    return next((entry["num_completion_tokens"] for entry in reversed(history) if "num_completion_tokens" in entry), 0)


def show_progress(trainer: Any, label: str) -> None:
    """Replace the trainer's own progress bars and prints with a single line."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.tokens = trained_tokens(state.log_history)
            self.facts: list[str] = []
            self.held_out: list[str] = []
            self.bar = StageBar(label, state.max_steps, state.global_step).__enter__() if state.is_world_process_zero else None

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not self.bar:
                return
            if "eval_ce" in logs:
                name = "kl" if "eval_kl" in logs else "ce"
                self.held_out = [f"held out {name} {logs[f'eval_{name}']:.2f}"]
                self.bar.losses |= {f"held_out_{part}": logs[f"eval_{part}"] for part in _WATCHED if f"eval_{part}" in logs}
                self.bar.advance(0, 0, self.facts + self.held_out)
            if "ce" in logs:
                self.facts = [f"{name} {logs[name]:.2f}" for name in ("kl", "ce") if name in logs]
                self.bar.losses |= {part: logs[part] for part in _WATCHED if part in logs}
                new = logs["num_completion_tokens"] - self.tokens
                self.tokens += new
                self.bar.advance(0, new, self.facts + self.held_out)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar:
                self.bar.advance(1)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.bar:
                self.bar.__exit__(None, None, None)

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar())
