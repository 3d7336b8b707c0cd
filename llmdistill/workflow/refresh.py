"""`llmdistill refresh`: incremental retraining.

Each version adds new prompts, continues from the promoted student, and is promoted only if it is not worse.

    OUTPUT/versions/1, 2, …     the output of each version, as `run` writes it
    OUTPUT/refresh.json         every version: what it was made from, whether it was promoted, and why
    OUTPUT/promoted             a link to the student to use
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.train import Mix
from llmdistill.data.ids import stable_id
from llmdistill.errors import InputError
from llmdistill.evaluation.metrics import has_teacher
from llmdistill.evaluation.statistics import interval_text
from llmdistill.runs import lock
from llmdistill.runs.files import check_shape, read_json, write_json
from llmdistill.runs.progress import say
from llmdistill.stages.prompts import Prepared, Prompt, prepared_prompts, prompts_inputs
from llmdistill.students.sides import is_needed
from llmdistill.teachers import all_fingerprints
from llmdistill.workflow.checks import check_splits
from llmdistill.workflow.pipeline import run_stages
from llmdistill.workflow.plan import stages

_FILE = "refresh.json"
_LINK = "promoted"


def refresh(experiment: Experiment, dry_run: bool = False) -> None:
    """Make the next version, or continue an interrupted one, and decide on it; repeated calls without new data do nothing.

    Args:
        experiment: the configuration.
        dry_run: only say what would be done.

    Raises:
        InputError: there is no section `refresh`, or what it needs.
        BusyError: another process is at it.
    """
    if experiment.refresh is None:
        raise InputError("the key refresh is missing; `refresh: {}` is enough")
    if experiment.prompts is None:
        raise InputError("the key prompts is missing; `refresh` needs new prompts from prompts.source")
    if experiment.store:
        raise InputError("refresh does not support store, as it keeps its versions on one machine; remove store")
    if experiment.rounds:
        raise InputError("refresh does not support rounds; remove one of them")
    if dry_run:
        return _next(experiment, dry_run)
    with lock.alone([Path(experiment.output) / "versions"], "refresh"):
        return _next(experiment)


def _next(experiment: Experiment, dry_run: bool = False) -> None:
    output = Path(experiment.output)
    made_from = _made_from(experiment)
    versions = _versions(output)
    if not dry_run:
        _promote(output, versions)
    last = versions[-1] if versions else None
    if last and last["made_from"] == made_from and "promoted" in last:
        return say("refresh", f"nothing new since version {last['version']}, which was {_verdict(last)}")
    resumed = last is not None and "promoted" not in last and last["made_from"] == made_from
    number = last["version"] if last and resumed else len(versions) + 1
    here = _version(experiment, versions, number)
    prepared = _prepared(here)
    new = None if prepared is None else len(prepared.prompts)
    if new == 0:
        return say("refresh", "all prompts of prompts.source are in earlier versions")
    if prepared and (reason := _too_few(here, prepared.prompts)):
        return say("refresh", f"waiting for more prompts: {reason}")
    if dry_run:
        return say("refresh", f"would make version {number} in {output / 'versions' / str(number)}" + _of(new))
    if not resumed:
        versions.append({"version": number, "made_from": made_from})
        _write(output, versions)
    say("refresh", f"version {number}{_of(new)}" + (", continued" if resumed else ""))
    run_stages(stages(here))
    versions[-1] |= _decide(experiment, output, versions)
    _write(output, versions)
    _promote(output, versions)
    return say("refresh", f"version {number} is {_verdict(versions[-1])}")


def _made_from(experiment: Experiment) -> str:
    """What a version depends on: the configuration, the prompts, the teacher."""
    assert experiment.prompts is not None
    settings = experiment.model_dump(mode="json", exclude={"output", "jobs", "refresh", "watch"})
    return stable_id(settings, prompts_inputs(experiment.prompts), all_fingerprints(experiment)[0])


def _versions(output: Path) -> list[dict[str, Any]]:
    file = output / _FILE
    found = check_shape(file, read_json(file) or {"versions": []}, {"versions": list})["versions"]
    return [check_shape(file, entry, {"version": int, "made_from": str}, f"versions.{n}") for n, entry in enumerate(found)]


def _write(output: Path, versions: list[dict[str, Any]]) -> None:
    write_json(output / _FILE, {"versions": versions})


def _version(experiment: Experiment, versions: list[dict[str, Any]], number: int) -> Experiment:
    """The experiment of a version: earlier prompts are left out, earlier rows mixed in, and the promoted student continues."""
    assert experiment.refresh is not None
    assert experiment.prompts is not None
    directory = Path(experiment.output) / "versions"
    changes: dict[str, Any] = {"output": str(directory / str(number))}
    earlier = [directory / str(entry["version"]) for entry in versions if "promoted" in entry]
    if earlier:
        changes["prompts"] = experiment.prompts.with_(known=[str(version / "data") for version in earlier])
        if experiment.refresh.replay:
            learned = "retokenized" if is_needed(experiment) else "curated"
            datasets = [str(version / learned) for version in earlier]
            changes["train"] = experiment.train.with_(mix=Mix(datasets=datasets, share=experiment.refresh.replay))
    promoted = [entry["version"] for entry in versions if entry.get("promoted")]
    if promoted:
        changes["student"] = experiment.student.continued(str(directory / str(promoted[-1]) / "student"))
    return experiment.with_(**changes)


def _prepared(experiment: Experiment) -> Prepared | None:
    """The prompts that a version adds; None if the teacher has yet to make them."""
    if experiment.prompts is None or experiment.prompts.steps:
        return None
    return prepared_prompts(experiment, empty=True)


def _too_few(experiment: Experiment, prompts: Sequence[Prompt]) -> str | None:
    """Why a version with these prompts could not be finished, so that the teacher would answer them in vain."""
    try:
        check_splits(experiment, prompts)
    except InputError as error:
        return str(error)
    return None


def _of(new: int | None) -> str:
    return "" if new is None else f", of {new:,} new prompts"


def _decide(experiment: Experiment, output: Path, versions: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the student of the last version is promoted, and why."""
    assert experiment.refresh is not None
    if not any(entry.get("promoted") for entry in versions):
        return {"promoted": True, "reason": "it is the first"}
    metrics = read_json(output / "versions" / str(versions[-1]["version"]) / "eval" / "metrics.json")
    by, what = ("kl", "KL from the teacher") if has_teacher(metrics["models"]) else ("nll", "NLL of the teacher's text")
    found = next(d for d in metrics["differences"] if d["worse"] == "student before" and d["metric"] == by)
    margin = experiment.refresh.margin
    reason = f"its {what} differs by {_interval(found)} nats per token from the previous version's"
    worse = found["high"] > margin
    if worse:
        reason += f", and the margin is {margin:g}"
    if metrics.get("tasks"):
        tasks = next(d for d in metrics["tasks"]["together"]["differences"] if d["against"] == "student before")
        reason += f"; its task score differs by {_interval(tasks)}"
        worse = worse or tasks["high"] < 0
    return {"promoted": not worse, "reason": reason}


def _interval(found: dict[str, float]) -> str:
    mean, ends = interval_text(found, "+.3f")
    return f"{mean} ({ends})"


def _verdict(entry: dict[str, Any]) -> str:
    return ("promoted: " if entry["promoted"] else "not promoted: ") + entry["reason"]


def _promote(output: Path, versions: list[dict[str, Any]]) -> None:
    """Atomically link to the student that was promoted last; `refresh.json` names it."""
    promoted = [entry["version"] for entry in versions if entry.get("promoted")]
    if not promoted:
        return
    target = Path("versions") / str(promoted[-1]) / "student"
    if (output / _LINK).is_symlink() and (output / _LINK).readlink() == target:
        return
    new = output / f".{_LINK}.{lock.writer_name()}"
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(output / _LINK)
