"""The output of a stage: a progress bar on a terminal, plain lines in a log, or lines of JSON.

A thread of its own reports what is going on every few seconds, so a stage says something while a model loads, before its
first row is whole, and when nothing moves.
"""

import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.status import Status

from llmdistill.runs.watch import StageProgress, current, event, is_first_process, without_secrets

FIRST_LINE_SECONDS = 3  # until the first line on an activity in a log
LINE_SECONDS = 9  # between two lines of a log
_REFRESH_SECONDS = 0.2  # of a terminal
_RATE_SECONDS = 30  # over which a rate is measured
_TOLD_FROM = 0.1  # share of the most tokens that there can be, from which on the time left is told
_STEADY_ROWS = 1024  # rows after which their mean length is taken for that of the others
_TURNS_TEXT = set(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]))  # its direction
# FORCE_COLOR, which Jupyter and CI set, asks for colours, and not for lines that move.
_MOVES = None if sys.stdout.isatty() else False
console = Console(highlight=False, soft_wrap=True, emoji=False, quiet=not is_first_process(), force_interactive=_MOVES)


def say(stage: str, text: str) -> None:
    """Print a message of a stage."""
    if current.as_json:
        event(stage, "message", level="warning" if stage == "warning" else "info", text=text)
    else:
        console.print(printable(without_secrets(f"{stage:<9} {text}")), markup=False)
    _reporter.spoke()


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2,000 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Text of models or files without control characters, escape sequences and bidirectional overrides."""
    return "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _TURNS_TEXT))


class Rate:
    """The rate of growth of a number over the last half minute."""

    def __init__(self, value: float = 0.0) -> None:
        self._seen = deque([(time.monotonic(), value)])

    def see(self, value: float) -> None:
        """Record the current value; unchanged values are not recorded."""
        now = time.monotonic()
        if value != self._seen[-1][1]:
            self._seen.append((now, value))
        while len(self._seen) > 2 and self._seen[1][0] < now - _RATE_SECONDS:
            self._seen.popleft()

    @property
    def per_second(self) -> float | None:
        """The rate; None as long as nothing has changed."""
        (begin, first), (end, last) = self._seen[0], self._seen[-1]
        if last == first:
            return None
        silent = time.monotonic() - end
        return (last - first) / max(end - begin + (silent if silent > _RATE_SECONDS else 0), 1e-9)


class Activity:
    """Something that takes a while and cannot be counted, such as loading a model."""

    def __init__(self, stage: str, text: str) -> None:
        self.stage, self.text = stage, text
        self._start = time.monotonic()
        self._status: Status | None = None

    def show(self) -> None:
        """Show it on the terminal, with the elapsed time."""
        if not console.is_interactive or current.as_json:
            return
        text = escape(without_secrets(f"{self.stage:<9} {self._with_time()}"))
        if self._status is None:
            self._status = console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def hide(self) -> None:
        """Remove it from the terminal."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def log(self) -> None:
        """Write its line."""
        if current.as_json:
            seconds = round(time.monotonic() - self._start, 3)
            event(self.stage, "activity", text=self.text, seconds=seconds)
        else:
            say(self.stage, self._with_time())

    def progress(self) -> StageProgress:
        """Its entry for `status`."""
        return StageProgress(self.stage, 0, 0, activity=self.text)

    def _with_time(self) -> str:
        seconds = time.monotonic() - self._start
        return f"{self.text} · {clock(seconds)}" if seconds >= 1 else self.text


@contextmanager
def working(stage: str, text: str) -> Iterator[Activity]:
    """Show the activity of a stage inside the block, if it takes a while."""
    activity = Activity(stage, text)
    with _reporter.reporting(activity):
        yield activity


class StageBar:
    """Progress of one stage: done of total, facts about the work, recent tokens per second, time left.

    Args:
        stage: its name.
        total: rows, steps or other units of all the work.
        done: units that were done before.
    """

    def __init__(self, stage: str, total: int, done: int = 0) -> None:
        self.stage = stage
        self.total = total
        self.done = done
        self.losses: dict[str, float] = {}
        """What training measures, by name."""
        self.summary: str | None = None
        """What is said at the end in place of the bar."""
        self._started_at = done
        self._told = 0  # tokens that `advance` was told
        self._tokens: Callable[[], int] | None = None
        self._row_tokens = 0
        self._facts: list[str] = []
        self._start = time.monotonic()
        self._token_rate, self._rate = Rate(), Rate(done)
        self._progress = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}{task.fields[text]}"),
            console=console,
            disable=not console.is_interactive or current.as_json,
        )
        self._task = self._progress.add_task(stage, total=total, completed=done, text="")
        self._reporting = _reporter.reporting(self)

    def count_tokens(self, tokens: Callable[[], int], row_tokens: int) -> None:
        """Show tokens before their rows are complete.

        Args:
            tokens: how many there are by now, those of unfinished rows included; `advance` is told those of whole rows.
            row_tokens: the most that a row can have.
        """
        self._tokens, self._row_tokens = tokens, row_tokens

    def __enter__(self) -> "StageBar":
        self._reporting.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.live.transient = self.summary is not None
        if self.summary is None and kind is None:
            self._show(end=True)
        self._reporting.__exit__(kind, error, trace)
        if kind is None and self.summary is not None:
            say(self.stage, self.summary)
        elif kind is None and (current.as_json or not console.is_interactive):
            self.log(end=True)

    def advance(self, steps: int = 1, tokens: int = 0, facts: list[str] | None = None) -> None:
        """Count `steps` more as done; `facts` replace those shown next to the count."""
        self.done += steps
        self._told += tokens
        if facts is not None:
            self._facts = facts
        self._see()
        _reporter.report_if_due()

    def found(self, steps: int) -> None:
        """Count steps done by others, which do not affect the speed here."""
        self.done += steps
        self._started_at += steps

    def show(self) -> None:
        """Show its current state on the terminal."""
        self._see()
        self._progress.live.transient = True
        self._progress.start()
        self._show()

    def hide(self) -> None:
        """Remove it from the terminal, or leave it there if it has finished."""
        self._progress.stop()

    def log(self, end: bool = False) -> None:
        """Write its line."""
        if not current.as_json:
            return say(self.stage, f"{self.done:,}/{self.total:,}{self._text(end)}")
        found = {key: value for key, value in asdict(self.progress(end)).items() if key != "step"}
        event(self.stage, "progress", **found, finished=end or None, seconds=round(time.monotonic() - self._start, 3))
        return None

    def progress(self, end: bool = False) -> StageProgress:
        """The current progress; the rate is that of the last half minute, or at the end the overall rate."""
        tokens, seconds = self.tokens, max(time.monotonic() - self._start, 1e-9)
        rate = self._token_rate.per_second if tokens and not end else tokens / seconds if tokens else None
        return StageProgress(self.stage, self.done, self.total, tokens, rate, self._seconds_left()[0], dict(self.losses))

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._tokens() if self._tokens else self._told

    def _see(self) -> None:
        self._token_rate.see(self.tokens)
        self._rate.see(self.done)

    def _seconds_left(self) -> tuple[float | None, bool]:
        """Seconds until the end, and whether that is an upper bound; None if unknown."""
        rows, new = self.total - self.done, self.done - self._started_at
        if not rows:
            return 0.0, False
        if self._tokens is None:
            return (rows / self._rate.per_second if self._rate.per_second else None), False
        rate = self._token_rate.per_second
        if not rate:
            return None, False
        unfinished = self.tokens - self._told  # `advance` is told the tokens of whole rows
        if self.tokens < _TOLD_FROM * (self.total - self._started_at) * self._row_tokens:
            return None, False  # the rate is still that of reading the first prompts
        known = new >= min(_STEADY_ROWS, max(self.total - self._started_at, 1) / 2)
        each = self._told / new if known else self._row_tokens
        return max(rows * each - unfinished, 0.0) / rate, not known

    def _text(self, end: bool) -> str:
        found, parts = self.progress(end), list(self._facts)
        if self._tokens and found.tokens:
            parts.insert(0, f"{found.tokens:,} tokens")
        if found.tokens_per_s is not None:
            parts.append(f"{found.tokens_per_s:,.0f} tok/s")
        seconds, is_bound = self._seconds_left()
        if end:
            parts.append(f"done in {clock(time.monotonic() - self._start)}")
        elif seconds is not None:
            parts.append(f"{'at most ' if is_bound else ''}{clock(seconds)} left")
        elif not found.tokens:
            parts.append(clock(time.monotonic() - self._start))
        return "".join(f" · {part}" for part in parts)

    def _show(self, end: bool = False) -> None:
        self._progress.update(self._task, completed=self.done, text=self._text(end))


class _Reporter:
    """Shows the innermost active item, from a thread, until none is left."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._going_on: list[Activity | StageBar] = []
        self._spoke = time.monotonic()
        self._has_spoken = False
        self._shown = 0.0
        self._thread: threading.Thread | None = None

    @contextmanager
    def reporting(self, item: Activity | StageBar) -> Iterator[None]:
        with self._lock:
            if self._going_on:
                self._going_on[-1].hide()
            self._going_on.append(item)
            self._has_spoken = False
            item.show()
            self._look(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="llmdistill-progress", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._look(item)
                item.hide()
                self._going_on.remove(item)
                if self._going_on:
                    self._going_on[-1].show()

    def spoke(self) -> None:
        """Note that a line was written, by anyone."""
        self._spoke, self._has_spoken = time.monotonic(), True

    def report_if_due(self) -> None:
        """Refresh the terminal; write a line to logs and watchers when it is time."""
        with self._lock:
            if not self._going_on:
                return
            item = self._going_on[-1]
            if console.is_interactive and time.monotonic() - self._shown >= _REFRESH_SECONDS:
                item.show()
                self._shown = time.monotonic()
            if current.watcher and current.watcher.is_due:
                self._look(item)
            silent = time.monotonic() - self._spoke
            if silent >= (LINE_SECONDS if self._has_spoken else FIRST_LINE_SECONDS) and self._logs:
                item.log()
                self.spoke()

    @property
    def _logs(self) -> bool:
        return current.as_json or not console.is_interactive

    def _look(self, item: Activity | StageBar) -> None:
        if current.watcher:
            current.watcher.see(item.progress())

    def _run(self) -> None:
        while True:
            time.sleep(0.5)
            self.report_if_due()


_reporter = _Reporter()


def clock(seconds: float) -> str:
    """Such as 1:26, or 2:01:26."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
