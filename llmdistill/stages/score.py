"""`llmdistill score`: the teacher reads finished text; it is stored with soft targets, as `generate` stores its own."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from llmdistill.config import Experiment, Score
from llmdistill.data.dataset import MANIFEST, SPLITS, Messages, Row, load_dataset, read_manifest
from llmdistill.data.shards import EVERYTHING, Worker, count_finished, count_shards, make_dataset
from llmdistill.errors import InputError
from llmdistill.models.loading import vocabulary_hash
from llmdistill.prompting.sources import metadata, read_jsonl
from llmdistill.prompting.turns import Turn, as_columns, learned_turns
from llmdistill.runs import record
from llmdistill.runs.progress import say
from llmdistill.teachers import Completion, Engine, Request, fingerprints, row_seed, stable_id
from llmdistill.teachers.prompt_encoding import PromptEncoder


def score(experiment: Experiment, dry_run: bool = False, worker: Worker = EVERYTHING) -> None:
    """Write the dataset `OUTPUT/data`, going on where an interrupted run stopped.

    Args:
        experiment: the configuration.
        dry_run: only say what would be done.
        worker: knows which shards are its own to make.

    Raises:
        InputError: the text, the teacher or the output directory are not usable; nothing was written.
    """
    if experiment.score is None:
        raise InputError("the key score is missing: `score` needs score.source")
    directory, teacher, source = experiment.directory("data"), experiment.teacher, Path(experiment.score.source)
    models, fingerprint = fingerprints(teacher)
    texts: _Lines | _Stored = _Stored(experiment.score) if source.is_dir() else _Lines(experiment.score)
    settings = experiment.model_dump(mode="json", include={"seed", "teacher", "score", "targets"})
    settings["generate"] = {"rows_per_shard": experiment.generate.rows_per_shard}
    file = source / MANIFEST if source.is_dir() else source
    inputs = {str(file): record.sha256(file), **models}
    state = record.claim(directory, "score", settings, inputs)
    count = count_shards(experiment, len(texts))
    if dry_run:
        say("score", f"{len(texts):,} rows of {source} in {count:,} shards")
        say("score", f"would write {directory}  ({count_finished(directory):,} of {count:,} shards are there)")
    elif state == "done" and count_finished(directory) == count:
        say("score", f"{directory} is finished ({len(texts):,} rows)")
    else:
        make_dataset("score", directory, _Texts(PromptEncoder(experiment, fingerprint), texts), settings, inputs, worker)


@dataclass(frozen=True)
class Text:
    """A conversation with its answer, as token ids too; `told_ids` is the prompt as the teacher sees it, if that differs."""

    id: str
    prompt: Messages
    completion: Messages
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    finish_reason: str | None = None
    sampling_logprob: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    told_ids: Sequence[int] | None = None


class _Source(Protocol):
    sampling: dict[str, Any]

    def __len__(self) -> int: ...

    def prepare(self, chat: PromptEncoder) -> int:
        """Check everything against the teacher; the length of the longest sequence, in tokens."""
        ...

    def text(self, index: int) -> Text: ...


class _Lines:
    """The lines of a JSONL file."""

    sampling: dict[str, Any] = {}

    def __init__(self, section: Score) -> None:
        file, every = Path(section.source), section.turns == "all"
        self.turns: list[tuple[str, Turn, dict[str, Any]]] = []
        for number, fields in read_jsonl(file, "score.source"):
            origin = f"{file} line {number}"
            other = metadata(fields, ("tools", "text"))
            turns = list(learned_turns(fields, origin, every, section.tool_calls))
            if len(turns) > 1:
                other = {**other, "conversation": stable_id(fields)}
            self.turns += [(origin, turn, other) for turn in turns]
        if not self.turns:
            raise InputError(f"{file}: holds no text" + ("" if section.tool_calls else " but tool calls"))

    def __len__(self) -> int:
        return len(self.turns)

    def prepare(self, chat: PromptEncoder) -> int:
        self.texts: list[Text] = []
        seen: dict[str, int] = {}
        longest = 0
        for origin, turn, other in self.turns:
            told_ids, prompt_ids, completion_ids = _token_ids(turn, chat, origin)
            content = stable_id(turn.prompt, turn.completion, *([turn.tools] if turn.tools else []), chat.fingerprint)
            seen[content] = seen.get(content, -1) + 1  # the same text twice is two rows
            identity = stable_id(content, seen[content])
            prompt, completion = as_columns(turn.prompt), as_columns(turn.completion)
            if turn.uses_tools:
                other = {**other, "messages": [*turn.prompt, *turn.completion], "tools": turn.tools}
            text = Text(identity, prompt, completion, prompt_ids, completion_ids, metadata=other, told_ids=told_ids)
            self.texts.append(text)
            length = len(told_ids) + len(completion_ids)
            longest = max(longest, chat.check_length(length + 1, "its tokens and the one that vLLM adds", origin))
        return longest

    def text(self, index: int) -> Text:
        return self.texts[index]


def _token_ids(turn: Turn, chat: PromptEncoder, origin: str) -> tuple[list[int], list[int], list[int]]:
    """The prompt as the teacher sees it and as it is stored, and the answer."""
    if turn.plain:
        ids = chat.text_ids(turn.completion[0]["content"], origin)
        return ids[:1], ids[:1], ids[1:]  # nothing stands before the first token, so nothing foretells it
    prompt_ids = chat.prompt_ids(turn.prompt, origin, turn.tools)
    completion_ids = chat.completion_ids(turn.prompt, turn.completion, prompt_ids, origin, turn.tools)
    return chat.told_ids(turn.prompt, origin, turn.tools), prompt_ids, completion_ids


class _Stored:
    """The rows of a dataset, all of its splits; their ids and token ids stay as they are."""

    def __init__(self, section: Score) -> None:
        import datasets

        self.directory = directory = Path(section.source)
        if section.turns != "last" or not section.tool_calls:
            raise InputError(f"score.turns and score.tool_calls are for JSONL; the rows of {directory} are read as they are")
        self.manifest = read_manifest(directory, "score.source")
        self.sampling = self.manifest["sampling"]
        there = {entry["split"] for entry in self.manifest["shards"]}
        schema = pq.read_schema(directory / self.manifest["shards"][0]["file"])
        self.sampled = [name for name in schema.names if name == "sampling_logprob"]  # true of the text, whoever reads it
        columns = ["id", "prompt", "completion", "input_ids", "completion_start", "finish_reason", "metadata"]
        columns += self.sampled
        parts = [load_dataset(directory, split).select_columns(columns) for split in SPLITS if split in there]
        self.rows = datasets.concatenate_datasets(parts)

    def __len__(self) -> int:
        return len(self.rows)

    def prepare(self, chat: PromptEncoder) -> int:
        if self.manifest["tokenizer"]["vocabulary_hash"] != vocabulary_hash(chat.tokenizer):
            raise InputError(
                f"score.source: {self.directory} was written with another vocabulary than that of "
                f"{chat.experiment.teacher.model}; export its text and score that"
            )
        import pyarrow.compute as pc

        self.chat = chat
        longest = pc.max(pc.list_value_length(self.rows.data.column("input_ids"))).as_py()
        if chat.experiment.teacher.system is not None:
            texts = map(self.text, range(len(self)))
            longest = max(len(text.told_ids or text.prompt_ids) + len(text.completion_ids) for text in texts)
        return chat.check_length(longest + 1, "the tokens of its longest row and the one that vLLM adds", str(self.directory))

    def text(self, index: int) -> Text:
        row = self.rows[index]
        ids, start = row["input_ids"].tolist(), int(row["completion_start"])
        messages = ([dict(m) for m in row["prompt"]], [dict(m) for m in row["completion"]])
        sampled = float(row["sampling_logprob"]) if self.sampled else None
        other = json.loads(str(row["metadata"]))
        system = self.chat.experiment.teacher.system
        told_ids = None if system is None else self.chat.told_ids(messages[0], f"{self.directory} row {row['id']}")
        return Text(str(row["id"]), *messages, ids[:start], ids[start:], str(row["finish_reason"]), sampled, other, told_ids)


class _Requests(Sequence[Request]):
    """Requests for texts, made when they are asked for."""

    def __init__(self, texts: _Source, seed: int) -> None:
        self.texts = texts
        self.seed = seed

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        text = self.texts.text(index)
        return Request(index, text.told_ids or text.prompt_ids, row_seed(text.id, self.seed), text.completion_ids)


class _Texts:
    """The rows to make, from whatever holds the text."""

    reads = True

    def __init__(self, chat: PromptEncoder, texts: _Source) -> None:
        self.chat = chat
        self.texts = texts
        self.max_model_len = texts.prepare(chat)
        self.requests = _Requests(texts, chat.experiment.seed)

    def run(self, engine: Engine, shards: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        return engine.score(shards)

    def row(self, completion: Completion) -> Row:
        text = self.texts.text(completion.index)
        return Row(
            text.id,
            text.prompt,
            text.completion,
            text.prompt_ids,
            completion.ids,
            text.finish_reason or completion.finish_reason,
            completion.token_logprobs,
            completion.targets,
            text.sampling_logprob,
            text.metadata,
        )

    def description(self) -> dict[str, Any]:
        return {"sampling": self.texts.sampling}
