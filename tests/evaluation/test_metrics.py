"""The entries of the metrics: what is made of the sums, by hand, and that everyone who shows metrics shows them all."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llmdistill.data.cards import with_results
from llmdistill.evaluation.metrics import METRICS, OWN_TEXT_METRICS, QUANTITIES, Metric, Sums, metrics_of, per_token
from llmdistill.evaluation.report.models import measures
from llmdistill.evaluation.statistics import Draws, digits, interval_text
from tests.stages.test_report import metrics

BY_NAME = {metric.name: metric for metric in METRICS}
OWN = {metric.name: metric for metric in OWN_TEXT_METRICS}
# Three rows of 2, 3 and 5 tokens, of which the first two end.
MEASURED = {
    "tokens": np.array([2, 3, 5]),
    "ended": np.array([1.0, 1.0, 0.0]),
    "teacher nll": np.array([1.0, 2.0, 2.0]),
    "a kl": np.array([1.0, 0.5, 2.5]),
    "a nll": np.array([3.0, 2.0, 5.0]),
    "a end": np.array([0.5, 0.25, 0.0]),
    "a early": np.array([0.1, 0.2, 0.6]),
}
DRAWS = Draws.of(["x", "y", "z"], 200, 0)


def value(metric, **more):
    return metric.compute(Sums("a", MEASURED, DRAWS, **more))


def test_values_by_hand():
    assert value(BY_NAME["kl"])["mean"] == 4 / 10
    assert value(BY_NAME["nll"])["mean"] == 10 / 10
    assert value(BY_NAME["bits_per_byte"], text_bytes=np.array([4, 6, 10]))["mean"] == pytest.approx(10 / np.log(2) / 20)
    assert value(BY_NAME["early_end"])["mean"] == pytest.approx(0.9 / (1 + 2 + 5))
    assert value(BY_NAME["end"]) is None, "too few texts end"
    assert value(BY_NAME["sequence_kl"]) is None, "no sample"
    weights = np.array([1.0, 3.0, 0.0])
    assert value(BY_NAME["sequence_kl"], weights=weights)["mean"] == (1 * 2 + 3 * 0) / 4
    assert value(OWN["teacher_nll"])["mean"] == 5 / 10
    assert value(OWN["length"])["mean"] == pytest.approx(10 / 3)
    assert value(OWN["ended"])["mean"] == pytest.approx(2 / 3)


def test_the_probability_of_the_end_where_enough_texts_end():
    measured = {"ended": np.ones(6), "a end": np.array([0.5, 0.25, 0.75, 0.5, 0.0, 1.0]), "tokens": np.full(6, 3)}
    assert BY_NAME["end"].compute(Sums("a", measured, Draws.of(list("uvwxyz"), 50, 0)))["mean"] == 0.5


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_documented(metric):
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    assert f"`{metric.name}`" in page


@pytest.mark.parametrize("metric", metrics_of("models"), ids=lambda metric: metric.name)
def test_what_students_are_compared_by_is_a_mean_over_tokens(metric):
    """The paired difference is taken of the quantity of its name."""
    assert metric.name in QUANTITIES
    measured = {**MEASURED, f"a {metric.name}": np.array([1.0, 2.0, 3.0])}
    assert metric.compute(Sums("a", measured, DRAWS))["mean"] == 6 / 10
    assert metric.difference is not None
    assert metric.definition


def test_a_new_metric_is_shown_wherever_metrics_are(monkeypatch):
    """An entry is all that it takes."""
    new = Metric(
        "new", "something new", "nats", "lower", per_token("new"), {"new": lambda at: at.ends_N}, definition="new, defined"
    )
    everywhere = dataclasses.replace(new, tables=("models", "measures", "runs"))
    monkeypatch.setattr("llmdistill.evaluation.metrics.METRICS", (*METRICS, everywhere))
    content = metrics()
    for number, model in enumerate(content["models"]):
        model["new"] = {"mean": number, "low": number - 0.5, "high": number + 0.5}
    assert [row["values"][1]["mean"] for row in measures(content["models"]) if row["name"] == "something new"] == [1]
    assert metrics_of("runs")[-1].heading == "nats ↓"
    assert "| new, defined, nats | 2 (95% CI 1.5 to 2.5) |" in with_results("## Configuration", content, {})


def test_an_interval_as_text():
    interval = {"mean": 0.1234, "low": -0.05, "high": 0.3}
    assert interval_text(interval, ".2f") == ("0.12", "-0.05 to 0.30")
    assert interval_text(interval, "+.1f", 100, "–") == ("+12.3", "-5.0–+30.0")
    assert interval_text(interval, ".1%") == ("12.3%", "-5.0% to 30.0%")


@pytest.mark.parametrize(
    ("low", "high", "want"), [(0.5, 0.5, 2), (1.42, 2.23, 2), (0.12, 0.19, 2), (0.0005, 0.0013, 4), (0, 1e-9, 5)]
)
def test_an_interval_is_shown_with_the_digits_of_its_half_width(low, high, want):
    assert digits(low, high, 2) == want
