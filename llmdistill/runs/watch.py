"""Monitoring of a stage: lines of JSON, metrics for Prometheus, and a progress file for `status`."""

import json
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmdistill.config.jobs import Watch
from llmdistill.errors import InputError, not_installed

PROGRESS = ".progress"
STATES = ("running", "done", "failed", "stopped")
_EVERY = 5  # seconds between two looks at a stage
_SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?|AUTH)(_ID)?$")  # names of the environment
_FORGOTTEN = 3600  # seconds after which nobody writes a file of progress any more


@dataclass
class StageProgress:
    """The progress of a stage or, if nothing can be counted, its activity."""

    step: str
    done: int
    total: int
    tokens: int = 0
    tokens_per_s: float | None = None
    seconds_left: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    activity: str | None = None


class Watcher:
    """Monitors one stage of one process."""

    def __init__(self, stage: str, output: str, settings: Watch, share: str | None) -> None:
        self.stage, self.output, self.settings, self.share = stage, output, settings, share
        self.last: StageProgress | None = None
        self._looked = float("-inf")
        remote = "://" in output
        self._file = None if remote else Path(output) / PROGRESS / f"{stage}.{secrets.token_hex(8)}.json"
        self._metrics = Metrics(settings.metrics, stage, output, share) if settings.metrics else None

    @property
    def is_due(self) -> bool:
        """Whether it is time for another update."""
        return time.monotonic() - self._looked >= _EVERY

    def see(self, progress: StageProgress) -> None:
        """Publish the progress of the stage."""
        self.last, self._looked = progress, time.monotonic()
        record = {"stage": self.stage, **asdict(progress), "time": time.time(), **_who(self.share)}
        with suppress(OSError):  # a stage does not end because nobody can watch it
            if self._file:
                if not self._file.exists():
                    _remove_old(self._file.parent)
                self._file.parent.mkdir(exist_ok=True)
                unfinished = self._file.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(record), encoding="utf-8")
                unfinished.replace(self._file)
            if self._metrics:
                self._metrics.write("running", progress)

    def end(self, state: str) -> None:
        """The stage is over: delete its progress file; its metrics keep the last values."""
        with suppress(OSError):
            if self._metrics:
                self._metrics.write(state, self.last)
            if self._file:
                self._file.unlink(missing_ok=True)
                self._file.parent.rmdir()


def _remove_old(directory: Path) -> None:
    """Delete files of killed processes: running ones write every few seconds."""
    for file in directory.glob("*"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > _FORGOTTEN:
                file.unlink()


class Metrics:
    """One process's file for the textfile collector of node_exporter.

    Raises:
        InputError: prometheus_client is not installed, or the directory cannot be made.
    """

    def __init__(self, directory: str, stage: str, output: str, share: str | None) -> None:
        try:
            from prometheus_client import CollectorRegistry, Gauge
        except ImportError:
            raise not_installed("watch.metrics", "prometheus_client", "watch") from None
        run, worker = without_secrets(output), share or "1/1"
        name = re.sub(r"[^\w.-]+", "_", f"llmdistill-{run[-100:]}-{stage}-{worker.replace('/', '-of-')}")
        self.file = Path(directory) / f"{name}.prom"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"watch.metrics: {directory}: {error.strerror}") from None
        self._registry = CollectorRegistry()
        self._labels = {"run": run, "stage": stage, "worker": worker}

        def gauge(name: str, text: str, *labels: str) -> Any:
            return Gauge(f"llmdistill_{name}", text, [*self._labels, *labels], registry=self._registry)

        self._numbers = {
            "done": gauge("done", "Finished rows, steps or other units.", "step"),
            "total": gauge("total", "Total rows, steps or other units.", "step"),
            "tokens": gauge("tokens", "Tokens since the process started this step.", "step"),
            "tokens_per_s": gauge("tokens_per_second", "Tokens per second over the last half minute.", "step"),
            "seconds_left": gauge("seconds_left", "Estimated seconds until the step is done.", "step"),
        }
        self._losses = gauge("loss", "The last value of each part of the loss and of other measurements.", "step", "part")
        self._state = gauge("stage_state", "1 for the state that the stage is in.", "state")
        self._updated = gauge("last_update_timestamp_seconds", "When this file was written.")
        self.write("running", None)

    def write(self, state: str, progress: StageProgress | None) -> None:
        """Write the file atomically."""
        from prometheus_client import write_to_textfile

        for name in STATES:
            self._state.labels(**self._labels, state=name).set(name == state)
        self._updated.labels(**self._labels).set_to_current_time()
        if progress and not progress.activity:
            for name, gauge in self._numbers.items():
                if (value := getattr(progress, name)) is not None:
                    gauge.labels(**self._labels, step=progress.step).set(value)
            for part, value in progress.losses.items():
                self._losses.labels(**self._labels, step=progress.step, part=part).set(value)
        write_to_textfile(str(self.file), self._registry)


class _Current:
    """The monitor in this process, and whether its lines are JSON."""

    watcher: Watcher | None = None
    as_json = False


current = _Current()


@contextmanager
def watched(stage: str, output: str, settings: Watch, share: str | None = None) -> Iterator[None]:
    """Monitor a stage inside the block; only the first of many processes is monitored.

    Raises:
        InputError: the metrics have nowhere to go.
    """
    current.as_json = settings.log == "json"  # also of what is said after the stage
    current.watcher = Watcher(stage, output, settings, share) if is_first_process() else None
    event(stage, "start")
    state = "failed"
    try:
        yield
        state = "done"
    except SystemExit as end:
        state = {0: "done", 143: "stopped"}.get(end.code if isinstance(end.code, int) else 1, "failed")
        raise
    except KeyboardInterrupt:
        state = "stopped"
        raise
    finally:
        if current.watcher:
            current.watcher.end(state)
        event(stage, "end", level="error" if state == "failed" else "info", state=state)
        current.watcher = None


def event(stage: str, name: str, level: str = "info", error: bool = False, **fields: Any) -> None:
    """Write one line of JSON, if enabled; unknown numbers are left out."""
    if not current.as_json or not is_first_process():
        return
    share = current.watcher.share if current.watcher else None
    known = {key: value for key, value in fields.items() if value not in (None, {}, [])}
    record = {"time": timestamp(), "level": level, "stage": stage, "event": name, **known, **_who(share)}
    print(without_secrets(json.dumps(record, ensure_ascii=False)), file=sys.stderr if error else sys.stdout, flush=True)


def without_secrets(text: str) -> str:
    """The text without passwords in addresses, and without tokens, keys, secrets and passwords from the environment."""
    for name, value in os.environ.items():
        if len(value.strip()) >= 8 and _SECRET.search(name.upper()):
            for written in {value.strip(), repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe="")}:
                text = text.replace(written, "***")
    return re.sub(r"(\w://)[^/\s@]+@", r"\1***@", text)


def _who(share: str | None) -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "share": share}


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, which prints and keeps the record for all."""
    return os.environ.get("RANK", "0") == "0"


def timestamp() -> str:
    """The time in UTC, as in 2026-01-31T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
