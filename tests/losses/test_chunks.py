"""The loss on chunks of text, against its formula in float64."""

import numpy as np
import pytest
import torch

from llmdistill.data.targets import Chunks
from llmdistill.losses import DIVERGENCES, Objective
from tests.losses.forms import assert_both_forms

N, D, V = 9, 6, 20
SIZES = np.array([0, 0, 3, 1, 0, 2, 0, 0, 0])  # three chunks, then three tokens of none; one of them is the row before's
LOGPROBS = np.array([0, 0, -4.0, -0.3, 0, -1e-4, 0, 0, 0], dtype=np.float32)


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    layer = torch.nn.Linear(D, V, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(V, D, generator=generator))
    labels = torch.randint(0, V, (N,), generator=generator)
    batch = Chunks(np.empty((N, 0)), SIZES, LOGPROBS).batch()
    batch = {name: torch.from_numpy(value) for name, value in batch.items()}
    return hidden, layer, labels, batch | {"target_kind": "chunks", "token_weights": torch.ones(N)}


def by_the_formula(logits, labels, loss, alpha, temperature):
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    total = (1 - alpha) * ce.sum() + alpha * ce[6:].sum()
    for tokens, log_p in ((slice(0, 3), -4.0), (slice(3, 4), np.float32(-0.3)), (slice(4, 6), np.float32(-1e-4))):
        p, q = np.exp(float(log_p) / temperature), (-ce[tokens].sum() / temperature).exp()
        outcomes = torch.tensor([[p, 1 - p]], dtype=torch.float64).log(), torch.stack([q, 1 - q]).log()[None]
        total = total + alpha * temperature * DIVERGENCES[loss](*outcomes)[0]
    return total


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_values_and_gradients_are_those_of_the_formula(loss, temperature, rows):
    hidden, layer, labels, batch = problem()
    assert_both_forms(
        hidden, layer, labels, batch, Objective(loss, 0.7, temperature),
        lambda logits: by_the_formula(logits, labels, loss, 0.7, temperature), rows, (2e-5, 2e-5), (5e-4, 5e-5),
    )  # fmt: skip


def test_the_chunk_of_each_token():
    batch = Chunks(np.empty((N, 0)), SIZES, LOGPROBS).batch()
    assert batch["target_chunk"].tolist() == [0, 0, 0, 1, 2, 2, -1, -1, -1]
    assert batch["target_ends"].tolist() == [False, False, True, True, False, True, False, False, False]


def test_a_student_with_the_teachers_probabilities_has_no_loss():
    _, _, _, batch = problem()
    ce = torch.tensor([1.0, 1.0, 2.0, 0.3, 5e-5, 5e-5, 9.0, 9.0, 9.0])
    from llmdistill.losses.chunks import chunk_parts

    found = chunk_parts(ce, batch, Objective())["kl"]
    assert found[:6].tolist() == pytest.approx([0] * 6, abs=1e-6)
    assert found[6:].tolist() == [9.0] * 3  # in no chunk: hard labels
