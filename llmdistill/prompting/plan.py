"""What `prompts` will need, determined before the teacher is loaded: files, templates, and the fields that they use."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llmdistill.config.prompts import Ask, Combine, Evolve, Magpie, Novelty, Prompts, SelfInstruct
from llmdistill.config.section import Section
from llmdistill.data.tables import Entry, files_hash
from llmdistill.errors import InputError
from llmdistill.prompting.novelty import read_others
from llmdistill.prompting.sources import read_list
from llmdistill.prompting.task_prompt import TaskPrompt, read_task_prompt
from llmdistill.prompting.template import PromptTemplate, check_field, compile_text
from llmdistill.runs.inputs import file_input


@dataclass
class Plan:
    """The templates by path, and the fields that each row of the source must or must not have.

    `inputs` holds path and hash of what is read beside the source: templates and lists.

    Raises:
        InputError: a template or a list is missing or wrong, or a step needs a field that there cannot be.
    """

    section: Prompts
    templates: dict[str, PromptTemplate] = field(default_factory=dict)
    needed: dict[str, str] = field(default_factory=dict)  # field of the source, and what needs it
    taken: dict[str, str] = field(default_factory=dict)  # field that it may not have, and who brings it
    inputs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._made: set[str] = set()
        self._source_is_there = self.section.from_where is not None
        for number, step in enumerate(self.section.steps):
            self._follow(step.settings, f"prompts.steps.{number}.{step.name}")
        self.final = final_template(self.section)
        if self.section.template:
            self.inputs |= file_input(self.section.template, "prompts.template")
        elif isinstance(self.final, TaskPrompt):
            self.inputs |= self.final.inputs
        for name in self.final.variables if self.final else ("prompt",) if self.section.steps else ():
            self._need(name, "prompts.task" if self.section.task else "prompts.template")

    @property
    def makes_prompt(self) -> bool:
        """Whether a step has made the field `prompt`, which replaces any conversation of the row."""
        return self.final is None and "prompt" in self._made

    @property
    def task(self) -> dict[str, str]:
        """The task's instruction, as a variable for templates; empty without a task."""
        return {"task": self.final.task.told} if isinstance(self.final, TaskPrompt) else {}

    def check(self, entry: Entry) -> None:
        """Refuse a row of the source that lacks a field, or has one that a list also adds.

        Raises:
            InputError: names its place and the field.
        """
        for name, what in self.needed.items():
            check_field(entry.fields, name, entry.origin, what)
        for name, what in self.taken.items():
            if name in entry.fields:
                raise InputError(f"{entry.origin}: has the field {name}, which {what} also adds; select others with its `fields`")

    def _follow(self, settings: Section, key: str) -> None:
        """What a step needs, and the fields that exist after it."""
        if isinstance(settings, Ask | Evolve):
            files = {"template": [settings.template]} if isinstance(settings, Ask) else {"templates": settings.templates}
            templates = [self._load(file, f"{key}.{name}") for name, several in files.items() for file in several]
            for template in templates:
                for name in template.variables:
                    self._need(name, f"the template {template.head.name}")
                if isinstance(settings, Evolve):  # what it made is compared with what it was made of
                    self._need(template.answer.field, key)
            self._made |= {name for template in templates for name in template.answer.names}
        elif isinstance(settings, SelfInstruct):
            template = self._load(settings.template, f"{key}.template")
            if template.variables != ["examples"]:
                raise InputError(f"{key}.template: {settings.template} must have the variable examples and no other")
            self._need(template.answer.field, key)
            self._made, self._source_is_there = {template.answer.field}, False
        elif isinstance(settings, Magpie):
            for name in sorted(compile_text(settings.system or "", f"{key}.system").variables):
                self._need(name, f"{key}.system")
            self._made.add(settings.field)
        elif isinstance(settings, Combine):
            self._combine(settings, key)
        elif isinstance(settings, Novelty):
            self._need(settings.field, key)
            for file in settings.against:
                self.inputs |= files_hash(file, f"{key}.against")
            for _ in read_others(settings, key):
                pass

    def _combine(self, settings: Combine, key: str) -> None:
        entries = read_list(settings, key)
        self.inputs |= files_hash(settings.source, f"{key}.source")
        names = list(entries[0].fields)
        for name in names:
            if name in self._made:
                raise InputError(
                    f"{key}: {settings.source} has the field {name}, which an earlier step makes; select others with `fields`"
                )
            if self._source_is_there:
                self.taken[name] = key
        self._made |= set(names)

    def _need(self, name: str, what: str) -> None:
        if name in self._made:
            return
        if not self._source_is_there:
            there = ", ".join(sorted(self._made)) or "none"
            raise InputError(f"{what} needs the field {name}; the previous steps provide {there}")
        self.needed.setdefault(name, what)

    def _load(self, file: str, key: str) -> PromptTemplate:
        if file not in self.templates:
            self.templates[file] = PromptTemplate(Path(file), key)
            self.inputs |= file_input(file, key)
        return self.templates[file]


def final_template(section: Prompts) -> PromptTemplate | TaskPrompt | None:
    """The template that turns the fields of an item into a conversation; None if they contain one.

    Raises:
        InputError: it is missing, or cannot be used.
    """
    if section.task:
        return read_task_prompt(section.task)
    return PromptTemplate(Path(section.template), "prompts.template") if section.template else None


def describe_steps(section: Prompts, items: int) -> Iterator[tuple[str, str]]:
    """What each step asks of the teacher, as far as known before the teacher has answered.

    Args:
        section: the configuration.
        items: how many the source gives.
    """
    known: int | None = items
    for step in section.steps:
        settings = step.settings
        if isinstance(settings, Novelty):
            others = f", also with {', '.join(settings.against)}" if settings.against else ""
            yield step.name, f"rejects items that overlap by more than {settings.max_overlap:g}{others}"
            known = None
        elif isinstance(settings, Combine):
            known = known and known * settings.samples
            yield step.name, f"{known:,} items" if known else f"{settings.samples} items of each"
        else:
            yield step.name, _questions(settings, known, section.sampling.max_tokens)
            known = None


def _questions(settings: Section, items: int | None, max_tokens: int) -> str:
    if isinstance(settings, SelfInstruct):
        items, each = 1, settings.rounds * settings.samples
    else:
        each = settings.rounds if isinstance(settings, Evolve) else settings.samples if isinstance(settings, Ask | Magpie) else 1
    at_most = "at most " if isinstance(settings, Evolve) else ""  # a round has no more items than the one before
    if items is None:
        return f"{at_most}{each} questions about every remaining item, up to {max_tokens:,} tokens each"
    return f"{at_most}{items * each:,} questions, up to {items * each * max_tokens:,} tokens"
