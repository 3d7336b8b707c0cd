"""`llmdistill retokenize`: the dataset in the tokens of a student with another vocabulary than the teacher.

The stored targets stay as they are, in the teacher's tokens. Beside them stands which of the teacher's positions each of the
student's has its target from (`data.alignment`), and for the whole dataset the classes in which both vocabularies are compared
(`models.root_classes`).
"""

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmdistill.config import Experiment
from llmdistill.data.alignment import Alignment, Side, Texts, align, chunks, shares
from llmdistill.data.dataset import (
    MANIFEST,
    SPLITS,
    SplitWriter,
    metadata_and_provenance,
    read_batches,
    read_manifest,
    shard_files,
    write_manifest,
)
from llmdistill.data.left_out import LeftOut
from llmdistill.data.targets import KINDS, Chunks, list_column
from llmdistill.errors import InputError, UnusableError
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.models.loading import (
    check_model_exists,
    describe_tokenizer,
    end_token_ids,
    load_config,
    load_tokenizer,
    vocabulary_hash,
)
from llmdistill.models.root_classes import RootClasses, Vocabulary, root_classes
from llmdistill.prompting.turns import stored_ids
from llmdistill.runs import record
from llmdistill.runs.progress import StageBar, say, working

_KEPT = ("id", "prompt", "completion", "finish_reason", "metadata")


def retokenize(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/retokenized`, both splits.

    Raises:
        InputError: there is no dataset or no student, the bytes of a tokenizer's tokens cannot be told, or both have the same
            vocabulary.
    """
    source, directory = experiment.dataset_directory, experiment.directory("retokenized")
    if dry_run and not (source / MANIFEST).is_file():
        check_model_exists(_student(experiment)[0], "student.model")
        return say("retokenize", f"would write {directory} in the tokens of {_student(experiment)[0]}")
    manifest = read_manifest(source)
    if "alignment" in manifest:
        raise InputError(f"{source}: is in the tokens of {manifest['student']['model']}; retokenize what it was made from")
    check_kind(manifest["targets"]["kind"], str(source))
    (claim,) = claims(experiment)
    done = record.claim(*claim) == "done"
    if dry_run:
        return say("retokenize", f"would write {directory} in the tokens of {_student(experiment)[0]}")
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


def _write(experiment: Experiment, manifest: Mapping[str, Any], claim: record.Claim, sides: "Sides") -> None:
    """Both splits, the classes and the manifest."""
    directory, leave_out = claim.directory, experiment.retokenize.special_tokens == "leave_out"
    sides.classes.save(directory)
    started = time.monotonic()
    counts: Counter[str] = Counter()
    left_out = LeftOut()
    writers = {split: SplitWriter(directory, split, int(experiment.shard_mb * 1e6)) for split in SPLITS}
    with StageBar("retokenize", sum(shard["rows"] for shard in manifest["shards"])) as bar:
        for split, writer in writers.items():
            for table in read_batches(shard_files(experiment.dataset_directory, split)):
                before = counts["positions"]
                writer.write(_table(table, sides, leave_out, counts, left_out))
                bar.advance(len(table), tokens=counts["positions"] - before)
        used = sum(writer.rows for writer in writers.values())
        left_out.close("retokenize", used)
        left_out.write(directory / "rejected.parquet")
        shards = [shard for writer in writers.values() for shard in writer.publish()]
        write_manifest(directory, shards, _description(manifest, sides, claim.inputs, counts, left_out))
        record.finish(directory, {"rows": used, **counts, **record.speed(counts["positions"], time.monotonic() - started)})
    say("retokenize", shares(counts))


def claims(experiment: Experiment) -> list[record.Claim]:
    """The dataset in the student's tokens, and what it depends on."""
    manifest = experiment.dataset_directory / MANIFEST
    settings = experiment.model_dump(mode="json", include={"retokenize", "shard_mb"})
    settings["student"] = experiment.student.model_dump(mode="json", include={"model", "revision"})
    settings["teacher"] = dict(zip(("model", "revision"), experiment.tokenizer, strict=False))
    model, revision, _ = _student(experiment)
    inputs = {str(manifest): record.sha256(manifest), model: record.model_fingerprint(model, revision)}
    return [record.Claim(experiment.directory("retokenized"), "retokenize", settings, inputs)]


def is_needed(experiment: Experiment) -> bool:
    """Whether the student is a model with another vocabulary than the dataset; False where there is no such model yet."""
    student, teacher = experiment.student, experiment.teacher
    theirs, revision, _ = experiment.tokenizer
    if student.model is None or student.model == theirs:
        return False
    manifest = experiment.dataset_directory / MANIFEST
    try:
        own = _vocabulary(student.model, student.revision, student.trust_remote_code)
        if manifest.is_file():
            return own != read_manifest(experiment.dataset_directory)["tokenizer"]["vocabulary_hash"]
        return own != _vocabulary(theirs, revision, teacher.trust_remote_code)
    except InputError:  # what is wrong with it, the stages that load it say
        return False


def check_kind(name: str, where: str) -> None:
    """Refuse targets that cannot be told over classes of tokens.

    Args:
        name: of the kind.
        where: what has them.

    Raises:
        InputError: naming what can.
    """
    if not KINDS[name].over_classes:
        raise InputError(
            f"{where}: targets of kind {name} cannot be told over classes of tokens, which a student with another tokenizer "
            "needs; set targets.kind to sampled (with loss forward_kl) or topk"
        )


def training_dataset(experiment: Experiment) -> Path:
    """Where `train` and `eval` read: the dataset in the student's tokens."""
    return experiment.directory("retokenized") if is_needed(experiment) else experiment.dataset_directory


@cache
def _vocabulary(model: str, revision: str | None, trust_remote_code: bool) -> str:
    return vocabulary_hash(load_tokenizer(model, revision, trust_remote_code))


def _student(experiment: Experiment) -> tuple[str, str | None, bool]:
    student = experiment.student
    if student.model is None:
        raise InputError(
            "retokenize needs student.model; a student made by student.prune or student.config has the teacher's tokens"
        )
    return student.model, student.revision, student.trust_remote_code


@dataclass(frozen=True)
class Sides:
    """Both tokenizers, and what they have in common.

    Attributes:
        teacher: how the stored tokens read.
        student: how the student's read.
        teacher_chat: the teacher's template.
        chat: the student's.
        classes: of both.
        tokenizer: what `dataset.json` says of the student's.
        kind: of the stored targets.
        masked: whether reasoning traces stand in the prompts.
        name: of the student.
    """

    teacher: Side
    student: Side
    teacher_chat: ChatTemplate
    chat: ChatTemplate
    classes: RootClasses
    tokenizer: dict[str, Any]
    kind: str
    masked: bool
    name: str

    def with_teachers(self, row: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
        """A row that the student has written, in the teacher's tokens, too, as `retokenize` stores rows.

        Args:
            row: with `input_ids` and `completion_start`, in the student's tokens.
            asked: the stored row with the same prompt.
        """
        ids = np.asarray(row["input_ids"])[int(row["completion_start"]) :]
        text = self.student.bytes(ids).decode(errors="replace")
        ended = len(ids) > 0 and int(ids[-1]) in self.student.end_ids
        answer = {"role": "assistant", "content": text}
        told = {**asked, "completion": [answer], "metadata": "{}", "finish_reason": "stop" if ended else "length"}
        prompt = np.asarray(asked["teacher_ids"])[: int(asked["teacher_start"])]
        try:
            _, their_ids = stored_ids(told, self.teacher_chat)
        except UnusableError:  # nothing but white space, which templates refuse: the end alone is compared
            their_ids = sorted(self.teacher.end_ids)[:1]
        place_N = align(Texts(self.teacher, self.student, np.array(their_ids), ids)).place_N
        return {**row, "teacher_ids": np.array([*prompt, *their_ids]), "teacher_start": len(prompt), "target_places": place_N}


def sides_of(experiment: Experiment, manifest: Mapping[str, Any]) -> Sides:
    """Everything of the tokenizers.

    Raises:
        InputError: they are of one vocabulary, the dataset is of another teacher, or the student's answers have no end.
    """
    teacher, theirs = experiment.teacher, manifest.get("teacher_tokenizer", manifest["tokenizer"])
    source = experiment.dataset_directory
    name, their_revision, key = experiment.tokenizer
    their_tokenizer = load_tokenizer(name, their_revision, teacher.trust_remote_code, key)
    if vocabulary_hash(their_tokenizer) != theirs["vocabulary_hash"]:
        raise InputError(f"{key}: {source} was written with another vocabulary than that of {name}")
    model, revision, trust = _student(experiment)
    tokenizer, config = (
        load_tokenizer(model, revision, trust, "student.model"),
        load_config(model, revision, trust, "student.model"),
    )
    if vocabulary_hash(tokenizer) == theirs["vocabulary_hash"]:
        raise InputError(f"student.model: {model} has the vocabulary of {source}; there is nothing to retokenize")
    end_ids = end_token_ids(model, revision, config, tokenizer)
    if not end_ids:
        raise InputError(f"student.model: neither the configuration nor the tokenizer of {model} names a token that ends a text")
    size = config.get_text_config().vocab_size
    sides = (
        Vocabulary.of(their_tokenizer, theirs["end_token_ids"], theirs["vocab_size"], key),
        Vocabulary.of(tokenizer, end_ids, size, "student.model"),
    )
    classes = root_classes(*sides)
    (their_side, side) = (
        Side(vocabulary.bytes_of, of, frozenset(vocabulary.end_ids))
        for vocabulary, of in zip(sides, (classes.teacher_V, classes.student_V), strict=True)
    )
    described = describe_tokenizer(tokenizer, size, end_ids)
    masked = manifest["sampling"].get("thinking") == "masked"
    chat = ChatTemplate(tokenizer, end_ids)
    their_chat = ChatTemplate(their_tokenizer, theirs["end_token_ids"], teacher.template_args)
    return Sides(their_side, side, their_chat, chat, classes, described, manifest["targets"]["kind"], masked, model)


def _table(table: pa.Table, sides: Sides, leave_out: bool, counts: Counter[str], left_out: LeftOut) -> pa.Table:
    """Some rows in the student's tokens; what they hold is added to the counts."""
    used: list[int] = []
    made: list[_Row] = []
    names = [name for name in (*_KEPT, "input_ids", "completion_start", "token_logprobs") if name in table.column_names]
    for number, row in enumerate(table.select(names).to_pylist()):
        try:
            made.append(_row(row, sides, leave_out))
        except UnusableError as error:
            left_out.add(error.at(f"row {row['id']}"))
            continue
        used.append(number)
    for row in made:
        counts.update(row.alignment.counted)
    return _columns(table.take(pa.array(used, pa.int64())), made, sides)


@dataclass(frozen=True)
class _Row:
    """A row in the student's tokens, and in the teacher's."""

    ids: np.ndarray[Any, Any]
    start: int
    alignment: Alignment
    chunks: Chunks


def _row(row: Mapping[str, Any], sides: Sides, leave_out: bool) -> _Row:
    their_ids, their_start = np.array(row["input_ids"]), int(row["completion_start"])
    if leave_out and sides.teacher.is_silent(their_ids[their_start:]).any():
        raise UnusableError("its completion has special tokens in it")
    prompt_ids, ids = stored_ids(row, sides.chat, _trace(row) if sides.masked else "")
    own_ids, start = np.array([*prompt_ids, *ids]), len(prompt_ids)
    if sides.masked:
        start += int(np.searchsorted(sides.student.begins(np.array(ids)), len(_trace(row).encode())))
    # Prompts are written by two templates; text without one is the same text from its first token on.
    answers = (their_ids[their_start:], own_ids[start:])
    texts = Texts(sides.teacher, sides.student, *(answers if row["prompt"] else (their_ids, own_ids, their_start, start)))
    sizes_N, logprobs_N = chunks(texts, np.array(row["token_logprobs"], dtype=np.float64))
    return _Row(own_ids, start, align(texts), Chunks(np.empty((len(sizes_N), 0)), sizes_N, logprobs_N))


def _trace(row: Mapping[str, Any]) -> str:
    """The reasoning trace that stands before the answer and is not learned."""
    _, provenance = metadata_and_provenance(row["metadata"])
    return str(provenance.get("thinking", ""))


def _columns(table: pa.Table, rows: list[_Row], sides: Sides) -> pa.Table:
    """The stored columns that stay, and those of the student's tokens."""
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
    kind = KINDS[sides.kind]
    columns |= {name: table[name] for name in kind.columns} or Chunks.encode([row.chunks for row in rows], 0)
    return pa.table(columns)


def _description(
    manifest: Mapping[str, Any], sides: Sides, inputs: dict[str, str], counts: Counter[str], left_out: LeftOut
) -> dict[str, Any]:
    """For `dataset.json`."""
    targets = manifest["targets"] if KINDS[sides.kind].columns else Chunks.describe(0)
    described = {key: value for key, value in manifest.items() if key not in ("rows", "completion_tokens", "shards", "left_out")}
    return described | {
        "tokenizer": sides.tokenizer,
        "teacher_tokenizer": manifest["tokenizer"],
        "student": {"model": sides.name},
        "targets": targets,
        "alignment": {**counts, "classes": sides.classes.count, "classes_hash": sides.classes.hash},
        "source": inputs,
        "versions": record.versions(),
        **left_out.described,
    }
