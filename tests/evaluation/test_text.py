"""What is measured without the teacher's weights, against plain float64 formulas over whole distributions."""

import numpy as np
import pytest
import torch

from llmdistill.data.targets import TopK
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.metrics import METRICS, Sums
from llmdistill.evaluation.statistics import Draws
from llmdistill.evaluation.text import text_sums
from llmdistill.models.loading import load_model
from tests.factories import VOCAB, most_likely, nearby

END, K = 7, 16
BY_NAME = {metric.name: metric for metric in METRICS}


@pytest.fixture(scope="module")
def models(tiny):
    return {"same": load_model(str(tiny), dtype="float32"), "student": nearby(tiny)}


def logprobs(model, ids, start):
    with torch.inference_mode():
        return model(torch.tensor(ids)[None]).logits[0, start - 1 : -1].double().log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def rows(models):
    """Text with the K most likely tokens of the model that is called the same; the last end was not shown."""
    generator = np.random.default_rng(0)
    rows = []
    for count in (2, 5, 9):
        ids = np.append(generator.integers(10, 3000, 2 + count), END)
        p_NV = logprobs(models["same"], ids, 3)
        soft = most_likely(p_NV, K)
        if count == 9:
            soft.logprobs_NK[-1], soft.tail_N[-1] = -np.inf, 1
        columns = {name: values.values.to_numpy() for name, values in TopK.encode([soft], VOCAB).items()}
        rows.append({"input_ids": ids, "completion_start": 3, **columns})
    return rows


def test_every_sum_is_that_of_the_plain_formula(models, rows):
    found = text_sums(models, rows, 2, [END])
    np.testing.assert_array_equal(found["tokens"], [2, 5, 9])
    np.testing.assert_array_equal(found["stored"], [2, 5, 8])
    np.testing.assert_array_equal(found["ended"], [1, 1, 1])
    for number, row in enumerate(rows):
        q = logprobs(models["student"], row["input_ids"], 3)
        ids, at = row["input_ids"][3:], np.arange(len(q))
        assert found["student nll"][number] == pytest.approx(-q[at, ids].sum(), rel=1e-3)
        assert found["student written"][number] == (q.argmax(1) == ids).sum()
        assert found["student end"][number] == pytest.approx(np.exp(q[-1, END]), rel=1e-2)
        p = logprobs(models["same"], row["input_ids"], 3)
        kl = [outcomes_kl(np.exp(one), np.exp(other)) for one, other in zip(p, q, strict=True)][: int(found["stored"][number])]
        assert found["student stored_kl"][number] == pytest.approx(sum(kl), rel=1e-2, abs=1e-3)


def outcomes_kl(p, q):
    kept = np.argsort(-p, kind="stable")[:K]
    one, other = np.append(p[kept], 1 - p[kept].sum()), np.append(q[kept], 1 - q[kept].sum())
    return (one * np.log(one / other)).sum()


def test_the_kl_over_stored_tokens_is_0_for_the_teacher_itself_and_never_above_the_whole(models, rows):
    found = text_sums(models, rows, 3, [END])
    assert found["same stored_kl"] == pytest.approx(np.zeros(3), abs=1e-4)
    shown = [{**row, "input_ids": row["input_ids"]} for row in rows[:2]]
    whole = fidelity({"teacher": models["same"], "student": models["student"]}, shown, 2, [END])
    assert (found["student stored_kl"][:2] <= whole["student kl"] + 1e-4).all()
    assert (found["student stored_kl"][:2] > 0).all()


def test_without_targets_or_over_classes_there_is_none(models, rows):
    plain = [{name: row[name] for name in ("input_ids", "completion_start")} for row in rows]
    retokenized = [{**row, "target_places": np.zeros(len(row["input_ids"]) - 3)} for row in rows]
    for others in (plain, retokenized):
        found = text_sums(models, others, 2, [END])
        assert "stored" not in found
        assert "student stored_kl" not in found
        draws = Draws.of(["a", "b", "c"], 100, 0)
        assert BY_NAME["stored_kl"].compute(Sums("student", found, draws)) is None
        assert BY_NAME["nll"].compute(Sums("student", found, draws))["mean"] > 0
