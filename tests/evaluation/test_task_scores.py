import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
import statsmodels.stats.multitest

from llmdistill.errors import InputError
from llmdistill.evaluation.task_scores import summarise
from llmdistill.evaluation.tasks import SCHEMA, About

ABOUT = About("x.yaml", "acc", 0.25)
MODELS = ["teacher", "student before", "student", "student, text only"]


def table(scores, clusters=None):
    """`scores[task][model]` of every item."""
    rows = [
        {
            "task": task,
            "item": f"{task}-{number}",
            "cluster": str(clusters[number] if clusters is not None else number),
            "model": model,
            "score": float(score),
            "answer": "",
            "target": "",
        }
        for task, by_model in scores.items()
        for model, values in by_model.items()
        for number, score in enumerate(values)
    ]
    np.random.default_rng(0).shuffle(rows)  # the order of rows means nothing
    order = {model: place for place, model in enumerate(MODELS)}
    return pa.Table.from_pylist(sorted(rows, key=lambda row: order[row["model"]]), SCHEMA)


def drawn(seed, rates, items):
    """Right and wrong with these rates, the same items being hard for all models."""
    difficulty = np.random.default_rng(seed).random(items)
    noise = np.random.default_rng(seed + 1)
    return {
        model: np.clip(difficulty + noise.normal(0, 0.1, items), 0, 1) < rate for model, rate in zip(MODELS, rates, strict=True)
    }


def test_one_task():
    scores = drawn(0, (0.9, 0.5, 0.8, 0.7), 200)
    about = {"sums": ABOUT}
    got = summarise(table({"sums": scores}), about, 4000, 0)
    (task,) = got["tasks"]
    assert (task["name"], task["items"], task["clusters"], task["warning"], task["chance"]) == ("sums", 200, 200, None, 0.25)
    for model in MODELS:
        assert task["models"][model]["mean"] == pytest.approx(scores[model].mean())
    by_rival = {difference["against"]: difference for difference in task["differences"]}
    assert list(by_rival) == ["teacher", "student before", "student, text only"]
    student = scores["student"].astype(float)
    for rival, difference in by_rival.items():
        assert difference["mean"] == pytest.approx(student.mean() - scores[rival].mean())
        want = scipy.stats.bootstrap(
            (student, scores[rival].astype(float)),
            lambda a, b, axis: a.mean(axis) - b.mean(axis),
            paired=True,
            n_resamples=4000,
            method="percentile",
            rng=1,
        ).confidence_interval
        assert (difference["low"], difference["high"]) == pytest.approx((want.low, want.high), abs=0.012)
        b = int((scores["student"] & ~scores[rival]).sum())
        c = int((scores[rival] & ~scores["student"]).sum())
        assert (difference["mcnemar"]["only_first"], difference["mcnemar"]["only_second"]) == (b, c)


def test_kept_is_a_paired_ratio():
    scores = drawn(0, (0.9, 0.5, 0.8, 0.7), 200)
    kept = summarise(table({"sums": scores}), {"sums": ABOUT}, 4000, 0)["tasks"][0]["kept"]
    student, teacher = scores["student"].astype(float), scores["teacher"].astype(float)
    assert kept["mean"] == pytest.approx(student.mean() / teacher.mean())
    want = scipy.stats.bootstrap(
        (student, teacher),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert (kept["low"], kept["high"]) == pytest.approx((want.low, want.high), abs=0.012)


@pytest.mark.parametrize(("items", "half"), [(12, 0.198), (38, 0.0693), (1000, 0.00277)])
def test_kept_is_not_certain_where_no_item_differs(items, half):
    """Of 38 items a student that is worse on 3% of all loses none in three of ten samples: z √2 / (n + 2) on each side."""
    right = np.arange(items) % 10 > 0
    got = summarise(table({"a": dict.fromkeys(MODELS, right)}), {"a": ABOUT}, 200, 0)
    teacher = right.mean()
    for kept in (got["tasks"][0]["kept"], got["together"]["kept"]):
        assert kept["mean"] == 1
        assert (1 - kept["low"], kept["high"] - 1) == pytest.approx((half / teacher, half / teacher), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("items", [38, 100, 300])
def test_kept_holds_the_true_share_where_few_items_differ(items):
    """The teacher has 95% right, the student 97% of those and a fifth of the others."""
    generator, held, count = np.random.default_rng(items), 0, 300
    for seed in range(count):
        teacher = generator.random(items) < 0.95
        student = np.where(teacher, generator.random(items) < 0.97, generator.random(items) < 0.2)
        scores = {"teacher": teacher, "student before": teacher, "student": student}
        kept = summarise(table({"a": scores}), {"a": ABOUT}, 200, seed)["tasks"][0]["kept"]
        held += kept["low"] <= (0.95 * 0.97 + 0.05 * 0.2) / 0.95 <= kept["high"]
    assert held / count > 0.93


def test_all_together_is_one_task_where_there_is_one():
    """Which has a width at 0 and 100%, and stays between them."""
    for right, rival in ((20, 20), (19, 20), (0, 19)):
        scores = dict.fromkeys(MODELS, np.arange(20) < rival) | {"student": np.arange(20) < right}
        got = summarise(table({"a": scores}), {"a": ABOUT}, 500, 0)
        (task,), together = got["tasks"], got["together"]
        assert together["models"] == task["models"]
        for ours, theirs in zip(together["differences"], task["differences"], strict=True):
            assert {key: ours[key] for key in ("mean", "low", "high")} == {key: theirs[key] for key in ("mean", "low", "high")}


def test_a_task_on_which_all_are_right_does_not_make_the_whole_more_certain():
    """Three of four tasks are constant: the width is that of independent intervals, and nothing is above 100%."""
    sure = dict.fromkeys(MODELS, np.ones(40))
    scores = {"a": drawn(1, (0.9, 0.5, 0.8, 0.7), 60), "b": sure, "c": sure, "d": sure}
    got = summarise(table(scores), dict.fromkeys(scores, ABOUT), 2000, 0)
    together, tasks = got["together"], got["tasks"]
    low = together["models"]["student"]["mean"] - together["models"]["student"]["low"]
    each = [task["models"]["student"]["mean"] - task["models"]["student"]["low"] for task in tasks]
    assert low == pytest.approx(np.linalg.norm(each) / 4, rel=0.1)
    assert together["models"]["student"]["high"] <= 1
    sides = [task["differences"][0]["high"] - task["differences"][0]["mean"] for task in tasks]
    found = together["differences"][0]
    assert found["high"] - found["mean"] == pytest.approx(np.linalg.norm(sides) / 4, rel=0.15)


def test_of_clusters_that_never_differ_the_difference_is_not_certain():
    """Like that of as many single items."""
    alone = summarise(table({"a": dict.fromkeys(MODELS, np.arange(30) % 2)}), {"a": ABOUT}, 200, 0)
    pairs = summarise(table({"a": dict.fromkeys(MODELS, np.arange(60) // 2 % 2)}, np.arange(60) // 2), {"a": ABOUT}, 200, 0)
    ends = [got["tasks"][0]["differences"][0]["high"] for got in (alone, pairs)]
    assert ends[0] == pytest.approx(ends[1])
    assert ends[0] > 0.08


def test_where_chance_is_not_known_nothing_is_said_of_it():
    scores = drawn(0, (0.9, 0.5, 0.8, 0.7), 100)
    got = summarise(table({"a": scores}), {"a": About("x", "exact_match", None)}, 200, 0)
    assert got["tasks"][0]["kept_above_chance"] is None
    assert got["together"]["kept_above_chance"] is None


def test_all_tasks_count_alike_and_holm_is_over_them():
    scores = {"a": drawn(1, (0.9, 0.5, 0.8, 0.7), 300), "b": drawn(2, (0.6, 0.3, 0.55, 0.5), 40), "c": drawn(3, (0.5,) * 4, 60)}
    about = {name: About("x", "acc", chance) for name, chance in (("a", 0.25), ("b", 0.5), ("c", None))}
    got = summarise(table(scores), about, 500, 0)
    together = got["together"]
    assert (together["tasks"], together["items"]) == (3, 400)
    means = {model: np.mean([scores[task][model].mean() for task in scores]) for model in MODELS}
    for model in MODELS:
        interval = together["models"][model]
        assert interval["mean"] == pytest.approx(means[model])
        assert interval["low"] < interval["mean"] < interval["high"]
    assert together["kept"]["mean"] == pytest.approx(means["student"] / means["teacher"])
    above = together["kept_above_chance"]
    assert above["mean"] == pytest.approx((means["student"] - 0.25) / (means["teacher"] - 0.25))
    for place, rival in enumerate(("teacher", "student before", "student, text only")):
        assert together["differences"][place]["against"] == rival
        assert together["differences"][place]["mean"] == pytest.approx(means["student"] - means[rival])
        tests = [task["differences"][place]["mcnemar"] for task in got["tasks"]]
        want = statsmodels.stats.multitest.multipletests([test["p"] for test in tests], method="holm")[1]
        assert [test["p_holm"] for test in tests] == pytest.approx(list(want))


def test_questions_on_one_passage_are_drawn_together():
    """Ten equal answers a passage hold no more than one: the interval is that of the passages."""
    answers = np.random.default_rng(4).random(40) < 0.5
    alone = dict.fromkeys(MODELS, answers)
    tenfold = {model: np.repeat(answers, 10) for model in MODELS}
    want = summarise(table({"t": alone}), {"t": ABOUT}, 1000, 0)["tasks"][0]
    got = summarise(table({"t": tenfold}, np.repeat(np.arange(40), 10)), {"t": ABOUT}, 1000, 0)["tasks"][0]
    assert (got["items"], got["clusters"]) == (400, 40)
    width = {
        name: entry["models"]["student"]["high"] - entry["models"]["student"]["low"] for name, entry in (("w", want), ("g", got))
    }
    assert width["g"] == pytest.approx(width["w"], rel=0.1)


def test_where_there_is_nothing_to_say():
    scores = {"t": {model: np.zeros(40) for model in MODELS} | {"student": np.full(40, 0.5)}}
    task = summarise(table(scores), {"t": ABOUT}, 200, 0)["tasks"][0]
    assert task["kept"] is None
    assert task["kept_above_chance"] is None
    assert all(difference["mcnemar"] is None for difference in task["differences"])  # half a point is neither right nor wrong


def test_too_few_items():
    one = {"t": {model: np.ones(1) for model in MODELS}}
    with pytest.raises(InputError, match="1 item of the task t, but an interval needs at least 2"):
        summarise(table(one), {"t": ABOUT}, 200, 0)
    few = {"t": {model: np.arange(9) % 2 for model in MODELS}}
    assert "only 9 items of the task t" in summarise(table(few), {"t": ABOUT}, 200, 0)["tasks"][0]["warning"]
