"""`llmdistill run`: every stage in order, each in a separate process, as a scheduler would start them."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmdistill.config import Experiment, dump_experiment
from llmdistill.curation.steps import step_inputs
from llmdistill.errors import InputError
from llmdistill.evaluation.statistics import check_clusters
from llmdistill.evaluation.tasks import read_tasks
from llmdistill.runs import lock, record
from llmdistill.runs.estimate import estimate, said
from llmdistill.runs.files import read_json, write_text
from llmdistill.runs.progress import counted, say, working
from llmdistill.runs.rounds import round_of, round_training
from llmdistill.runs.status import how_far
from llmdistill.stages.export import check_libraries
from llmdistill.stages.prompts import Prepared, Prompt, count_splits, prepared_prompts
from llmdistill.stages.retokenize import check_kind
from llmdistill.stages.table import STAGES
from llmdistill.students.origins import fresh_claims, origin
from llmdistill.students.sides import check_tokenizers, is_needed
from llmdistill.students.sizes import check_sizes
from llmdistill.teachers import shared_file
from llmdistill.training.examples import read_examples
from llmdistill.training.settings import check_training

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


def run_pipeline(experiment: Experiment, remake: bool = False) -> None:
    """Run the stages; the first that fails ends the run with its exit status. Finished stages are skipped with a message.

    Args:
        experiment: the configuration.
        remake: remove the work of other settings first, which is refused otherwise.

    Raises:
        InputError: what the last stages read is not usable, or there is work of other settings, which is better known
            before the first.
    """
    check_inputs(experiment)
    stale = check_stale(experiment, remake)
    with lock.alone(stale, "run"):
        for directory, why in stale.items():
            say("run", f"removes {directory}: {why}")
            shutil.rmtree(directory.resolve())
            if directory.is_symlink():
                directory.unlink()
            shared_file(directory).unlink(missing_ok=True)  # what was spent on it counts no more
    check_plan(experiment)
    run_stages(stages(experiment))


def dry_run(experiment: Experiment, remake: bool = False) -> None:
    """Print what every stage would do, and about how long it would take.

    Args:
        experiment: the configuration.
        remake: as for `run_pipeline`; nothing is removed.

    Raises:
        InputError: a stage could not run with this configuration.
    """
    check_inputs(experiment)
    if stale := check_stale(experiment, remake):
        for directory, why in stale.items():
            say("run", f"would delete {directory} and make it again: {why}")
        return
    for stage in stages(experiment):
        if stage.round:  # Its models are those that earlier stages make: there is nothing to check them by yet.
            written = [stage.experiment.directory(name) for name in STAGES[stage.command].writes if name != "student-before"]
            say(f"round {stage.round}", f"{stage.command} would write {written[0]}")
        else:
            STAGES[stage.command].function(stage.experiment, dry_run=True)
    check_plan(experiment)


def check_stale(experiment: Experiment, remake: bool = False) -> dict[Path, str]:
    """The directories with work made with other settings, or made from such work, each with the reason.

    Raises:
        InputError: there are some, and they are not to be made again, or are in an object store, too.
    """
    changed: dict[Path, str] = {}
    inputs: dict[Path, dict[str, str]] = {}
    for stage in stages(experiment):
        if not any(stage.experiment.directory(name).exists() for name in STAGES[stage.command].writes):
            continue
        with suppress(InputError):  # what else is wrong, the stage itself says
            for claim in _claims(stage):
                inputs[claim.directory] = claim.inputs
                try:
                    record.claim(*claim)
                except record.StaleError as error:
                    changed[error.directory] = "; ".join(error.changed)
    output = Path(experiment.output)
    derived = record.made_from(changed, output, inputs) if changed else []
    stale = changed | {path: "made from these" for path in derived if path not in changed}
    if stale and not remake:
        lines = "".join(f"\n  {directory.relative_to(output)}: {why}" for directory, why in stale.items())
        raise InputError(f"{output} was made with other settings:{lines}\n{record.REMEDY}")
    if stale and experiment.store:
        raise InputError(
            f"--remake deletes nothing from a store; delete {', '.join(path.name for path in stale)} from {experiment.store} and "
            f"{output}, or choose another `output` and `store`"
        )
    return stale


def _claims(stage: StageRun) -> list[record.Claim]:
    """The outputs of a stage, including `student-before` if `train` makes it, and what they depend on."""
    made: list[record.Claim] = STAGES[stage.command].claims(stage.experiment)
    return [*made, *(fresh_claims(stage.experiment) if stage.command == "train" else [])]


def check_inputs(experiment: Experiment, here: bool = True) -> None:
    """Check that everything that the configuration names for the stages after the teacher's work exists and is usable.

    Args:
        experiment: the configuration.
        here: whether the stages run in this environment, so that their libraries must be in it.

    Raises:
        InputError: names the key.
    """
    if not experiment.eval.held_out and experiment.train.dataset is None:
        raise InputError(
            "eval.held_out is 0, which leaves nothing for `eval`; set it above 0, or run the stages before it by themselves"
        )
    if experiment.export and here:
        check_libraries(experiment, experiment.export)
    step_inputs(experiment.curate)
    read_tasks(experiment.eval.tasks)
    origin(experiment)
    check_tokenizers(experiment)
    _check_prune(experiment)
    # Without TRL its arguments are not known, and a dry run needs none.
    with suppress(ImportError), working("run", "checking the configuration"):
        check_training(experiment)
        if experiment.rounds:
            changes = {"rounds": None, "targets": experiment.own_targets, "train": round_training(experiment)}
            check_training(experiment.with_(**changes), "rounds.args")
    if examples := experiment.train.compare_examples:
        read_examples(examples)


def _check_prune(experiment: Experiment) -> None:
    """Refuse a student that is larger than its teacher, if the teacher is a directory.

    Raises:
        InputError: names the key.
    """
    prune, config = experiment.student.prune, read_json(Path(experiment.teacher.model) / "config.json")
    if prune is not None and isinstance(config, dict):
        check_sizes(prune, config.get("text_config", config))


def check_plan(experiment: Experiment) -> None:
    """Check the held-out split, and print the approximate duration of the unfinished stages, as far as possible.

    Raises:
        InputError: the prompts leave a split empty.
    """
    missing = missing_stages(experiment)
    if not missing or experiment.prompts is None:
        return
    prepared = check_held_out(experiment, missing)
    if experiment.teacher.abilities.api:
        return
    if prepared is None:
        return say("run", "the time can be estimated once `prompts` has finished")
    with working("run", "measuring this machine"):
        each = estimate(experiment, sorted({stage.command for stage in missing}), len(prepared.prompts))
    seconds: dict[str, float] = {}
    for stage in missing:
        if stage.command in each:
            seconds[stage.command] = seconds.get(stage.command, 0.0) + each[stage.command]
    if seconds:
        say("run", said(seconds))


def missing_stages(experiment: Experiment) -> list[StageRun]:
    """The unfinished stages."""
    return [stage for stage in stages(experiment) if how_far(Path(experiment.output), stage.name) != "done"]


def check_held_out(experiment: Experiment, missing: Sequence[StageRun]) -> Prepared | None:
    """Check the held-out split if `curate` has not made it yet, and return the prompts, if known already.

    Raises:
        InputError: the prompts leave a split empty.
    """
    prepared = prepared_prompts(experiment)
    if prepared is not None and any(stage.command == "curate" for stage in missing):
        check_splits(experiment, prepared.prompts)
    return prepared


def check_splits(experiment: Experiment, prompts: Sequence[Prompt]) -> None:
    """What `curate` would find, before the teacher has worked: which prompts are held out does not depend on the answers.

    Raises:
        InputError: a split is too small.
    """
    from llmdistill.stages.curate import warn_of_few

    share = experiment.eval.held_out
    if not share:
        return
    train, test = count_splits(experiment, prompts)
    if not (train and test):
        raise InputError(
            f"eval.held_out: {share:g} of {counted(train + test, 'conversation')} leaves {train:,} for training, {test:,} held "
            "out; add prompts, or change eval.held_out or seed"
        )
    if not experiment.train.mix:  # else there are more held-out rows in those datasets
        check_clusters(test, "held-out prompts", "raise eval.held_out")  # `eval` would refuse it after everything else
    warn_of_few(test)


def run_stages(stages: list[StageRun]) -> None:
    """Run stages one after another; the first that fails ends this process with its exit status."""
    for stage in stages:
        if stage.round and stage.command == "generate":
            say(f"round {stage.round}", "the student writes, the teacher scores the text, and the student trains on it")
        status = _run(stage)
        if status:
            sys.exit(status if status > 0 else 1)


def _run(stage: StageRun) -> int:
    """Run a stage in a separate process, on a configuration saved next to its output; returns its exit status."""
    file = Path(stage.experiment.output) / CONFIGS / f"{stage.command}.yaml"
    text, was_there = dump_experiment(stage.experiment), file.exists()
    if not was_there or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    with subprocess.Popen([sys.executable, "-m", "llmdistill", stage.command, str(file)]) as process:
        try:
            status = process.wait()
        except BaseException:  # Ctrl-C or SIGTERM: the stage gets it too and keeps what it has finished
            process.terminate()
            process.wait()
            raise
    if status == 2 and not was_there:  # wrong input leaves nothing behind
        file.unlink()
        with suppress(OSError):
            file.parent.rmdir()
            file.parent.parent.rmdir()
    return status
