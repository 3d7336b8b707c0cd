"""Statistics of the scores of single items: means, paired differences, and the share of the teacher's score that is kept.

A teacher behind an API, whose weights are not available, has no score, as its answers would be billed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmdistill.config import Experiment
from llmdistill.evaluation.cascade import cascade
from llmdistill.evaluation.examples import apart
from llmdistill.evaluation.own_tasks import OwnTask, run_own
from llmdistill.evaluation.parts import Parts
from llmdistill.evaluation.statistics import (
    Array,
    Draws,
    Estimate,
    Interval,
    check_clusters,
    clusters_needed,
    holm,
    mcnemar,
    mean_of,
    pairs_interval,
    residual_errors,
)
from llmdistill.evaluation.tasks import SCHEMA, About, run_tasks
from llmdistill.runs.files import write_parquet

STUDENT, TEACHER = "student", "teacher"


def measure_tasks(
    tasks: dict[str, tuple[str, Any]],
    models: dict[str, Any],
    tokenizers: dict[str, Any],
    end_ids: dict[str, list[int]],
    experiment: Experiment,
    parts: Parts,
    directory: Path,
) -> dict[str, Any]:
    """Run the tasks, write `tasks.parquet`, and return the entry `tasks` of `metrics.json`."""
    settings, shown = experiment.eval, experiment.teacher.template_args
    size, limit = settings.batch_size, settings.task_limit
    own = [task for _, task in tasks.values() if isinstance(task, OwnTask)]
    others = {name: entry for name, entry in tasks.items() if not isinstance(entry[1], OwnTask)}
    table, about, warnings = SCHEMA.empty_table(), dict[str, About](), list[str]()
    if own:  # the cheaper ones first
        end = experiment.generate.thinking_end
        rows, tables = run_own(own, models, tokenizers, end_ids, size, limit, shown, parts=parts, thinking_end=end)
        table = pa.Table.from_pylist(rows, SCHEMA)
        about = about_own(own, tables)
    if others:
        measured, described, warnings = run_tasks(others, models, tokenizers, size, limit, shown, parts)
        table, about = pa.concat_tables([table, measured]), about | described
    write_parquet(directory / "tasks.parquet", table)
    how = {
        "chat_template": tokenizers.get(TEACHER, tokenizers[STUDENT]).chat_template is not None,
        "limit": limit,
        "warnings": warnings,
    }
    return {"tasks": {**how, **summarise(table, about, settings.resamples, experiment.seed)}}


def about_own(tasks: Sequence[OwnTask], tables: Mapping[str, dict[str, Any]]) -> dict[str, About]:
    """Descriptions of the user's own tasks, by name.

    Args:
        tasks: the tasks, as read.
        tables: from `run_own`.
    """
    return {own.task.name: About(str(own.task.file), own.task.rules.METRIC, own.chance, tables[own.task.name]) for own in tasks}


def summarise(table: pa.Table, about: dict[str, About], resamples: int, seed: int) -> dict[str, Any]:
    """The entry `tasks` of `metrics.json`, with `tasks` and `together`.

    Args:
        table: a row for every item and model, from `tasks.run_tasks`.
        about: descriptions of the tasks.
        resamples: number of bootstrap resamples, over clusters of items.
        seed: seed of the resamples.

    Raises:
        InputError: if a task has too few items for an interval.
    """
    models = pc.unique(table["model"]).to_pylist()
    rivals = [name for name in models if name != STUDENT]
    tasks = [_Task(name, table.filter(pc.equal(table["task"], name)), resamples, seed + n) for n, name in enumerate(about)]
    described = [task.described(about[task.name], models, rivals) for task in tasks]
    for rival in rivals:
        tested = [next(d for d in entry["differences"] if d["against"] == rival) for entry in described]
        tested = [difference for difference in tested if difference["mcnemar"]]
        for difference, p in zip(tested, holm([d["mcnemar"]["p"] for d in tested]), strict=True):
            difference["mcnemar"]["p_holm"] = p
    return {"tasks": described, "together": _together(tasks, about, models, rivals)}


class _Task:
    """One task's scores, with all models' in the same order of items."""

    def __init__(self, name: str, table: pa.Table, resamples: int, seed: int) -> None:
        self.name, self.seed = name, seed
        by_model = {
            model: table.filter(pc.equal(table["model"], model)).sort_by("item")
            for model in pc.unique(table["model"]).to_pylist()
        }
        first = next(iter(by_model.values()))
        assert all(rows["item"].equals(first["item"]) for rows in by_model.values())
        self.rows = by_model
        self.scores: dict[str, Array] = {model: rows["score"].to_numpy() for model, rows in by_model.items()}
        self.draws = Draws.of(first["cluster"].to_pylist(), resamples, seed)
        self.items = np.ones(len(first))
        self.sizes = self.draws.sums(self.items)
        self.warning = check_clusters(len(self.sizes), f"items of the task {name}", "raise eval.task_limit")

    def values(self, model: str, rival: str | None = None) -> Array:
        """A model's scores, or their differences from another's."""
        return self.scores[model] - self.scores[rival] if rival else self.scores[model]

    def ratio(self, *models: str) -> Estimate:
        """The mean of a model, or of the difference between two."""
        return self.draws.ratio(self.values(*models), self.items)

    def are_right_or_wrong(self, *models: str) -> bool:
        """Whether these models' scores are 0 or 1."""
        return all(np.isin(self.scores[model], (0, 1)).all() for model in models)

    def is_constant(self, *models: str) -> bool:
        """Whether a model's scores, or the differences between two, are all the same."""
        return bool(np.ptp(self.values(*models)) == 0)

    def is_between(self, *models: str) -> bool:
        """Whether these models' scores are between 0 and 1."""
        return all(self.scores[model].min() >= 0 and self.scores[model].max() <= 1 for model in models)

    def mean(self, *models: str) -> dict[str, float]:
        """The mean of a model, or of the difference between two, with its interval."""
        values = self.values(*models)
        if len(models) > 1 and self.are_right_or_wrong(*models):
            return self.draws.pairs(values)
        return (self.draws.share if len(models) == 1 and self.is_between(*models) else self.draws.interval)(values, self.items)

    def least_half(self, *models: str) -> float:
        """Half-width of the interval for two models that are right on the same items; 0 for other scores."""
        return pairs_interval(np.zeros(len(self.sizes))).high if self.are_right_or_wrong(*models) else 0.0

    def described(self, about: About, models: Sequence[str], rivals: Sequence[str]) -> dict[str, Any]:
        """Its entry in `metrics.json`."""
        return {
            "name": self.name,
            "source": about.source,
            "metric": about.metric,
            "chance": about.chance,
            "items": len(self.items),
            "clusters": len(self.sizes),
            "warning": self.warning,
            "models": {model: self.mean(model) for model in models},
            "differences": [self._difference(rival) for rival in rivals],
            "kept": _kept([self], 0),
            "kept_by_model": {model: _kept([self], 0, model) for model in models if model != TEACHER},
            "kept_above_chance": None if about.chance is None else _kept([self], about.chance),
            **about.tables,
            **(self._beside_the_teacher() if "valid" in about.tables and TEACHER in self.scores else {}),
        }

    def _beside_the_teacher(self) -> dict[str, Any]:
        """For one of the user's own tasks: the items on which the student is worse or better, and when to ask the teacher."""
        ours, theirs = self.rows[STUDENT], self.rows[TEACHER]
        return {"apart": apart(ours, theirs), **self._cascade()}

    def _cascade(self) -> dict[str, Any]:
        rows = self.rows[STUDENT]
        if rows["agrees"].null_count:  # free text
            return {}
        agrees, clusters = rows["agrees"].to_numpy(), rows["cluster"].to_pylist()
        return {"cascade": cascade(rows["logprobs"].to_pylist(), agrees, self.scores, clusters, self.draws, self.seed)}

    def _difference(self, rival: str) -> dict[str, Any]:
        ours, theirs = self.scores[STUDENT], self.scores[rival]
        needed = clusters_needed(self.draws.sums(ours - theirs), self.sizes)
        binary = self.are_right_or_wrong(STUDENT, rival)
        return {
            "of": STUDENT,
            "against": rival,
            **self.mean(STUDENT, rival),
            "mcnemar": asdict(mcnemar(ours == 1, theirs == 1)) if binary else None,
            "items_needed": None if needed is None else math.ceil(needed * self.sizes.mean()),
        }


def _together(tasks: list[_Task], about: dict[str, About], models: Sequence[str], rivals: Sequence[str]) -> dict[str, Any]:
    """Over all tasks: the mean of their means, each task counting alike, its items drawn apart from the others'."""

    def mean(*models: str) -> dict[str, float]:
        each = [task.mean(*models) for task in tasks]
        if len(tasks) == 1:
            return each[0]
        found = mean_of([task.ratio(*models) for task in tasks]).interval()
        # If all scores of a task are equal, resamples show nothing; its own interval has a width.
        silent = [own for task, own in zip(tasks, each, strict=True) if task.is_constant(*models)]
        down, up = (
            math.hypot(end, *((own[side] - own["mean"]) / len(tasks) for own in silent))
            for side, end in (("low", found.mean - found.low), ("high", found.high - found.mean))
        )
        least, most = (
            (-1 if len(models) > 1 else 0, 1) if all(task.is_between(*models) for task in tasks) else (-math.inf, math.inf)
        )
        return asdict(Interval(found.mean, max(found.mean - down, least), min(found.mean + up, most)))

    chances = [about[task.name].chance for task in tasks]
    return {
        "tasks": len(tasks),
        "items": sum(len(task.items) for task in tasks),
        "models": {model: mean(model) for model in models},
        "differences": [
            {
                "of": STUDENT,
                "against": rival,
                **mean(STUDENT, rival),
            }
            for rival in rivals
        ],
        "kept": _kept(tasks, 0),
        "kept_above_chance": _kept(tasks, float(np.mean([chance or 0 for chance in chances]))) if any(chances) else None,
    }


def _kept(tasks: list[_Task], floor: float, model: str = STUDENT) -> dict[str, float] | None:
    """A model's score above a floor as a share of the teacher's, both on the same items.

    None if the teacher is not above the floor in every resample, as the share is meaningless then. None without a teacher, too.
    """
    if TEACHER not in tasks[0].scores:
        return None
    ours, theirs = ([task.ratio(name) for task in tasks] for name in (model, TEACHER))
    student, teacher = (
        np.mean([np.append(each.value, each.values) for each in found], axis=0) - floor for found in (ours, theirs)
    )
    if teacher.min() <= 1e-9:
        return None
    kept = student / teacher
    squares = np.zeros(len(kept))
    for task, one, other in zip(tasks, ours, theirs, strict=True):
        weights = np.vstack([np.ones(len(task.sizes)), task.draws.draws])
        columns = np.stack([*(task.draws.sums(task.scores[name]) for name in (model, TEACHER)), task.sizes])
        means = [np.append(each.value, each.values) for each in (one, other)]
        coefficients = np.stack([np.ones_like(kept), -kept, kept * means[1] - means[0]], axis=1)
        squares += residual_errors(columns, coefficients, task.sizes, weights) ** 2
    errors = np.sqrt(squares) / len(tasks) / teacher
    freedom = sum(each.freedom for each in ours)
    found = Estimate(float(kept[0]), float(errors[0]), kept[1:], errors[1:], freedom).interval()
    # If both are right and wrong on the same items, or nearly so, resamples show too little: use a difference of shares.
    least = math.sqrt(sum(task.least_half(model, TEACHER) ** 2 for task in tasks)) / len(tasks) / float(teacher[0])
    return asdict(Interval(found.mean, min(found.low, found.mean - least), max(found.high, found.mean + least)))
