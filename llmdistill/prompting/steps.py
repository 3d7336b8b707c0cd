"""The steps of `prompts.steps`: each reads the previous step's items and writes a file that accounts for every one."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.config.prompts import Ask, Combine, Evolve, Magpie, Novelty, SelfInstruct
from llmdistill.config.section import Section
from llmdistill.data.ids import row_id, row_seed, stable_id
from llmdistill.data.rows import Messages
from llmdistill.errors import InputError, UnusableError
from llmdistill.prompting.asking import GIVEN_UP, TOO_LONG, UNUSABLE, Answer, Asker, ChatFormat, PromptFormat, Question
from llmdistill.prompting.items import Item, ItemWriter, count_items, items_file, read_items
from llmdistill.prompting.magpie import PreQueryFormat
from llmdistill.prompting.novelty import Pool, read_others
from llmdistill.prompting.sources import read_list
from llmdistill.prompting.template import PromptTemplate, compile_text, read_answer, render_text

_OWN_EXAMPLES = 0.25  # of the examples of a later round, as in the paper: 2 of 8


@dataclass(frozen=True)
class PromptStepContext:
    """The context of the steps: the teacher, the templates by path, the experiment's seed, and a task's instruction."""

    asker: Asker
    templates: dict[str, PromptTemplate]
    seed: int
    task: dict[str, str]


@dataclass(frozen=True)
class Files:
    """The input and output of a step; the teacher's answers are in a directory next to the output."""

    source: Path
    out: Path

    def round(self, number: int) -> Path:
        """The files of one of several rounds."""
        return self.out.with_suffix("") / f"round-{number}"


def run_step(context: PromptStepContext, settings: Section, files: Files) -> None:
    """Write the items that a step makes, with an account of its inputs.

    Raises:
        InputError: an item, a template or a list does not fit.
        WaitingForOthersError: other workers have not asked all of their questions yet.
    """
    with items_file(files.out) as writer:
        _STEPS[type(settings)](context, settings, files, writer)


def _ask(context: PromptStepContext, settings: Ask, files: Files, writer: ItemWriter) -> None:
    template = context.templates[settings.template]
    about = _Questions(context, settings.samples, lambda item: template.render(item.fields, item.where))
    for item, question, answer in about.answered("ask", files.source, files.out.with_suffix("")):
        for child in _children(writer, template, item, question, answer, {"step": "ask"}):
            writer.keep(child)


def _evolve(context: PromptStepContext, settings: Evolve, files: Files, writer: ItemWriter) -> None:
    templates = [context.templates[file] for file in settings.templates]

    def drawn(item: Item) -> PromptTemplate:
        return templates[row_seed(item.id, context.seed) % len(templates)]

    about = _Questions(context, 1, lambda item: drawn(item).render(item.fields, item.where))
    if settings.keep_parents:
        for item in read_items(files.source):
            writer.keep(item)
    parents = files.source
    for number in range(1, settings.rounds + 1):
        directory = files.round(number)
        made = directory.with_suffix(".parquet")
        directory.mkdir(parents=True, exist_ok=True)
        with items_file(made) as evolved:
            for item, question, answer in about.answered("evolve", parents, directory):
                template = drawn(item)
                for child in _children(evolved, template, item, question, answer, {"step": "evolve", "round": number}):
                    old, new = (str(one.fields[template.answer.field]) for one in (item, child))
                    if " ".join(old.lower().split()) == " ".join(new.lower().split()):
                        evolved.refuse("rejected", child, "unchanged", new)
                    else:
                        evolved.keep(child)
        writer.rows.copy(made)
        parents = made


def _magpie(context: PromptStepContext, settings: Magpie, files: Files, writer: ItemWriter) -> None:
    system = compile_text(settings.system, "prompts.steps: magpie.system") if settings.system is not None else None

    def messages_of(item: Item) -> Messages:
        what = "the system message of magpie"
        return [{"role": "system", "content": render_text(system, item.fields, what, item.where)}] if system else []

    about = _Questions(context, settings.samples, messages_of, PreQueryFormat(context.asker.chat))
    for item, question, answer in about.answered("magpie", files.source, files.out.with_suffix("")):
        made = {settings.field: answer.text}
        child = item.child(stable_id(item.id, question.id), made, {"step": "magpie", "answer": question.id, "gave": made})
        if answer.finish_reason == "stop" and answer.text:
            writer.keep(child)
        else:
            writer.refuse("failed", child, "empty" if answer.finish_reason == "stop" else _why_cut(answer), answer.text)


def _self_instruct(context: PromptStepContext, settings: SelfInstruct, files: Files, writer: ItemWriter) -> None:
    template = context.templates[settings.template]
    name, seeds, pool = template.answer.field, list(read_items(files.source)), Pool()
    if len(seeds) < settings.examples:
        raise InputError(f"prompts.steps: self_instruct shows {settings.examples} examples, but there are {len(seeds)} items")
    for item in seeds:
        pool.add(str(item.fields[name]), item.id)
        if settings.keep_parents:
            writer.keep(item)
    about = _Questions(context, 1, lambda item: template.render(item.fields, item.where))
    made: list[Item] = []
    for number in range(1, settings.rounds + 1):
        chance = random.Random(row_seed(f"round {number}", context.seed))  # noqa: S311
        shown = [_examples(chance, settings.examples, seeds, made) for _ in range(settings.samples)]
        items = [Item("", {**context.task, "examples": [item.fields[name] for item in examples]}, {}) for examples in shown]
        answered = about.answered_in_memory("self_instruct", items, files.round(number))
        for examples, (item, question, answer) in zip(shown, answered, strict=True):
            seen = [{"id": example.id, **example.lineage.get("source", {})} for example in examples]
            record = {"step": "self_instruct", "round": number, "examples": seen}
            for child in _children(writer, template, item, question, answer, record):
                new = Item(child.id, {name: child.fields[name]}, child.lineage)
                if _is_new(writer, pool, new, name, settings.max_overlap):
                    made.append(new)


def _examples(chance: random.Random, count: int, seeds: list[Item], made: list[Item]) -> list[Item]:
    """Some of the seeds and, once there are any, some of what the teacher has made; in random order."""
    own = min(len(made), int(count * _OWN_EXAMPLES))
    examples = [*chance.sample(seeds, count - own), *chance.sample(made, own)]
    chance.shuffle(examples)
    return examples


def _combine(context: PromptStepContext, settings: Combine, files: Files, writer: ItemWriter) -> None:
    entries = read_list(settings, "prompts.steps: combine")
    for item in read_items(files.source):
        chance = random.Random(row_seed(item.id, context.seed))  # noqa: S311
        for entry in chance.sample(entries, settings.samples):
            both = entry.fields.keys() & item.fields.keys()
            if both:
                raise InputError(f"{entry.origin}: has the field {min(both)}, like {item.where}; select with combine.fields")
            writer.keep(item.child(stable_id(item.id, entry.place), entry.fields, {"step": "combine", **entry.place}))


def _novelty(context: PromptStepContext, settings: Novelty, files: Files, writer: ItemWriter) -> None:
    pool = Pool()
    for text, place in read_others(settings, "prompts.steps: novelty"):
        pool.add(text, place)
    for item in read_items(files.source):
        _is_new(writer, pool, item, settings.field, settings.max_overlap)


def _is_new(writer: ItemWriter, pool: Pool, item: Item, name: str, most: float) -> bool:
    """Keep an item that is not similar to those of the pool, and add it to them."""
    text = str(item.fields[name])
    near = pool.nearest(text, most)
    if near is None:
        pool.add(text, item.id)
        writer.keep(item)
        return True
    overlap, other = near
    writer.refuse(
        "rejected", item.child(item.id, {}, {"step": "novelty", "overlap": round(overlap, 3), "with": other}), "overlap", text
    )
    return False


@dataclass(frozen=True)
class _Questions:
    """Questions about items; repeated messages are further samples, not the same question."""

    context: PromptStepContext
    samples: int
    messages_of: Callable[[Item], Messages]
    prompt_format: PromptFormat | None = None

    def answered(self, label: str, source: Path, directory: Path) -> Iterator[tuple[Item, Question, Answer]]:
        """The items kept in a file, each repeated by the number of questions, with question and answer."""
        return self._answered(label, lambda: read_items(source), count_items(source).kept, directory)

    def answered_in_memory(self, label: str, items: list[Item], directory: Path) -> Iterator[tuple[Item, Question, Answer]]:
        """The same for some items."""
        return self._answered(label, lambda: items, len(items), directory)

    def _answered(
        self, label: str, items: Callable[[], Iterable[Item]], count: int, directory: Path
    ) -> Iterator[tuple[Item, Question, Answer]]:
        asker = self.context.asker

        def questions() -> Iterator[Question]:
            asked: Counter[str] = Counter()
            for item in items():
                reason = None
                try:
                    messages = self.messages_of(item)
                except UnusableError as error:
                    messages, reason = [{"role": "user", "content": item.id}], error.reason
                key = stable_id(messages)
                for _ in range(self.samples):
                    identity = row_id(messages, asker.chat.fingerprint, asker.sampling, asked[key])
                    yield Question(identity, messages, item.where, reason)
                    asked[key] += 1

        answers = asker.ask(label, directory, count * self.samples, questions, self.prompt_format or ChatFormat(asker.chat))
        about = (item for item in items() for _ in range(self.samples))
        return ((item, *pair) for item, pair in zip(about, answers, strict=True))


def _children(
    writer: ItemWriter, template: PromptTemplate, item: Item, question: Question, answer: Answer, record: dict[str, Any]
) -> Iterator[Item]:
    """The contents of an answer, as items that the caller keeps or refuses; unusable parts are refused here."""
    record = {**record, "template": str(template.file), "answer": question.id}
    if answer.finish_reason.startswith((TOO_LONG, UNUSABLE, GIVEN_UP)):
        writer.refuse("failed", item.child(stable_id(question.id), {}, record), _why_cut(answer), "")
        return
    reading = read_answer(template.answer, answer.text, answer.finish_reason == "stop")
    for number, fields in enumerate(reading.items):
        yield item.child(stable_id(item.id, question.id, number), fields, {**record, "entry": number, "gave": fields})
    for text, reason in reading.rejected:
        writer.refuse("rejected", item.child(stable_id(question.id), {}, record), reason, text)
    for text, reason in reading.failed:
        writer.refuse("failed", item.child(stable_id(question.id), {}, record), reason, text)


def _why_cut(answer: Answer) -> str:
    for given in (UNUSABLE, GIVEN_UP):
        if answer.finish_reason.startswith(given):
            return answer.finish_reason.removeprefix(given)
    return "longer than the context" if answer.finish_reason == TOO_LONG else "cut at max_tokens"


_STEPS: dict[type[Section], Callable[[PromptStepContext, Any, Files, ItemWriter], None]] = {
    Ask: _ask,
    Evolve: _evolve,
    SelfInstruct: _self_instruct,
    Magpie: _magpie,
    Combine: _combine,
    Novelty: _novelty,
}
