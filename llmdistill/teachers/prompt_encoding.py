"""The teacher without its weights: its tokenizer, its chat template, and what a dataset says of it."""

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
    """Those of all teachers, by their names; of a single one the name is empty.

    Args:
        experiment: the configuration.
        fingerprints: of the teachers.

    Raises:
        InputError: a teacher is not usable; or they have different tokens, and `retokenize` could not bring all of them into the
            student's.
    """
    found = {
        name: PromptEncoder(experiment.model_copy(update={"teacher": teacher}), fingerprints[name])
        for name, teacher in experiment.routed.items()
    }
    if have_several_tokenizers(found):  # said before anything is written, not when all of it is there
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
                    f"{key}: {student.model} has no chat template, and no teacher has its vocabulary, so there is none to "
                    "write the prompts of all teachers by; choose another student"
                )
    return found


def have_several_tokenizers(chats: "Mapping[str, PromptEncoder]") -> bool:
    """Whether teachers do not all make the same token ids of the same conversation and its end."""
    return len({token_identity(chat.tokenizer, chat.end_ids) for chat in chats.values()}) > 1


class PromptEncoder:
    """Turns conversations into the token ids that the teacher sees.

    Raises:
        InputError: the teacher, its engine or `targets` are not usable.
    """

    def __init__(self, experiment: Experiment, fingerprint: str) -> None:
        teacher, kept = experiment.teacher, experiment.targets
        check_engine(teacher)
        self.experiment = experiment
        self.fingerprint = fingerprint
        model, revision, key = experiment.tokenizer
        api, trust = teacher.abilities.api, teacher.trust_remote_code
        self.config = None if api else load_config(model, revision, trust)  # of a teacher whose weights are there
        self.tokenizer = load_tokenizer(model, revision, trust, key)
        highest = max(self.tokenizer.get_vocab().values(), default=0)
        self.vocab_size: int = self.config.get_text_config().vocab_size if self.config else highest + 1
        self.known_ids = highest + 1 if highest + 1 < self.vocab_size else None  # where the output layer is padded
        self.end_ids = end_token_ids(model, revision, self.config, self.tokenizer)
        for number, more in enumerate(teacher.ensemble):
            key = f"teacher.ensemble.{number}.model"
            theirs = load_tokenizer(more.model, more.revision, teacher.trust_remote_code, key)
            if vocabulary_hash(theirs) != vocabulary_hash(self.tokenizer):
                raise InputError(f"{key}: {more.model} has another tokenizer than {teacher.model}; their mean is not defined")
        if kept.stored.distinct and kept.kept > (self.known_ids or self.vocab_size):
            raise InputError(
                f"targets.{kept.stored.size} is {kept.kept:,}, "
                f"but the vocabulary of {teacher.model} has {self.known_ids or self.vocab_size:,} tokens"
            )

    @cached_property
    def template(self) -> ChatTemplate:
        """What encodes and decodes all of its text."""
        return ChatTemplate(self.tokenizer, self.end_ids, self.experiment.teacher.template_args)

    @property
    def context(self) -> int | None:
        """The longest sequence that the teacher was made for, in tokens, where it is known."""
        return context_length(self.config) if self.config else None

    def prompt_ids(self, messages: Conversation, origin: str, tools: list[Any] | None = None) -> list[int]:
        """The prompt as it is stored and the student sees it: through the chat template, up to where the answer begins.

        Raises:
            UnusableError: the template refuses it, or does not show all of it.
        """
        try:
            return self.template.prompt_ids(messages, tools)
        except UnusableError as error:
            raise error.at(origin) from None

    def told_ids(self, messages: Conversation, origin: str, tools: list[Any] | None = None) -> list[int]:
        """The prompt as the teacher sees it: with `teacher.system` in the place of its own system message, if there is one."""
        return self.prompt_ids(self.told(messages), origin, tools)

    def told(self, messages: Conversation) -> Conversation:
        """The conversation as the teacher sees it."""
        system = self.experiment.teacher.system
        if system is None:
            return messages
        return [{"role": "system", "content": system}, *(message for message in messages if message["role"] != "system")]

    def check_length(self, length: int, what: str, origin: str) -> None:
        """Refuse what does not fit into `teacher.max_model_len`, or into what the model was made for.

        Args:
            length: in tokens.
            what: is so long, in words.
            origin: of the row.

        Raises:
            UnusableError: it is longer.
            InputError: `teacher.max_model_len` is more than the model has.
        """
        teacher = self.experiment.teacher
        limit, asked = self.context, teacher.max_model_len
        if asked and limit and asked > limit:
            raise InputError(f"teacher.max_model_len is {asked:,}, but {teacher.model} has a context of {limit:,} tokens")
        allowed = asked or limit
        if allowed and length > allowed:
            raise UnusableError(f"{what} are more than the context of {allowed:,} tokens", origin)

    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of how rows were made."""
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
