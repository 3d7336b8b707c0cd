"""The teacher without its weights: its tokenizer, its chat template, and what a dataset says of it."""

from collections.abc import Sequence
from typing import Any

from llmdistill.config import Experiment
from llmdistill.data.dataset import Messages
from llmdistill.errors import InputError
from llmdistill.models.licence import licence_of
from llmdistill.models.loading import (
    context_length,
    end_token_ids,
    load_config,
    load_tokenizer,
    special_token_ids,
    vocabulary_hash,
)
from llmdistill.runs import record
from llmdistill.teachers import check_engine


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
        self.config = load_config(teacher.model, teacher.revision, teacher.trust_remote_code)
        self.tokenizer = load_tokenizer(teacher.model, teacher.revision, teacher.trust_remote_code)
        self.vocab_size: int = self.config.get_text_config().vocab_size
        self.end_ids = end_token_ids(teacher.model, teacher.revision, self.config, self.tokenizer)
        for number, more in enumerate(teacher.ensemble):
            key = f"teacher.ensemble.{number}.model"
            theirs = load_tokenizer(more.model, more.revision, teacher.trust_remote_code, key)
            if vocabulary_hash(theirs) != vocabulary_hash(self.tokenizer):
                raise InputError(f"{key}: {more.model} has another tokenizer than {teacher.model}; their mean is not defined")
        if kept.stored.distinct and kept.kept > self.vocab_size:
            raise InputError(
                f"targets.{kept.stored.size} is {kept.kept:,}, "
                f"but the vocabulary of {teacher.model} has {self.vocab_size:,} tokens"
            )

    def prompt_ids(self, messages: Messages, origin: str, tools: list[Any] | None = None) -> list[int]:
        """The prompt as it is stored and the student sees it: through the chat template, up to where the answer begins."""
        return self._template(messages, origin, True, tools)

    def told_ids(self, messages: Messages, origin: str, tools: list[Any] | None = None) -> list[int]:
        """The prompt as the teacher sees it: with `teacher.system` in the place of its own system message, if there is one."""
        system = self.experiment.teacher.system
        if system is None:
            return self.prompt_ids(messages, origin, tools)
        rest = [message for message in messages if message["role"] != "system"]
        return self.prompt_ids([{"role": "system", "content": system}, *rest], origin, tools)

    def text_ids(self, text: str, origin: str) -> list[int]:
        """Text without turns, as the tokenizer begins it; at least two tokens."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if len(ids) < 2:
            raise InputError(f"{origin}: the text has fewer than two tokens")
        return ids

    def completion_ids(
        self,
        prompt: Messages,
        completion: Messages,
        prompt_ids: Sequence[int],
        origin: str,
        tools: list[Any] | None = None,
    ) -> list[int]:
        """A given answer as the teacher would have written it, up to and with the token that ends its turn."""
        whole = self._template([*prompt, *completion], origin, False, tools)
        if whole[: len(prompt_ids)] != list(prompt_ids):
            raise InputError(
                f"{origin}: in the teacher's chat template the conversation does not begin with its prompt, so the tokens "
                "of the answer cannot be identified"
            )
        ids = whole[len(prompt_ids) :]
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), len(ids) - 1)
        if not ids:
            raise InputError(f"{origin}: the answer is empty")
        return ids[: end + 1]

    def check_length(self, longest: int, what: str, origin: str) -> int:
        """The context to reserve: `teacher.max_model_len`, else the longest sequence; never more than the model has."""
        teacher = self.experiment.teacher
        limit, asked = context_length(self.config), teacher.max_model_len
        if asked and limit and asked > limit:
            raise InputError(f"teacher.max_model_len is {asked:,}, but {teacher.model} has a context of {limit:,} tokens")
        allowed = asked or limit
        if allowed and longest > allowed:
            raise InputError(f"{origin}: {what} are {longest:,}, more than the context of {allowed:,} tokens")
        return asked or longest

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
                "licence": licence_of(teacher.model, teacher.revision),
                **({"system": teacher.system} if teacher.system else {}),
                **({"weight": teacher.weight} if teacher.ensemble else {}),
                **({"ensemble": [more.model_dump() for more in teacher.ensemble]} if teacher.ensemble else {}),
            },
            "tokenizer": {
                "vocab_size": self.vocab_size,
                "vocabulary_hash": vocabulary_hash(self.tokenizer),
                "end_token_ids": self.end_ids,
                "special_token_ids": special_token_ids(self.tokenizer),
                "chat_template": self.tokenizer.chat_template,
            },
            "targets": self.experiment.targets.stored.describe(self.experiment.targets.kept),
            "seed": self.experiment.seed,
            "determinism": teacher.abilities.determinism,
            "versions": record.versions(),
        }

    def _template(self, messages: Messages, origin: str, add_generation_prompt: bool, tools: list[Any] | None) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise InputError("teacher.model: its tokenizer has no chat template; use an instruction-tuned teacher")
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
            )["input_ids"]
        except Exception as error:  # templates raise whatever they like
            raise InputError(f"{origin}: the teacher's chat template refuses it: {error}") from None
        return ids
