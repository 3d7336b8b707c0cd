"""A model as a draft: the cycles against all outcomes of short texts, and a teacher that drafts for itself."""

import itertools
import json
import shlex

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.evaluation import drafts
from llmdistill.evaluation.drafts import MODES, MOST, cycles
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.metrics import METRICS, Sums
from llmdistill.evaluation.statistics import Draws
from llmdistill.models.loading import load_model
from tests.factories import nearby

BY_NAME = {metric.name: metric for metric in METRICS}
GAMMAS = range(1, MOST + 1)


def by_enumeration(accept, gamma):
    """Cycles, and those that keep the first 1, 2, … drafts, over all outcomes of drafting each token of a text."""
    starts, kept = 0.0, np.zeros(MOST)
    for outcome in itertools.product([False, True], repeat=len(accept)):
        weight = np.prod([a if accepted else 1 - a for a, accepted in zip(accept, outcome, strict=True)])
        place = 1  # the first token is written with the prompt
        while place + gamma <= len(accept):
            run = next((n for n in range(gamma) if not outcome[place + n]), gamma)
            starts += weight
            kept[:run] += weight
            place += run + 1
    return starts, kept


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from([0.0, 0.3, 0.9, 1.0]), min_size=1, max_size=8), min_size=1, max_size=3))
def test_cycles_are_those_of_all_outcomes(texts):
    """Texts of different length, one of two modes reversed."""
    accept = np.zeros((len(texts), 2, max(map(len, texts))))
    for row, text in enumerate(texts):
        accept[row, 0, : len(text)], accept[row, 1, : len(text)] = text, text[::-1]
    starts, kept = cycles(accept, np.array([len(text) for text in texts]))
    for row, text in enumerate(texts):
        for mode, values in enumerate((text, text[::-1])):
            for gamma in GAMMAS:
                want = by_enumeration(values, gamma)
                assert starts[row, mode, gamma - 1] == pytest.approx(want[0])
                np.testing.assert_allclose(kept[row, mode, gamma - 1], want[1], atol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.8])
def test_where_all_tokens_are_alike_it_is_the_formula_of_leviathan_et_al(rate):
    starts, kept = cycles(np.full((1, 1, 300), rate), np.array([300]))
    tokens = 1 + kept.sum(axis=-1)[0, 0] / starts[0, 0]
    np.testing.assert_allclose(tokens, [(1 - rate ** (gamma + 1)) / (1 - rate) for gamma in GAMMAS])


def test_cycles_begin_where_little_is_accepted():
    """After the first token: easy and hard halves. With one draft per cycle, cycles are 1/2 and 1 a token, not the mean's 2/3."""
    accept = np.array([[[0.0] + [1.0] * 200 + [0.0] * 200]])
    starts, kept = cycles(accept, np.array([401]))
    assert starts[0, 0, 0] == 100 + 200
    assert kept[0, 0, 0].sum() == 100


@pytest.fixture(scope="module")
def models(tiny):
    return {"teacher": load_model(str(tiny)), "copy": load_model(str(tiny)), "student": nearby(tiny)}


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    return [{"input_ids": generator.integers(10, 3000, 3 + n), "completion_start": 3} for n in (3, 6, 12, 40, 30, 25, 9)]


def draft_of(name, models, rows):
    found = fidelity({"teacher": models["teacher"], name: models[name]}, rows, 3)
    return BY_NAME["draft"].compute(Sums(name, found, Draws.of(list("abcdefg"), 100, 0)))


def test_a_copy_of_the_teacher_has_exactly_everything_accepted(models, rows):
    """Whatever both were published with, which is no part of a distribution."""
    plain = draft_of("copy", models, rows)
    for mode in ("sampled", "temperature_0"):
        assert plain[mode]["acceptance"]["mean"] == 1
        assert [group["mean"] for group in plain[mode]["by_position"]] == [1, 1, 1]  # others are in too few texts
        assert [(cycle["gamma"], cycle["mean"]) for cycle in plain[mode]["cycles"]] == [(g, g + 1) for g in GAMMAS]
        assert all(set(cycle["by_place"]) == {1} for cycle in plain[mode]["cycles"])
    models["copy"].generation_config.update(temperature=0.3, top_k=5, repetition_penalty=1.7, do_sample=True)
    assert draft_of("copy", models, rows) == plain


def test_acceptance_is_that_of_the_plain_formula(models, rows):
    found = draft_of("student", models, rows)
    want = {mode: [] for mode in MODES}
    for row in rows:
        with torch.inference_mode():
            p, q = (
                models[name](torch.tensor(row["input_ids"])[None]).logits[0, 2:-1].double().softmax(-1).numpy()
                for name in ("teacher", "student")
            )
        choice = q.argmax(1)
        want["sampled"].append(np.minimum(p, q).sum(1))
        want["greedy"].append(p[np.arange(len(p)), choice])
        want["temperature_0"].append((p.argmax(1) == choice).astype(float))
        want["unweighted"].append((p * q).sum(1))
    for mode, texts in want.items():
        assert found[mode]["acceptance"]["mean"] == pytest.approx(np.concatenate(texts).mean(), rel=2e-3), mode
        for group, end in zip(found[mode]["by_position"], (4, 8, 16), strict=False):
            here = np.concatenate([text[group["from"] : end] for text in texts])
            assert group["mean"] == pytest.approx(here.mean(), rel=2e-3, abs=1e-5)
            assert group["tokens"] == len(here)
        starts, kept = 0.0, 0.0
        for text in texts:
            each = by_enumeration(text[:10], 2)
            starts, kept = starts + each[0], kept + each[1].sum()
        short = draft_of("student", models, [{**row, "input_ids": row["input_ids"][:13]} for row in rows])
        assert short[mode]["cycles"][1]["mean"] == pytest.approx(1 + kept / starts, rel=2e-3)


def test_texts_too_short_for_a_draft_say_nothing_of_it(models, rows):
    found = draft_of("student", models, [{**row, "input_ids": row["input_ids"][:8]} for row in rows])
    assert [cycle["gamma"] for cycle in found["sampled"]["cycles"]] == [1, 2, 3, 4]


def measured(sampled, greedy, temperature_0):
    """As `figures` gives it, with as many tokens a cycle for γ = 1, 2, …"""
    every = {"sampled": sampled, "greedy": greedy, "temperature_0": temperature_0, "unweighted": sampled}
    return {
        mode: {"cycles": [{"gamma": n + 1, "mean": t, "low": t - 0.1, "high": t + 0.1} for n, t in enumerate(tokens)]}
        for mode, tokens in every.items()
    }


def test_the_speed_up_is_tokens_over_what_they_cost():
    draft = measured([1.6, 2.0, 2.2], [1.5, 1.7, 1.8], [1.8, 2.4, 2.9])
    drafts.add_speed_ups(draft, {"median": 5.0, "low": 4.0, "high": 10.0})
    assert draft["cost"] == {"median": 0.2, "low": 0.1, "high": 0.25}
    assert draft["sampled"]["cycles"][1]["speed_up"] == pytest.approx({"mean": 2 / 1.4, "low": 1.9 / 1.5, "high": 2.1 / 1.2})
    sampling, greedy = drafts.best_cycles(draft)
    assert (sampling["mode"], sampling["gamma"], greedy["mode"], greedy["gamma"]) == ("sampled", 2, "temperature_0", 3)
    assert drafts.advice(sampling) == (
        "At temperature 1 the student as a draft model would give the teacher 1.43 times its speed (1.27 to 1.75), "
        "with 2 sampled drafts per cycle."
    )
    command = shlex.split(drafts.serve_command("a teacher's", "v1", "runs/x", sampling))
    assert command[:5] == ["vllm", "serve", "a teacher's", "--revision", "v1"]
    assert json.loads(command[6]) == {
        "model": "runs/x",
        "num_speculative_tokens": 2,
        "method": "draft_model",
        "draft_sample_method": "probabilistic",
    }
    assert "draft_sample_method" not in drafts.serve_command("t", None, "s", greedy)


def test_a_student_that_is_little_smaller_slows_the_teacher_down():
    """40% smaller: c = 0.6, where half of the greedy drafts being accepted is not enough."""
    draft = measured([1.4, 1.5], [1.45, 1.7], [1.55, 1.9])
    drafts.add_speed_ups(draft, {"median": 1 / 0.6, "low": 1 / 0.65, "high": 1 / 0.58})
    assert drafts.advice(drafts.best_cycles(draft)[0]) == (
        "At temperature 1 the student as a draft model would slow the teacher down: even the best, 1 greedy draft per cycle, "
        "gives 0.91 times its speed (0.82 to 0.98)."
    )
    for accepted in (1.5, 1.65):  # 0.94 (0.85 to 1.01) and 1.03 (0.94 to 1.11): neither is shown to be slower or faster
        draft = measured([1.4, 1.5], [accepted, 1.7], [1.55, 1.9])
        drafts.add_speed_ups(draft, {"median": 1 / 0.6, "low": 1 / 0.65, "high": 1 / 0.58})
        assert "was not shown to help" in drafts.advice(drafts.best_cycles(draft)[0])


def test_where_speeds_are_not_known_no_speed_up_is_guessed():
    draft = measured([1.4], [1.5], [1.6])
    drafts.add_speed_ups(draft, None)
    assert "cost" not in draft
    assert drafts.best_cycles(draft) == []
