import numpy as np
import pytest
import torch

from llmdistill.config import Prune
from llmdistill.errors import InputError
from llmdistill.models import load_model
from llmdistill.student import block_influence, choose_layers, evenly_spaced, prune_layers


def test_evenly_spaced():
    assert evenly_spaced(12, 6) == [0, 2, 4, 7, 9, 11]
    assert evenly_spaced(4, 4) == [0, 1, 2, 3]
    assert evenly_spaced(4, 1) == [0]


@pytest.mark.parametrize("layers", [0, 5, [], [1, 0], [0, 0], [0, 4], [-1]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(InputError, match=r"student.prune.layers"):
        choose_layers(Prune(layers=layers), 4, None)


def test_block_influence_picks_the_layers_that_do_something(tiny):
    model = load_model(str(tiny))
    for number in (1, 2):  # these two pass their input on unchanged
        torch.nn.init.zeros_(model.model.layers[number].self_attn.o_proj.weight)
        torch.nn.init.zeros_(model.model.layers[number].mlp.down_proj.weight)
    rows = [{"input_ids": np.arange(5, 5 + n), "completion_start": 2} for n in (4, 9, 6)]
    influence = block_influence(model, rows, batch_size=2)
    assert influence[[1, 2]] == pytest.approx([0, 0], abs=1e-6)
    assert choose_layers(Prune(layers=2, by="block_influence"), 4, influence) == [0, 3]


def test_dropping_layers_that_do_nothing_changes_nothing(tiny):
    model = load_model(str(tiny))
    for number in (1, 2):
        torch.nn.init.zeros_(model.model.layers[number].self_attn.o_proj.weight)
        torch.nn.init.zeros_(model.model.layers[number].mlp.down_proj.weight)
    student = prune_layers(model, [0, 3])
    ids = torch.arange(20)[None]
    torch.testing.assert_close(student(ids).logits, model(ids).logits)
    assert student.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 4
    decoded = student.generate(ids, max_new_tokens=4, do_sample=False)  # the cache counts layers from 0 again
    assert decoded.tolist() == model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
