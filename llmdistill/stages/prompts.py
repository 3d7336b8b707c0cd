"""`llmdistill prompts`: the teacher makes prompts from prompts. Also the source of prompts for `generate`."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmdistill.config import Experiment
from llmdistill.config.prompts import Magpie, Prompts, SelfInstruct
from llmdistill.data.batches import read_batches
from llmdistill.data.conversations import CONVERSATION, as_columns, given_prompt, metadata, more_than_text
from llmdistill.data.ids import stable_id
from llmdistill.data.jsonl import Fields
from llmdistill.data.left_out import LeftOut
from llmdistill.data.manifest import MANIFEST, read_manifest
from llmdistill.data.row_formats import RowReader, check_reserved
from llmdistill.data.rows import MESSAGES, to_json
from llmdistill.data.shard_writer import ROW_GROUP, remove_leftovers
from llmdistill.data.shards import EVERYTHING, Share
from llmdistill.data.subjects import conversation_of, is_held_out, prompt_keys
from llmdistill.data.tables import Entry, conversation_of_prompt
from llmdistill.errors import InputError, UnusableError
from llmdistill.models.loading import load_tokenizer
from llmdistill.prompting.asking import Asker, WaitingForOthersError
from llmdistill.prompting.items import Counts, Item, count_items, items_file, read_items, read_refused, rows_file
from llmdistill.prompting.magpie import PreQueryFormat
from llmdistill.prompting.passages import Starts
from llmdistill.prompting.plan import Plan, describe_steps, final_template
from llmdistill.prompting.sources import read_source, source_hash
from llmdistill.prompting.steps import Files, PromptStepContext, run_step
from llmdistill.prompting.task_prompt import TaskPrompt
from llmdistill.prompting.template import PromptTemplate
from llmdistill.runs import record
from llmdistill.runs.inputs import sha256
from llmdistill.runs.progress import counted, say
from llmdistill.teachers import all_fingerprints, teacher_precision
from llmdistill.teachers.prompt_encoding import PromptEncoder

PROMPTS_FILE = "prompts.parquet"
REJECTED_FILE = "rejected.parquet"
# `with_tools` is the conversation and the tools that it offers, as JSON, where there is more to it than roles and contents.
_PROMPTS_SCHEMA = pa.schema([("prompt", MESSAGES), *((name, pa.string()) for name in ("with_tools", "metadata", "lineage"))])
_REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in ("step", "verdict", "reason", "text", "lineage")])


@dataclass(frozen=True)
class Prompt:
    """A conversation for the teacher to continue, as the chat template takes it.

    Attributes:
        messages: up to the turn that the teacher writes.
        origin: where it comes from, in words, for messages.
        metadata: what else its row says.
        lineage: its ancestors.
        tools: that the teacher may call.
    """

    messages: list[dict[str, Any]]
    origin: str
    metadata: Fields
    lineage: dict[str, Any]
    tools: list[Any] | None = None

    @property
    def uses_tools(self) -> bool:
        """Whether it has more than roles and contents."""
        return more_than_text(self.messages, self.tools)

    @property
    def session(self) -> str | None:
        """The session that it belongs to, if its source has one."""
        return self.lineage.get("source", {}).get("conversation")

    @property
    def content(self) -> Any:
        """What distinguishes it from the others."""
        return {"messages": self.messages, "tools": self.tools} if self.uses_tools else self.messages


class PromptTable(Sequence[Prompt]):
    """Prompts in Arrow's memory: little more than their text."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        schema = _PROMPTS_SCHEMA.append(pa.field("origin", pa.string()))
        batches, rows = [], []
        for prompt in prompts:
            rows.append({**_stored(prompt), "origin": prompt.origin})
            if len(rows) == ROW_GROUP:
                batches.append(pa.Table.from_pylist(rows, schema))
                rows = []
        self._table = pa.concat_tables([*batches, pa.Table.from_pylist(rows, schema)]).combine_chunks()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        row = {name: self._table[name][index].as_py() for name in self._table.schema.names}
        return _read(row, row["origin"])


def prompts(experiment: Experiment, dry_run: bool = False, worker: Share = EVERYTHING) -> None:
    """Write `OUTPUT/prompts`, continuing an interrupted run.

    Args:
        experiment: the configuration.
        dry_run: only say what would be done.
        worker: its share of every step's questions.

    Raises:
        InputError: source, templates, teacher or output directory are not usable; nothing was written.
    """
    section, teacher = experiment.prompts, experiment.teacher
    if section is None or not section.steps:
        raise InputError(
            "the key prompts.steps is missing; without steps there is nothing to do, as `generate` reads prompts.source itself"
        )
    directory = experiment.directory("prompts")
    models, _ = all_fingerprints(experiment)
    plan, starts = Plan(section), token_starts(experiment)
    counts = Counts()
    bad = LeftOut(section)
    for _, reason in _entries(plan, starts, bad):
        counts.add(reason)
    bad.check_share(counts.kept)
    if section.from_where and not counts.kept:
        raise InputError(f"prompts.source: no usable prompts: {counts}")
    first = section.steps[0].settings
    if isinstance(first, SelfInstruct) and counts.kept < first.examples:
        raise InputError(
            f"prompts.steps.0.self_instruct.examples is {first.examples}, but {section.from_where} has only {counts.kept} items"
        )
    if dry_run:
        return _say_plan(experiment, counts)
    (claim,) = claims(experiment)
    if record.claim(*claim) == "done":
        made = (record.read_run(directory) or {})["results"]["prompts"]
        return say("prompts", f"{directory} is finished ({counted(made, 'prompt')})")
    if teacher.budget is not None:
        say("warning", "teacher.budget covers only the dataset; requests made by prompts.steps do not count")
    chat = PromptEncoder(experiment, models[teacher.model])
    for step in section.steps:
        if isinstance(step.settings, Magpie):
            PreQueryFormat(chat, step.settings.system is not None)
    asker = Asker(experiment, chat, worker)
    context = PromptStepContext(asker, plan.templates, experiment.seed, plan.task)
    asker.precision = record.begin_computing(*claim, experiment.seed, teacher_precision(teacher))
    remove_leftovers(directory)
    try:
        _make(plan, context, starts, directory)
    except WaitingForOthersError as error:
        say("prompts", f"{error}; run this command again once they are done")
    return None


def claims(experiment: Experiment) -> list[record.Claim]:
    """The prompts, and what they depend on."""
    models, _ = all_fingerprints(experiment)
    inputs = prompts_inputs(experiment.prompts or Prompts()) | models
    return [record.Claim(experiment.directory("prompts"), "prompts", _settings(experiment), inputs)]


def _make(plan: Plan, context: PromptStepContext, starts: Starts | None, directory: Path) -> None:
    """Process the source with the steps that are not done, and the result with the template."""
    last = directory / "0-source.parquet"
    if not last.exists():
        _write_source(plan, starts, last)
    made = [("source", last)] if plan.section.from_where else []
    for number, step in enumerate(plan.section.steps, start=1):
        files = Files(last, directory / f"{number}-{step.name}.parquet")
        if not files.out.exists():
            run_step(context, step.settings, files)
            say(step.name, str(count_items(files.out)))
        made.append((f"{number} {step.name}", files.out))
        last = files.out
    counts = [(name, count_items(file)) for name, file in made]
    counts.append(("template", _write_prompts(plan, made, directory)))
    kept = counts[-1][1].kept
    if not kept:
        raise InputError(f"{directory}: no prompts are left; {REJECTED_FILE} says why")
    asker = context.asker
    steps = [{"name": name, **count.described()} for name, count in counts]
    record.finish(directory, {"prompts": kept, **record.speed(asker.tokens, asker.seconds), "steps": steps})
    say("prompts", f"{counted(kept, 'prompt')} in {directory / PROMPTS_FILE}")


def _entries(plan: Plan, starts: Starts | None, bad: LeftOut) -> Iterator[tuple[Entry, str | None]]:
    """The rows of the source, each with the reason if it is unusable; unreadable ones are also added to `bad`."""
    for entry in read_source(plan.section, starts):
        bad.seen += 1
        reason = entry.refused
        try:
            entry.check()
            check_reserved(entry.fields, entry.origin)
            plan.check(entry)
        except UnusableError as error:
            bad.add(error)
            reason = error.reason
        yield entry, reason


def _write_source(plan: Plan, starts: Starts | None, file: Path) -> None:
    bad, kept = LeftOut(plan.section), 0
    with items_file(file) as writer:
        for entry, reason in _entries(plan, starts, bad):
            item = Item(stable_id(to_json(entry.fields)), entry.fields, {"source": entry.place})
            if reason is None:
                writer.keep(item)
                kept += 1
            else:
                writer.refuse("rejected", item, reason, str(entry.fields.get("passage", "")))
        bad.check_share(kept)
        if plan.section.from_where is None:
            writer.keep(Item(stable_id("no source"), {}, {}))  # for magpie, which needs none


def _write_prompts(plan: Plan, made: list[tuple[str, Path]], directory: Path) -> Counts:
    """Write `prompts.parquet`, and `rejected.parquet` with everything that was left out."""
    counts, seen = Counts(), _Seen()
    with (
        rows_file(directory / PROMPTS_FILE, _PROMPTS_SCHEMA) as kept,
        rows_file(directory / REJECTED_FILE, _REJECTED_SCHEMA) as rejected,
    ):
        for name, file in made:
            for row in read_refused(file):
                rejected.add({"step": name, **{key: row[key] for key in ("verdict", "reason", "text", "lineage")}})
        for item in read_items(made[-1][1]):
            text = ""
            try:
                prompt = _render(plan.section, plan.final, item.fields, item.lineage, item.where, is_made=plan.makes_prompt)
                reason, text = seen.refuses(prompt), as_columns(prompt.messages)[-1]["content"]
            except UnusableError as error:
                reason = error.reason
            counts.add(reason)
            if reason is None:
                kept.add(_stored(prompt))
            else:
                refused = {"step": "template", "verdict": "rejected", "reason": reason, "text": text}
                rejected.add({**refused, "lineage": to_json(item.lineage)})
    return counts


def load_prompts(
    section: Prompts, starts: Starts | None = None, counts: Counts | None = None, left_out: LeftOut | None = None
) -> PromptTable:
    """Read and render every row of the source; duplicate conversations are kept once.

    Args:
        section: the configuration; its steps play no part.
        starts: returns the positions of tokens in a text; needed if passages are measured in tokens.
        counts: receives what became of the rows.
        left_out: receives those that cannot be used.

    Raises:
        InputError: names the file and the line or key.
    """
    counts = Counts() if counts is None else counts
    bad = LeftOut(section) if left_out is None else left_out

    def rendered() -> Iterator[Prompt]:
        template = final_template(section)
        seen, reader = _Seen(), RowReader(section)
        for entry in read_source(section, starts):
            bad.seen += 1
            reason = entry.refused
            try:
                entry.check()
                if reason is None:
                    prompt = _render(section, template, entry.fields, {"source": entry.place}, entry.origin, reader)
                    reason = seen.refuses(prompt)
            except UnusableError as error:
                bad.add(error, entry.fields)
                reason = error.reason
            counts.add(reason)
            if reason is None:
                yield prompt

    table = PromptTable(rendered())
    bad.check_share(counts.kept)
    if not table:
        raise InputError(f"prompts.source: no usable prompts: {counts}")
    return table


@dataclass(frozen=True)
class Prepared:
    """The prompts for `generate`, their source, the counts, and what was left out."""

    prompts: PromptTable
    inputs: dict[str, str]
    steps: list[dict[str, Any]]
    left_out: LeftOut = field(default_factory=LeftOut)


def prepared_prompts(experiment: Experiment, empty: bool = False) -> Prepared | None:
    """The output of `prompts` or, without steps, the source itself; None if `prompts` has not been run.

    Args:
        experiment: the configuration.
        empty: whether there may be no prompt that is not known.

    Raises:
        InputError: the source or a template is not usable, or what is there was made with other settings.
    """
    prepared, section = _prepared(experiment), experiment.prompts
    known = section.known if section else []
    shards = {Path(directory): read_manifest(Path(directory), "prompts.known")["shards"] for directory in known}
    if prepared is None or section is None or not known:
        return prepared
    there: set[str] = set()
    for directory, entries in shards.items():
        files = [directory / entry["file"] for entry in entries]
        for rows in read_batches(files, ["prompt", "completion", "metadata"]):
            there.update(prompt_keys(rows))
    counts = Counts()

    def unknown() -> Iterator[Prompt]:
        for prompt in prepared.prompts:
            reason = "known" if conversation_of(as_columns(prompt.messages)) in there else None
            counts.add(reason)
            if reason is None:
                yield prompt

    left = PromptTable(unknown())
    if not left and not empty:
        raise InputError(f"prompts.known: all {len(prepared.prompts):,} prompts are in {', '.join(known)}")
    steps = [*prepared.steps, {"name": "known", **counts.described()}]
    return Prepared(left, prepared.inputs | _known_inputs(section), steps, prepared.left_out)


def count_splits(experiment: Experiment, prompts: Iterable[Prompt]) -> tuple[int, int]:
    """Number of conversations that `curate` will train on and hold out if it rejects none."""
    keys = {json.dumps(prompt.session) if prompt.session else conversation_of(as_columns(prompt.messages)) for prompt in prompts}
    held_out = sum(is_held_out(key, experiment.seed, experiment.eval.held_out) for key in keys)
    return len(keys) - held_out, held_out


def _prepared(experiment: Experiment) -> Prepared | None:
    section = experiment.prompts
    if section is None:
        raise InputError("the key prompts is missing: `generate` needs prompts.source")
    if section.steps:
        return _made_prompts(experiment)
    counts, left_out = Counts(), LeftOut(section)
    table = load_prompts(section, token_starts(experiment), counts, left_out)
    return Prepared(table, prompts_inputs(section), [{"name": "source", **counts.described()}], left_out)


def prepared_inputs(experiment: Experiment) -> dict[str, str]:
    """Path or name and hash of what `prepared_prompts` reads, without reading the prompts.

    Raises:
        InputError: one is missing, or cannot be used.
    """
    section = experiment.prompts or Prompts()
    file = experiment.directory("prompts") / PROMPTS_FILE
    inputs = {str(file): sha256(file)} if section.steps else prompts_inputs(section)
    return inputs | _known_inputs(section)


def _known_inputs(section: Prompts) -> dict[str, str]:
    return {str(Path(directory) / MANIFEST): sha256(Path(directory) / MANIFEST) for directory in section.known}


def prompts_inputs(section: Prompts) -> dict[str, str]:
    """Path or name and hash of the files that prompts are made from: the source, templates and lists.

    Raises:
        InputError: one is missing, or cannot be used.
    """
    return {**source_hash(section), **Plan(section).inputs}


def _made_prompts(experiment: Experiment) -> Prepared | None:
    directory = experiment.directory("prompts")
    run = record.read_run(directory)
    if run is None:
        return None
    # The source need not be there any more, nor be what it was: what was made of it counts.
    if record.claim(directory, "prompts", _settings(experiment), run.get("inputs", {})) != "done":
        raise InputError(f"{directory}: not finished; run `prompts` again to continue")
    file = directory / PROMPTS_FILE
    rows = (row for batch in read_batches([file]) for row in batch.to_pylist())
    table = PromptTable(_read(row, f"{file} row {number}") for number, row in enumerate(rows, start=1))
    return Prepared(table, {str(file): sha256(file)}, run["results"]["steps"])


def token_starts(experiment: Experiment) -> Starts | None:
    """The positions of the teacher's tokens in a text, if passages are measured in them."""
    section = experiment.prompts
    if section is None or section.passages is None or section.passages.unit != "tokens":
        return None
    model, revision, key = experiment.tokenizer
    tokenizer = load_tokenizer(model, revision, experiment.teacher.trust_remote_code, key)

    def starts(text: str) -> list[int]:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [start for start, _ in offsets]

    return starts


class _Seen:
    """Conversations that exist already."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def refuses(self, prompt: Prompt) -> str | None:
        digest = hashlib.sha256(to_json(prompt.content).encode()).digest()[:16]
        if digest in self._digests:
            return "duplicate"
        self._digests.add(digest)
        return None


def _render(
    section: Prompts,
    template: PromptTemplate | TaskPrompt | None,
    fields: Fields,
    lineage: dict[str, Any],
    origin: str,
    reader: RowReader | None = None,
    is_made: bool = False,
) -> Prompt:
    """A conversation from a row's fields: by a template, or its own, which is only the field `prompt` if `is_made`."""
    answer: Fields = {}
    if template:
        check_reserved(fields, origin)
    elif is_made:
        fields = {name: value for name, value in fields.items() if name not in CONVERSATION or name == "prompt"}
    else:
        given, fields = fields, (reader or RowReader(section)).read(fields, origin)
        # The teacher writes its own answer; the one that the row has stays known, to be compared with.
        told = fields.get("completion")
        answer = {name: value for name, value in given.items() if isinstance(told, str) and value == told}
    messages: list[dict[str, Any]] = template.render(fields, origin) if template else given_prompt(fields, origin)
    if section.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": section.system}, *messages]
    used = template.variables if template else CONVERSATION
    tools = None if template else fields.get("tools")
    ancestors = {**lineage, "template": section.template or section.task}
    return Prompt(messages, origin, metadata(fields, used) | answer, ancestors, tools)


def _stored(prompt: Prompt) -> dict[str, Any]:
    whole = to_json(prompt.content) if prompt.uses_tools else None
    described = {"metadata": to_json(prompt.metadata), "lineage": to_json(prompt.lineage)}
    return {"prompt": as_columns(prompt.messages), "with_tools": whole, **described}


def _read(row: dict[str, Any], origin: str) -> Prompt:
    """The prompt of a stored row."""
    messages, tools = conversation_of_prompt(row)
    return Prompt(messages, origin, json.loads(row["metadata"]), json.loads(row["lineage"]), tools)


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What the prompts depend on."""
    settings = experiment.model_dump(mode="json", include={"seed", "teacher", "prompts"})
    trace = experiment.generate.model_dump(include={"thinking_end"}, exclude_defaults=True)  # where answers begin
    return settings | {"generate": {"rows_per_shard": experiment.generate.rows_per_shard, **trace}}


def _say_plan(experiment: Experiment, counts: Counts) -> None:
    section = experiment.prompts
    assert section is not None
    if section.from_where:
        say("source", str(counts))
    for name, text in describe_steps(section, counts.kept if section.from_where else 1):
        say(name, text)
    say("prompts", f"would write {experiment.directory('prompts')}")
