"""Asking the teacher while making prompts: answers are stored in shards, which later attempts and other workers reuse."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from llmdistill.config import Experiment, Generate, Targets
from llmdistill.config.machine import Precision
from llmdistill.data.batches import read_batches
from llmdistill.data.ids import row_seed
from llmdistill.data.rows import Messages, storable
from llmdistill.data.shard_writer import finished_shards, write_shard
from llmdistill.data.shards import Share, check_given_up, counting_others, indices
from llmdistill.data.targets import Array
from llmdistill.errors import InputError, UnusableError
from llmdistill.models.chat_template import Conversation
from llmdistill.runs.progress import StageBar, counted, working
from llmdistill.teachers import Engine, EngineSpec, Request, open_engine, shared_file
from llmdistill.teachers.prompt_encoding import PromptEncoder
from llmdistill.teachers.thinking import answer_ids

# Tokens reserved for a question and its answer where `teacher.max_model_len` does not say: how long the questions of a
# later step are is not known before the first one is done, and the teacher is loaded once.
_CONTEXT = 4096
# In the place of a finish reason: it was not asked, since it does not fit or the chat template cannot show it, or it was given
# up; behind the last two stands the reason.
TOO_LONG, UNUSABLE, GIVEN_UP = "context", "unusable: ", "failed: "


@dataclass(frozen=True)
class Question:
    """A question for the teacher, under a stable name.

    `origin` is for messages; `unusable` says why it cannot be asked, if it cannot.
    """

    id: str
    messages: Messages
    origin: str
    unusable: str | None = None


@dataclass(frozen=True)
class Answer:
    """Its answer."""

    text: str
    finish_reason: str


class WaitingForOthersError(Exception):
    """Other workers have not finished all shards of a step; the same command continues when they have."""


class PromptFormat(Protocol):
    """How messages become token ids for the teacher, and its text becomes an answer."""

    def ids(self, messages: Messages, origin: str) -> Sequence[int]:
        """What the teacher sees."""
        ...

    def messages(self, messages: Messages) -> Conversation | None:
        """What an endpoint that takes conversations is sent; None where it is no conversation."""
        ...

    def answer(self, ids: Array, finish_reason: str) -> Answer:
        """What it wrote."""
        ...


class ChatFormat:
    """The teacher's turn in a conversation."""

    def __init__(self, chat: PromptEncoder) -> None:
        self.chat = chat

    def ids(self, messages: Messages, origin: str) -> Sequence[int]:
        """Through its chat template, up to where its turn begins."""
        return self.chat.prompt_ids(messages, origin)

    def messages(self, messages: Messages) -> Conversation | None:
        """As they are."""
        return messages

    def answer(self, ids: Array, finish_reason: str) -> Answer:
        """Without its reasoning trace and special tokens."""
        end = self.chat.experiment.generate.thinking_end
        return Answer(self.chat.template.decode(answer_ids(self.chat.tokenizer, ids, end)), finish_reason)


class Asker:
    """One teacher for all steps; it is loaded, in its `precision`, at the first question that has no answer yet.

    Raises:
        InputError: the answers alone would fill its context.
    """

    def __init__(self, experiment: Experiment, chat: PromptEncoder, share: Share) -> None:
        assert experiment.prompts is not None
        self.precision: Precision | None = None
        self.experiment = experiment
        self.chat = chat
        self.share = share
        self.sampling = Generate(**experiment.prompts.sampling.model_dump())
        longest = self.sampling.max_tokens
        chat.check_length(longest + 1, "the shortest question and the longest answer", "prompts.sampling.max_tokens")
        limit = chat.context
        self.context = experiment.teacher.max_model_len or min(max(_CONTEXT, 2 * longest), limit or 2 * longest + _CONTEXT)
        self.tokens = 0
        self.seconds = 0.0
        self._engine: Engine | None = None

    def ask(
        self, label: str, directory: Path, count: int, questions: Callable[[], Iterable[Question]], prompt_format: PromptFormat
    ) -> Iterator[tuple[Question, Answer]]:
        """Every question with its answer, in order.

        Args:
            label: the step's name, for the progress.
            directory: where the answers are, or will be.
            count: how many questions there are.
            questions: gives them, as often as it is called.
            prompt_format: how messages become token ids, and token ids an answer.

        Raises:
            WaitingForOthersError: this worker's shards are made, and some of the others are not.
            RemoteError: most of a shard was given up.
        """
        size = self.experiment.generate.rows_per_shard
        shards = -(-count // size)
        directory.mkdir(parents=True, exist_ok=True)
        with closing(self.share.shards(label, directory, shards)) as missing:
            if (first := next(missing, None)) is not None:
                rows = [min(size, count - shard * size) for shard in range(shards)]
                self._make(label, directory, chain([first], missing), rows, questions, prompt_format)
        there = len(finished_shards(directory, "train"))
        if there < shards:
            raise WaitingForOthersError(f"{there:,} of {counted(shards, 'shard')} finished; the rest are left to other workers")
        return _read(directory, questions())

    def _make(
        self,
        label: str,
        directory: Path,
        missing: Iterator[int],
        rows: list[int],
        questions: Callable[[], Iterable[Question]],
        prompt_format: PromptFormat,
    ) -> None:
        """Ask what the missing shards hold, of so many rows each; each is stored as soon as its last answer is there."""
        engine, size = self._open(), self.experiment.generate.rows_per_shard
        asked: dict[int, list[Question]] = {}
        answers: dict[int, dict[int, Answer]] = {}  # by shard, then by index

        def batches() -> Iterator[list[Request]]:
            waiting, reached = iter(questions()), 0
            for shard in counting_others(missing, directory, mine, bar):
                if shard < reached:  # in progress elsewhere
                    waiting, reached = iter(questions()), 0
                start = (shard - reached) * size
                chunk, reached = list(islice(waiting, start, start + size)), shard + 1
                asked[shard], answers[shard] = chunk, {}
                yield list(requests(shard, chunk))

        def requests(shard: int, chunk: list[Question]) -> Iterator[Request]:
            for index, question in enumerate(chunk, start=shard * size):
                reason = question.unusable
                ids: Sequence[int] = ()
                try:
                    ids = () if reason else prompt_format.ids(question.messages, question.origin)
                except UnusableError as error:
                    reason = error.reason
                if reason:
                    answers[shard][index] = Answer("", f"{UNUSABLE}{reason}")
                    bar.advance()
                elif len(ids) + self.sampling.max_tokens > self.context:
                    answers[shard][index] = Answer("", TOO_LONG)
                    bar.advance()
                else:
                    messages = prompt_format.messages(question.messages)
                    yield Request(index, ids, row_seed(question.id, self.experiment.seed), messages=messages)

        failed: dict[int, Counter[str]] = {}

        def store(shard: int) -> None:
            given_up = failed.pop(shard, Counter())
            asked_for = sum(not answer.finish_reason.startswith((TOO_LONG, UNUSABLE)) for answer in answers[shard].values())
            check_given_up(given_up, asked_for, len(rows) == 1, self.experiment.teacher.endpoint or label)
            given = [answer for _, answer in sorted(answers.pop(shard).items())]
            write_shard(directory, "train", shard, len(rows), _table(asked.pop(shard), given))

        started, before = time.monotonic(), engine.tokens
        mine = {shard: rows[shard] for shard in self.share.part(len(rows))}
        bar = StageBar(label, sum(mine.values()), sum(mine[shard] for shard in indices(directory) & mine.keys()))
        bar.count_tokens(lambda: engine.tokens - before, self.sampling.max_tokens)
        with bar:
            for completion in engine.generate(batches()):
                shard = completion.index // size
                if completion.failed:
                    failed.setdefault(shard, Counter())[completion.failed] += 1
                    answers[shard][completion.index] = Answer("", f"{GIVEN_UP}{completion.failed}")
                else:
                    answers[shard][completion.index] = prompt_format.answer(completion.ids, completion.finish_reason)
                bar.advance(tokens=len(completion.ids))
                if len(answers[shard]) == len(asked[shard]):
                    store(shard)
            for shard in list(asked):  # those of which nothing had to be asked
                store(shard)
        self.tokens += engine.tokens - before
        self.seconds += time.monotonic() - started

    def _open(self) -> Engine:
        if self._engine is None:
            teacher = self.experiment.teacher
            if teacher.in_turn:
                teacher = teacher.model_copy(update={"ensemble": []})
            if self.precision is not None:
                teacher = teacher.model_copy(update={"dtype": self.precision.dtype})
            text_only = Targets(kind="none")
            with working("prompts", "starting the teacher"):
                spec = EngineSpec(
                    teacher,
                    self.sampling,
                    text_only,
                    self.chat.end_ids,
                    self.context,
                    self.experiment.seed,
                    known_ids=self.chat.known_ids,
                    template=self.chat.template,
                    shared=shared_file(self.experiment.directory("prompts")),
                )
                self._engine = open_engine(spec)
        return self._engine


def _table(questions: list[Question], answers: list[Answer]) -> pa.Table:
    return pa.table(
        {
            "id": pa.array([question.id for question in questions], pa.string()),
            "text": pa.array([storable(answer.text) for answer in answers], pa.string()),
            "finish_reason": pa.array([answer.finish_reason for answer in answers], pa.string()),
        }
    )


def _read(directory: Path, questions: Iterable[Question]) -> Iterator[tuple[Question, Answer]]:
    files = [shard.file for shard in finished_shards(directory, "train")]
    rows = (row for batch in read_batches(files) for row in batch.to_pylist())
    for question, row in zip(questions, rows, strict=True):
        if question.id != row["id"]:
            raise InputError(f"{directory}: contains answers to other questions; remove it to ask again")
        yield question, Answer(row["text"], row["finish_reason"])
