"""`llmdistill report`: one page that says what was made, from what, and how well it does, for people."""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from llmdistill.config import Experiment
from llmdistill.data.budget import money
from llmdistill.data.cards import describe_targets
from llmdistill.data.dataset import MANIFEST
from llmdistill.errors import InputError
from llmdistill.evaluation import drafts
from llmdistill.evaluation.metrics import METRICS, OWN_TEXT_METRICS, Metric, first_table, has_teacher, metrics_of
from llmdistill.evaluation.picture import picture
from llmdistill.evaluation.plots import Point, group_plot, interval_plot, loss_plot, size_plot
from llmdistill.evaluation.routes import lines
from llmdistill.evaluation.statistics import interval_text
from llmdistill.runs.progress import console, say
from llmdistill.runs.record import check_shape, read_json, read_run, write_bytes, write_text
from llmdistill.students.sides import training_dataset

SCHEMA_VERSION = 2
Json = dict[str, Any]

_LABELS = {"student before": "student before training", "student, text only": "student trained on text only"}
_FEW_PROMPTS = 30


def report(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/report.html`, `report.md` and `report.png`, always anew: it takes no time and no model.

    Raises:
        InputError: there is no evaluation, or it is of another schema.
    """
    page, text, shared = (Path(experiment.output) / f"report.{form}" for form in ("html", "md", "png"))
    if dry_run:
        return say("report", f"would write {page}, {text} and {shared}")
    view = _view(experiment)
    environment = template_environment()
    for file in (page, text):
        write_text(file, environment.get_template(f"{file.name}.j2").render(view))
    write_bytes(shared, picture(view, _LABELS))
    say("report", str(page))
    console.print()
    return console.print(view["headline"], markup=False)


def _view(experiment: Experiment) -> Json:
    """Everything that the templates show."""
    metrics = read_metrics(experiment.directory("eval") / "metrics.json")
    models: dict[str, Json] = {model["name"]: model for model in metrics["models"]}
    columns, teacher = first_table(metrics), models.get("teacher")
    path = teacher["path"] if teacher else experiment.teacher.model
    near, data = _NEARNESS["kl" if teacher else "nll"], _data(experiment)
    cautions = [*_of_teachers(metrics.get("teachers", [])), *_cautions(metrics, models), *([] if teacher else _of_sampling(data))]
    return {
        "headline": metrics["headline"],
        "output": experiment.output,
        "models": list(models.values()),
        "teacher": path,
        "teacher_name": Path(path).name,
        "missing": None if teacher else _MISSING,
        "near": near,
        "held_out": metrics["held_out"],
        "classes": _classes(metrics["held_out"].get("classes")),
        "decoding": metrics["decoding"],
        "warnings": [*metrics.get("warnings", []), *_task_warnings(metrics.get("tasks"))],
        "samples": metrics["samples"],
        "cards": _cards(models, metrics.get("tasks")),
        "tasks": metrics.get("tasks"),
        "task_rival": _rival(metrics["tasks"]) if metrics.get("tasks") else None,
        "task_plots": list(_task_plots(metrics.get("tasks"))),
        "change": _largest_change(metrics["samples"]),
        "judged": metrics.get("win_rate"),
        "exports": _exports(experiment),
        "draft": _draft(experiment, path, models["student"]),
        "profiles": _profiles(models),
        "columns": columns,
        "measures": list(_measures(metrics["models"], [] if teacher else columns)),
        "own_text": metrics.get("own_text"),
        "sizes": _sizes(models) if teacher else None,
        "views": [_view_of_tokens(view) for view in metrics["views"]],
        "examples": metrics["examples"],
        "intervals": interval_plot((name, model[near["metric"]]) for name, model in models.items() if name != "teacher"),
        "findings": _findings(metrics["differences"]),
        "verdict": _verdict(metrics["differences"]),
        "cautions": cautions,
        "training": _training(experiment),
        "data": data,
        "lineage": _lineage(experiment),
    }


# How near a model is to its teacher: by its distributions, or, without its weights, by its text.
_NEARNESS: dict[str, Json] = {
    "kl": {
        "metric": "kl",
        "title": "KL from the teacher",
        "note": "The teacher itself is at 0.",
        "better": "← closer to the teacher",
        "failed": "Training did not bring the student closer to the teacher.",
    },
    "nll": {
        "metric": "nll",
        "title": "NLL of the teacher’s text",
        "note": "Where the text was sampled at temperature 1, the difference of two models estimates that of their KL.",
        "better": "← predicts it better",
        "failed": "Training did not make the student predict the teacher’s text better.",
    },
}
_MISSING = (
    "The teacher is behind an API, so what needs its weights is not here: the KL from the teacher over the vocabulary, the share "
    "of its next-token choices, calibration, the models’ own text, the token view, the student as a draft model, and the "
    "teacher’s size, speed and task scores."
)


def _classes(shared: Json | None) -> str:
    """Over how many classes models of different vocabularies are compared, in words."""
    if shared is None or not isinstance(shared["count"], dict):
        return f"{shared['count']:,} root classes" if shared else ""
    return f"root classes of each teacher ({', '.join(f'{name} {count:,}' for name, count in shared['count'].items())})"


def _of_teachers(entries: list[Json]) -> list[str]:
    """What is said where rows have teachers of their own."""
    if not entries:
        return []
    return [f"{len(entries)} teachers: every row was compared with its own.", *lines(entries)]


def _task_warnings(tasks: Json | None) -> list[str]:
    """What `eval` has said of single tasks; what it has said of all stands below their table."""
    return [f"{task['name']}: {task['warning']}" for task in (tasks or {"tasks": []})["tasks"] if task.get("warning")]


def read_metrics(file: Path) -> Json:
    """The content of a `metrics.json`.

    Raises:
        InputError: it is not there, or of another schema.
    """
    metrics: Json | None = read_json(file)
    if metrics is None:
        raise InputError(f"{file} is not there; run `eval` first")
    check_shape(file, metrics, {})
    if metrics.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{file}: schema_version is {metrics.get('schema_version')!r}, this version reads {SCHEMA_VERSION}")
    return metrics


def _cards(models: dict[str, Json], tasks: Json | None) -> list[Json]:
    """The headline figures, each with its source."""
    student = models["student"]
    if "teacher" not in models:
        return _cards_of_text(models["student before"], student, tasks)
    teacher = models["teacher"]
    saved = 1 - student["parameters"] / teacher["parameters"]
    speed = student["decode_tokens_per_s"] / teacher["decode_tokens_per_s"]
    times = f"{speed:.1f}×"
    size = f"{parameters(teacher['parameters'])} → {parameters(student['parameters'])} parameters"
    rate = f"{tokens_per_second(teacher)} → {tokens_per_second(student)} tokens/s"
    return [
        {"figure": f"{abs(saved):.0%}", "label": "smaller" if saved >= 0 else "larger", "note": size},
        {
            "figure": times,
            "label": "as fast" if times == "1.0×" else "faster" if speed > 1 else "the teacher’s speed",
            "note": rate,
        },
        _kept_card(student["top1"], "of the teacher’s next-token choices kept"),
        *([_kept_card(tasks["together"]["kept"], "of its task score kept")] if tasks and tasks["together"]["kept"] else []),
    ]


def _cards_of_text(before: Json, student: Json, tasks: Json | None) -> list[Json]:
    """Those that need no weights of the teacher."""
    (bits, ends), (untrained, _) = (interval_text(model["bits_per_byte"], ".2f") for model in (student, before))
    length = {
        "figure": bits,
        "label": "bits per byte of the teacher’s text",
        "note": f"95% CI {ends}; {untrained} before training",
    }
    size = f"{megabytes(student['bytes'])}, {tokens_per_second(student)} tokens/s"
    return [
        length,
        _kept_card(student["written"], "of the teacher’s tokens are its first choice"),
        *([_kept_card(tasks["together"]["models"]["student"], "right on the tasks")] if tasks else []),
        {"figure": parameters(student["parameters"]), "label": "parameters", "note": size},
    ]


def _kept_card(share: Json, label: str) -> Json:
    mean, ends = interval_text(share, ".0f", 100)
    return {"figure": f"{mean}%", "label": label, "note": f"95% CI {ends}"}


def _task_plots(tasks: Json | None) -> Iterator[Json]:
    """The student's differences to the teacher or, without it, to itself before, and to the student of the text alone."""
    for rival in (_rival(tasks), "student, text only") if tasks else ():
        rows = []
        for entry in [*tasks["tasks"], {"name": "all together", **tasks["together"]}] if tasks else []:
            rows += [(entry["name"], percent(found)) for found in entry["differences"] if found["against"] == rival]
        if plot := interval_plot(rows, with_zero=True):
            yield {"rival": rival, "plot": plot}


def _rival(tasks: Json) -> str:
    """Whom the student is tested against on tasks."""
    return "teacher" if "teacher" in tasks["together"]["models"] else "student before"


def _largest_change(samples: list[Json]) -> Json | None:
    """The sample whose answer training has brought closest to the teacher's, compared with before; None if it has none."""

    def gain(sample: Json) -> float:
        teacher, before, after = (sample["answers"][name].split() for name in ("teacher", "student before", "student"))
        return _likeness(teacher, after) - _likeness(teacher, before)

    both = [sample for sample in samples if {"teacher", "student before", "student"} <= sample["answers"].keys()]
    best = max(both, key=gain, default=None)
    return best if best and gain(best) > 0 else None


def _likeness(first: list[str], second: list[str]) -> float:
    """The share of words that two texts have in common, in the same order."""
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


def _exports(experiment: Experiment) -> list[Json]:
    """What `export` has written, each with what it lost and, where it was served, what it costs there."""
    found = read_json(experiment.directory("export") / "export.json")
    if not found:
        return []
    served = {entry["name"]: entry for entry in (found.get("serving") or {}).get("models", [])}
    return [{**made, "served": served.get(made["name"])} for made in found["formats"]]


_DRAFTS = {
    "sampled": "sampled drafts",
    "greedy": "greedy drafts",
    "temperature_0": "temperature 0",
    "unweighted": "sampled drafts, q not kept",
}


def _draft(experiment: Experiment, teacher: str, student: Json) -> Json | None:
    """The student as a draft model in speculative decoding, and how it is served where that is faster."""
    draft = student.get("draft")
    if draft is None:
        return None
    best, modes = drafts.best_cycles(draft), [draft[mode] for mode in _DRAFTS]
    faster = next((cycle for cycle in best if cycle["speed_up"]["mean"] > 1), None)
    revision = experiment.teacher.revision
    return {
        "labels": list(_DRAFTS.values()),
        "cycles": list(zip(*(mode["cycles"] for mode in modes[:3]), strict=True)),  # vLLM has these
        "acceptance": [mode["acceptance"] for mode in modes],
        "by_position": list(zip(*(mode["by_position"] for mode in modes), strict=True)),
        "cost": draft.get("cost"),
        "advice": [drafts.advice(cycle) for cycle in best],
        "command": faster and drafts.serve_command(teacher, revision, student["path"], faster),
    }


def _profiles(models: dict[str, Json]) -> Json:
    """The KL by position and by the teacher's entropy, of every model but the teacher, as figures."""
    found = {}
    for by in ("position", "entropy"):
        begins = sorted({group["from"] for model in models.values() for group in model.get(f"kl_by_{by}", [])})
        names = [f"{begin:g}–" for begin in begins]
        curves = {
            name: [{"group": begins.index(group["from"]), **group} for group in model.get(f"kl_by_{by}", [])]
            for name, model in models.items()
            if name != "teacher"
        }
        found[by] = group_plot(curves, names) if begins else None
    return found


def _sizes(models: dict[str, Json]) -> Json | None:
    """Size against agreement with the teacher, as a figure."""
    return size_plot([(name, (model["bytes"] or 0) / 1e6, percent(model["top1"])) for name, model in models.items()])


def _measures(models: list[Json], shown: Sequence[Metric] = ()) -> Iterator[Json]:
    """A row for each metric beside those that are shown, with each model's interval, where any has it."""
    rows = [(metric, [model.get(metric.name) for model in models]) for metric in metrics_of("measures") if metric not in shown]
    rows += [(metric, [(model.get("own_text") or {}).get(metric.name) for model in models]) for metric in OWN_TEXT_METRICS]
    for metric, values in rows:
        if any(values):
            yield {"name": metric.label, "unit": metric.heading, "factor": metric.factor, "values": values}


def percent(interval: Json) -> Json:
    """An interval of a share, in percent."""
    return {key: 100 * interval[key] for key in ("mean", "low", "high")}


# A token's KL in nats from which on it is shown in the next darker shade.
_SHADES = (0.05, 0.2, 0.5, 1.0, 2.0)


def _view_of_tokens(view: Json) -> Json:
    """A text token by token, in words that a line does not break, each with its shade and what both models expected there."""
    words: list[Json] = []
    for token in view["tokens"]:
        before, shown, after = _parts(token["text"])
        if not words or before or words[-1]["tokens"][-1]["after"]:
            words.append({"tokens": [], "letters": 0})
        shade = sum(token["kl"] >= least for least in _SHADES)
        words[-1]["tokens"].append({**token, "shade": shade, "before": before, "shown": shown, "after": after})
        words[-1]["letters"] += len(shown)
    kl = [token["kl"] for token in view["tokens"]]
    return {"prompt": view["prompt"], "words": words, "kl": sum(kl) / max(len(kl), 1), "count": len(kl)}


def _parts(token: str) -> tuple[str, str, str]:
    """A token's white space before and after it, and the rest; where there is nothing else, the white space is shown as signs."""
    if not token.strip():
        return "", visible(token), "\n" if "\n" in token else ""
    shown = token.strip()
    before, _, after = token.partition(shown)
    return before, shown, after


def visible(token: str) -> str:
    """A token with its white space as signs."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _findings(differences: list[Json]) -> list[Json]:
    """The paired differences in words, one group for each pair of models, the two trained students first."""
    groups: dict[tuple[str, str], list[Json]] = {}
    for difference in sorted(differences, key=lambda difference: bool(difference["worse"] == "student before")):
        groups.setdefault((difference["better"], difference["worse"]), []).append(_finding(difference))
    return [{"better": better, "worse": worse, "items": items} for (better, worse), items in groups.items()]


_VERDICTS = {
    "student, text only": ("Soft targets", "the same student trained on the text alone"),
    "student before": ("Training", "the student before training"),
}


def _verdict(differences: list[Json]) -> str | None:
    """Whether it was worth it, in one sentence: against the text alone if there is such a student, by the KL or else the text."""
    measured = {found["metric"] for found in differences}
    by_rival = {found["worse"]: found for found in differences if found["metric"] == ("kl" if "kl" in measured else "nll")}
    rival = next((name for name in _VERDICTS if name in by_rival), None)
    if rival is None:
        return None
    what, against = _VERDICTS[rival]
    found = _finding(by_rival[rival])
    said = {"shown": "helped", "open": "were not shown to help", "reversed": "did harm"}[found["verdict"]]
    if what == "Training":
        said = said.replace("were", "was")
    text = found["text"][0].lower() + found["text"][1:]
    return f"{what} {said}. Against {against}, {text}"


def _finding(difference: Json) -> Json:
    """A paired difference: shown, not shown, or reversed."""
    metric = next(metric for metric in METRICS if metric.name == difference["metric"])
    words = metric.difference
    assert words is not None
    mean, low, high = (metric.factor * difference[key] for key in ("mean", "low", "high"))
    if metric.better == "lower":
        mean, low, high = -mean, -high, -low
    form = f".{_digits(low, high, 2 if metric.factor == 1 else 1)}f"
    if low <= 0 <= high:
        _, ends = interval_text({"mean": mean, "low": low, "high": high}, form)
        ends = f"{ends} {words.unit}".replace("-", "−")
        return {
            "verdict": "open",
            "text": f"No difference in {words.what} was shown: the 95% interval of the gain, {ends}, includes 0.",
        }
    near, far = sorted((abs(low), abs(high)))
    size, ends = interval_text({"mean": abs(mean), "low": near, "high": far}, form)
    text = f"{(words.gain if low > 0 else words.loss).format(f'{size} {words.unit}')} (95% interval {ends})."
    return {"verdict": "shown" if low > 0 else "reversed", "text": text}


def _cautions(metrics: Json, models: dict[str, Json]) -> list[str]:
    """What a reader should know before trusting the figures."""
    said = []
    before, prompts = models.get("student before"), metrics["held_out"]["prompts"]
    near = _NEARNESS["kl" if has_teacher(metrics["models"]) else "nll"]
    if before and not models["student"][near["metric"]]["mean"] < before[near["metric"]]["mean"]:
        said.append(near["failed"])
    if prompts < _FEW_PROMPTS:
        said.append(f"With {prompts} held-out prompts the intervals are approximate.")
    said.append(
        "Differences are between the same rows. The intervals cover the choice of held-out prompts, "
        "not the variation between training runs: each student was trained once."
    )
    return said


def _of_sampling(data: Json) -> list[str]:
    """What is said where the likelihood of the text does not compare distances from the teacher."""
    whole = {"temperature": 1, "top_p": 1, "top_k": 0}
    sampling = data.get("sampling") or {}
    if all(sampling.get(key, value) == value for key, value in whole.items()):
        return []
    return [
        "The text was not sampled at temperature 1 from the teacher’s whole distribution: its NLL says how well the models "
        "predict this text, not which is nearer to the teacher, and favours a student trained on the text alone."
    ]


def _training(experiment: Experiment) -> Json:
    """Loss curves of the students that were trained, and which logs are not there."""
    curves: dict[str, list[Json]] = {}
    for name, directory in (
        ("student", experiment.directory("student")),
        ("student, text only", experiment.directory("student-text-only")),
    ):
        state = read_json(directory / "trainer_state.json")
        if state is not None:
            curves[name] = [entry for entry in state["log_history"] if "step" in entry and "ce" in entry]
    return {
        "missing": None if "student" in curves else str(experiment.directory("student") / "trainer_state.json"),
        "steps": {name: int(entries[-1]["step"]) for name, entries in curves.items() if entries},
        "last": {name: {key: entries[-1].get(key) for key in ("kl", "ce")} for name, entries in curves.items() if entries},
        "plots": {key: loss_plot({name: _points(entries, key) for name, entries in curves.items()}) for key in ("kl", "ce")},
        "not_finite": sum(
            not math.isfinite(entry[key])
            for entries in curves.values()
            for entry in entries
            for key in ("kl", "ce")
            if key in entry
        ),
    }


def _points(entries: list[Json], key: str) -> list[Point]:
    return [(entry["step"], entry[key]) for entry in entries if key in entry and math.isfinite(entry[key])]


def _data(experiment: Experiment) -> Json:
    """From the rows that the teacher wrote to those trained on, as steps of a waterfall."""
    file = training_dataset(experiment) / MANIFEST
    manifest = read_json(file)
    if manifest is None:
        return {"missing": str(file)}
    splits = {
        split: {key: sum(shard[key] for shard in manifest["shards"] if shard["split"] == split) for key in ("rows", "tokens")}
        for split in ("train", "test")
    }
    rows_in = manifest.get("rows_in", splits["train"]["rows"] + splits["test"]["rows"])
    by = "written" if manifest["sampling"] else "read"
    steps = [{"label": f"{by} by the teacher", "kind": "in", "rows": rows_in, "from": 0}]
    for step in manifest.get("steps", []):
        name, rejected, failed = step["name"].replace("_", " "), step["rejected"], step["failed"]
        steps.append({"label": f"rejected by {name}", "kind": "out", "rows": rejected, "from": step["kept"] + failed})
        if failed:
            steps.append({"label": f"failed in {name}", "kind": "out", "rows": failed, "from": step["kept"]})
    steps.append({"label": "trained on", "kind": "train", "from": 0, **splits["train"]})
    steps.append({"label": "held out", "kind": "test", "from": splits["train"]["rows"], **splits["test"]})
    for step in steps:
        step["left_percent"], step["width_percent"] = (round(100 * step[key] / (rows_in or 1), 2) for key in ("from", "rows"))
        step["rest_percent"] = step["left_percent"] if step["kind"] == "out" else 0
    described = {
        "teacher": manifest["teacher"],
        "sampling": manifest["sampling"],
        "targets": describe_targets(manifest),
    }
    described["cost"] = _cost(manifest.get("cost", {}), splits["train"]["rows"] + splits["test"]["rows"])
    made = manifest.get("prompts", [])
    return {"missing": None, "steps": steps, "prompts": made if len(made) > 1 else [], **described}


def _cost(cost: Json, kept: int) -> str | None:
    """What the teacher's endpoint was paid, in words; None of a teacher that bills nothing."""
    if not cost:
        return None
    tokens = f"{cost['input_tokens']:,} tokens in, {cost['output_tokens']:,} out"
    if "paid" not in cost:
        return tokens
    return f"{money(cost['paid'])} for {tokens}: {money(cost['paid'] / max(kept, 1))} a kept row"


def _lineage(experiment: Experiment) -> Json:
    """Each stage's `run.json`, and the versions, said once where all stages agree."""
    stages: list[Json] = []
    for directory in dict.fromkeys(
        (
            experiment.directory("prompts"),
            experiment.directory("data"),
            experiment.dataset_directory,
            training_dataset(experiment),
            experiment.directory("student"),
            experiment.directory("student-text-only"),
            experiment.directory("eval"),
            experiment.directory("export"),
        )
    ):
        run = read_run(directory)
        if run is not None or directory.name not in ("prompts", "student-text-only", "export"):
            stages.append({"directory": str(directory), "name": directory.name, "run": run})
    found = sorted(
        (package, version, stage["name"])
        for stage in stages
        if stage["run"]
        for package, version in stage["run"]["versions"].items()
    )
    versions: dict[str, Json] = {}
    for (package, version), uses in groupby(found, key=lambda use: use[:2]):
        versions.setdefault(package, {})[version] = [directory for _, _, directory in uses]
    return {"stages": stages, "versions": versions}


def template_environment() -> jinja2.Environment:
    """Templates with escaping on, but for Markdown, whose templates use the filters `cell` and `fenced`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmdistill.evaluation"),
        autoescape=jinja2.select_autoescape(default=True, disabled_extensions=("md.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        filter.__name__: filter
        for filter in (cell, estimate, fenced, interval, label, megabytes, moment, parameters, tokens_per_second, visible)
    }
    return environment


def parameters(count: int) -> str:
    """134515008 as 134.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def megabytes(size: int | None) -> str:
    """269060552 as 269 MB."""
    if size is None:
        return "–"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB"


def tokens_per_second(model: Json) -> str:
    """Three digits, or as many as there are before the point."""
    rate = model["decode_tokens_per_s"]
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def estimate(interval: Json, factor: float = 1, least: int | None = None) -> tuple[str, str]:
    """The mean, and `low–high` with the digits that the interval's width warrants; no interval where it has no width."""
    interval = {"low": interval["mean"], "high": interval["mean"], **interval}  # some are known without one
    low, high = factor * interval["low"], factor * interval["high"]
    digits = _digits(low, high, (2 if factor == 1 else 0) if least is None else least)
    mean, ends = interval_text(interval, f".{digits}f", factor, " to " if low < 0 else "–")
    return mean.replace("-", "−"), "" if low == high else ends.replace("-", "−")


def interval(found: Json, factor: float = 1) -> str:
    """As `estimate`, in one text: `mean (low–high)`."""
    mean, ends = estimate(found, factor)
    return f"{mean} ({ends})" if ends else mean


def moment(stamp: str | None) -> str:
    """2026-11-23T18:28:49Z as 23 Nov 2026, 18:28."""
    if not stamp:
        return "–"
    when = datetime.fromisoformat(stamp)
    return f"{when.day} {when:%b %Y, %H:%M}"


def label(name: str) -> str:
    """A model's name in the evaluation, as the page says it."""
    return _LABELS.get(name, name)


def cell(text: object) -> str:
    """Text in Markdown that stays text: one line, no HTML, no mark-up, no end of a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~&$])", r"\\\1", " ".join(str(text).split()))


def fenced(text: str) -> str:
    """Text as a block of code whose fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _digits(low: float, high: float, least: int) -> int:
    """Decimals that show an interval's half-width, at least `least` and at most five."""
    half = (high - low) / 2
    return min(5, max(least, -math.floor(math.log10(half)))) if half > 0 and math.isfinite(half) else least
