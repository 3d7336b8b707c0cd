"""The output of `llmdistill status`: the stages in an output directory that are done, running (and how far), or not done."""

import platform
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from llmdistill.config import load_experiment
from llmdistill.errors import InputError
from llmdistill.runs import record
from llmdistill.runs.files import read_json
from llmdistill.runs.progress import clock
from llmdistill.runs.watch import PROGRESS
from llmdistill.stages.table import STAGES

_OLD = 120  # seconds without news that are worth a word


def begun(output: Path) -> list[str]:
    """The stages that have started there, in order."""
    names = [name for name in STAGES if _has_begun(output, name)]
    rounds = sorted(int(path.name) for path in (output / "rounds").glob("[0-9]*") if path.name.isdigit())
    later = [
        f"round-{number}-{name}"
        for number in rounds
        for name in STAGES
        if _has_begun(output / "rounds" / str(number) / ("written" if name == "generate" else ""), name)
    ]
    last = [name for name in names if STAGES[name].after_rounds]
    return [*(name for name in names if name not in last), *later, *last]


def known(output: Path) -> list[str]:
    """The stages of a run in order: those of the configuration saved by `run`, and others that have started."""
    from llmdistill.workflow.plan import CONFIGS, stages

    planned: list[str] = []
    for file in sorted((output / CONFIGS).glob("*.yaml")):
        with suppress(InputError):
            names = [stage.name for stage in stages(load_experiment(file))]
            planned = max(planned, names, key=len)  # the first training is that of a run without rounds
    there = begun(output)
    return [*planned, *(name for name in there if name not in planned)] if there else []


def how_far(output: Path, name: str) -> str:
    """Whether a stage is done, its progress, or that it is not done; named as by `StageRun.name`."""
    named = re.fullmatch(r"(?:round-(\d+)-)?([a-z]+)(?:-\d+)?", name)
    assert named is not None
    number, name = named.groups()
    if number:
        output = output / "rounds" / number / ("written" if name == "generate" else "")
    looks = [look for look in _looks(output) if look["stage"] == name]
    silent = time.time() - max((look["time"] for look in looks), default=0)
    if looks and (silent < _OLD or not _is_done(output, name)):
        return _sum(looks, silent)
    return "done" if _is_done(output, name) else "not done"


def _sum(looks: list[dict[str, Any]], silent: float) -> str:
    """One line for all workers; those at the same step are added up."""
    newest = max(looks, key=lambda look: look["time"])
    step = newest["step"]
    there = [look for look in looks if look["step"] == step]
    lost = [look for look in there if newest["time"] - look["time"] >= _OLD]  # killed on another machine, perhaps
    here = [look for look in there if look not in lost]
    speed = sum(look["tokens_per_s"] or 0 for look in here)
    left = [look["seconds_left"] for look in here if look["seconds_left"] is not None]
    if all(look.get("activity") for look in here):
        late = f" · last update {clock(silent)} ago" if silent >= _OLD else ""
        return f"running · {newest['activity']}{late}"
    parts = [
        f"{sum(look['done'] for look in there):,}/{sum(look['total'] for look in there):,}",
        f"{speed:,.0f} tok/s" if speed else "",
        f"{clock(max(left))} left" if left else "",
        f"{len(here)} workers" if len(here) > 1 else "",
        f"{len(lost)} more without news for {clock(newest['time'] - max(look['time'] for look in lost))}" if lost else "",
        f"last update {clock(silent)} ago" if silent >= _OLD else "",
    ]
    name = "" if step == looks[0]["stage"] else f" {step}"
    return f"running{name} " + " · ".join(part for part in parts if part)


def _looks(output: Path) -> Iterator[dict[str, Any]]:
    """The latest reports of running processes there; of several with the same share, the newest."""
    newest: dict[Any, dict[str, Any]] = {}
    for file in (output / PROGRESS).glob("*.json"):
        try:
            look = read_json(file)
        except InputError:
            continue
        if look is None or (look["host"] == platform.node() and not psutil.pid_exists(look["pid"])):
            continue  # it has just ended, or was killed
        key = (look["stage"], look["share"])
        if key not in newest or newest[key]["time"] < look["time"]:
            newest[key] = look
    yield from newest.values()


def _has_begun(output: Path, name: str) -> bool:
    if any(look["stage"] == name for look in _looks(output)):
        return True
    if STAGES[name].record is None:
        return (output / "report.html").exists()
    run = _run(output, name)
    return run is not None and run["stage"] == name


def _is_done(output: Path, name: str) -> bool:
    if STAGES[name].record is None:
        return (output / "report.html").exists()
    # Those beside the first, such as the student of the text alone, are there from when they are begun.
    beside = [record.read_run(output / directory) for directory in STAGES[name].writes]
    runs = [_run(output, name), *(run for run in beside if run and run["stage"] == name)]
    return all(run is not None and run["status"] == "done" for run in runs)


def _run(output: Path, name: str) -> Any:
    return record.read_run(output / str(STAGES[name].record))
