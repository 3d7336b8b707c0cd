"""The stages: what each is called, reads, writes and needs. Whoever deals with stages in general reads this table.

It imports nothing of the package, so that `config` can take the names from it.
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
    """A step of a run that reads directories and writes one; a command of its own.

    Attributes:
        name: of the command.
        help: what it does, in a line.
        sections: of the configuration that it reads.
        module: where its function is, in this package; the function is named as the module.
        reads: directories of the run that other stages make.
        writes: directories of the run that it makes.
        shared: whether several workers may make its shards together: by `--shards` of its command, and as a job.
        uses_model: whether it loads a model, so that its job gets GPUs unless told otherwise.
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
        """What makes it, imported when it is asked for: `function(experiment, dry_run=False)`."""
        found: Callable[..., Any] = getattr(importlib.import_module(f"llmdistill.stages.{self.module}"), self.module)
        return found

    @property
    def claims(self) -> Callable[..., Any]:
        """What it writes and what that depends on: `claims(experiment)`, a list of `record.Claim`; of `report`, none."""
        module = importlib.import_module(f"llmdistill.stages.{self.module}")
        return getattr(module, "claims", lambda experiment: [])

    @property
    def record(self) -> Directory | None:
        """The directory whose `run.json` says whether it is done; None for `report`, which is done where its page is."""
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
            "bring the dataset into the tokens of a student with another vocabulary",
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
            "train the student on its own text in micro-rounds, within one process",
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
            "write the student for serving, quantised or not, and measure the loss in fidelity",
            ("export", "eval.speed"),
            "export",
            reads=("curated", "retokenized", "student", "eval"),
            writes=("export",),
            after_rounds=True,
        ),
        Stage(
            "report",
            "write the report, as HTML, Markdown and a picture, or compare several runs on one page",
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
