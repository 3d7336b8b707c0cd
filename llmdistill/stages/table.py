"""The stages: what each is called, reads, writes and needs. Whoever deals with stages in general reads this table.

It imports nothing of the package, so that `config` can take the names from it.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Directory = Literal["prompts", "data", "curated", "student-before", "student", "student-text-only", "eval", "export", "judge"]


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
    def record(self) -> Directory | None:
        """The directory whose `run.json` says whether it is done; None for `report`, which is done where its page is."""
        made = [directory for directory in self.writes if directory != "student-before" or self.name == "prune"]
        return made[0] if made else None


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "prompts",
            "the teacher makes prompts out of prompts, by the steps of the configuration",
            ("teacher", "prompts", "generate.rows_per_shard"),
            "prompts",
            writes=("prompts",),
            shared=True,
        ),
        Stage(
            "generate",
            "the teacher writes a dataset: text and soft targets in one pass",
            ("teacher", "prompts", "generate", "targets"),
            "generate",
            reads=("prompts",),
            writes=("data",),
            shared=True,
        ),
        Stage(
            "score",
            "the teacher reads finished text; it is stored with soft targets, as by generate",
            ("teacher", "score", "generate.rows_per_shard", "targets"),
            "score",
            writes=("data",),
            shared=True,
        ),
        Stage(
            "curate",
            "filter the dataset and hold rows out for evaluation, counting every rejected row",
            ("curate", "eval.held_out"),
            "curate",
            reads=("data",),
            writes=("curated",),
            uses_model=False,
        ),
        Stage(
            "prune",
            "cut the student out of the teacher, and say what went and why",
            ("teacher", "student.prune"),
            "prune",
            reads=("curated",),
            writes=("student-before",),
        ),
        Stage(
            "train",
            "train the student on the dataset",
            ("student", "train"),
            "train",
            reads=("curated",),
            writes=("student-before", "student", "student-text-only"),
        ),
        Stage(
            "eval",
            "measure the student against the teacher on held-out rows",
            ("eval",),
            "evaluate",
            reads=("curated", "student-before", "student", "student-text-only"),
            writes=("eval",),
            after_rounds=True,
        ),
        Stage(
            "export",
            "write the student whole or quantised, ready to serve, and measure what that costs",
            ("export", "eval.speed"),
            "export",
            reads=("curated", "student"),
            writes=("export",),
            after_rounds=True,
        ),
        Stage(
            "report",
            "write report.html and report.md, or one page on several runs",
            (),
            "report",
            reads=("prompts", "data", "curated", "student", "student-text-only", "eval", "export"),
            uses_model=False,
            after_rounds=True,
        ),
    )
}
