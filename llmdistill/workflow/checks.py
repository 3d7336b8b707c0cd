"""What is checked before the first stage of a run, so that no teacher works for a run that a later stage would refuse."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llmdistill.config import Experiment
from llmdistill.curation.steps import step_inputs
from llmdistill.errors import InputError
from llmdistill.evaluation.statistics import check_clusters
from llmdistill.evaluation.tasks import read_tasks
from llmdistill.runs import record
from llmdistill.runs.files import read_json
from llmdistill.runs.progress import counted, say, working
from llmdistill.stages.export import check_libraries
from llmdistill.stages.prompts import Prepared, Prompt, count_splits, prepared_prompts
from llmdistill.stages.table import STAGES
from llmdistill.students.on_policy import round_training
from llmdistill.students.origins import fresh_claims, origin
from llmdistill.students.sides import check_tokenizers
from llmdistill.students.sizes import check_sizes
from llmdistill.training.examples import read_examples
from llmdistill.training.settings import check_training
from llmdistill.workflow.estimate import estimate, said
from llmdistill.workflow.plan import StageRun, stages
from llmdistill.workflow.status import how_far


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
