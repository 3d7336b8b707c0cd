"""What is measured slice by slice: the same as at once, in less memory."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmdistill.data.targets import TopK
from llmdistill.evaluation import slices
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.slices import by_slices
from llmdistill.evaluation.text import text_sums
from llmdistill.models.loading import load_model
from llmdistill.models.root_classes import RootClasses
from tests.factories import VOCAB, most_likely, nearby

END, CLASSES, MOST = 7, 500, 5


@pytest.fixture
def models(tiny):
    return {"teacher": load_model(str(tiny)), "student": nearby(tiny)}


def over_tokens(models):
    generator = np.random.default_rng(0)
    rows = [{"input_ids": generator.integers(10, 3000, 3 + n), "completion_start": 3} for n in (1, 4, 9, 40)]
    rows[1]["input_ids"][-1] = END
    return fidelity(models, rows, 3, [END])


def over_classes(models):
    """Of the student's positions every third belongs to none of the teacher's."""
    generator = np.random.default_rng(0)
    classes = RootClasses(*(generator.permutation(VOCAB) % CLASSES for _ in range(2)))
    rows = [
        {
            "input_ids": generator.integers(10, 3000, 3 + n),
            "completion_start": 3,
            "teacher_ids": generator.integers(10, 3000, 5 + 2 * n),
            "teacher_start": 5,
            "target_places": np.where(np.arange(n) % 3 == 1, -1, 2 * np.arange(n)),
        }
        for n in (2, 5, 9, 30)
    ]
    return fidelity(models, rows, 3, [END], classes=classes)


def of_text(models):
    generator = np.random.default_rng(0)
    rows = []
    for n in (1, 4, 9, 40):
        logits = 3 * generator.normal(size=(n, VOCAB))
        soft = most_likely(logits - np.log(np.exp(logits).sum(1, keepdims=True)), 8)
        columns = {name: values.values.to_numpy() for name, values in TopK.encode([soft], VOCAB).items()}
        rows.append({"input_ids": generator.integers(10, 3000, 3 + n), "completion_start": 3, **columns})
    return text_sums(models, rows, 3, [END])


MEASURES = [over_tokens, over_classes, of_text]


class Rows(TorchDispatchMode):
    """Remembers the most positions of which there was a distribution, or logits, in one tensor."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        is_weight = function is torch.ops.aten.t.default
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[1:] in ((VOCAB,), (CLASSES,)) and not is_weight:
                self.most = max(self.most, len(tensor))
        return made


@pytest.mark.parametrize("measure", MEASURES)
def test_slices_change_nothing_and_bound_how_much_is_held(models, measure, monkeypatch):
    with Rows() as at_once:
        want = measure(models)
    monkeypatch.setitem(slices.SLICE_BYTES, "cpu", MOST * 4 * VOCAB)
    with Rows() as in_slices:
        found = measure(models)
    assert (at_once.most > 25, in_slices.most) == (True, MOST)
    assert found.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("measure", MEASURES)
def test_an_output_layer_that_is_more_than_a_product_is_left_to_the_model(models, measure, monkeypatch):
    want = measure(models)
    monkeypatch.setitem(slices.SLICE_BYTES, "cpu", MOST * 4 * VOCAB)
    for model in models.values():
        model.get_output_embeddings().register_forward_hook(lambda layer, arguments, made: made + 0)
    for name, values in measure(models).items():
        np.testing.assert_allclose(values, want[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("count", "sizes"), [(0, [0]), (1, [1]), (10, [10]), (11, [6, 5]), (35, [9, 9, 9, 8])])
def test_slices_are_of_about_the_same_size(count, sizes, monkeypatch):
    monkeypatch.setitem(slices.SLICE_BYTES, "cpu", 10 * 4 * 3)
    found = []

    def measure(values, here):
        found.append(len(values[here]))
        return {"twice": 2 * values[here]}

    values = torch.arange(count)
    assert by_slices(partial(measure, values), count, 3, "cpu")["twice"].tolist() == [2 * value for value in range(count)]
    assert found == sizes


def test_a_slice_is_never_empty_where_there_is_something(monkeypatch):
    monkeypatch.setitem(slices.SLICE_BYTES, "cpu", 1)
    found = by_slices(lambda here: {"width": torch.tensor([here.stop - here.start])}, 3, VOCAB, "cpu")
    assert found["width"].tolist() == [1, 1, 1]
