import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdistill.config import Experiment
from llmdistill.curate import _judge, repeated_share


def table(texts, ids=None, reasons=None):
    count = len(texts)
    ids = ids or [[9, 1, 2, 3]] * count
    return pa.table(
        {
            "id": [f"row{n}" for n in range(count)],
            "prompt": [[{"role": "user", "content": f"question {n // 2}"}] for n in range(count)],
            "completion": [[{"role": "assistant", "content": text}] for text in texts],
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "completion_start": pa.array([1] * count, pa.int32()),
            "finish_reason": reasons or ["stop"] * count,
        }
    )


def test_repeated_share():
    assert repeated_share(np.array([1, 2, 3, 4]), 2) == 0
    assert repeated_share(np.array([1, 2, 1, 2, 1]), 2) == pytest.approx(2 / 4)
    assert repeated_share(np.array([7]), 2) == 0


def judged(tmp_path, rows, steps=(), held_out=0.1):
    """What becomes of each row, by name."""
    pq.write_table(rows, tmp_path / "rows.parquet")
    experiment = Experiment.model_validate(
        {"output": "o", "teacher": {"model": "t"}, "curate": list(steps), "eval": {"held_out": held_out}}
    )
    names = [*(step.name for step in experiment.curate), "train", "test"]
    return [names[verdict] for verdict in _judge(experiment, [tmp_path / "rows.parquet"])]


def test_the_first_step_that_a_row_fails_is_its_reason(tmp_path):
    rows = table(
        ["a b", "c", "A  B", "d", "e"],
        [[9, 1], [9, 5, 5, 5, 5, 5, 5], [9, 2], [9, 1, 2, 3], [9, 4]],
        ["stop", "stop", "stop", "length", "stop"],
    )
    steps = [
        {"finish_reason": {"keep": ["stop"]}},
        {"repetition": {"ngram": 2, "max_share": 0.5}},
        {"duplicates": None},
        {"length": {"max_tokens": 1}},
    ]
    assert judged(tmp_path, rows, steps, 1e-9) == ["train", "repetition", "duplicates", "finish_reason", "train"]


def test_duplicates_are_found_across_groups_of_rows(tmp_path):
    rows = table([str(n % 1500) for n in range(3000)])
    verdicts = judged(tmp_path, rows, [{"duplicates": None}], 1e-9)
    assert verdicts == ["train"] * 1500 + ["duplicates"] * 1500


def test_no_prompt_is_on_both_sides_and_the_share_is_about_right(tmp_path):
    rows = table([str(n) for n in range(2000)])
    verdicts = np.array(judged(tmp_path, rows))
    assert 140 <= (verdicts == "test").sum() <= 260  # a tenth of 1,000 prompts, two rows each, within three deviations
    assert (verdicts[::2] == verdicts[1::2]).all()
    assert judged(tmp_path, rows.slice(0, 500)) == verdicts[:500].tolist()
