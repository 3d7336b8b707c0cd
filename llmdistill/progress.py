"""One line a stage: a bar on a terminal, a plain line now and then in a log."""

import os
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LOG_SECONDS = 30
console = Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")  # one of many processes speaks


def say(stage: str, text: str) -> None:
    """A stage's line that is not a bar."""
    console.print(f"{stage:<9} {text}", markup=False)


class StageBar:
    """Progress of one stage: done of total, facts about the work, tokens per second, time left."""

    def __init__(self, stage: str, total: int, done: int = 0) -> None:
        self.stage = stage
        self.total = total
        self.done = done
        self._started_at = done
        self._tokens = 0
        self._facts: list[str] = []
        self.summary: str | None = None
        """What is said at the end in place of the bar."""
        self._start = self._logged = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(stage, total=total, completed=done, text="")

    def __enter__(self) -> "StageBar":
        self._progress.start()
        self._show()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.summary is not None:
            self._progress.live.transient = True
        elif kind is None:
            self._show(end=True)
        self._progress.stop()
        if kind is None and self.summary is not None:
            say(self.stage, self.summary)
        elif kind is None and not console.is_terminal:
            self._log(end=True)

    def advance(self, steps: int = 1, tokens: int = 0, facts: list[str] | None = None) -> None:
        """Count `steps` more as done; `facts` replace what is shown beside the count."""
        self.done += steps
        self._tokens += tokens
        if facts is not None:
            self._facts = facts
        self._show()
        if not console.is_terminal and time.monotonic() - self._logged > _LOG_SECONDS:
            self._log()

    def _text(self, end: bool) -> str:
        seconds = time.monotonic() - self._start
        parts = list(self._facts)
        if self._tokens:
            parts.append(f"{self._tokens / max(seconds, 1e-9):,.0f} tok/s")
        if end:
            parts.append(f"done in {_clock(seconds)}")
        elif self.done > self._started_at:
            parts.append(f"{_clock(seconds / (self.done - self._started_at) * (self.total - self.done))} left")
        return "".join(f" · {part}" for part in parts)

    def _show(self, end: bool = False) -> None:
        self._progress.update(self._task, completed=self.done, text=self._text(end))

    def _log(self, end: bool = False) -> None:
        self._logged = time.monotonic()
        say(self.stage, f"{self.done:,}/{self.total:,}{self._text(end)}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
