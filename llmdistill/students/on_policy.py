"""The parts of on-policy rounds: experiments in which the student generates, the teacher scores, and the student trains."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment, Prompts, Score, Targets, Teacher
from llmdistill.config.train import Mix, Train
from llmdistill.data.targets import SampledLogprobs
from llmdistill.students.sides import training_dataset


@dataclass(frozen=True)
class Round:
    """The experiments of one round, each for the stages that it is named after.

    Attributes:
        written: for `generate`: the student writes.
        scored: for `score`: the teacher reads it.
        curated: for `curate`: the rows are filtered as ever, and none is held out.
        whole: for the others.
    """

    written: Experiment
    scored: Experiment
    curated: Experiment
    whole: Experiment


def round_of(experiment: Experiment, name: str, number: int, student: str) -> Round:
    """The experiments of a round. If the targets are a sample of the student's, it draws them while generating.

    Args:
        experiment: the run's.
        name: of the round's directory in `rounds`.
        number: of the round, from 1.
        student: the directory of the student that writes.
    """
    settings, teacher = experiment.rounds, experiment.teacher
    assert settings is not None
    targets = experiment.own_targets
    drawn = Targets(kind=SampledLogprobs.name, n=targets.n) if targets.stored.of_writer else Targets(kind="none")
    changes = {"rounds": None, "seed": experiment.seed + number, "targets": targets, "train": round_training(experiment)}
    here = below(experiment, f"rounds/{name}").with_(**changes)
    written = below(here, "written").with_(
        teacher=Teacher(
            model=student,
            engine=teacher.students_engine,
            dtype=teacher.dtype,
            batch_size=teacher.batch_size,
            template_args=teacher.template_args,  # as it was trained
            trust_remote_code=experiment.student.trust_remote_code or teacher.trust_remote_code,
        ),
        prompts=Prompts(source=str(experiment.dataset_directory), limit=None if settings.every else settings.limit),
        generate=experiment.generate.with_(samples=1),
        targets=drawn,
        train=experiment.train,
    )
    scored = here.with_(score=Score(source=str(written.directory("data"))))
    return Round(written, scored, here.with_(eval=experiment.eval.with_(held_out=0)), here)


def round_training(experiment: Experiment) -> Train:
    """How the student trains in the rounds: on their own datasets, without cross-entropy on its own text."""
    settings = experiment.rounds
    assert settings is not None
    changes: dict[str, Any] = {
        "dataset": None,
        "loss": experiment.round_loss,
        "alpha": 1 - experiment.train.sequence_alpha,
        "alpha_end": None,
        "compare_text_only": False,
        "compare_examples": None,
        "args": _arguments(experiment.train.args, settings.args),
    }
    if settings.teacher_share:
        changes["mix"] = Mix(datasets=[str(training_dataset(experiment))], share=settings.teacher_share)
    return experiment.train.with_(**changes)


def _arguments(of_training: dict[str, Any], of_rounds: dict[str, Any]) -> dict[str, Any]:
    """The training arguments, overridden by those of the rounds; a number of epochs replaces a number of steps."""
    if "num_train_epochs" in of_rounds and "max_steps" not in of_rounds:
        of_training = {name: value for name, value in of_training.items() if name != "max_steps"}
    return of_training | of_rounds


def below(experiment: Experiment, name: str) -> Experiment:
    """The experiment in a directory of its output, and of its store if it has one."""
    store = f"{experiment.store.rstrip('/')}/{name}" if experiment.store else None
    return experiment.with_(output=str(Path(experiment.output) / name), store=store)
