"""The `prompts` section of the experiment: where prompts come from, and the steps that make prompts out of prompts."""

from typing import Literal

from pydantic import Field, model_validator

from llmdistill.config.section import Section, Step


class HubDataset(Section):
    """A dataset as `datasets.load_dataset` takes it."""

    path: str
    """Name on the Hugging Face Hub, or a local directory."""
    name: str | None = None
    """Which of its configurations."""
    split: str = "train"
    """Which split, or a part of it: `train[:1000]`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""


class Passages(Section):
    """How documents are cut: at headings, and between paragraphs where a section is too long."""

    size: int = Field(default=2000, ge=1)
    """Longest passage."""
    unit: Literal["characters", "tokens"] = "characters"
    """What is counted; tokens are those of the teacher's tokenizer."""
    overlap: int = Field(default=0, ge=0)
    """How much of it a passage shares with the one before, where a section had to be cut."""
    min_size: int = Field(default=200, ge=0)
    """A shorter passage is joined to the one before or after it, and rejected where it fits to neither."""
    field: str | None = None
    """The column that holds a document's text, where the source is a table."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Passages":
        for name in ("overlap", "min_size"):
            if getattr(self, name) >= self.size:
                raise ValueError(f"{name} is {getattr(self, name):,}, it must be less than size, {self.size:,}")
        return self


class Ask(Section):
    """Ask the teacher; what is read in its answer becomes new items, each with the fields of the one asked about."""

    template: str
    """A template file with an `answer`."""
    samples: int = Field(default=1, ge=1)
    """Questions about an item."""


class Evolve(Section):
    """Let the teacher rewrite items, in each round by one of several templates (Evol-Instruct, 2304.12244)."""

    templates: list[str] = Field(min_length=1)
    """Template files; which one, is drawn for every item."""
    rounds: int = Field(default=1, ge=1)
    """How often; a round rewrites what the one before has made."""
    keep_parents: bool = True
    """Keep what was rewritten too."""


class SelfInstruct(Section):
    """Let the teacher write more of a kind, shown some examples (Self-Instruct, 2212.10560)."""

    template: str
    """A template file with the variable `examples` and an `answer`."""
    rounds: int = Field(default=1, ge=1)
    """How often; from the second on, a quarter of the examples are the teacher's own."""
    samples: int = Field(default=32, ge=1)
    """Questions in a round."""
    examples: int = Field(default=8, ge=1)
    """Examples in a question."""
    max_overlap: float = Field(default=0.7, gt=0, le=1)
    """Largest ROUGE-L with anything that is there already."""
    keep_parents: bool = True
    """Keep the examples too."""


class Magpie(Section):
    """Let the teacher write the user's turn, given only what comes before it in its chat template (2406.08464)."""

    samples: int = Field(default=1, ge=1)
    """Turns for each item; without a source, in all."""
    system: str | None = None
    """A system message before it, with Jinja expressions over the item's fields."""
    field: str = "instruction"
    """The field that the turn becomes."""


class Combine(Section):
    """Put items together with those of a second list: tasks with personas."""

    source: str
    """A file, folder or glob, as `prompts.source`."""
    fields: list[str] | None = None
    """Fields of the list to take; all if not given."""
    samples: int = Field(default=1, ge=1)
    """Entries of the list for each item, drawn without repeats."""


class Novelty(Section):
    """Keep items that are unlike those before."""

    field: str = "instruction"
    """The field that is compared."""
    max_overlap: float = Field(default=0.7, gt=0, le=1)
    """Largest ROUGE-L with an item that was kept before."""


class PromptStep(Step):
    """One step of `prompts.steps`; exactly one key."""

    ask: Ask | None = None
    """By a template."""
    evolve: Evolve | None = None
    """By rewriting."""
    self_instruct: SelfInstruct | None = None
    """By examples."""
    magpie: Magpie | None = None
    """By the teacher's chat template alone."""
    combine: Combine | None = None
    """By a second list."""
    novelty: Novelty | None = None
    """By what is there already."""


class Sampling(Section):
    """How the teacher writes."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy. The stored distributions are at temperature 1 whatever this is."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: the smallest set of tokens with this much mass; 1 is off."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the so many most likely tokens; 0 is off."""
    max_tokens: int = Field(default=512, ge=1)
    """Longest completion, in tokens."""


class Prompts(Section):
    """What the teacher is asked."""

    source: str | None = None
    """A JSONL, CSV, TSV or Parquet file, whose rows hold `messages`, or `prompt`, or the variables of the template; or text
    and Markdown files, cut into passages; a folder or a glob of either; or a dataset's directory, for its training prompts."""
    dataset: HubDataset | None = None
    passages: Passages | None = None
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many rows or passages of the source."""
    known: list[str] = []
    """Directories of datasets whose prompts are left out."""
    steps: list[PromptStep] = []
    """Ways to make prompts out of prompts, applied in this order."""
    sampling: Sampling = Sampling()
    template: str | None = None
    """A template file (YAML with Jinja) that turns a row's fields into messages."""
    system: str | None = None
    """A system message put before every prompt that has none."""

    @model_validator(mode="after")
    def _one_source(self) -> "Prompts":
        if self.source is not None and self.dataset is not None:
            raise ValueError("give either prompts.source or prompts.dataset, not both")
        if self.source is None and self.dataset is None and not (self.steps and self.steps[0].magpie):
            raise ValueError("the key prompts.source is missing; only steps that begin with magpie need none")
        return self

    @property
    def passes(self) -> int:
        """How often the teacher is asked, each time with all answers so far at hand; as often do workers have to be started."""
        return sum(getattr(step.settings, "rounds", 1) for step in self.steps if not isinstance(step.settings, Combine | Novelty))

    @property
    def from_where(self) -> str | None:
        """The source or the dataset, by its path; None where the teacher begins from nothing."""
        return self.source if self.dataset is None else self.dataset.path
