"""Packs hold every row once, none too many tokens, and waste little."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.models.loading import load_model
from llmdistill.training.packing import check_apart, pack


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80), capacity=st.integers(1, 50))
def test_every_row_is_in_one_pack_that_is_not_too_long(lengths, capacity):
    packs = pack(lengths, capacity)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    for rows in packs:
        assert len(rows) == 1 or sum(lengths[row] for row in rows) <= capacity
    # Best fit leaves no two packs that would fit into one; so less than half of all room is empty.
    used = sorted(min(sum(lengths[row] for row in rows), capacity) for rows in packs)
    assert len(packs) == 1 or used[0] + used[1] > capacity


def test_by_hand():
    assert pack([5, 3, 7, 2, 3], 10) == [[2, 1], [0, 4, 3]]


def test_real_lengths_fill_their_packs():
    """Lengths of a heavy-tailed kind, a hundred times as many rows as fit in a pack: over 99% of the room is used."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(int) + 1, 2048)
    packs = pack(lengths, 2048)
    assert lengths.sum() / (2048 * len(packs)) > 0.99


def test_weights_that_are_elsewhere_are_not_tried(tiny):
    """Under FSDP one process has them and tries; under ZeRO-3 none has all of them."""
    model = load_model(str(tiny))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    check_apart(model)
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="use FSDP2 or ZeRO-2"):
        check_apart(model)
