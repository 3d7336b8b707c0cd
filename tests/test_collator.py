"""Alignment, the rule that every peer got wrong at least once: by hand, and by a model that knows where it stands."""

import numpy as np
import torch

from llmdistill import targets
from llmdistill.collator import DistillCollator, completion_logits


def row(ids, start, k=2):
    """A row whose soft target for position t says: id of the token itself, most likely."""
    length = len(ids) - start
    soft = targets.TopK(
        np.array([[token, token + 1] for token in ids[start:]]),
        np.log(np.tile([0.75, 0.125], (length, 1))),
        np.full(length, 0.125, dtype=np.float32),
    )
    columns = targets.encode([soft], 100)
    return {"input_ids": ids, "completion_start": start} | {name: column[0].values.to_numpy() for name, column in columns.items()}


def test_by_hand():
    """Prompt 10 11 12, completion 20 21: the logits at 12 predict 20, those at 20 predict 21, those at 21 nothing."""
    batch = DistillCollator(pad_token_id=0)([row([10, 11, 12, 20, 21], 3), row([13, 30, 31], 1)])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21], [13, 30, 31, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 20, 21], [-100, 30, 31, -100, -100]]
    assert batch["positions"].tolist() == [2, 3, 5, 6]
    assert batch["target_ids"].tolist() == [[20, 21], [21, 22], [30, 31], [31, 32]]
    torch.testing.assert_close(batch["target_logprobs"].exp(), torch.tensor([[0.75, 0.125]] * 4), rtol=1e-3, atol=0)


def test_logits_stand_where_their_token_is_predicted():
    """A model whose logits at every position name that position must give back `completion_start + t − 1`."""

    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Identity()

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, attention_mask, use_cache):
            where_BT = torch.arange(input_ids.shape[1]) + 100 * torch.arange(len(input_ids))[:, None]
            return type("Output", (), {"logits": self.head(where_BT[..., None])})()

    batch = DistillCollator(pad_token_id=0)([row([10, 11, 12, 20, 21], 3), row([13, 30, 31], 1)])
    assert completion_logits(Positions(), batch)[:, 0].tolist() == [2, 3, 100, 101]


def test_cutting_keeps_targets_with_their_tokens():
    batch = DistillCollator(pad_token_id=0, max_length=4)(
        [row([10, 11, 12, 20, 21], 3), row([13, 30, 31], 1), row([1, 2, 3, 4, 5], 4)]
    )
    assert batch["input_ids"].shape == (3, 4)
    assert batch["target_ids"][:, 0].tolist() == [20, 30, 31]
    assert batch["labels"][batch["labels"] != -100].tolist() == [20, 30, 31]
    assert batch["positions"].tolist() == [2, 4, 5]


def test_text_only_rows_have_no_targets():
    batch = DistillCollator(pad_token_id=0)([{"input_ids": [1, 2, 3], "completion_start": 2}])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "positions"}
