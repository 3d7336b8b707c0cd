"""The stages of a run, in order."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmdistill.config import Experiment
from llmdistill.errors import InputError
from llmdistill.stages.retokenize import check_kind
from llmdistill.stages.table import STAGES
from llmdistill.students.on_policy import round_of
from llmdistill.students.sides import is_needed

CONFIGS = "configs"  # in `output`: what each stage was started with


@dataclass(frozen=True)
class StageRun:
    """A stage of a run, and the experiment that it belongs to.

    Attributes:
        command: the stage's name.
        experiment: what the command reads; that of a round is another one than that of the run.
        round: of training on the student's own text; 0 is the teacher's text.
        part: which of several starts of the same workers, from 1.
    """

    command: str
    experiment: Experiment
    round: int = 0
    part: int = 1

    @property
    def name(self) -> str:
        """Its unique name: `train`, `round-1-train`, `prompts-2`."""
        return (f"round-{self.round}-" if self.round else "") + self.command + (f"-{self.part}" if self.part > 1 else "")

    @property
    def shared(self) -> bool:
        """Whether several workers may share its shards."""
        return STAGES[self.command].shared


def stages(experiment: Experiment) -> list[StageRun]:
    """The stages in order: the teacher generates the dataset or, if `score` is given, scores it.

    Raises:
        InputError: the student has another tokenizer, which the kind of targets or micro-rounds do not support.
    """
    experiment = experiment.with_(jobs=None)  # no stage reads it, and lines of shell in it may hold a secret
    made = [] if experiment.prompts is None or not experiment.prompts.steps else ["prompts"]
    first = ["score"] if experiment.score else [*made, "generate"]
    cut, exported = ["prune"] if experiment.student.prune else [], ["export"] if experiment.export else []
    own = ["retokenize"] if is_needed(experiment) else []
    for targets in (experiment.targets, experiment.own_targets) if own else ():
        check_kind(targets.stored.name, experiment.student.model or "student.model")
    return [
        *(StageRun(command, experiment) for command in [*first, "curate", *own, *cut]),
        # The first student is that of no rounds; everything after it is about the last one.
        StageRun("train", experiment.with_(rounds=None)),
        *_rounds(experiment),
        *(StageRun(command, experiment) for command in ("eval", *exported, "report")),
    ]


def _rounds(experiment: Experiment) -> Iterator[StageRun]:
    """The stages of each round: the student generates, the teacher scores, the rows are filtered as usual, the student trains.

    Raises:
        InputError: micro-rounds of a student with another vocabulary.
    """
    settings = experiment.rounds
    if settings is None:
        return
    own = is_needed(experiment)
    if settings.every:
        if own:
            raise InputError(
                f"rounds.every does not support student.model {experiment.student.model}, whose vocabulary differs from the "
                "teacher's; remove rounds.every"
            )
        yield StageRun("rounds", experiment)
        return
    student = experiment.first_student
    for number in range(1, settings.n + 1):
        made = round_of(experiment, str(number), number, str(student))
        yield StageRun("generate", made.written, number)
        yield StageRun("score", made.scored, number)
        yield StageRun("curate", made.curated, number)
        if own:
            yield StageRun("retokenize", made.whole, number)
        yield StageRun("train", made.whole.with_(student=experiment.student.continued(str(student))), number)
        student = made.whole.directory("student")
