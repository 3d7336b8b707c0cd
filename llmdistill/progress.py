"""One line a stage: a bar on a terminal, a plain line now and then in a log, or a line of JSON."""

import os
import time
from dataclasses import asdict
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llmdistill.watch import Look, current, event, without_secrets

_LOG_SECONDS = 30
console = Console(highlight=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")  # one of many processes speaks


def say(stage: str, text: str) -> None:
    """A stage's line that is not a bar."""
    if current.as_json:
        event(stage, "message", level="warning" if stage == "warning" else "info", text=text)
    else:
        console.print(without_secrets(f"{stage:<9} {text}"), markup=False)


class StageBar:
    """Progress of one stage: done of total, facts about the work, tokens per second, time left."""

    def __init__(self, stage: str, total: int, done: int = 0) -> None:
        self.stage = stage
        self.total = total
        self.done = done
        self._started_at = done
        self._tokens = 0
        self._facts: list[str] = []
        self.losses: dict[str, float] = {}
        """What training measures, by name."""
        self.summary: str | None = None
        """What is said at the end in place of the bar."""
        self._start = self._logged = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal or current.as_json,
        )
        self._task = self._progress.add_task(stage, total=total, completed=done, text="")

    def __enter__(self) -> "StageBar":
        self._progress.start()
        self._show()
        if current.watcher:
            current.watcher.see(self._look())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.summary is not None:
            self._progress.live.transient = True
        elif kind is None:
            self._show(end=True)
        self._progress.stop()
        if current.watcher:
            current.watcher.see(self._look())
        if kind is None and self.summary is not None:
            say(self.stage, self.summary)
        elif kind is None and self._logs:
            self._log(end=True)

    def advance(self, steps: int = 1, tokens: int = 0, facts: list[str] | None = None) -> None:
        """Count `steps` more as done; `facts` replace what is shown beside the count."""
        self.done += steps
        self._tokens += tokens
        if facts is not None:
            self._facts = facts
        self._show()
        if current.watcher and current.watcher.is_due:
            current.watcher.see(self._look())
        if self._logs and time.monotonic() - self._logged > _LOG_SECONDS:
            self._log()

    @property
    def _logs(self) -> bool:
        return current.as_json or not console.is_terminal

    def _look(self) -> Look:
        """How far it is; speed and time left are those since it began."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        new = self.done - self._started_at
        return Look(
            self.stage,
            self.done,
            self.total,
            self._tokens,
            self._tokens / seconds if self._tokens else None,
            seconds / new * (self.total - self.done) if new else None,
            dict(self.losses),
        )

    def _text(self, end: bool) -> str:
        look, parts = self._look(), list(self._facts)
        if look.tokens_per_s is not None:
            parts.append(f"{look.tokens_per_s:,.0f} tok/s")
        if end:
            parts.append(f"done in {clock(time.monotonic() - self._start)}")
        elif look.seconds_left is not None:
            parts.append(f"{clock(look.seconds_left)} left")
        return "".join(f" · {part}" for part in parts)

    def _show(self, end: bool = False) -> None:
        self._progress.update(self._task, completed=self.done, text=self._text(end))

    def _log(self, end: bool = False) -> None:
        self._logged = time.monotonic()
        if current.as_json:
            look = asdict(self._look())
            name = look.pop("step")
            event(name, "progress", **look, finished=end or None, seconds=round(time.monotonic() - self._start, 3))
        else:
            say(self.stage, f"{self.done:,}/{self.total:,}{self._text(end)}")


def clock(seconds: float) -> str:
    """Such as 1:26, or 2:01:26."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
