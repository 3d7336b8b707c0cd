"""The stages: the name, inputs, outputs and needs of each. Code that handles stages in general reads this table.

It imports nothing from the package, so that `config` can use the names.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Directory = Literal[
    "prompts",
    "data",
    "curated",
    "retokenized",
    "student-before",
    "student",
    "student-text-only",
    "student-examples",
    "rounds/student",
    "eval",
    "export",
    "judge",
]


@dataclass(frozen=True)
class Stage:
    """A step of a run with its own command, which reads directories and writes one.

    Attributes:
        name: name of the command.
        help: one-line description.
        sections: sections of the configuration that it reads.
        module: module in this package with its function, which has the same name.
        reads: directories of the run that it reads and other stages make.
        writes: directories of the run that it makes.
        shared: whether several workers may share its shards, with `--shards` and as jobs.
        uses_model: whether it loads a model, so that its job gets GPUs by default.
        after_rounds: whether it comes after all rounds.
    """

    name: str
    help: str
    sections: tuple[str, ...]
    module: str
    reads: tuple[Directory, ...] = ()
    writes: tuple[Directory, ...] = ()
    shared: bool = False
    uses_model: bool = True
    after_rounds: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        """The function that runs the stage, imported on demand: `function(experiment, dry_run=False)`."""
        found: Callable[..., Any] = getattr(importlib.import_module(f"llmdistill.stages.{self.module}"), self.module)
        return found

    @property
    def claims(self) -> Callable[..., Any]:
        """Its outputs and what they depend on: `claims(experiment)`, a list of `record.Claim`, empty for `report`."""
        module = importlib.import_module(f"llmdistill.stages.{self.module}")
        return getattr(module, "claims", lambda experiment: [])

    @property
    def record(self) -> Directory | None:
        """The directory whose `run.json` records whether it is done; None for `report`, which is done if its page exists."""
        made = [directory for directory in self.writes if directory != "student-before" or self.name == "prune"]
        return made[0] if made else None


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "prompts",
            "make new prompts with the teacher, by the steps in prompts.steps",
            ("teacher", "prompts", "generate.rows_per_shard", "generate.thinking_end"),
            "prompts",
            writes=("prompts",),
            shared=True,
        ),
        Stage(
            "generate",
            "generate a dataset with the teacher: text and soft targets in one pass",
            ("teacher", "prompts", "generate", "targets"),
            "generate",
            reads=("prompts",),
            writes=("data",),
            shared=True,
        ),
        Stage(
            "score",
            "add the teacher's soft targets to existing text",
            ("teacher", "score", "generate.rows_per_shard", "targets"),
            "score",
            writes=("data",),
            shared=True,
        ),
        Stage(
            "curate",
            "filter the dataset and hold out rows for evaluation",
            ("curate", "eval.held_out", "shard_mb", "generate.thinking", "generate.thinking_end"),
            "curate",
            reads=("data",),
            writes=("curated",),
            uses_model=False,
        ),
        Stage(
            "prune",
            "make the student by pruning the teacher",
            ("teacher", "student.prune"),
            "prune",
            reads=("curated", "retokenized"),
            writes=("student-before",),
        ),
        Stage(
            "retokenize",
            "convert the dataset to the tokens of a student with a different vocabulary",
            ("teacher", "student", "retokenize"),
            "retokenize",
            reads=("curated",),
            writes=("retokenized",),
            uses_model=False,
        ),
        Stage(
            "train",
            "train the student on the dataset",
            ("student", "train", "targets"),
            "train",
            reads=("curated", "retokenized"),
            writes=("student-before", "student", "student-text-only", "student-examples"),
        ),
        Stage(
            "rounds",
            "train the student on its own text in micro-rounds, in a single process",
            ("teacher", "generate", "targets", "curate", "student", "train", "rounds"),
            "rounds",
            reads=("curated",),
            writes=("rounds/student",),
        ),
        Stage(
            "eval",
            "evaluate the student against the teacher on held-out rows",
            ("eval",),
            "evaluate",
            reads=("curated", "retokenized", "student-before", "student", "student-text-only", "student-examples"),
            writes=("eval",),
            after_rounds=True,
        ),
        Stage(
            "export",
            "write the student for serving, quantised or not, and measure the loss of fidelity",
            ("export", "eval.speed"),
            "export",
            reads=("curated", "retokenized", "student", "eval"),
            writes=("export",),
            after_rounds=True,
        ),
        Stage(
            "report",
            "write the report as HTML, Markdown and an image, or compare several runs on one page",
            ("eval.price_per_hour",),
            "report",
            reads=(
                "prompts",
                "data",
                "curated",
                "retokenized",
                "student",
                "student-text-only",
                "student-examples",
                "eval",
                "export",
            ),
            uses_model=False,
            after_rounds=True,
        ),
    )
}
