"""Assigns rows to teachers before any of them is loaded."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.route import DEFAULT
from llmdistill.errors import InputError

Routed = tuple[Mapping[str, Any], Mapping[str, Any], str]  # a row's fields, its place in the source, and that in words


def teachers_of(experiment: Experiment, count: int, rows: Iterable[Routed]) -> list[str]:
    """The name of each row's teacher; empty for a single teacher.

    Args:
        experiment: the configuration.
        count: of the rows.
        rows: what determines their teachers.

    Raises:
        InputError: a row names no teacher, or a teacher is named by no row.
    """
    teachers, route = experiment.teachers, experiment.route
    if route is None:
        return [""] * count
    names = [route.teacher_of(fields, str(place.get("file", "")), teachers, origin) for fields, place, origin in rows]
    for name in teachers:
        if name not in names and name != DEFAULT:
            by = f"route.column {route.column}" if route.column else "route.files"
            raise InputError(f"teachers.{name}: no row is assigned to it by {by}; remove it or correct the route")
    return names


def said(names: Iterable[str]) -> str:
    """Number of rows per teacher, in words; empty for a single teacher."""
    counts = Counter(name for name in names if name)
    return ", ".join(f"{count:,} to {name}" for name, count in counts.most_common())
