"""`llmdistill retokenize`: convert the dataset to the tokens of a student with a different vocabulary.

The stored targets stay as they are, in the teacher's tokens. Beside them stands which of the teacher's positions each of the
student's has its target from (`data.alignment`), and for the whole dataset the classes in which both vocabularies are compared
(`models.root_classes`).
"""

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from llmdistill.config import Experiment
from llmdistill.data.alignment import Alignment, Texts, align, chunks, shares
from llmdistill.data.batches import read_batches
from llmdistill.data.conversations import stored_ids
from llmdistill.data.dataset import shard_files
from llmdistill.data.left_out import LeftOut
from llmdistill.data.manifest import MANIFEST, read_manifest, write_manifest
from llmdistill.data.rows import metadata_and_provenance
from llmdistill.data.shard_writer import SPLITS, SplitWriter
from llmdistill.data.targets import KINDS, Chunks, list_column
from llmdistill.errors import InputError, UnusableError
from llmdistill.models.loading import check_model_exists
from llmdistill.models.root_classes import save_classes
from llmdistill.runs import record
from llmdistill.runs.inputs import model_fingerprint, sha256
from llmdistill.runs.progress import StageBar, say, working
from llmdistill.students.sides import Sides, sides_of, student_of, teacher_of

_KEPT = ("id", "prompt", "completion", "finish_reason", "metadata")


def retokenize(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/retokenized`, both splits.

    Raises:
        InputError: if there is no dataset or student, the bytes of tokens cannot be determined, or both have the same
            vocabulary.
    """
    source, directory = experiment.dataset_directory, experiment.directory("retokenized")
    if dry_run and not (source / MANIFEST).is_file():
        check_model_exists(student_of(experiment)[0], "student.model")
        return say("retokenize", f"would write {directory} in the tokens of {student_of(experiment)[0]}")
    manifest = read_manifest(source)
    if "alignment" in manifest:
        raise InputError(f"{source}: is in the tokens of {manifest['student']['model']}; retokenize what it was made from")
    check_kind(manifest["targets"]["kind"], str(source))
    (claim,) = claims(experiment)
    done = record.claim(*claim) == "done"
    if dry_run:
        return say("retokenize", f"would write {directory} in the tokens of {student_of(experiment)[0]}")
    if done:
        return say("retokenize", f"{directory} is finished")
    with working("retokenize", "comparing the vocabularies"):
        sides = sides_of(experiment, manifest)
    record.begin(*claim, experiment.seed)
    for leftover in [*directory.glob("*.parquet"), *directory.glob(".*.unfinished")]:
        leftover.unlink()
    try:
        return _write(experiment, manifest, claim, sides)
    except InputError:  # wrong input leaves nothing behind
        shutil.rmtree(directory)
        raise


def _write(experiment: Experiment, manifest: Mapping[str, Any], claim: record.Claim, sides: dict[str, Sides]) -> None:
    """Both splits, the classes and the manifest."""
    directory = claim.directory
    save_classes({name: own.classes for name, own in sides.items()}, directory)
    started = time.monotonic()
    none = {name: Counter(dict.fromkeys(Alignment.SORTS, 0)) for name in sides}
    making = _Making(sides, experiment.main, experiment.retokenize.special_tokens == "leave_out", none)
    counts, left_out = making.counts, making.left_out
    writers = {split: SplitWriter(directory, split, int(experiment.shard_mb * 1e6)) for split in SPLITS}
    with StageBar("retokenize", sum(shard["rows"] for shard in manifest["shards"])) as bar:
        for split, writer in writers.items():
            for table in read_batches(shard_files(experiment.dataset_directory, split)):
                before = making.total["positions"]
                writer.write(_table(table, making))
                bar.advance(len(table), tokens=making.total["positions"] - before)
        used = sum(writer.rows for writer in writers.values())
        left_out.close("retokenize", used)
        left_out.write(directory / "rejected.parquet")
        shards = [shard for writer in writers.values() for shard in writer.publish()]
        write_manifest(directory, shards, _description(manifest, making, claim.inputs))
        total = making.total
        record.finish(directory, {"rows": used, **total, **record.speed(total["positions"], time.monotonic() - started)})
    for name in sides:
        say("retokenize", f"{name}: {shares(counts[name])}" if name else shares(counts[name]))


@dataclass(frozen=True)
class _Making:
    """The tools for converting a dataset to the student's tokens, and the counts.

    Attributes:
        sides: the tokenizers, by the teachers' names.
        main: the teacher of rows that name none.
        leave_out: whether rows with special tokens in their completion are.
        counts: positions of each sort, by the teachers' names.
        left_out: rows.
    """

    sides: dict[str, Sides]
    main: str
    leave_out: bool
    counts: dict[str, Counter[str]]
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def total(self) -> Counter[str]:
        """Positions by category, over all teachers."""
        return Counter({sort: sum(counts[sort] for counts in self.counts.values()) for sort in Alignment.SORTS})

    @property
    def any(self) -> Sides:
        """The entries common to all teachers."""
        return next(iter(self.sides.values()))


def claims(experiment: Experiment) -> list[record.Claim]:
    """The dataset in the student's tokens, and what it depends on."""
    manifest = experiment.dataset_directory / MANIFEST
    settings = experiment.model_dump(mode="json", include={"retokenize", "shard_mb"})
    settings["student"] = experiment.student.model_dump(mode="json", include={"model", "revision"})
    settings["teacher"] = dict(zip(("model", "revision"), experiment.tokenizer, strict=False))
    if experiment.teachers:
        named = experiment.teachers.items()
        settings["teachers"] = {name: one.model_dump(mode="json", include={"model", "revision"}) for name, one in named}
    model, revision, _ = student_of(experiment)
    inputs = {str(manifest): sha256(manifest), model: model_fingerprint(model, revision)}
    return [record.Claim(experiment.directory("retokenized"), "retokenize", settings, inputs)]


def check_kind(name: str, where: str) -> None:
    """Refuse targets that cannot be converted to classes of tokens.

    Args:
        name: of the kind.
        where: what has them.

    Raises:
        InputError: names what can.
    """
    if not KINDS[name].over_classes:
        raise InputError(
            f"{where}: targets of kind {name} cannot be converted to classes, which a student with a different tokenizer "
            "needs; set targets.kind to sampled (with loss forward_kl) or topk"
        )


def _table(table: pa.Table, making: _Making) -> pa.Table:
    """Convert some rows to the student's tokens, and update the counts."""
    used: list[int] = []
    made: list[_Row] = []
    names = [name for name in (*_KEPT, "input_ids", "completion_start", "token_logprobs") if name in table.column_names]
    for number, row in enumerate(table.select(names).to_pylist()):
        name = teacher_of(row, making.sides, making.main)
        try:
            made.append(_row(row, name, making.sides[name], making.leave_out))
        except UnusableError as error:
            making.left_out.add(error.at(f"row {row['id']}"))
            continue
        used.append(number)
        making.counts[name].update(made[-1].alignment.counted)
    return _columns(table.take(pa.array(used, pa.int64())), made, making)


@dataclass(frozen=True)
class _Row:
    """A row in the student's tokens, and in those of the named teacher."""

    teacher: str
    ids: np.ndarray[Any, Any]
    start: int
    alignment: Alignment
    chunks: Chunks


def _row(row: Mapping[str, Any], name: str, sides: Sides, leave_out: bool) -> _Row:
    their_ids, their_start = np.array(row["input_ids"]), int(row["completion_start"])
    if sides.same:
        return _as_it_is(name, their_ids, their_start, np.array(row["token_logprobs"], dtype=np.float64))
    if leave_out and sides.teacher.is_silent(their_ids[their_start:]).any():
        raise UnusableError("its completion contains special tokens")
    prompt_ids, ids = stored_ids(row, sides.chat, _trace(row) if sides.masked else "")
    own_ids, start = np.array([*prompt_ids, *ids]), len(prompt_ids)
    if sides.masked:
        start += int(np.searchsorted(sides.student.begins(np.array(ids)), len(_trace(row).encode())))
    # Prompts are written by two templates; text without one is the same text from its first token on.
    answers = (their_ids[their_start:], own_ids[start:])
    texts = Texts(sides.teacher, sides.student, *(answers if row["prompt"] else (their_ids, own_ids, their_start, start)))
    sizes_N, logprobs_N = chunks(texts, np.array(row["token_logprobs"], dtype=np.float64))
    return _Row(name, own_ids, start, align(texts), Chunks(np.empty((len(sizes_N), 0)), sizes_N, logprobs_N))


def _as_it_is(name: str, ids: np.ndarray[Any, Any], start: int, logprobs_N: np.ndarray[Any, Any]) -> _Row:
    """A row that is already in the student's tokens: every position has its own target, and every token is a chunk."""
    known_N, places_N = np.isfinite(logprobs_N), np.arange(len(logprobs_N))
    chunked = Chunks(np.empty((len(places_N), 0)), known_N.astype(np.int64), np.where(known_N, logprobs_N, 0))
    return _Row(name, ids, start, Alignment(places_N, 0, 0), chunked)


def _trace(row: Mapping[str, Any]) -> str:
    """The reasoning trace before the answer, which is not learned."""
    _, provenance = metadata_and_provenance(row["metadata"])
    return str(provenance.get("thinking", ""))


def _columns(table: pa.Table, rows: list[_Row], making: _Making) -> pa.Table:
    """The stored columns that are kept, and those for the student's tokens."""
    columns: dict[str, Any] = {name: table[name] for name in _KEPT}
    columns |= {
        "input_ids": list_column([row.ids for row in rows], np.int32),
        "completion_start": pa.array([row.start for row in rows], pa.int32()),
        "completion_mask": list_column([np.arange(len(row.ids)) >= row.start for row in rows], np.int8),
        "token_logprobs": list_column([row.chunks.logprobs_N for row in rows], np.float32),
        "teacher_ids": table["input_ids"],
        "teacher_start": table["completion_start"],
        "target_places": list_column([row.alignment.place_N for row in rows], np.int32),
    }
    if "" not in making.sides:
        columns["teacher"] = pa.array([row.teacher for row in rows], pa.string())
    kind = KINDS[making.any.kind]
    columns |= {name: table[name] for name in kind.columns} or Chunks.encode([row.chunks for row in rows], 0)
    return pa.table(columns)


def _description(manifest: Mapping[str, Any], making: _Making, inputs: dict[str, str]) -> dict[str, Any]:
    """Entry in `dataset.json`."""
    sides, each = making.any, {}
    for name, own in making.sides.items():
        each[name] = {**making.counts[name], "classes": own.classes.count, "classes_hash": own.classes.hash}
    together = hashlib.sha256(json.dumps({name: found["classes_hash"] for name, found in each.items()}).encode()).hexdigest()
    alignment = each.get("") or {**making.total, "classes_hash": together, "teachers": each}
    targets = manifest["targets"] if KINDS[sides.kind].columns else Chunks.describe(0)
    described = {key: value for key, value in manifest.items() if key not in ("rows", "completion_tokens", "shards", "left_out")}
    return described | {
        "tokenizer": sides.tokenizer,
        "teacher_tokenizer": manifest["tokenizer"],
        "student": {"model": sides.name},
        "targets": targets,
        "alignment": alignment,
        "source": inputs,
        "versions": record.versions(),
        **making.left_out.described,
    }
