"""`llmdistill score`: the teacher scores finished text, which is stored with soft targets like that of `generate`."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from llmdistill.config import Experiment, Score
from llmdistill.data.conversations import Turn, as_columns, learned_turns, metadata, stored_ids
from llmdistill.data.dataset import load_dataset
from llmdistill.data.ids import row_seed, stable_id
from llmdistill.data.left_out import LeftOut
from llmdistill.data.manifest import has_several_tokenizers, read_manifest
from llmdistill.data.row_formats import RowReader
from llmdistill.data.rows import Messages, Row, metadata_and_provenance
from llmdistill.data.shard_writer import SHARD_NAME, SPLITS
from llmdistill.data.shards import EVERYTHING, Opened, Part, Worker, count_finished, count_shards, is_whole, make_dataset
from llmdistill.data.tables import Entry, files_hash, read_answered
from llmdistill.data.targets import SampledByStudent, SampledLogprobs
from llmdistill.data.traffic import opening
from llmdistill.errors import InputError, UnusableError
from llmdistill.models.loading import vocabulary_hash
from llmdistill.prompting.routing import Routed, said, teachers_of
from llmdistill.runs import record
from llmdistill.runs.progress import counted, say
from llmdistill.teachers import Completion, Engine, Request, all_fingerprints, open_engine
from llmdistill.teachers.prompt_encoding import PromptEncoder, encoders


def score(experiment: Experiment, dry_run: bool = False, worker: Worker = EVERYTHING, opened: Opened = open_engine) -> None:
    """Write the dataset `OUTPUT/data`, continuing an interrupted run.

    Args:
        experiment: the configuration.
        dry_run: only say what would be done.
        worker: knows which shards are its own to make.
        opened: gives the teacher's engine.

    Raises:
        InputError: the text, the teacher or the output directory are not usable; nothing was written.
    """
    if experiment.score is None:
        raise InputError("the key score is missing; `score` needs score.source")
    directory, source = experiment.directory("data"), Path(experiment.score.source)
    _, wholes = all_fingerprints(experiment)
    is_dataset = source.is_dir() and any(SHARD_NAME.fullmatch(file.name) for file in source.iterdir())
    drawn = experiment.targets.stored.of_writer
    if drawn and not is_dataset:
        raise InputError(f"score.source: {_no_sample(experiment, source)}")
    texts: _Conversations | _Stored = _Stored(experiment, drawn) if is_dataset else _Conversations(experiment.score)
    names = teachers_of(experiment, len(texts), texts.routed())
    (claim,) = claims(experiment)
    state = record.claim(*claim)
    if dry_run:
        count = count_shards(experiment, Counter(names).values())
        where = f" ({said(names)})" if experiment.teachers else ""
        say("score", f"{counted(len(texts), 'row')}{where} of {source} in {counted(count, 'shard')}")
        texts.left_out.say("score", len(texts))
        say("score", f"would write {directory}  ({count_finished(directory):,} of {counted(count, 'shard')} finished)")
    elif state == "done" and is_whole(directory):
        say("score", f"{directory} is finished ({counted(read_manifest(directory)['rows'], 'row')})")
    else:
        make_dataset(claim, _Texts(experiment, encoders(experiment, wholes), texts, names), worker, opened)


def claims(experiment: Experiment) -> list[record.Claim]:
    """The dataset, and what it depends on."""
    assert experiment.score is not None
    models, _ = all_fingerprints(experiment)
    settings = experiment.model_dump(mode="json", include={"seed", "score", "targets", *experiment.who})
    settings["generate"] = {"rows_per_shard": experiment.generate.rows_per_shard}
    inputs = files_hash(experiment.score.source, "score.source") | models
    return [record.Claim(experiment.directory("data"), "score", settings, inputs)]


@dataclass(frozen=True)
class Text:
    """A conversation with its answer, as token ids too; `told_ids` is the prompt as the teacher sees it, if different.

    `sample` is what the model that wrote it has drawn, where the targets are to be of that.
    """

    id: str
    prompt: Messages
    completion: Messages
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    finish_reason: str | None = None
    sampling_logprob: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    told_ids: Sequence[int] | None = None
    sample: SampledLogprobs | None = None


class _Source(Protocol):
    sampling: dict[str, Any]
    left_out: LeftOut

    def __len__(self) -> int: ...

    def routed(self) -> Iterable[Routed]:
        """For each text, its fields, its file, and its location in words, which determine its teacher."""
        ...

    def prepare(self, chats: Mapping[str, PromptEncoder], names: Sequence[str]) -> list[Part]:
        """Check each text against its teacher, and group the texts by teacher."""
        ...

    def text(self, index: int) -> Text: ...


_ROOM = "its tokens plus the one that vLLM adds"


class _Conversations:
    """The rows of tables."""

    sampling: dict[str, Any] = {}

    def __init__(self, section: Score) -> None:
        self.turns: list[tuple[Entry, Turn, dict[str, Any], dict[str, Any]]] = []
        self.texts: list[Text] | None = None  # those that the teacher can read, once `prepare` has looked
        self.left_out = LeftOut(section)
        reader = RowReader(section)
        for entry in read_answered(section.source, section, "score.source"):
            self.left_out.seen += 1
            try:
                entry.check()
                if entry.refused:
                    raise UnusableError(entry.refused, entry.origin)
                fields = reader.read(entry.fields, entry.origin)
                turns = list(learned_turns(fields, entry.origin, section.turns == "all", section.tool_calls))
            except UnusableError as error:
                self.left_out.add(error, entry.fields)
                continue
            session = entry.conversation
            if session is None and section.turns == "all" and turns and turns[0].prompt:
                session = opening(turns[0].prompt)
            provenance = {"conversation": session} if session else {}
            place = Entry({}, entry.place)
            self.turns += [(place, turn, metadata(fields, turn.fields), provenance) for turn in turns]
        self.left_out.check_share(len(self.turns))
        reader.close("score", section.source)
        if not self.turns and not self.left_out.reasons:
            raise InputError(f"{section.source}: contains no text" + ("" if section.tool_calls else " but tool calls"))

    def __len__(self) -> int:
        return len(self.turns if self.texts is None else self.texts)

    def routed(self) -> Iterable[Routed]:
        return ((other, entry.place, entry.origin) for entry, _, other, _ in self.turns)

    def prepare(self, chats: Mapping[str, PromptEncoder], names: Sequence[str]) -> list[Part]:
        self.texts = []
        parts = [self._part(name, chat, names) for name, chat in chats.items()]
        self.left_out.close("score", len(self.texts))
        return parts

    def _part(self, name: str, chat: PromptEncoder, names: Sequence[str]) -> Part:
        """Add the texts of a teacher."""
        texts: list[Text] = []
        seen: dict[str, int] = {}
        longest = 0
        for (entry, turn, other, provenance), its in zip(self.turns, names, strict=True):
            if its != name:
                continue
            origin = entry.origin
            try:
                told_ids, prompt_ids, completion_ids = _token_ids(turn, chat, origin)
                length = len(told_ids) + len(completion_ids) + 1
                chat.check_length(length, _ROOM, origin)
            except UnusableError as error:
                self.left_out.add(error, {"prompt": turn.prompt, "completion": turn.completion})
                continue
            longest = max(longest, length)
            content = stable_id(turn.prompt, turn.completion, *([turn.tools] if turn.tools else []), chat.fingerprint)
            seen[content] = seen.get(content, -1) + 1  # the same text twice is two rows
            text = Text(
                stable_id(content, seen[content]),
                as_columns(turn.prompt),
                as_columns(turn.completion),
                array("i", prompt_ids),  # a list of numbers takes nine times the memory
                array("i", completion_ids),
                metadata=other,
                provenance=provenance | turn.provenance | ({"teacher": name} if name else {}),
                told_ids=None if told_ids is prompt_ids else array("i", told_ids),
            )
            texts.append(text)
        assert self.texts is not None
        self.texts += texts
        return Part(name, chat, len(texts), chat.experiment.teacher.max_model_len or longest)

    def text(self, index: int) -> Text:
        assert self.texts is not None
        return self.texts[index]


def _token_ids(turn: Turn, chat: PromptEncoder, origin: str) -> tuple[list[int], list[int], list[int]]:
    """The prompt as the teacher sees it and as stored, and the answer."""
    try:
        prompt_ids, completion_ids = turn.token_ids(chat.template)
    except UnusableError as error:
        raise error.at(origin) from None
    as_stored = turn.plain or chat.experiment.teacher.system is None
    told_ids = prompt_ids if as_stored else chat.told_ids(turn.prompt, origin, turn.tools)
    return told_ids, prompt_ids, completion_ids


class _Stored:
    """The rows of a dataset, in all of its splits. Their ids are kept, and so are token ids if they are the teacher's."""

    def __init__(self, experiment: Experiment, drawn: bool) -> None:
        import datasets

        section, self.drawn = experiment.score, drawn
        assert section is not None
        self.directory = directory = Path(section.source)
        if section.turns != "last" or not section.tool_calls:
            raise InputError(f"score.turns and score.tool_calls are for tables; the rows of {directory} are used unchanged")
        self.left_out = LeftOut()
        self.manifest = read_manifest(directory, "score.source")
        if drawn and self.manifest["targets"]["kind"] != SampledLogprobs.name:
            raise InputError(f"score.source: {_no_sample(experiment, directory)}")
        if drawn and self.manifest["targets"]["n"] != experiment.targets.n:
            drawn_n = self.manifest["targets"]["n"]
            raise InputError(
                f"targets.n is {experiment.targets.n}, but the sample in {directory} has {drawn_n} tokens per position"
            )
        self.sampling = self.manifest["sampling"]
        there = {entry["split"] for entry in self.manifest["shards"]}
        schema = pq.read_schema(directory / self.manifest["shards"][0]["file"])
        self.sampled = [name for name in schema.names if name == "sampling_logprob"]  # true of the text, whoever reads it
        columns = ["id", "prompt", "completion", "input_ids", "completion_start", "finish_reason", "metadata"]
        columns += [*self.sampled, *(SampledLogprobs.columns if drawn else ())]
        parts = [load_dataset(directory, split).select_columns(columns) for split in SPLITS if split in there]
        self.rows = datasets.concatenate_datasets(parts)
        # For rows in a different vocabulary, in the teacher's tokens.
        self.encoded: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        self.order: list[int] | None = None  # of the rows that are read, those of a teacher together, once `prepare` has looked

    def __len__(self) -> int:
        return len(self.rows if self.order is None else self.order)

    def routed(self) -> Iterable[Routed]:
        for identity, text in zip(self.rows["id"], self.rows["metadata"], strict=True):
            other, ours = metadata_and_provenance(str(text))
            yield other, ours.get("lineage", {}).get("source", {}), f"{self.directory} row {identity}"

    def prepare(self, chats: Mapping[str, PromptEncoder], names: Sequence[str]) -> list[Part]:
        hashes = {name: vocabulary_hash(chat.tokenizer) for name, chat in chats.items()}
        stored = [vocabulary == hashes[name] for vocabulary, name in zip(self._vocabularies(), names, strict=True)]
        others = [number for number, same in enumerate(stored) if not same]
        if self.drawn and others:
            other = chats[names[others[0]]].experiment.teacher.model
            raise InputError(
                f"{self.directory}: its samples are in a different vocabulary than that of {other}; set targets.kind to topk"
            )
        self._encode(chats, names, others)
        self._arrange(chats, names, [number for number, same in enumerate(stored) if same or number in self.encoded])
        lengths = self._lengths()
        self._arrange(chats, names, list(lengths))
        self.left_out.close("score", len(lengths))
        parts = []
        for name, chat in chats.items():
            its = [length for number, length in lengths.items() if names[number] == name]
            parts.append(Part(name, chat, len(its), chat.experiment.teacher.max_model_len or max(its, default=0) + 1))
        return parts

    def _arrange(self, chats: Mapping[str, PromptEncoder], names: Sequence[str], numbers: Sequence[int]) -> None:
        """Add rows by number, grouped by teacher."""
        self.order = [number for name in chats for number in numbers if names[number] == name]
        self.encoders = [(names[number], chats[names[number]]) for number in self.order]

    def _vocabularies(self) -> Iterator[str]:
        """The hash of the vocabulary in which each row is stored."""
        teachers = self.manifest["teachers"] if has_several_tokenizers(self.manifest) else {}
        for text in self.rows["metadata"]:
            writer = metadata_and_provenance(str(text))[1].get("teacher") if teachers else None
            yield (teachers[writer] if writer else self.manifest)["tokenizer"]["vocabulary_hash"]

    def _encode(self, chats: Mapping[str, PromptEncoder], names: Sequence[str], numbers: Sequence[int]) -> None:
        """Rows in a different vocabulary than their teacher's, if its chat template accepts them."""
        rows = self.rows.with_format(None)
        for number in numbers:
            try:
                if self.sampling.get("thinking") == "masked":
                    raise UnusableError("its reasoning trace is part of its prompt, which is in another model's tokens")
                prompt_ids, ids = stored_ids(rows[number], chats[names[number]].template)
                self.encoded[number] = array("i", prompt_ids), array("i", ids)
            except UnusableError as error:
                self.left_out.add(error.at(f"{self.directory} row {rows[number]['id']}"))

    def _lengths(self) -> dict[int, int]:
        """The tokens of each row that fits its teacher, by its number in reading order."""
        import pyarrow.compute as pc

        assert self.order is not None
        found, stored = {}, pc.list_value_length(self.rows.data.column("input_ids")).to_numpy()
        for place, (number, (_, chat)) in enumerate(zip(self.order, self.encoders, strict=True)):
            length = int(stored[number])
            try:
                if chat.experiment.teacher.system is not None or number in self.encoded:
                    text = self.text(place)
                    length = len(text.told_ids or text.prompt_ids) + len(text.completion_ids)
                chat.check_length(length + 1, "its tokens plus the one that vLLM adds", str(self.directory))
                found[number] = length
            except UnusableError as error:
                self.left_out.add(error.at(f"{self.directory} row {self.rows[number]['id']}"))
        return found

    def text(self, index: int) -> Text:
        assert self.order is not None
        place, (name, chat) = self.order[index], self.encoders[index]
        row = self.rows[place]
        ids, start = row["input_ids"].tolist(), int(row["completion_start"])
        messages = ([dict(m) for m in row["prompt"]], [dict(m) for m in row["completion"]])
        sampled = float(row["sampling_logprob"]) if self.sampled else None
        other, provenance = metadata_and_provenance(str(row["metadata"]))
        provenance |= {"teacher": name} if name else {}
        system = chat.experiment.teacher.system
        whole = provenance["messages"][:-1] if "messages" in provenance else messages[0]
        prompt_ids, completion_ids = self.encoded.get(place, (ids[:start], ids[start:]))
        origin = f"{self.directory} row {row['id']}"
        told_ids = None
        if system is not None and whole:
            tools = provenance.get("tools")
            trace = prompt_ids[len(chat.prompt_ids(whole, origin, tools)) :]  # of generate.thinking: masked
            told_ids = [*chat.told_ids(whole, origin, tools), *trace]
        reason = str(row["finish_reason"])
        sample = SampledLogprobs.of_rows([row], [len(completion_ids)]) if self.drawn else None
        made = (str(row["id"]), *messages, prompt_ids, completion_ids, reason, sampled, other, provenance, told_ids)
        return Text(*made, sample=sample)


def _no_sample(experiment: Experiment, source: Path) -> str:
    return (
        f"{source} has no sample of the model that wrote it, which targets.kind {experiment.targets.kind} needs: a dataset with "
        f"targets.kind {SampledLogprobs.name}"
    )


class _Requests(Sequence[Request]):
    """Requests for texts, made on demand."""

    def __init__(self, texts: _Source, seed: int) -> None:
        self.texts = texts
        self.seed = seed

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        text = self.texts.text(index)
        asked_NJ = None if text.sample is None else text.sample.ids_NK
        return Request(index, text.told_ids or text.prompt_ids, row_seed(text.id, self.seed), text.completion_ids, asked_NJ)


class _Texts:
    """The rows to make, from any source of text; grouped by teacher."""

    reads = True

    def __init__(self, experiment: Experiment, chats: dict[str, PromptEncoder], texts: _Source, names: list[str]) -> None:
        self.chat = next(chat for chat in chats.values() if chat.experiment.teacher == experiment.teacher)
        assert experiment.score is not None
        self.source = experiment.score.source
        self.texts = texts
        self.parts = texts.prepare(chats, names)
        self.left_out = texts.left_out
        self.requests = _Requests(texts, experiment.seed)

    def run(self, engine: Engine, shards: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        for read in engine.score(shards):
            sample = self.texts.text(read.index).sample
            if sample is None or read.said is None:
                yield read
            else:
                yield replace(read, targets=SampledByStudent.of_sample(sample, read.said.asked_NJ), said=None)

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
            text.provenance,
        )

    def description(self) -> dict[str, Any]:
        return {"sampling": self.texts.sampling, "text_from": self.source, **self.texts.left_out.described}
