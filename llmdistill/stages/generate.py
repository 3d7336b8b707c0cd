"""`llmdistill generate`: the teacher continues the prompts; text and soft targets are stored in one pass."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmdistill.config import Experiment
from llmdistill.data.budget import estimate
from llmdistill.data.conversations import as_columns
from llmdistill.data.ids import row_id, row_seed
from llmdistill.data.manifest import read_manifest
from llmdistill.data.rows import Row
from llmdistill.data.shards import EVERYTHING, Layout, Opened, Part, Worker, count_finished, count_shards, is_whole, make_dataset
from llmdistill.data.targets import SampledLogprobs
from llmdistill.errors import InputError, UnusableError
from llmdistill.prompting.routing import said, teachers_of
from llmdistill.runs import record
from llmdistill.runs.progress import console, counted, say
from llmdistill.stages.prompts import Prepared, Prompt, prepared_inputs, prepared_prompts
from llmdistill.teachers import Completion, Engine, Request, all_fingerprints, open_engine
from llmdistill.teachers.prompt_encoding import PromptEncoder, encoders
from llmdistill.teachers.thinking import answer_start

NO_ANSWER = "no_answer"  # the finish reason of a reasoning trace that has not ended, or with nothing behind it


@dataclass(frozen=True)
class Writer:
    """A model in memory that generates instead of the weights in `teacher.model`, with the same tokenizer and template.

    Attributes:
        opened: gives its engine.
        fingerprint: what identifies its weights.
        made_from: path and hash of what they follow from.
        prompts: how many it answers.
        prepared: gives them; called only if rows are missing.
    """

    opened: Opened
    fingerprint: str
    made_from: dict[str, str]
    prompts: int
    prepared: Callable[[], Prepared]


def generate(experiment: Experiment, dry_run: bool = False, worker: Worker = EVERYTHING, writer: Writer | None = None) -> None:
    """Write the dataset `OUTPUT/data`, continuing an interrupted run.

    Args:
        experiment: the configuration.
        dry_run: only say what would be done.
        worker: knows which shards are its own to make.
        writer: the model that writes, where it is in memory.

    Raises:
        InputError: the prompts, the teacher or the output directory are not usable; nothing was written.
    """
    if experiment.targets.stored.of_writer:
        raise InputError(
            f"targets.kind is {experiment.targets.kind}, which `score` makes of a dataset with targets.kind "
            f"{SampledLogprobs.name}; for rounds set it to sampled"
        )
    directory = experiment.directory("data")
    models, wholes = all_fingerprints(experiment) if writer is None else (writer.made_from, {"": writer.fingerprint})
    prepared = prepared_prompts(experiment) if writer is None else writer.prepared()
    if prepared is None:
        if dry_run:
            return say("generate", "will answer all prompts made by `prompts`")
        raise InputError(f"{experiment.directory('prompts')}: does not exist; run `prompts` first, or `run` for all stages")
    rows = ((prompt.metadata, prompt.lineage.get("source", {}), prompt.origin) for prompt in prepared.prompts)
    names = teachers_of(experiment, len(prepared.prompts), rows)
    claim = _claim(experiment, {**prepared.inputs, **models}, writer)
    state = record.claim(*claim)

    if dry_run:
        _say_plan(experiment, prepared, names)
    elif state == "done" and is_whole(directory):
        say("generate", f"{directory} is finished ({counted(read_manifest(directory)['rows'], 'row')})")
    else:
        opened = open_engine if writer is None else writer.opened
        make_dataset(claim, _Prompts(experiment, encoders(experiment, wholes), prepared, names), worker, opened)
    return None


def claims(experiment: Experiment, writer: Writer | None = None) -> list[record.Claim]:
    """The dataset, and what it depends on."""
    models = all_fingerprints(experiment)[0] if writer is None else writer.made_from
    return [_claim(experiment, {**prepared_inputs(experiment), **models}, writer)]


def _claim(experiment: Experiment, inputs: dict[str, str], writer: Writer | None) -> record.Claim:
    settings = experiment.model_dump(mode="json", include={"seed", "prompts", "generate", "targets", *experiment.who})
    if writer is not None:
        settings["drawn"] = writer.prompts
    return record.Claim(experiment.directory("data"), "generate", settings, inputs)


class _Prompts:
    """The rows to make: prompts as the teacher's token ids, repeated by the number of samples; grouped by teacher."""

    def __init__(self, experiment: Experiment, chats: dict[str, PromptEncoder], prepared: Prepared, names: list[str]) -> None:
        self.chat = next(chat for chat in chats.values() if chat.experiment.teacher == experiment.teacher)
        soft = bool(experiment.targets.stored.columns)
        self.writes_twice = experiment.generate.rereads
        self.reads = self.writes_twice and (soft or not experiment.teacher.abilities.api)  # what is not known is not read
        self._traces: dict[int, str] = {}  # of rows that are read and not yet stored
        self._prompts = prepared.prompts
        self._usable = array("q")  # the numbers of those that the teacher can be asked
        self.left_out = prepared.left_out
        self.steps = prepared.steps
        self.sampling = experiment.generate
        self._ids = array("i")  # of all prompts as the teacher sees them, one after the other
        self._starts = array("q", [0])
        self.parts = [self._part(name, chat, names) for name, chat in chats.items()]
        self.left_out.close("generate", len(self._usable))
        self.layout = Layout([part.rows for part in self.parts], self.sampling.rows_per_shard)
        self.requests = _Requests(self)

    def _part(self, name: str, chat: PromptEncoder, names: list[str]) -> Part:
        """Encode the prompts of a teacher."""
        if self.sampling.thinking == "removed" and not chat.experiment.teacher.abilities.api and chat.template.begins_traces:
            raise InputError(
                f"generate.thinking: removed, but the chat template of {chat.experiment.teacher.model} opens a trace in every "
                "prompt, so answers without a trace are not possible; keep the traces or mask them"
            )
        longest, before, what = 0, len(self._usable), f"its prompt and generate.max_tokens {self.sampling.max_tokens:,}"
        for number, prompt in enumerate(self._prompts):
            if names[number] != name:
                continue
            try:
                ids = chat.told_ids(prompt.messages, prompt.origin, prompt.tools)
                chat.check_length(len(ids) + self.sampling.max_tokens, what, prompt.origin)
            except UnusableError as error:
                self.left_out.add(error, {"prompt": prompt.messages})
                continue
            self._usable.append(number)
            self._ids.extend(ids)
            self._starts.append(len(self._ids))
            longest = max(longest, len(ids))
        length = chat.experiment.teacher.max_model_len or longest + self.sampling.max_tokens
        return Part(name, chat, (len(self._usable) - before) * self.sampling.samples, length)

    def __len__(self) -> int:
        return len(self._usable)

    def prompt(self, number: int) -> Prompt:
        """A prompt for the teacher."""
        found: Prompt = self._prompts[self._usable[number]]
        return found

    def part(self, index: int) -> Part:
        """The part that a row belongs to."""
        return self.parts[self.layout.part_of(index)]

    def told_ids(self, number: int) -> Sequence[int]:
        """The token ids of a prompt as the teacher sees it."""
        return self._ids[self._starts[number] : self._starts[number + 1]]

    def prompt_ids(self, index: int) -> Sequence[int]:
        """The token ids of a row's prompt as stored."""
        number, chat = index // self.sampling.samples, self.part(index).chat
        if chat.experiment.teacher.system is None:
            return self.told_ids(number)
        prompt = self.prompt(number)
        return chat.prompt_ids(prompt.messages, prompt.origin, prompt.tools)

    def id(self, index: int) -> str:
        """The stable id of a row."""
        number, sample = divmod(index, self.sampling.samples)
        return row_id(self.prompt(number).content, self.part(index).chat.fingerprint, self.sampling, sample)

    def run(self, engine: Engine, shards: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        return self._write_and_read(engine, shards) if self.writes_twice else engine.generate(shards)

    def _write_and_read(self, engine: Engine, shards: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Every shard is written, then read as it is stored.

        Log-probabilities that come with the text have a grammar's mask in them, or follow a trace that is no longer there.
        """
        for requests in shards:
            request_of = {request.index: request for request in requests}
            texts, reason_of, usage_of = [], {}, {}
            for completion in engine.generate([requests]):
                if completion.failed:
                    yield completion
                    continue
                start, reason_of[completion.index] = self._answer(completion)
                before = self.part(completion.index).chat.template.decode(completion.ids[:start])
                self._traces[completion.index] = completion.trace or before
                if not self.reads:
                    yield replace(completion.behind(start), finish_reason=reason_of[completion.index])
                    continue
                usage_of[completion.index] = completion.usage
                texts.append(replace(request_of[completion.index], completion_ids=completion.ids[start:].tolist()))
            for read in engine.score([texts] if texts else []):
                written = usage_of[read.index]
                read = replace(read, usage=read.usage + written if read.usage and written else read.usage)
                yield read if read.failed else replace(read, finish_reason=reason_of[read.index])

    def _answer(self, completion: Completion) -> tuple[int, str]:
        """Where the answer begins and how it ends; an unfinished trace keeps its last token, with `no_answer`.

        What an endpoint gives apart from a trace is the answer, and so is what it ends by itself without any.
        """
        part = self.part(completion.index)
        if self.sampling.thinking == "kept" or completion.trace is not None:
            return 0, completion.finish_reason
        start = answer_start(part.chat.tokenizer, completion.ids, self.sampling.thinking_end)
        if start is None and part.chat.experiment.teacher.abilities.api and completion.finish_reason == "stop":
            return 0, completion.finish_reason
        return (len(completion.ids) - 1, NO_ANSWER) if start is None else (start, completion.finish_reason)

    def row(self, completion: Completion) -> Row:
        prompt, prompt_ids = self.prompt(completion.index // self.sampling.samples), self.prompt_ids(completion.index)
        part = self.part(completion.index)
        provenance: dict[str, Any] = {"lineage": prompt.lineage}
        if part.name:
            provenance["teacher"] = part.name
        if prompt.session:
            provenance["conversation"] = prompt.session
        trace = self._traces.pop(completion.index, "")
        if self.sampling.thinking == "masked":
            start, reason = self._answer(completion)
            before = completion.ids[:start]
            trace = part.chat.template.decode(before)
            prompt_ids, completion = [*prompt_ids, *before.tolist()], replace(completion.behind(start), finish_reason=reason)
        if self.sampling.thinking != "kept":
            provenance["thinking"] = trace
        answer = {"role": "assistant", "content": part.chat.template.decode(completion.ids)}
        if prompt.uses_tools:
            provenance |= {"messages": [*prompt.messages, answer], "tools": prompt.tools}
        return Row(
            self.id(completion.index),
            as_columns(prompt.messages),
            [answer],
            prompt_ids,
            completion.ids,
            completion.finish_reason,
            completion.token_logprobs,
            completion.targets,
            completion.sampling_logprob,
            prompt.metadata,
            provenance,
        )

    def description(self) -> dict[str, Any]:
        sampling = self.sampling.model_dump(exclude={"rows_per_shard"} | self.sampling.unused)
        return {"sampling": sampling, "prompts": self.steps, **self.left_out.described}


class _Requests(Sequence[Request]):
    """Requests for all rows, made on demand."""

    def __init__(self, prompts: _Prompts) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts) * self.prompts.sampling.samples

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index // self.prompts.sampling.samples
        seed = row_seed(self.prompts.id(index), self.prompts.chat.experiment.seed)
        prompt = self.prompts.prompt(number)
        messages = self.prompts.part(index).chat.told(prompt.messages)
        return Request(index, self.prompts.told_ids(number), seed, messages=messages, tools=prompt.tools)


def _say_plan(experiment: Experiment, prepared: Prepared, names: list[str]) -> None:
    samples, prompts = experiment.generate.samples, len(names)
    rows, each = prompts * samples, [number * samples for number in Counter(names).values()]
    count, there = count_shards(experiment, each), count_finished(experiment.directory("data"))
    tokens = rows * experiment.generate.max_tokens
    per_position = experiment.targets.stored.bytes_per_token * experiment.targets.kept
    size = tokens * (per_position + 3)
    directory = experiment.directory("data")
    routed = f" ({said(names)})" if experiment.teachers else ""
    times = f" × {samples} samples" if samples > 1 else ""
    console.print(
        f"{counted(prompts, 'prompt')}{routed}{times} = {counted(rows, 'row')}, up to {_human(tokens)} tokens, "
        f"at most about {_human_bytes(size)} ({per_position:.0f} B/position) in {counted(count, 'shard')}\n"
        f"would write {directory}  ({there:,} of {counted(count, 'shard')} finished)",
        markup=False,
    )
    prepared.left_out.say("generate", prompts)
    if experiment.teacher.price:
        letters = sum(len(str(message.get("content"))) for prompt in prepared.prompts for message in prompt.messages)
        say("generate", f"costs {estimate(experiment, letters * experiment.generate.samples, rows)}")


def _human(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:,.0f}"


def _human_bytes(number: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"
