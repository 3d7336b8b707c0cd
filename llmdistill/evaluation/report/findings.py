"""The measured differences in words, and what a reader should know before relying on them."""

from typing import Any

from llmdistill.evaluation.metrics import METRICS, has_teacher
from llmdistill.evaluation.routes import lines
from llmdistill.evaluation.statistics import digits, interval_text

Json = dict[str, Any]
_FEW_PROMPTS = 30


# Distance of a model from its teacher: by its distributions or, without its weights, by its text.
NEARNESS: dict[str, Json] = {
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
        "note": "If the text was sampled at temperature 1, the difference between two models estimates that of their KL.",
        "better": "← predicts it better",
        "failed": "Training did not make the student predict the teacher’s text better.",
    },
}


MISSING = (
    "The teacher is behind an API, so results that need its weights are missing: the KL from the teacher over the vocabulary, "
    "the share of its next-token choices, calibration, the models’ own text, the token view, the student as a draft model, and "
    "the teacher’s size, speed and task scores."
)


def classes_text(shared: Json | None) -> str:
    """The number of classes over which models with different vocabularies are compared, in words."""
    if shared is None or not isinstance(shared["count"], dict):
        return f"{shared['count']:,} root classes" if shared else ""
    return f"root classes of each teacher ({', '.join(f'{name} {count:,}' for name, count in shared['count'].items())})"


def of_teachers(entries: list[Json]) -> list[str]:
    """The result if rows have different teachers."""
    if not entries:
        return []
    return [f"{len(entries)} teachers: every row was compared with its own teacher.", *lines(entries)]


def findings(differences: list[Json]) -> list[Json]:
    """The paired differences in words, one group for each pair of models, the two trained students first."""
    groups: dict[tuple[str, str], list[Json]] = {}
    for difference in sorted(differences, key=lambda difference: bool(difference["worse"] == "student before")):
        groups.setdefault((difference["better"], difference["worse"]), []).append(_finding(difference))
    return [{"better": better, "worse": worse, "items": items} for (better, worse), items in groups.items()]


_VERDICTS = {
    "student, text only": ("Soft targets", "the same student trained on the text only"),
    "student before": ("Training", "the student before training"),
}


def verdict_of(differences: list[Json]) -> str | None:
    """Whether distillation helped, in one sentence: if possible against the text only, by the KL or else the text."""
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
    form = f".{digits(low, high, 2 if metric.factor == 1 else 1)}f"
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


def cautions(metrics: Json, models: dict[str, Json]) -> list[str]:
    """What a reader should know before relying on the figures."""
    said = []
    before, prompts = models.get("student before"), metrics["held_out"]["prompts"]
    near = NEARNESS["kl" if has_teacher(metrics["models"]) else "nll"]
    if before and not models["student"][near["metric"]]["mean"] < before[near["metric"]]["mean"]:
        said.append(near["failed"])
    if prompts < _FEW_PROMPTS:
        said.append(f"With {prompts} held-out prompts the intervals are approximate.")
    said.append(
        "Differences are between the same rows. The intervals cover the choice of held-out prompts, "
        "not the variation between training runs: each student was trained once."
    )
    return said


def of_sampling(data: Json) -> list[str]:
    """A note if the likelihood of the text does not measure the distance from the teacher."""
    whole, sampling = {"temperature": 1, "top_p": 1, "top_k": 0}, data.get("sampling") or {}
    if data["text_from"] is None and all(sampling.get(key, value) == value for key, value in whole.items()):
        return []
    return [
        "The text was not sampled at temperature 1 from the teacher’s full distribution: its NLL says how well the models "
        "predict this text, not which is closer to the teacher, and favours a student trained on the text only."
    ]
