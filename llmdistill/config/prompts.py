"""The section `prompts` of the experiment: where prompts come from, and the steps that make new ones."""

from typing import Literal

from pydantic import Field, model_validator

from llmdistill.config.rows import RowReading
from llmdistill.config.section import Section, Step


class HubDataset(Section):
    """A dataset that `datasets.load_dataset` opens."""

    path: str
    """Name on the Hugging Face Hub, or a local directory."""
    name: str | None = None
    """Configuration (subset) of the dataset."""
    split: str = "train"
    """Split, or a slice of it: `train[:1000]`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""


class Passages(Section):
    """How documents are split into passages: at headings, and between paragraphs if a section is too long."""

    size: int = Field(default=2000, ge=1)
    """Maximum length of a passage."""
    unit: Literal["characters", "tokens"] = "characters"
    """Unit of the lengths; tokens are those of the teacher's tokenizer."""
    overlap: int = Field(default=0, ge=0)
    """Overlap with the previous passage of a section that was split."""
    min_size: int = Field(default=200, ge=0)
    """Minimum length: a shorter passage is merged with the previous or next one, and rejected if it fits neither."""
    field: str | None = None
    """Column with the text of a document, if the source is a table."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Passages":
        for name in ("overlap", "min_size"):
            if getattr(self, name) >= self.size:
                raise ValueError(f"{name} is {getattr(self, name):,}, it must be less than size, {self.size:,}")
        return self


class Ask(Section):
    """Ask the teacher about each item. Items parsed from its answer replace the original and inherit its fields."""

    template: str
    """Template file with an `answer` section."""
    samples: int = Field(default=1, ge=1)
    """Questions per item."""


class Evolve(Section):
    """Let the teacher rewrite items, with templates chosen at random (Evol-Instruct, 2304.12244)."""

    templates: list[str] = Field(min_length=1)
    """Template files; one is drawn for each item."""
    rounds: int = Field(default=1, ge=1)
    """Number of rounds; each rewrites the output of the previous one."""
    keep_parents: bool = True
    """Also keep the original items."""


class SelfInstruct(Section):
    """Let the teacher write more items like the examples it is shown (Self-Instruct, 2212.10560)."""

    template: str
    """Template file with the variable `examples` and an `answer` section."""
    rounds: int = Field(default=1, ge=1)
    """Number of rounds. From the second on, a quarter of the examples are items that the teacher wrote."""
    samples: int = Field(default=32, ge=1)
    """Questions per round."""
    examples: int = Field(default=8, ge=1)
    """Examples per question."""
    max_overlap: float = Field(default=0.7, gt=0, le=1)
    """Maximum ROUGE-L with any existing item."""
    keep_parents: bool = True
    """Also keep the original items."""


class Magpie(Section):
    """Let the teacher write the user's turn, given only what precedes it in the chat template (Magpie, 2406.08464)."""

    samples: int = Field(default=1, ge=1)
    """Turns per item; without a source, turns in total."""
    system: str | None = None
    """System message, with Jinja expressions over the item's fields."""
    field: str = "instruction"
    """Field that receives the turn."""


class Combine(Section):
    """Combine items with entries of a second list, such as tasks with personas."""

    source: str
    """File, folder or glob, as in `prompts.source`."""
    fields: list[str] | None = None
    """Fields to take from the list; all if not set."""
    samples: int = Field(default=1, ge=1)
    """Entries per item, drawn without replacement."""


class Novelty(Section):
    """Keep only items that are not similar to an earlier one."""

    field: str = "instruction"
    """Field to compare."""
    max_overlap: float = Field(default=0.7, gt=0, le=1)
    """Maximum ROUGE-L with any item kept earlier."""
    against: list[str] = []
    """Files with rows to which items must not be similar either, by the same field; for example, held-out examples."""


class PromptStep(Step):
    """One step of `prompts.steps`; exactly one key."""

    ask: Ask | None = None
    """Ask the teacher with a template."""
    evolve: Evolve | None = None
    """Rewrite items."""
    self_instruct: SelfInstruct | None = None
    """Write more items like the examples."""
    magpie: Magpie | None = None
    """Write user turns from the chat template."""
    combine: Combine | None = None
    """Combine with a second list."""
    novelty: Novelty | None = None
    """Drop items similar to earlier ones."""


class Sampling(Section):
    """Sampling parameters of the teacher."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy. Stored distributions are always at temperature 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: sample from the smallest set of tokens with this probability mass; 1 turns it off."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the k most likely tokens; 0 turns it off."""
    max_tokens: int = Field(default=512, ge=1)
    """Maximum completion length in tokens."""


class Prompts(RowReading):
    """The prompts that the teacher answers."""

    source: str | None = None
    """JSONL, JSON, CSV or Parquet files whose rows hold conversations in any known format, or the variables of the template;
    text or Markdown files, which are split into passages; a folder or glob of either; or the directory of a dataset, for its
    prompts."""
    dataset: HubDataset | None = None
    passages: Passages | None = None
    limit: int | None = Field(default=None, ge=1)
    """Use only the first N rows or passages of the source; of a dataset, the first N prompts."""
    known: list[str] = []
    """Directories of datasets whose prompts are excluded."""
    steps: list[PromptStep] = []
    """Steps that make new prompts from existing ones, applied in this order."""
    sampling: Sampling = Sampling()
    template: str | None = None
    """Template file (YAML with Jinja) that turns the fields of a row into messages."""
    task: str | None = None
    """One of your own tasks (YAML file), instead of a template: its messages, filled with the field `input` of a row."""
    system: str | None = None
    """System message added to every prompt that has none."""

    @model_validator(mode="after")
    def _one_source(self) -> "Prompts":
        if self.source is not None and self.dataset is not None:
            raise ValueError("give either prompts.source or prompts.dataset, not both")
        if self.source is None and self.dataset is None and not (self.steps and self.steps[0].magpie):
            raise ValueError("the key prompts.source is missing; it is optional only if the first step is magpie")
        return self

    @model_validator(mode="after")
    def _a_task_has_its_own_messages(self) -> "Prompts":
        for name in ("template", "system"):
            if self.task is not None and getattr(self, name) is not None:
                raise ValueError(f"prompts.task defines the whole prompt; remove prompts.{name}")
        return self

    @property
    def passes(self) -> int:
        """Number of passes over the teacher, each of which needs all earlier answers; workers are started once for each."""
        return sum(getattr(step.settings, "rounds", 1) for step in self.steps if not isinstance(step.settings, Combine | Novelty))

    @property
    def from_where(self) -> str | None:
        """Path of the source or the dataset; None if the first step needs no source."""
        return self.source if self.dataset is None else self.dataset.path
