"""`llmdistill run`: every stage in order, each in a process of its own, as a scheduler would start them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.teacher import DEFAULT_ENGINE
from llmdistill.evaluation.tasks import read_tasks
from llmdistill.runs.estimate import estimate, said
from llmdistill.runs.progress import say, working
from llmdistill.runs.status import how_far
from llmdistill.stages.prompts import prepared_prompts


@dataclass(frozen=True)
class StageRun:
    """A command of the pipeline, and what it overrides in the experiment."""

    command: str
    overrides: dict[str, str] = field(default_factory=dict)
    round: int = 0  # 0 is the teacher's text

    @property
    def name(self) -> str:
        """What tells it from the others: `train`, `round-1-train`."""
        return f"round-{self.round}-{self.command}" if self.round else self.command

    @property
    def arguments(self) -> list[str]:
        """The overrides as words of the command line."""
        return as_words(self.overrides)


def as_words(overrides: dict[str, str]) -> list[str]:
    """Overrides as words of the command line."""
    return [word for key, value in overrides.items() for word in (f"--{key}", value)]


def stages(experiment: Experiment) -> list[StageRun]:
    """The stages in order: the dataset is written by the teacher, or, where `score` is given, read by it."""
    made = [] if experiment.prompts is None or not experiment.prompts.steps else ["prompts"]
    first = ["score"] if experiment.score else [*made, "generate"]
    cut, exported = ["prune"] if experiment.student.prune else [], ["export"] if experiment.export else []
    begin = [StageRun(command) for command in [*first, "curate", *cut]]
    # The first student is that of no rounds; everything after it is about the last one.
    begin.append(StageRun("train", {"rounds": "0"} if experiment.rounds else {}))
    return [*begin, *_rounds(experiment), *map(StageRun, ["eval", *exported, "report"])]


def _rounds(experiment: Experiment) -> Iterator[StageRun]:
    """What each round adds: the student writes, the teacher reads it, the rows are filtered as ever, the student learns."""
    settings = experiment.rounds
    if settings is None:
        return
    teacher, output = experiment.teacher, Path(experiment.output)
    engine = DEFAULT_ENGINE if teacher.abilities.remote else teacher.engine
    prompts: dict[str, Any] = {"source": str(experiment.directory("curated")), "limit": settings.limit}
    student = experiment.first_student
    for number in range(1, settings.n + 1):
        here = output / "rounds" / str(number)
        common = {"rounds": "0", "output": str(here), "seed": str(experiment.seed + number)}
        if experiment.store:
            common["store"] = f"{experiment.store.rstrip('/')}/rounds/{number}"
        writer = {"model": str(student), "engine": engine, "dtype": teacher.dtype, "batch_size": teacher.batch_size}
        yield StageRun(
            "generate",
            {
                **common,
                "output": str(here / "written"),
                **({"store": f"{common['store']}/written"} if experiment.store else {}),
                "teacher": json.dumps(writer),
                "prompts": json.dumps(prompts),
                "generate.samples": "1",
                "targets": '{"kind": "none"}',
            },
            number,
        )
        yield StageRun("score", {**common, "score": json.dumps({"source": str(here / "written" / "data")})}, number)
        yield StageRun("curate", {**common, "eval.held_out": "0"}, number)
        learned = {**common, "student.model": str(student), "student.revision": "null", "train.compare_text_only": "false"}
        if settings.teacher_share:
            mix = {"datasets": [str(experiment.directory("curated"))], "share": settings.teacher_share}
            learned["train.mix"] = json.dumps(mix)
        if settings.loss:
            learned["train.loss"] = settings.loss
        learned |= {f"train.args.{name}": json.dumps(value) for name, value in settings.args.items()}
        yield StageRun("train", learned, number)
        student = here / "student"


def run_pipeline(experiment: Experiment, arguments: list[str]) -> None:
    """Run the stages; the first that fails ends the run with its exit status. A finished stage says so and is skipped.

    Args:
        experiment: the configuration.
        arguments: the configuration file and the overrides, as they were typed.

    Raises:
        InputError: the tasks of the last stages are not usable, which is better known before the first.
    """
    read_tasks(experiment.eval.tasks)
    say_estimate(experiment)
    run_stages(stages(experiment), arguments)


def say_estimate(experiment: Experiment) -> None:
    """Say about how long the stages that are not done will take here; nothing where that cannot be told."""
    missing = [stage for stage in stages(experiment) if how_far(Path(experiment.output), stage.name) != "done"]
    if not missing or experiment.prompts is None:
        return
    prepared = prepared_prompts(experiment)
    if prepared is None:
        return say("run", "how long it takes can be told once `prompts` has made the prompts")
    with working("run", "measuring this machine"):
        each = estimate(experiment, sorted({stage.command for stage in missing}), len(prepared.prompts))
    seconds: dict[str, float] = {}
    for stage in missing:
        if stage.command in each:
            seconds[stage.command] = seconds.get(stage.command, 0.0) + each[stage.command]
    if seconds:
        say("run", said(seconds))
    return None


def run_stages(stages: list[StageRun], arguments: list[str]) -> None:
    """Run stages one after the other; the first that fails ends this process with its exit status."""
    for stage in stages:
        if stage.round and stage.command == "generate":
            say(f"round {stage.round}", "the student writes, the teacher reads it, and the student learns from that")
        with subprocess.Popen([sys.executable, "-m", "llmdistill", stage.command, *arguments, *stage.arguments]) as process:
            try:
                status = process.wait()
            except BaseException:  # Ctrl-C or SIGTERM: the stage gets it too and keeps what it has finished
                process.terminate()
                process.wait()
                raise
        if status:
            sys.exit(status if status > 0 else 1)
