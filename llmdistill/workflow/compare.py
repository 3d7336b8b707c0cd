"""Several finished runs on one page: their differences, and which student is closer to the teacher, on the same rows."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from llmdistill.errors import InputError
from llmdistill.evaluation.metrics import has_teacher, metrics_of
from llmdistill.evaluation.plots import interval_plot, size_plot
from llmdistill.evaluation.report.words import percent, template_environment
from llmdistill.evaluation.statistics import Draws, holm, two_sided_p
from llmdistill.runs.files import write_text
from llmdistill.runs.progress import console, say
from llmdistill.runs.record import read_run
from llmdistill.stages.report import read_metrics

Json = dict[str, Any]

_COMPARED = [metric.name for metric in metrics_of("runs")]
_STAGES = ("data", "curated", "retokenized", "student-before")
_RESAMPLES = 2000
_MOST_KEYS = 12  # that are shown of what runs differ in


def compare(directories: list[Path], out: Path, dry_run: bool = False) -> None:
    """Write a page, and the same in Markdown next to it.

    Args:
        directories: the `output` of each run; the first is what the others are compared with.
        out: the page, which ends in `.html`.
        dry_run: only say what would be written.

    Raises:
        InputError: there are fewer than two, one has no evaluation, they were not measured on the same rows, or the pages
            cannot be written.
    """
    if len(directories) < 2:
        raise InputError(
            f"{directories[0]}: a comparison needs at least two directories; for the report of one run, pass its configuration"
        )
    if out.suffix != ".html":
        raise InputError(f"--out {out}: must end in .html")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: no such directory {out.parent}")
    if (beside := out.with_suffix(".md")).exists() and not out.exists():
        raise InputError(f"--out {out}: {beside}, which would be written next to it, already exists; choose another name")
    names = _names(directories)
    metrics = [read_metrics(directory / "eval" / "metrics.json") for directory in directories]
    _check_teachers(directories)
    students = [next(model for model in found["models"] if model["name"] == "student") for found in metrics]
    sums, draws = _same_rows(directories)
    differences = _differences(sums, draws)
    view = {
        "runs": [
            {"name": name, "directory": str(directory), "student": student, "difference": difference}
            for name, directory, student, difference in zip(names, directories, students, [None, *differences], strict=True)
        ],
        "keys": _what_differs(directories),
        "held_out": {**metrics[0]["held_out"], "resamples": _RESAMPLES},
        "teacher": next(model for model in metrics[0]["models"] if model["name"] == "teacher"),
        "intervals": interval_plot((name, student["kl"]) for name, student in zip(names, students, strict=True)),
        "sizes": size_plot(
            (name, (student["bytes"] or 0) / 1e6, percent(student["top1"])) for name, student in zip(names, students, strict=True)
        ),
        "verdict": _verdict(names, differences),
        "metrics": metrics_of("runs"),
    }
    if dry_run:
        return say("report", f"would write {out} and {out.with_suffix('.md')}")
    environment = template_environment()
    for file in (out, out.with_suffix(".md")):
        write_text(file, environment.get_template(f"compare{file.suffix}.j2").render(view))
    say("report", str(out))
    console.print()
    console.print(view["verdict"], markup=False)
    return None


def _names(directories: list[Path]) -> list[str]:
    """The last parts of their paths that distinguish them."""
    parts = [directory.resolve().parts for directory in directories]
    if len(set(parts)) < len(parts):
        raise InputError("a run is named twice")
    depth = next(depth for depth in range(1, 99) if len({part[-depth:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def _check_teachers(directories: list[Path]) -> None:
    """Refuse runs whose students were compared with different teachers, or without a teacher's weights.

    Raises:
        InputError: names it, or the first two.
    """
    teachers = {}
    for directory in directories:
        run = read_run(directory / "eval") or {}
        metrics = read_metrics(directory / "eval" / "metrics.json")
        if not has_teacher(metrics["models"]):
            raise InputError(
                f"{directory}: its teacher is behind an API, but comparing runs needs the teacher's weights for the KL"
            )
        model = next(found["path"] for found in metrics["models"] if found["name"] == "teacher")
        teachers[directory] = (run.get("inputs", {}).get(model), model)
    first, *others = teachers.items()
    for directory, (fingerprint, model) in others:
        if fingerprint != first[1][0]:
            raise InputError(
                f"{directory} was compared with the teacher {model}, but {first[0]} with {first[1][1]}; "
                "the distances from two teachers are not comparable"
            )


def _same_rows(directories: list[Path]) -> tuple[list[Json], Draws]:
    """The sums over every held-out row for the student of each run, in one order.

    Raises:
        InputError: a run has other rows than the first.
    """
    tables = []
    for directory in directories:
        file = directory / "eval" / "rows.parquet"
        if not file.is_file():
            raise InputError(f"{file} is missing; run `eval` again")
        tables.append(pq.read_table(file).sort_by("id"))
    first = tables[0]
    for directory, table in zip(directories, tables, strict=True):
        if table["id"] != first["id"]:
            common = len(set(table["id"].to_pylist()) & set(first["id"].to_pylist()))
            raise InputError(
                f"{directory}: its held-out rows differ from those of {directories[0]}: {common:,} of {len(table):,} and "
                f"{len(first):,} are the same; evaluate all runs on one dataset (train.dataset)"
            )
        if table["tokens"] != first["tokens"]:
            raise InputError(
                f"{directory}: its held-out rows have different positions than in {directories[0]}; students with different "
                "vocabularies are measured at shared positions, which cannot be compared"
            )
    draws = Draws.of(first["conversation"].to_pylist(), _RESAMPLES, 0)
    return [
        {"tokens": table["tokens"].to_numpy()} | {name: table[f"student {name}"].to_numpy() for name in _COMPARED}
        for table in tables
    ], draws


def _differences(sums: list[Json], draws: Draws) -> list[Json]:
    """Each run except the first, minus the first: paired intervals, and p of the KL by the bootstrap, adjusted by Holm."""
    tokens = sums[0]["tokens"]
    found: list[Json] = [
        {key: draws.interval(mine[key] - sums[0][key], tokens) for key in _COMPARED}
        | {"p": two_sided_p(draws.ratio(mine["kl"] - sums[0]["kl"], tokens).values)}
        for mine in sums[1:]
    ]
    for difference, adjusted in zip(found, holm([difference["p"] for difference in found]), strict=True):
        difference["p"] = adjusted
    return found


def _verdict(names: list[str], differences: list[Json]) -> str:
    """One sentence: which runs are closer to the teacher than the first, and which are farther."""
    nearer = [name for name, d in zip(names[1:], differences, strict=True) if d["kl"]["high"] < 0 and d["p"] < 0.05]
    farther = [name for name, d in zip(names[1:], differences, strict=True) if d["kl"]["low"] > 0 and d["p"] < 0.05]
    open_ones = [name for name in names[1:] if name not in (*nearer, *farther)]
    said = [
        f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} {what}"
        for found, what in (
            (nearer, f"closer to the teacher than {names[0]}"),
            (farther, f"farther from the teacher than {names[0]}"),
            (open_ones, f"not shown to differ from {names[0]}"),
        )
        if found
    ]
    return "; ".join(said) + "."


def _what_differs(directories: list[Path]) -> list[Json]:
    """Keys of the configuration that differ between runs, with each run's value, except seeds and output paths."""
    settings = []
    for directory in directories:
        found: Json = {}
        models = read_metrics(directory / "eval" / "metrics.json")["models"]
        parts = Path(next(model["path"] for model in models if model["name"] == "student")).parts
        # Below the run's own directory, wherever that is now.
        of_student = directory.joinpath(*parts[parts.index("rounds") :]) if "rounds" in parts else directory / "student"
        for made in (*(directory / stage for stage in _STAGES), of_student, directory / "eval"):
            run = read_run(made)
            if run:
                found |= _flat(run["settings"])
        found["rounds"] = len(list((directory / "rounds").glob("*/student"))) or None
        settings.append(found)
    keys = sorted({key for found in settings for key in found})
    rows = [{"key": key, "values": [_shown(found.get(key)) for found in settings]} for key in keys]
    rows = [row for row in rows if len(set(row["values"])) > 1]
    more = len(rows) - _MOST_KEYS
    return [*rows[:_MOST_KEYS], *([{"key": f"and {more} more", "values": [""] * len(directories)}] if more > 0 else [])]


def _flat(tree: Any, prefix: str = "") -> Json:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    found: Json = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.")
    return found


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
