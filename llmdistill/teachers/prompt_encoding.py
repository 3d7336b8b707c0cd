"""The teacher without its weights: its tokenizer, its chat template, and its entries in a dataset."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from llmdistill.config import Experiment
from llmdistill.errors import InputError, UnusableError
from llmdistill.models.chat_template import ChatTemplate, Conversation
from llmdistill.models.licence import licence_of, named
from llmdistill.models.loading import (
    context_length,
    describe_tokenizer,
    end_token_ids,
    load_config,
    load_tokenizer,
    token_identity,
    vocabulary_hash,
)
from llmdistill.models.token_bytes import token_bytes
from llmdistill.runs import record
from llmdistill.teachers import check_engine


def encoders(experiment: Experiment, fingerprints: dict[str, str]) -> "dict[str, PromptEncoder]":
    """Prompt encoders of all teachers by name; the name of a single teacher is empty.

    Args:
        experiment: the configuration.
        fingerprints: fingerprints of the teachers.

    Raises:
        InputError: if a teacher is unusable, or they have different tokens that `retokenize` cannot convert to the student's.
    """
    found = {
        name: PromptEncoder(experiment.model_copy(update={"teacher": teacher}), fingerprints[name])
        for name, teacher in experiment.routed.items()
    }
    if have_several_tokenizers(found):  # reported before anything is written, not when all of it is finished
        for name, chat in found.items():
            token_bytes(chat.tokenizer, f"teachers.{name}.model")
        student = experiment.student
        if student.model is not None:
            key = "student.model"
            tokenizer = load_tokenizer(student.model, student.revision, student.trust_remote_code, key)
            token_bytes(tokenizer, key)
            own = vocabulary_hash(tokenizer)
            if not tokenizer.chat_template and all(vocabulary_hash(chat.tokenizer) != own for chat in found.values()):
                raise InputError(
                    f"{key}: {student.model} has no chat template, and no teacher has its vocabulary, so there is no "
                    "template for the prompts of all teachers; choose another student"
                )
    return found


def have_several_tokenizers(chats: "Mapping[str, PromptEncoder]") -> bool:
    """Whether teachers encode the same conversation and its end differently."""
    return len({token_identity(chat.tokenizer, chat.end_ids) for chat in chats.values()}) > 1


class PromptEncoder:
    """Turns conversations into the token ids that the teacher sees.

    Raises:
        InputError: if the teacher, its engine or `targets` are unusable.
    """

    def __init__(self, experiment: Experiment, fingerprint: str) -> None:
        teacher, kept = experiment.teacher, experiment.targets
        check_engine(teacher)
        self.experiment = experiment
        self.fingerprint = fingerprint
        model, revision, key = experiment.tokenizer
        api, trust = teacher.abilities.api, teacher.trust_remote_code
        self.config = None if api else load_config(model, revision, trust)  # for a teacher whose weights are available
        self.tokenizer = load_tokenizer(model, revision, trust, key)
        highest = max(self.tokenizer.get_vocab().values(), default=0)
        self.vocab_size: int = self.config.get_text_config().vocab_size if self.config else highest + 1
        self.known_ids = highest + 1 if highest + 1 < self.vocab_size else None  # where the output layer is padded
        self.end_ids = end_token_ids(model, revision, self.config, self.tokenizer)
        for number, more in enumerate(teacher.ensemble):
            key = f"teacher.ensemble.{number}.model"
            theirs = load_tokenizer(more.model, more.revision, teacher.trust_remote_code, key)
            if vocabulary_hash(theirs) != vocabulary_hash(self.tokenizer):
                raise InputError(f"{key}: {more.model} and {teacher.model} have different tokenizers, so they have no mean")
        if kept.stored.distinct and kept.kept > (self.known_ids or self.vocab_size):
            raise InputError(
                f"targets.{kept.stored.size} is {kept.kept:,}, "
                f"but the vocabulary of {teacher.model} has {self.known_ids or self.vocab_size:,} tokens"
            )

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer that encodes and decodes all of its text."""
        return ChatTemplate(self.tokenizer, self.end_ids, self.experiment.teacher.template_args)

    @property
    def context(self) -> int | None:
        """The longest sequence that the teacher supports, in tokens, if known."""
        return context_length(self.config) if self.config else None

    def prompt_ids(self, messages: Conversation, origin: str, tools: list[Any] | None = None) -> list[int]:
        """The prompt as stored and seen by the student: rendered with the chat template, up to the start of the answer.

        Raises:
            UnusableError: if the template refuses it, or does not render all of it.
        """
        try:
            return self.template.prompt_ids(messages, tools)
        except UnusableError as error:
            raise error.at(origin) from None

    def told_ids(self, messages: Conversation, origin: str, tools: list[Any] | None = None) -> list[int]:
        """The prompt as the teacher sees it: with `teacher.system`, if set, instead of its own system message."""
        return self.prompt_ids(self.told(messages), origin, tools)

    def told(self, messages: Conversation) -> Conversation:
        """The conversation as the teacher sees it."""
        system = self.experiment.teacher.system
        if system is None:
            return messages
        return [{"role": "system", "content": system}, *(message for message in messages if message["role"] != "system")]

    def check_length(self, length: int, what: str, origin: str) -> None:
        """Refuse what exceeds `teacher.max_model_len` or the model's own limit.

        Args:
            length: length in tokens.
            what: description of what is too long.
            origin: where the row was read.

        Raises:
            UnusableError: if it is longer.
            InputError: if `teacher.max_model_len` exceeds the model's limit.
        """
        teacher = self.experiment.teacher
        limit, asked = self.context, teacher.max_model_len
        if asked and limit and asked > limit:
            raise InputError(f"teacher.max_model_len is {asked:,}, but {teacher.model} has a context of {limit:,} tokens")
        allowed = asked or limit
        if allowed and length > allowed:
            raise UnusableError(f"{what} exceed the context of {allowed:,} tokens", origin)

    def description(self) -> dict[str, Any]:
        """The entry in `dataset.json` about how rows were made."""
        teacher = self.experiment.teacher
        return {
            "teacher": {
                "model": teacher.model,
                "revision": teacher.revision,
                "commit": getattr(self.config, "_commit_hash", None),
                "fingerprint": self.fingerprint,
                "engine": teacher.engine,
                "licence": named(teacher.licence) if teacher.licence else licence_of(teacher.model, teacher.revision),
                **({"endpoint": teacher.endpoint, "api": teacher.api} if teacher.abilities.api else {}),
                **({"request_args": teacher.request_args} if teacher.request_args else {}),
                **({"system": teacher.system} if teacher.system else {}),
                **({"template_args": teacher.template_args} if teacher.template_args else {}),
                **({"weight": teacher.weight} if teacher.ensemble else {}),
                **({"ensemble": [more.model_dump() for more in teacher.ensemble]} if teacher.ensemble else {}),
            },
            "tokenizer": {
                **({"of": self.experiment.tokenizer[0]} if teacher.abilities.api else {}),
                **describe_tokenizer(self.tokenizer, self.vocab_size, self.end_ids),
            },
            "targets": self.experiment.targets.stored.describe(self.experiment.targets.kept),
            "seed": self.experiment.seed,
            "determinism": teacher.abilities.determinism,
            "versions": record.versions(),
        }
