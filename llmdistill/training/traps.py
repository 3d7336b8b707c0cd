"""Warnings about well-known mistakes before a training run: what is wrong, by which key, and what would be better."""

from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from llmdistill.config.student import Student
from llmdistill.data.targets import kind_of
from llmdistill.models.loading import load_config, load_tokenizer, own_end_ids, vocabulary_hash

_LOOKED_AT = 4096  # rows of the dataset, so that a large one does not take longer
_ROWS_WITHOUT_END = 0.8
_RATE_FACTOR = 5  # off by this factor, a learning rate is meant for the other way of training
_LARGE = 1e9  # parameters; smaller models tolerate large steps


def traps(student: Student, arguments: Any, manifest: dict[str, Any], rows: Any, parameters: int) -> Iterator[str]:
    """One sentence for every mistake in this run.

    Args:
        student: section of the configuration.
        arguments: the `DistillConfig`.
        manifest: manifest of the dataset.
        rows: the training rows, as stored.
        parameters: number of parameters of the student.
    """
    found = [
        end_token(student, manifest),
        soft_targets(rows) if arguments.uses_targets else None,
        learning_rate(student, arguments.learning_rate, parameters),
        rows_without_end(rows, arguments.max_length),
    ]
    return (text for text in found if text)


def end_token(student: Student, manifest: dict[str, Any]) -> str | None:
    """A student whose end token differs from the rows': a base model with an instruction-tuned teacher."""
    if student.model is None:
        return None
    config = load_config(student.model, student.revision, student.trust_remote_code, "student.model")
    tokenizer = load_tokenizer(student.model, student.revision, student.trust_remote_code, "student.model")
    if vocabulary_hash(tokenizer) != manifest["tokenizer"]["vocabulary_hash"]:
        return None  # it learns from text only, with its own end token
    own, theirs = own_end_ids(student.model, student.revision, config, tokenizer), manifest["tokenizer"]["end_token_ids"]
    new = sorted(set(theirs) - set(own))
    if not own or not new:
        return None
    names = [" or ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (own, new)]
    text = f"student.model ends its text with {names[0]}; the rows also end with {names[1]}, which it has to learn"
    if student.lora is None:
        return f"{text}; both are saved as end tokens, but an instruction-tuned student.model would already know them"
    if {"modules_to_save", "trainable_token_indices"} & student.lora.args.keys():
        return None
    trained = new if config.get_text_config().tie_word_embeddings else {"embed_tokens": new, "lm_head": new}
    return f"{text} while the weights of that token are frozen; set student.lora.args.trainable_token_indices to {trained}"


def soft_targets(rows: Any) -> str | None:
    """Warnings of the kind of soft targets."""
    kind = kind_of(rows.column_names)
    return kind.warning(rows.select_columns(list(kind.columns)).with_format("arrow")[:_LOOKED_AT]) if kind.columns else None


def learning_rate(student: Student, rate: float, parameters: int) -> str | None:
    """A learning rate for all weights used with adapters, or one for adapters used with all weights of a large model."""
    usual = student.default_learning_rate
    said = f"train.args.learning_rate is {rate:g}"
    if student.lora and rate <= usual / _RATE_FACTOR:
        return f"{said}, typical for training all weights; adapters (student.lora) usually need about ten times that, {usual:g}"
    if not student.lora and parameters > _LARGE and rate >= usual * _RATE_FACTOR:
        return f"{said}, typical for adapters; all weights of a {parameters / 1e9:.1f}B model usually need about {usual:g}"
    return None


def rows_without_end(rows: Any, max_length: int | None) -> str | None:
    """Truncated rows: a student that rarely sees an end token does not learn to stop."""
    table = rows.select_columns(["finish_reason", "input_ids"]).with_format("arrow")[:_LOOKED_AT]
    by_teacher = pc.equal(table["finish_reason"], "length")
    by_training = pc.greater(pc.list_value_length(table["input_ids"]), max_length or 2**31 - 1)
    share = pc.mean(pc.or_(by_teacher, by_training)).as_py()
    if share is None or share <= _ROWS_WITHOUT_END:
        return None
    longer = "generate.max_tokens" if pc.sum(by_teacher).as_py() > pc.sum(by_training).as_py() else "train.args.max_length"
    return (
        f"{share:.0%} of the rows are cut off before they end, so the student rarely sees an end token and may not stop; "
        f"raise {longer}, or keep only rows that end: curate: [{{finish_reason: {{keep: [stop]}}}}]"
    )
