import numpy as np
import pyarrow as pa
import pytest

from llmdistill.config import CurateStep
from llmdistill.curate import _apply, _split, repeated_share


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


def test_every_row_is_accounted_for():
    rows = table(
        ["a b", "c", "A  B", "d", "e"],
        [[9, 1], [9, 5, 5, 5, 5, 5, 5], [9, 2], [9, 1, 2, 3], [9, 4]],
        ["stop", "stop", "stop", "length", "stop"],
    )
    steps = [
        CurateStep.model_validate({"finish_reason": {"keep": ["stop"]}}),
        CurateStep.model_validate({"repetition": {"ngram": 2, "max_share": 0.5}}),
        CurateStep.model_validate({"duplicates": None}),
        CurateStep.model_validate({"length": {"max_tokens": 1}}),
    ]
    kept, rejected = _apply(steps, rows)
    assert kept["id"].to_pylist() == ["row0", "row4"]
    reasons = dict(zip(rejected["id"].to_pylist(), rejected["reason"].to_pylist(), strict=True))
    assert reasons == {"row3": "finish_reason", "row1": "repetition", "row2": "duplicates"}


def test_no_prompt_is_on_both_sides_and_the_share_is_about_right():
    rows = table([str(n) for n in range(2000)])
    train, test = _split(rows, 0.1, seed=0)
    assert len(train) + len(test) == 2000
    assert 140 <= len(test) <= 260  # a tenth of 1,000 prompts, two rows each, give or take three standard deviations
    assert not {str(p) for p in train["prompt"].to_pylist()} & {str(p) for p in test["prompt"].to_pylist()}
    assert _split(rows.slice(0, 500), 0.1, 0)[1]["id"].to_pylist() == [i for i in test["id"].to_pylist() if int(i[3:]) < 500]
