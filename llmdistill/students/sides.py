"""Both tokenizers of a dataset that is converted to a student's tokens: the student's, and that of each row's teacher.

Every teacher is compared with the student separately. If its vocabulary is the student's, its classes are single tokens, and
nothing is lost, whatever the other teachers' vocabularies are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llmdistill.config import Experiment
from llmdistill.config.student import ORIGINS
from llmdistill.data.alignment import Side, Texts, align
from llmdistill.data.conversations import stored_ids
from llmdistill.data.manifest import MANIFEST, has_several_tokenizers, read_manifest
from llmdistill.data.rows import metadata_and_provenance
from llmdistill.errors import InputError, UnusableError
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.models.loading import (
    describe_tokenizer,
    end_token_ids,
    load_config,
    load_tokenizer,
    token_identity,
    vocabulary_hash,
)
from llmdistill.models.root_classes import RootClasses, Vocabulary, root_classes
from llmdistill.models.token_bytes import token_bytes
from llmdistill.runs.progress import say


def is_needed(experiment: Experiment) -> bool:
    """Whether the student's tokens differ from the dataset's, or those from each other; False if there is no such model."""
    student, teacher = experiment.student, experiment.teacher
    theirs, revision, _ = experiment.tokenizer
    try:
        there = (experiment.dataset_directory / MANIFEST).is_file()
        manifest = read_manifest(experiment.dataset_directory) if there else None
        if has_several_tokenizers(manifest) if manifest else _are_several(experiment):
            return True
        if student.model is None or student.model == theirs:
            return False
        own = _vocabulary(student.model, student.revision, student.trust_remote_code)
        if manifest:
            return own != manifest["tokenizer"]["vocabulary_hash"]
        return own != _vocabulary(theirs, revision, teacher.trust_remote_code)
    except InputError:  # the stages that load it report what is wrong with it
        return False


def _are_several(experiment: Experiment) -> bool:
    """Whether the teachers' rows will have more than one vocabulary, template or set of end tokens."""
    found = {_identity(teacher.model, teacher.revision, teacher.trust_remote_code) for teacher in experiment.teachers.values()}
    return len(found) > 1


def training_dataset(experiment: Experiment) -> Path:
    """The directory that `train` and `eval` read: the dataset in the student's tokens."""
    return experiment.directory("retokenized") if is_needed(experiment) else experiment.dataset_directory


@cache
def _vocabulary(model: str, revision: str | None, trust_remote_code: bool) -> str:
    return vocabulary_hash(load_tokenizer(model, revision, trust_remote_code))


@cache
def _identity(model: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, ...]:
    tokenizer, config = (load(model, revision, trust_remote_code) for load in (load_tokenizer, load_config))
    return token_identity(tokenizer, end_token_ids(model, revision, config, tokenizer))


def student_of(experiment: Experiment) -> tuple[str, str | None, bool]:
    """The model to whose tokens the dataset is converted: the student; if it is pruned from a teacher, that teacher.

    Raises:
        InputError: if none is named, or it is the teacher's own.
    """
    student, teacher = experiment.student, experiment.teacher
    if student.model is not None:
        return student.model, student.revision, student.trust_remote_code
    if experiment.teachers and any(getattr(student, name) is not None for name in ORIGINS):
        return teacher.model, teacher.revision, teacher.trust_remote_code
    raise InputError("retokenize needs student.model; a student made by student.prune or student.config has the teacher's tokens")


@dataclass(frozen=True)
class Sides:
    """The tokenizers of a teacher and of the student, and what they have in common.

    Attributes:
        teacher: spelling of the stored tokens.
        student: spelling of the student's tokens.
        teacher_chat: the teacher's template.
        chat: the student's template.
        classes: classes of both.
        tokenizer: entry of the student's tokenizer in `dataset.json`.
        same: whether both have the same vocabulary, chat template and end tokens, so that rows do not change.
        kind: kind of the stored targets.
        masked: whether reasoning traces are part of the prompts.
        name: name of the student.
    """

    teacher: Side
    student: Side
    teacher_chat: ChatTemplate
    chat: ChatTemplate
    classes: RootClasses
    tokenizer: dict[str, Any]
    same: bool
    kind: str
    masked: bool
    name: str

    def with_teachers(self, row: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
        """A row generated by the student, also in the teacher's tokens, as `retokenize` stores rows.

        Args:
            row: with `input_ids` and `completion_start`, in the student's tokens.
            asked: the stored row with the same prompt.
        """
        ids = np.asarray(row["input_ids"])[int(row["completion_start"]) :]
        prompt = np.asarray(asked["teacher_ids"])[: int(asked["teacher_start"])]
        if self.same:
            their_ids, place_N = ids.tolist(), np.arange(len(ids))
        else:
            their_ids = self._in_teachers(ids, asked)
            place_N = align(Texts(self.teacher, self.student, np.array(their_ids), ids)).place_N
        return {**row, "teacher_ids": np.array([*prompt, *their_ids]), "teacher_start": len(prompt), "target_places": place_N}

    def _in_teachers(self, ids: Any, asked: Mapping[str, Any]) -> list[int]:
        """The student's text in the teacher's tokens."""
        text = self.student.bytes(ids).decode(errors="replace")
        ended = len(ids) > 0 and int(ids[-1]) in self.student.end_ids
        answer = {"role": "assistant", "content": text}
        told = {**asked, "completion": [answer], "metadata": "{}", "finish_reason": "stop" if ended else "length"}
        try:
            return stored_ids(told, self.teacher_chat)[1]
        except UnusableError:  # only white space, which templates refuse: only the end is compared
            return sorted(self.teacher.end_ids)[:1]


def check_tokenizers(experiment: Experiment) -> None:
    """Check what `retokenize` needs from the tokenizers, if it is needed, before the teacher has worked.

    Raises:
        InputError: if the bytes of a tokenizer's tokens cannot be determined, or the student's answers have no end token.
    """
    if not is_needed(experiment):
        return
    theirs = [teacher_tokenizer(experiment, name) for name in experiment.routed]
    model, key, tokenizer, _, end_ids = _own(experiment)
    for other, named in theirs:
        token_bytes(other, named)
    token_bytes(tokenizer, key)
    own = vocabulary_hash(tokenizer)
    borrows = experiment.teachers and not tokenizer.chat_template and own in [vocabulary_hash(other) for other, _ in theirs]
    if not (end_ids or borrows):
        raise _no_end(model, key)


@dataclass(frozen=True)
class _Student:
    """The student's tokenizer, its end tokens and the size of its output layer."""

    name: str
    tokenizer: Any
    end_ids: list[int]
    size: int


def sides_of(experiment: Experiment, manifest: Mapping[str, Any]) -> dict[str, Sides]:
    """The tokenizers of all teachers by name; the name of a single teacher is empty.

    Raises:
        InputError: if all have one vocabulary, the dataset is from other teachers, or the student's answers have no end token.
    """
    source = experiment.dataset_directory
    if has_several_tokenizers(manifest) and manifest["teachers"].keys() - experiment.teachers.keys():
        named = ", ".join(manifest["teachers"])
        raise InputError(f"teachers: {source} has rows of the teachers {named}, each in its own tokens; name them all")
    student = _student(experiment, manifest)
    known: dict[Any, RootClasses] = {}
    found: dict[str, Sides] = {}
    for name, teacher in experiment.routed.items():
        tokenizer, key = teacher_tokenizer(experiment, name)
        theirs = tokenizer_of(manifest, name)
        if vocabulary_hash(tokenizer) != theirs["vocabulary_hash"]:
            raise InputError(f"{key}: {source} was written with a different vocabulary than that of {tokenizer.name_or_path}")
        chat = ChatTemplate(tokenizer, theirs["end_token_ids"], teacher.template_args)
        found[name] = _sides(chat, theirs, student, manifest, key, known)
    own = vocabulary_hash(student.tokenizer)
    if not has_several_tokenizers(manifest) and manifest["tokenizer"]["vocabulary_hash"] == own and "alignment" not in manifest:
        raise InputError(f"student.model: {student.name} has the vocabulary of {source}; there is nothing to retokenize")
    return found


def tokenizer_of(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entry in `dataset.json` for the tokenizer of the teacher of that name."""
    found: dict[str, Any] = manifest.get("teachers", {}).get(name, {}).get("tokenizer") or manifest.get(
        "teacher_tokenizer", manifest["tokenizer"]
    )
    return found


def teacher_of(row: Mapping[str, Any], sides: Mapping[str, Sides], main: str) -> str:
    """The name of a stored row's teacher; rows from elsewhere belong to the main one."""
    if "" in sides:
        return ""
    name = str(metadata_and_provenance(str(row["metadata"]))[1].get("teacher"))
    return name if name in sides else main


def teacher_tokenizer(experiment: Experiment, name: str) -> tuple[Any, str]:
    """The tokenizer of the teacher of that name, and the key that names it."""
    teacher = experiment.routed[name]
    model, revision, key = experiment.model_copy(update={"teacher": teacher}).tokenizer
    key = f"teachers.{name}.model" if name else key
    return load_tokenizer(model, revision, teacher.trust_remote_code, key), key


def _own(experiment: Experiment) -> tuple[str, str, Any, Any, list[int]]:
    """The student's name, the key that names it, its tokenizer, configuration and end tokens."""
    model, revision, trust = student_of(experiment)
    key = "student.model" if experiment.student.model else "teacher.model"
    tokenizer, config = load_tokenizer(model, revision, trust, key), load_config(model, revision, trust, key)
    return model, key, tokenizer, config, end_token_ids(model, revision, config, tokenizer)


def _no_end(model: str, key: str) -> InputError:
    return InputError(f"{key}: neither the configuration nor the tokenizer of {model} names a token that ends a text")


def _student(experiment: Experiment, manifest: Mapping[str, Any]) -> _Student:
    model, key, tokenizer, config, end_ids = _own(experiment)
    own = vocabulary_hash(tokenizer)
    names = [name for name in experiment.teachers if tokenizer_of(manifest, name)["vocabulary_hash"] == own]
    if not tokenizer.chat_template and names:  # a base model with an instruction-tuned teacher from its family
        name = experiment.main if experiment.main in names else names[0]
        theirs = tokenizer_of(manifest, name)
        tokenizer.chat_template, end_ids = theirs["chat_template"], theirs["end_token_ids"]
        say("retokenize", f"{model} has no chat template; it gets that of teachers.{name}, and its end tokens")
    if not end_ids:
        raise _no_end(model, key)
    return _Student(model, tokenizer, end_ids, config.get_text_config().vocab_size)


def _sides(
    their_chat: ChatTemplate,
    theirs: Mapping[str, Any],
    student: _Student,
    manifest: Mapping[str, Any],
    key: str,
    known: dict[Any, RootClasses],
) -> Sides:
    """The sides of one teacher; classes already known for a vocabulary are reused."""
    described = describe_tokenizer(student.tokenizer, student.size, student.end_ids)
    both = ("vocabulary_hash", "end_token_ids")
    one_vocabulary = all(_comparable(described[name]) == _comparable(theirs[name]) for name in both)
    vocabularies = (
        Vocabulary.of(their_chat.tokenizer, theirs["end_token_ids"], theirs["vocab_size"], key),
        Vocabulary.of(student.tokenizer, student.end_ids, student.size, "student.model"),
    )
    which = (theirs["vocabulary_hash"], tuple(sorted(theirs["end_token_ids"])), theirs["vocab_size"])
    if which not in known:
        single = RootClasses.of_one_vocabulary(theirs["vocab_size"], student.size) if one_vocabulary else None
        known[which] = single or root_classes(*vocabularies)
    classes = known[which]
    their_side, side = (
        Side(vocabulary.bytes_of, of, frozenset(vocabulary.end_ids))
        for vocabulary, of in zip(vocabularies, (classes.teacher_V, classes.student_V), strict=True)
    )
    return Sides(
        their_side,
        side,
        their_chat,
        ChatTemplate(student.tokenizer, student.end_ids),
        classes,
        described,
        one_vocabulary and described["chat_template"] == theirs["chat_template"],
        manifest["targets"]["kind"],
        manifest["sampling"].get("thinking") == "masked",
        student.name,
    )


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value
