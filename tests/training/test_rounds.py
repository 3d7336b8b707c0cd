"""Rows that change every few steps."""

import random
import signal

import numpy as np
import pytest
import torch

from llmdistill.training.rounds import RoundRows, _on_sigterm, _own_random_numbers


@pytest.mark.parametrize("rows", [3, 8, 20])
def test_places_take_the_rows_evenly(rows):
    """Every row as often as any other, give or take one; all of them before one comes again."""
    places = RoundRows(8)
    places.fill([f"row {number}" for number in range(rows)], seed=1)
    taken = [places[place] for place in range(len(places))]
    assert len(taken) == 8
    assert len(set(taken)) == min(rows, 8)
    assert max(map(taken.count, taken)) == -(-8 // rows)
    places.fill([f"row {number}" for number in range(rows)], seed=2)
    assert [places[place] for place in range(8)] != taken


def test_the_next_round_has_other_rows():
    places = RoundRows(4)
    for name in "ab":
        places.fill([f"{name}{number}" for number in range(4)], seed=0)
        assert {places[place] for place in range(4)} == {f"{name}{number}" for number in range(4)}


def test_random_numbers_drawn_inside_are_missing_nowhere():
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with _own_random_numbers():
        draw()
        torch.manual_seed(5)  # as engines do
    assert draw() == expected


def test_sigterm_is_for_whoever_makes_the_rows():
    asked = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append("training"))
    try:
        with _on_sigterm(lambda number, frame: asked.append("at once")):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == ["at once", "training"]
