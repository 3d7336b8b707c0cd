"""The choice of layers by KL, against each removal done by hand in float64."""

import copy

import numpy as np
import pytest
import torch

from llmdistill.config.student import Prune
from llmdistill.errors import InputError
from llmdistill.losses.hidden_states import of_pruned
from llmdistill.students import layer_choice
from llmdistill.students.layer_choice import TeacherKl, layers_by_kl, parts_kept
from llmdistill.students.pruning import choose, prune_model
from tests.students.test_refit import ROWS, random_model, ridge_regression, seen

RIDGE = 0.3
MORE = [*ROWS, *({"input_ids": row["input_ids"][::-1].copy(), "completion_start": 2} for row in ROWS)]


def kl_by_hand(teacher, student, rows):
    """Nats per completion token: from each completion's first token on, the token before it predicts."""
    total = tokens = 0
    with torch.no_grad():
        for row in rows:
            ids, start = torch.from_numpy(row["input_ids"].copy())[None], row["completion_start"]
            p, q = (model(ids).logits[0, start - 1 : -1].double().log_softmax(-1) for model in (teacher, student))
            total += float((p.exp() * (p - q)).sum())
            tokens += len(p)
    return total / tokens


def test_the_kl_is_that_of_all_completion_tokens():
    teacher = random_model()
    student = prune_model(teacher, choose(Prune(layers=[0, 3]), teacher.config, None))
    assert TeacherKl(teacher, MORE).kl(student) == pytest.approx(kl_by_hand(teacher, student, MORE), rel=1e-4)


def test_what_is_held_of_the_teacher_does_not_grow_with_the_rows(monkeypatch):
    """The first 83 completion tokens of 16 rows at most."""
    rng, held = np.random.default_rng(0), []
    rows = [{"input_ids": rng.integers(0, 32, 130), "completion_start": 3} for _ in range(100)]

    class Counted(TeacherKl):
        def __init__(self, teacher, rows):
            super().__init__(teacher, rows)
            held.append(sum(len(part) for part in self._logprobs))

    monkeypatch.setattr(layer_choice, "TeacherKl", Counted)
    monkeypatch.setattr(layer_choice, "_tried", lambda *_: [(1, 0.5)])
    for count in (4, 64, 100):
        layers_by_kl(random_model(), rows[:count], 3, RIDGE)
    assert held == [83, 16 * 83, -(-100 // 7) * 83]


def without(teacher, layer, rows):
    """The teacher without a layer, the `o_proj` and `down_proj` before it solved again in numpy."""
    layers = [number for number in range(4) if number != layer]
    student = prune_model(teacher, choose(Prune(layers=layers), teacher.config, None))
    place = layer - 1
    source = dict(of_pruned(layers, 4))[place]
    target = seen(teacher, source, rows)[2]
    heads, a, out = seen(student, place, rows)
    change, _ = ridge_regression([heads, a], target - out, target, RIDGE)
    with torch.no_grad():
        student.model.layers[place].self_attn.o_proj.weight += torch.from_numpy(change.T).float()
    _, a, out = seen(student, place, rows)
    (change,) = ridge_regression([a], target - out, target, RIDGE)
    with torch.no_grad():
        student.model.layers[place].mlp.down_proj.weight += torch.from_numpy(change.T).float()
    return student


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_the_layer_goes_that_costs_least(family):
    teacher = random_model(family)
    judged, solved_on = MORE[::4], [row for number, row in enumerate(MORE) if number % 4]
    costs = {layer: kl_by_hand(teacher, without(teacher, layer, solved_on), judged) for layer in (1, 2, 3)}
    state = copy.deepcopy(teacher.state_dict())
    layers, [(removed, kl)] = layers_by_kl(teacher, MORE, 3, RIDGE)
    assert removed == min(costs, key=costs.get)
    assert kl == pytest.approx(costs[removed], rel=1e-3)
    assert layers == [number for number in range(4) if number != removed]
    assert all(torch.equal(weight, state[name]) for name, weight in teacher.state_dict().items())


def test_one_after_the_other_and_the_first_stays():
    teacher = random_model()
    layers, removed = layers_by_kl(teacher, MORE, 1, RIDGE)
    assert layers == [0]
    assert sorted(layer for layer, _ in removed) == [1, 2, 3]
    kept, _, again = parts_kept(Prune(layers=2, by="kl", ridge=RIDGE, intermediate_size=20), teacher, MORE)
    assert again == removed[:2]
    assert kept.layers == sorted({0, 1, 2, 3} - {layer for layer, _ in again})
    assert [len(neurons) for neurons in kept.neurons] == [20, 20]


@pytest.mark.parametrize("family", ["Gemma2", "Olmo2"])
def test_with_a_norm_behind_the_mlp(family):
    layers, removed = layers_by_kl(random_model(family), MORE, 2, RIDGE)
    assert len(layers) == 2
    assert all(np.isfinite(kl) for _, kl in removed)


def test_too_few_rows_are_refused():
    with pytest.raises(InputError, match=r"student.prune.by: kl needs at least two calibration rows, got 1"):
        layers_by_kl(random_model(), ROWS[:1], 2, 1.0)


def test_the_kl_without_a_refit_is_not_offered():
    with pytest.raises(ValueError, match="by is kl, which is measured after a refit, but refit is false"):
        Prune(layers=2, by="kl", refit=False)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"layers": [0, 1], "by": "kl"}, "by is kl, which chooses layers, but layers lists them"),
        ({"intermediate_size": 10, "by": "even"}, "by is even, which chooses layers, but layers is not set"),
        ({"layers": 2, "refit": False, "ridge": 0.1}, "ridge is 0.1, but refit is false"),
    ],
)
def test_a_key_without_an_effect_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        Prune(**section)
