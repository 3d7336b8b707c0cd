"""The copy of a run in an object store, which outlives the machine so that another one can continue.

The names under the URL are the same as under `output`. Single objects are written atomically, but nothing can be renamed, so a
complete directory is marked: its `.finished.json` holds the SHA-256 of every file and the contents of `run.json`. It is
uploaded after them and deleted before any of them changes. Useful before that are checkpoints, each a directory of its own,
and the shards of an unfinished dataset (see `shared_shards`).
"""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from llmdistill.config import Experiment
from llmdistill.data.manifest import MANIFEST
from llmdistill.errors import InputError
from llmdistill.objectstore.store import DamagedError, Store
from llmdistill.runs import lock, record
from llmdistill.runs.files import RUN_FILE, read_json, write_json
from llmdistill.runs.inputs import sha256
from llmdistill.runs.progress import say
from llmdistill.runs.watch import is_first_process
from llmdistill.stages.table import STAGES, Directory

SEAL = ".finished.json"
CARD = "README.md"
_CHECKPOINTS = "checkpoints"
_STATE = "trainer_state.json"  # the trainer writes it last: a checkpoint that has it is complete
# Made by several workers, of which the first decides.
_SHARED = {directory for stage in STAGES.values() if stage.shared for directory in stage.writes}
# Not a stage, but it reads the results of one.
_OTHER_READERS: dict[str, tuple[Directory, ...]] = {"chat": ("student",)}


class Copy:
    """A directory under `output`, and its copy in the store."""

    def __init__(self, store: Store, output: Path, name: str, name_there: str | None = None) -> None:
        self.store = store
        self.name = name_there or name
        self.directory = output / name
        self.url = f"{store.url}/{self.name}"

    def part(self, name: str) -> "Copy":
        """A directory in it that is complete by itself."""
        return Copy(self.store, self.directory, name, f"{self.name}/{name}")

    def seal(self) -> dict[str, Any] | None:
        """The store's record of the complete directory; None if it is incomplete there."""
        found: dict[str, Any] | None = None
        with suppress(DamagedError):
            found = self.store.read(f"{self.name}/{SEAL}")
        if found is None or not ("run" in found and "files" in found):
            return None
        for name in found["files"]:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise InputError(f"{self.url}/{SEAL}: {name} would lie outside of it")
        return found

    def break_seal(self, damaged: str | None = None) -> None:
        """Mark it as incomplete there; the record that decides on a dataset's shards is removed with the seal.

        Args:
            damaged: an object to remove as well.
        """
        self.store.remove(f"{self.name}/{SEAL}")
        self.store.remove(f"{self.name}/{MANIFEST}")
        if damaged is not None:
            self.store.remove(damaged)

    def is_here(self) -> bool:
        """Whether it need not be fetched, as it is done or was not made by a stage."""
        return self.directory.exists() and (self.is_done_here() or not (self.directory / RUN_FILE).exists())

    def is_done_here(self) -> bool:
        """Whether its stage is done."""
        run = record.read_run(self.directory)
        return bool(run and run["status"] == "done")

    def upload_if_done(self) -> None:
        """Upload a finished directory, unless the store has it already.

        Raises:
            InputError: if the store has work made with other settings.
        """
        if not self.is_done_here():
            return
        run, seal = record.read_run(self.directory) or {}, self.seal()
        if seal and seal["run"] != run:
            self.check(run["stage"], run["settings"], run["inputs"])
        # If another run has made the same, its result stays; if it was this one, it has continued since.
        if not seal or (seal["run"] != run and seal["run"]["started"] == run["started"]):
            say("store", f"uploading {self.directory} to {self.url}")
            self.upload()

    def upload(self) -> None:
        """Make the copy equal to this directory, with its seal at the very end."""
        files = sorted(self.directory.rglob("*"))
        here = {path.relative_to(self.directory).as_posix(): path for path in files if path.is_file()}
        here = {name: path for name, path in here.items() if not _is_apart(name)}
        sums = {name: sha256(path) for name, path in here.items() if name not in (RUN_FILE, CARD)}
        there, seal = self.store.names(self.name), self.seal() or {"files": {}}
        self.store.remove(f"{self.name}/{SEAL}")
        for name in sorted(here, key=_order):
            same = name in sums and (seal["files"].get(name) == sums[name] or f"-{sums[name][:16]}." in name)
            if same and there.get(name) == here[name].stat().st_size:
                continue
            if name == MANIFEST and self.directory.name in _SHARED:
                self._decide(here[name])
            else:
                self.store.put(here[name], f"{self.name}/{name}")
        for name in there.keys() - here.keys():
            if not _is_apart(name):
                self.store.remove(f"{self.name}/{name}")
        self._seal({"run": record.read_run(self.directory), "files": sums})

    def _decide(self, file: Path) -> None:
        if self.store.decide(file, f"{self.name}/{file.name}") != file.read_bytes():
            raise InputError(
                f"{self.url} has another dataset with the same settings; "
                f"remove it there, or remove {self.directory} to download it"
            )

    def _seal(self, content: dict[str, Any]) -> None:
        file = self.directory / f".seal.{lock.writer_name()}.unfinished"
        write_json(file, content)
        try:
            self.store.put(file, f"{self.name}/{SEAL}")
        finally:
            file.unlink()

    def fetch(self) -> None:
        """Make this directory equal to the copy, with the status in `run.json` at the very end.

        Raises:
            DamagedError: if an object differs from what was uploaded, or is missing.
        """
        seal = self.seal()
        assert seal is not None
        say("store", f"fetching {self.directory} from {self.url}")
        self.directory.mkdir(parents=True, exist_ok=True)
        run_file = self.directory / RUN_FILE
        if seal["run"] and not run_file.exists():
            write_json(run_file, {**seal["run"], "status": "unfinished"})
        for name in sorted(seal["files"], key=_order):
            file = self.directory / name
            if not file.is_file() or sha256(file) != seal["files"][name]:
                self.store.get(f"{self.name}/{name}", file, seal["files"][name])
        with suppress(DamagedError):  # `eval` writes to a card after the seal; a checkpoint has none
            self.store.get(f"{self.name}/{CARD}", self.directory / CARD)
        for file in self.directory.glob("*.parquet"):
            if file.name not in seal["files"]:
                file.unlink()
        if seal["run"]:
            write_json(run_file, seal["run"])

    def check(self, name: str, settings: dict[str, Any], inputs: dict[str, str]) -> None:
        """Refuse to mix work made with different settings.

        Args:
            name: name of the stage.
            settings: the resolved configuration that its result depends on.
            inputs: path and hash of what it reads.

        Raises:
            InputError: if the store has work of another stage, or made with other settings.
        """
        seal = self.seal()
        run = seal["run"] if seal else self.store.read(f"{self.name}/{RUN_FILE}")
        self._compare(run, {"stage": name, "settings": settings, "inputs": inputs})

    def begin(self) -> None:
        """Before the first upload, record the settings of the work in the store, or check that they are the same.

        Raises:
            InputError: if the store has work of another stage, or made with other settings.
        """
        file = self.directory / RUN_FILE
        self._compare(json.loads(self.store.decide(file, f"{self.name}/{file.name}")), read_json(file))

    def _compare(self, there: dict[str, Any] | None, here: dict[str, Any]) -> None:
        if there is None:
            return
        found = record.differences(there, here["settings"], here["inputs"])
        found += record.other_commits(there.get("commits", {}), here.get("commits", {}))
        dtypes = [run["precision"]["dtype"] for run in (there, here) if run.get("precision")]
        if len(set(dtypes)) == 2:
            found.append(f"its teacher computes in {dtypes[0]}, that of {self.directory} in {dtypes[1]}")
        if there["stage"] != here["stage"]:
            found = [f"it is the work of `{there['stage']}`"]
        if found:
            raise InputError(
                f"{self.url} was made with other settings: {'; '.join(found)}. "
                "Choose another `store`, or remove that directory from it to make it again"
            )


def _is_apart(name: str) -> bool:
    """Files that are not part of a stage's result: hidden files, and checkpoints, each of which is complete by itself."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") for part in parts) or parts[0] == _CHECKPOINTS


def _order(name: str) -> tuple[bool, bool, bool, str]:
    """Files that mark others as complete come after them."""
    return name == RUN_FILE, name == MANIFEST, name == _STATE, name


def bring(experiment: Experiment, name: str) -> None:
    """Before a stage, fetch its input and those of its own results that were finished elsewhere and are missing here.

    Raises:
        InputError: if the store is unusable or has work made with other settings, or the stage's input is damaged there.
    """
    assert experiment.store is not None
    Store(experiment.store).check()
    output = Path(experiment.output)
    output.mkdir(parents=True, exist_ok=True)
    with lock.in_turn(output / "store"):  # of several processes the first fetches, and the others find the result
        for directory in _reads(experiment, name):
            copy = _copy(experiment, directory)
            try:
                if copy and not copy.is_here() and copy.seal():
                    copy.fetch()
            except DamagedError as error:
                raise InputError(f"{error}; run the stage that makes {directory} on this machine to make it again") from None
        for copy in _own(experiment, name):
            _bring_own(copy)


def _own(experiment: Experiment, name: str) -> list[Copy]:
    """The directories that a stage writes."""
    copies = [_copy(experiment, experiment.directory(part)) for part in (STAGES[name].writes if name in STAGES else ())]
    return [copy for copy in copies if copy]


def _reads(experiment: Experiment, name: str) -> list[Path]:
    """Inputs of a stage that another one may have made, in this experiment or in one that the configuration names."""
    prompts, score, train, export = experiment.prompts, experiment.score, experiment.train, experiment.export
    learned = [train.dataset, *experiment.mixed_datasets]
    student = [experiment.student.model, experiment.first_student if experiment.rounds else None]
    named: dict[str, list[str | Path | None]] = {
        "generate": [
            *(teacher.model for teacher in experiment.routed.values()),
            *((prompts.source, *prompts.known) if prompts else ()),
        ],
        "score": [score.source if score else None],
        "prune": [train.dataset],
        "train": [*learned, *student],
        "eval": [*learned, *student],
        "export": [train.dataset, export.model if export else None],
    }
    parts = STAGES[name].reads if name in STAGES else _OTHER_READERS.get(name, ())
    found = [experiment.directory(part) for part in parts]
    return [*found, *(Path(path) for path in named.get(name, ()) if path)]


def _copy(experiment: Experiment, directory: Path) -> Copy | None:
    """A directory under `output`, or next to it as far up as `output` and the URL end with the same names; else None."""
    assert experiment.store is not None
    output, url = Path(os.path.normpath(experiment.output)), experiment.store.rstrip("/")
    parts = PurePosixPath(os.path.relpath(directory, output)).parts
    up = parts.count("..")
    there = url.split("/")[3:]
    if up == len(parts) or (up and list(output.parts[-up:]) != there[-up:]):
        return None
    for _ in range(up):
        output, url = output.parent, url.rpartition("/")[0]
    return Copy(Store(url), output, "/".join(parts[up:]))


def _bring_own(copy: Copy) -> None:
    """Fetch results of this stage that were finished elsewhere; damaged ones are made again."""
    try:
        if here := record.read_run(copy.directory):
            copy.check(here["stage"], here["settings"], here["inputs"])
        if copy.is_done_here():
            return
        if copy.seal():
            copy.fetch()
        elif copy.directory.name in ("student", "student-text-only", "student-examples"):
            _bring_checkpoints(copy)
    except DamagedError as error:
        say("store", f"{error}; making it again")
        copy.break_seal(error.name)
        _bring_own(copy)


def keep(experiment: Experiment, name: str) -> None:
    """After a stage, upload what it has finished.

    Raises:
        InputError: if the store has work made with other settings, or refuses access.
    """
    assert experiment.store is not None
    if not is_first_process():
        return
    for copy in _own(experiment, name):
        copy.upload_if_done()
    # A page is not a directory, and `eval` has written its results on the student's card.
    output = Path(experiment.output)
    pages = {
        "report": [output / f"report.{form}" for form in ("html", "md", "png")],
        "eval": [experiment.directory("student") / CARD],
    }
    for page in pages.get(name, ()):
        if page.is_file():
            Store(experiment.store).put(page, page.relative_to(output).as_posix())


def _checkpoints(names: Sequence[str], last: str) -> list[str]:
    """The complete checkpoints, by the file written last, from oldest to newest."""
    found = [match for name in names if (match := re.fullmatch(rf"(checkpoint-(\d+))/{re.escape(last)}", name))]
    return [match[1] for match in sorted(found, key=lambda match: int(match[2]))]


def _checkpoints_here(student: Copy) -> list[str]:
    directory = student.directory / _CHECKPOINTS
    return _checkpoints([file.relative_to(directory).as_posix() for file in directory.glob(f"*/{_STATE}")], _STATE)


def _bring_checkpoints(student: Copy) -> None:
    """Fetch the newest complete checkpoint, and the best one if it is an earlier one, unless one as new is here."""
    there, here = _checkpoints(list(student.store.names(f"{student.name}/{_CHECKPOINTS}")), SEAL), _checkpoints_here(student)
    if not there:
        return
    if not (student.directory / RUN_FILE).exists():
        student.store.get(f"{student.name}/{RUN_FILE}", student.directory / RUN_FILE)
    newest = there[-1]
    if here and int(here[-1].split("-")[1]) >= int(newest.split("-")[1]):
        return
    wanted = newest
    try:
        state = student.store.read(f"{student.name}/{_CHECKPOINTS}/{newest}/{_STATE}") or {}
        best = PurePosixPath(state.get("best_model_checkpoint") or newest).name
        for wanted in [checkpoint for checkpoint in there if checkpoint in (best, newest) and checkpoint not in here]:
            student.part(f"{_CHECKPOINTS}/{wanted}").fetch()
    except DamagedError as error:
        say("store", f"{error}; trying the previous checkpoint")
        student.part(f"{_CHECKPOINTS}/{wanted}").break_seal()
        _bring_checkpoints(student)


def keep_checkpoints(experiment: Experiment, directory: Path, limit: int | None) -> None:
    """Upload the complete checkpoints that the store lacks; under a limit, also delete those deleted here.

    Args:
        experiment: the configuration.
        directory: the student's directory.
        limit: `save_total_limit`.
    """
    student = _copy(experiment, directory)
    assert student is not None
    name = f"{student.name}/{_CHECKPOINTS}"
    here, there = _checkpoints_here(student), list(student.store.names(name))
    student.begin()
    for checkpoint in here:
        if f"{checkpoint}/{SEAL}" not in there:
            student.part(f"{_CHECKPOINTS}/{checkpoint}").upload()
    old = [file for file in there if PurePosixPath(file).parts[0] not in here] if limit is not None else []
    for file in sorted(old, key=lambda file: not file.endswith(SEAL)):  # the seals first
        student.store.remove(f"{name}/{file}")


def upload_checkpoints(experiment: Experiment, trainer: Any, directory: Path) -> None:
    """Upload each checkpoint once all processes have written it; training waits for the upload."""
    from transformers import TrainerCallback

    class Upload(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.accelerator.wait_for_everyone()
            if state.is_world_process_zero:
                keep_checkpoints(experiment, directory, args.save_total_limit)

    if experiment.store is not None:
        trainer.add_callback(Upload())
