"""What was paid, as the finished shards tell it."""

import numpy as np
import pytest

from llmdistill.config import load_experiment
from llmdistill.data import budget
from llmdistill.data.rows import rows_to_table
from llmdistill.data.shard_writer import finished_shards, with_bill, write_shard
from tests.factories import make_row


@pytest.fixture
def directory(tmp_path):
    """Three shards that cost 1, 2 and 3."""
    for index in range(3):
        table = rows_to_table([make_row(str(index), [1, 2], np.array([3, 4]))], 10)
        gives = {"logprobs": index != 1}
        bill = {"input": 1, "cached": 0, "output": 2, "cost": index + 1.0, "gives": gives}
        write_shard(tmp_path / "data", "train", index, 3, with_bill(table, bill))
    return tmp_path / "data"


def test_each_footer_is_read_once_and_a_damaged_shard_has_cost_nothing(directory, experiment_file, monkeypatch):
    read = []
    billed = budget.billed
    monkeypatch.setattr(budget, "billed", lambda shards: read.extend(shards) or billed(shards))
    of = budget.Budget(load_experiment(experiment_file), directory, lambda index: [], reads=False)
    assert of.spent() == of.spent() == 6
    assert len(read) == 3
    first = finished_shards(directory, "train")[0].file
    content = first.read_bytes()
    first.write_bytes(content[:-7])
    other = budget.Budget(load_experiment(experiment_file), directory, lambda index: [], reads=False)
    assert other.spent() == 5
    first.write_bytes(content)
    assert other.spent() == 6


def test_the_whole_bill_names_each_thing_that_was_given_once(directory, experiment_file):
    found = budget.whole_bill(directory, finished_shards(directory, "train"), load_experiment(experiment_file))
    assert found["gives"] == [{"logprobs": True}, {"logprobs": False}]
    assert found["cost"] == {"input_tokens": 3, "cached_tokens": 0, "output_tokens": 6}
