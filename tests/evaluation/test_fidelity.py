"""What is measured at every token, against plain float64 formulas over whole distributions."""

import numpy as np
import pytest
import torch

from llmdistill.evaluation.fidelity import fidelity, own_text, token_view
from llmdistill.evaluation.metrics import CONFIDENCES, ENTROPIES, METRICS, POSITIONS, Sums
from llmdistill.evaluation.statistics import Draws
from llmdistill.models.loading import load_model, load_tokenizer
from tests.factories import nearby

END = 7
BY_NAME = {metric.name: metric for metric in METRICS}


@pytest.fixture(scope="module")
def models(tiny):
    return {"teacher": load_model(str(tiny)), "student": nearby(tiny)}


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    rows = [{"input_ids": generator.integers(10, 3000, 3 + n), "completion_start": 3} for n in (1, 4, 9, 40)]
    rows[1]["input_ids"][-1] = rows[3]["input_ids"][-1] = END
    return rows


def logprobs(model, row):
    with torch.inference_mode():
        logits = model(torch.tensor(row["input_ids"])[None]).logits[0, row["completion_start"] - 1 : -1]
    return logits.double().log_softmax(-1).numpy()


def test_every_sum_is_that_of_the_plain_formula(models, rows):
    found = fidelity(models, rows, 3, [END])
    for number, row in enumerate(rows):
        p, q = (logprobs(models[name], row) for name in ("teacher", "student"))
        ids, at = row["input_ids"][3:], np.arange(len(p))
        kl = (np.exp(p) * (p - q)).sum(1)
        top_p, top_q = (np.argsort(-x, axis=1)[:, :5] for x in (p, q))
        choice, entropy = top_q[:, 0], -(np.exp(p) * p).sum(1)
        want = {
            "kl": kl.sum(),
            "reverse_kl": (np.exp(q) * (q - p)).sum(),
            "top1": (top_p[:, 0] == choice).sum(),
            "top5": sum(len(set(a) & set(b)) / 5 for a, b in zip(top_p, top_q, strict=True)),
            "nll": -q[at, ids].sum(),
            "end": np.exp(q[-1, END]) * (ids[-1] == END),
            "early": np.exp(q[:, END]).sum() - np.exp(q[-1, END]) * (ids[-1] == END),
        }
        for name, value in want.items():
            assert found[f"student {name}"][number] == pytest.approx(value, rel=2e-3, abs=1e-4), name
        assert found["tokens"][number] == len(p)
        assert found["ended"][number] == (ids[-1] == END)
        for name, values, begins in (("position", at, POSITIONS), ("entropy", entropy, ENTROPIES)):
            group = np.array([max(place for place, begin in enumerate(begins) if begin <= max(value, 0)) for value in values])
            sums = [kl[group == place].sum() for place in range(len(begins))]
            np.testing.assert_allclose(found[f"student kl by {name}"][number], sums, rtol=2e-3, atol=2e-3)
            assert found[f"tokens by {name}"][number].sum() == len(p)
        confidence = np.exp(q[at, choice])
        bins = np.minimum((confidence * CONFIDENCES).astype(int), CONFIDENCES - 1)
        for name, value in (("confidence", confidence), ("truth", np.exp(p[at, choice]))):
            want_bins = np.bincount(bins, value, CONFIDENCES)
            np.testing.assert_allclose(found[f"student {name}"][number], want_bins, rtol=2e-3, atol=2e-3)


def test_the_teacher_is_at_no_distance_from_itself(models, rows):
    found = fidelity({"teacher": models["teacher"]}, rows, 4, [END])
    for name in ("kl", "reverse_kl"):
        assert found[f"teacher {name}"].tolist() == [0] * 4
    for name in ("top1", "top5"):
        np.testing.assert_allclose(found[f"teacher {name}"], found["tokens"])
    draws = Draws.of(list("abcd"), 100, 0)
    error = BY_NAME["calibration_error"].compute(Sums("teacher", found, draws))
    assert error == {"mean": 0}


def test_calibration_by_hand():
    """Two positions said 0.9 and true 0.5, two said 0.2 and true 0.3: (0.8 + 0.2) / 4."""
    confidence, truth = np.zeros((2, CONFIDENCES)), np.zeros((2, CONFIDENCES))
    confidence[:, 9], truth[:, 9], confidence[:, 2], truth[:, 2] = 0.9, 0.5, 0.2, 0.3
    measured = {"a confidence": confidence, "a truth": truth, "tokens": np.array([2, 2])}
    error = BY_NAME["calibration_error"].compute(Sums("a", measured, Draws.of(["a", "b"], 50, 0)))
    assert error["mean"] == pytest.approx(0.25)


def test_a_token_view_shows_what_both_thought_of_its_place(models, rows, tiny):
    tokenizer = load_tokenizer(str(tiny), None)
    view = token_view(models["teacher"], models["student"], rows[3], tokenizer, 12)
    p, q = (logprobs(models[name], rows[3])[:12] for name in ("teacher", "student"))
    assert [token.text for token in view] == [tokenizer.decode([i]) for i in rows[3]["input_ids"][3:15]]
    np.testing.assert_allclose([token.kl for token in view], (np.exp(p) * (p - q)).sum(1), rtol=2e-3, atol=1e-3)
    for number, token in enumerate(view):
        for best, x in ((token.teacher, p[number]), (token.student, q[number])):
            ids = np.argsort(-x)[:5]
            assert [text for text, _ in best] == [tokenizer.decode([i]) for i in ids]
            np.testing.assert_allclose([value for _, value in best], np.exp(x[ids]), atol=2e-3)


def test_own_text_is_the_models_and_says_whether_it_ended(models, rows):
    """Of each prompt once; ids before the answer are the prompt's, nothing stands behind an end."""
    twice = [*rows, *rows]
    found = own_text(models["student"], twice, 3, 20, [END, 11], seed=1)
    prompts = {tuple(row["input_ids"][:3].tolist()) for row in rows[:3]}
    assert {tuple(row["input_ids"][:3].tolist()) for row in found} == prompts
    for row in found:
        answer = row["input_ids"][row["completion_start"] :]
        assert 1 <= len(answer) <= 20
        assert row["ended"] == (answer[-1] in (END, 11))
        assert row["ended"] or len(answer) == 20
        assert not np.isin(answer[:-1], (END, 11)).any()
    again = own_text(models["student"], twice, 3, 20, [END, 11], seed=1)
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(found, again, strict=True))
