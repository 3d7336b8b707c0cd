"""Alignment, the rule that every peer got wrong at least once: by hand, and by a model that knows where it stands."""

import numpy as np
import pytest
import torch

from llmdistill.data import targets
from llmdistill.data.collator import DistillCollator, completion_labels, first_items
from llmdistill.losses import Objective, distillation_loss
from llmdistill.models.forward import completion_logits


def row(ids, start, k=2):
    """A row whose soft target for position t says: id of the token itself, most likely."""
    length = len(ids) - start
    soft = targets.TopK(
        np.array([[token, token + 1] for token in ids[start:]]),
        np.log(np.tile([0.75, 0.125], (length, 1))),
        np.full(length, 0.125, dtype=np.float32),
    )
    columns = targets.TopK.encode([soft], 100)
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

        def forward(self, input_ids, use_cache, **masks):
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
    assert set(batch) == {"input_ids", "attention_mask", "labels", "lengths", "pack_sizes", "positions", "token_weights"}


def test_in_a_line_by_hand():
    """Two rows one behind the other: positions begin again, and the first token of the second row is predicted by nothing."""
    rows = [row([10, 11, 12, 20, 21], 3), row([13, 30, 31], 1)]
    batch = DistillCollator(pad_token_id=0, padding_free=True)(rows)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21, 13, 30, 31]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 20, 21, -100, 30, 31]]
    assert batch["positions"].tolist() == [2, 3, 5, 6]
    assert batch["lengths"].tolist() == [5, 3]
    assert "attention_mask" not in batch
    below = DistillCollator(pad_token_id=0)(rows)
    for name in ("target_ids", "target_logprobs", "target_tail", "token_weights"):
        assert batch[name].tolist() == below[name].tolist()
    packed = DistillCollator(pad_token_id=0, padding_free=True)([rows[:1], rows[1:]])
    assert packed.pop("target_kind") == batch.pop("target_kind") == "topk"
    assert all(packed[name].tolist() == values.tolist() for name, values in batch.items())


def test_weights_by_hand():
    """Teachers with p = (0.75, 0.125 | 0.125) everywhere: an entropy of 0.7356 nats, a certainty of 0.4792."""
    rows = [row([10, 20, 21], 1), row([13, 30], 1), row([14, 15, 16, 17, 50], 4)]  # the last is cut to nothing
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.125))
    for by, want in (("uniform", 1.0), ("entropy", entropy), ("certainty", np.exp(-entropy))):
        batch = DistillCollator(0, max_length=3, position_weights=by)(rows)
        np.testing.assert_allclose(batch["token_weights"], [want] * 3, rtol=1e-3)
        batch = DistillCollator(0, max_length=3, position_weights=by, by_sequence=True)(rows)
        np.testing.assert_allclose(batch["token_weights"], [0.5, 0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize("by", ["entropy", "certainty"])
def test_a_row_whose_tokens_all_weigh_nothing_counts_uniformly(by):
    """One token a position and nothing outside: the teacher's entropy is 0 everywhere."""
    sure = row([10, 20, 21], 1) | {"target_ids": [20, 21], "target_logprobs": [0.0, 0.0], "target_tail": [0.0, 0.0]}
    assert DistillCollator(0, position_weights=by)([sure])["token_weights"].tolist() == [1, 1]
    found = DistillCollator(0, position_weights=by, by_sequence=True)([row([13, 30], 1), row([10, 20, 21], 1)])
    np.testing.assert_allclose(found["token_weights"], [1, 0.5, 0.5], rtol=1e-6)
    assert DistillCollator(0, position_weights=by, by_sequence=True)([sure])["token_weights"].tolist() == [0.5, 0.5]


def test_importance_goes_with_the_tokens_of_its_row():
    rows = [row([10, 11, 12, 20, 21], 3) | {"importance": 0.5, "token_logprobs": [-1.0, -2.0]}]
    rows += [row([13, 30, 31], 1) | {"importance": 2.0, "token_logprobs": [-3.0, -4.0]}]
    batch = DistillCollator(0, max_length=4)(rows)
    assert batch["token_importance"].tolist() == [0.5, 2.0, 2.0]
    assert batch["token_logprobs"].tolist() == [-1.0, -3.0, -4.0]


ROWS = [row([10, 11, 12, 20, 21], 3), row([13, 30, 31], 1), row([1, 2, 3, 4], 3), row([5, 6, 7], 2)]


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("padding_free", [False, True])
def test_items_that_fill_a_batch_up_teach_nothing(padding_free, packs, count):
    """As a batch of the first items alone, but for what the model reads."""
    if packs and not padding_free:
        pytest.skip("packs stand in a line")
    items = [ROWS[:2], [ROWS[2]], [ROWS[3], ROWS[0]], ROWS[:1]] if packs else ROWS
    collator = DistillCollator(0, padding_free=padding_free)
    whole = collator(items)
    cut = first_items(whole, count)
    assert torch.equal(cut["input_ids"], whole["input_ids"])
    assert cut["target_kind"] == "topk"
    learnt = cut["labels"][cut["labels"] != -100]
    assert torch.equal(cut["input_ids"].flatten()[cut["positions"] + 1], learnt)
    if count == 0:
        assert not len(learnt)
        assert not len(cut["target_ids"])
        return
    alone = collator(items[:count])
    assert torch.equal(learnt, alone["labels"][alone["labels"] != -100])
    for name in ("lengths", "target_ids", "target_logprobs", "target_tail", "token_weights"):
        assert torch.equal(cut[name], alone[name]), name


@pytest.mark.parametrize("weights", ["uniform", "entropy", "certainty"])
@pytest.mark.parametrize("kind", ["sampled", "multinomial"])
def test_a_student_that_is_the_teacher_is_at_no_distance_however_rows_are_cut_or_weighted(kind, weights):
    """The entropy is that of each position: of a row's first positions alone, or some of them weighted, nothing is left over."""
    generator = np.random.default_rng(0)
    logits, rows = [], []
    for length in (9, 14):
        # Positions that differ: a mean over the row is true of none of them.
        spread = np.linspace(0.1, 6, length)[:, None]
        logprobs = torch.from_numpy(generator.normal(size=(length, 50)) * spread).log_softmax(-1)
        uniform = torch.from_numpy(generator.random((length, targets.KINDS[kind].uniforms(12))))
        ids = targets.KINDS[kind].keep(logprobs, 12, uniform)
        soft = targets.KINDS[kind].from_kept(ids.numpy(), logprobs.gather(1, ids).numpy())
        row = {name: column[0].values.to_numpy() for name, column in targets.KINDS[kind].encode([soft], 50).items()}
        rows.append({"input_ids": np.arange(3 + length), "completion_start": 3, **row})
        logits.append(logprobs[:5])
    batch = DistillCollator(0, max_length=8, position_weights=weights)(rows)
    loss, parts = distillation_loss(torch.cat(logits), completion_labels(batch), batch, Objective("forward_kl", 1.0))
    assert len(batch["positions"]) == 10
    assert abs(loss.item()) / batch["token_weights"].sum() < 5e-4
    assert abs(parts["kl"].item()) / 10 < 5e-4


def test_a_token_without_a_distribution_weighs_what_those_of_its_row_do():
    """An end token that an endpoint does not show; however the rows are batched."""
    hidden = {"target_ids": [7, 7], "target_logprobs": [-np.inf, -np.inf], "target_tail": [1.0]}
    rows = [row([10, 20, 21], 1), row([13, 30], 1)]
    for one in rows:
        one["input_ids"] = [*one["input_ids"], 7]
        one |= {name: [*one[name], *values] for name, values in hidden.items()}
    rows[0]["target_logprobs"][:4] = np.log([0.9, 0.05, 0.4, 0.3])
    rows[0]["target_tail"][:2] = [0.05, 0.3]
    for by, of in (("entropy", lambda p: -(p * np.log(p)).sum()), ("certainty", lambda p: np.exp((p * np.log(p)).sum()))):
        first, second, other = of(np.array([0.9, 0.05, 0.05])), of(np.array([0.4, 0.3, 0.3])), of(np.array([0.75, 0.125, 0.125]))
        want = [first, second, (first + second) / 2, other, other]
        collator = DistillCollator(0, position_weights=by)
        np.testing.assert_allclose(collator(rows)["token_weights"], want, rtol=1e-3)
        np.testing.assert_allclose(collator(rows[1:])["token_weights"], want[3:], rtol=1e-3)
