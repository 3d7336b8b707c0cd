"""Measures of models without the teacher's weights: how they predict its text, and what was stored with it.

For targets of kind `topk`, which an endpoint gives, the KL is over the stored tokens, with everything else as one outcome; by
the data-processing inequality, it is at most the KL over the vocabulary. Over root classes there is no such number: the
teacher's tokens that are not stored are in the classes of stored ones too, with unknown probability.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from llmdistill.data.targets import TopK, kind_of
from llmdistill.evaluation.fidelity import Report, common_size
from llmdistill.evaluation.metrics import QUANTITIES_OF_TEXT, Positions
from llmdistill.evaluation.slices import by_slices, widest
from llmdistill.evaluation.statistics import Array


def text_sums(
    models: dict[str, Any],
    rows: Any,
    batch_size: int,
    end_ids: Sequence[int],
    report: Report = lambda rows, tokens: None,
) -> dict[str, Array]:
    """Each row's sums over its completion tokens, shape (rows,).

    Args:
        models: the models by name, all with the tokens of the rows.
        rows: with `input_ids` and `completion_start`, and possibly soft targets.
        batch_size: rows per forward pass.
        end_ids: the tokens that end a completion.
        report: called with the number of finished rows and tokens after every batch.

    Returns:
        `tokens`, `ended`, and for every model `NAME QUANTITY` for the quantities that need no teacher: `NAME nll`, `NAME
        written`, … If the rows have targets of kind `topk` in their own tokens, also `stored`, the positions of which
        something is known, and `NAME stored_kl`.
    """
    import torch

    from llmdistill.data.collator import DistillCollator, completion_labels, text_only
    from llmdistill.losses.fused import find_head, logits_of

    device = next(iter(models.values())).device
    collate = DistillCollator(pad_token_id=0, vocab_size=common_size(models.values()))
    heads, width = {name: find_head(model) for name, model in models.items()}, widest(models.values())
    parts: dict[str, list[Array]] = {}
    for first in range(0, len(rows), batch_size):
        chunk = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
        lengths = [len(row["input_ids"]) - int(row["completion_start"]) for row in chunk]
        stored = kind_of(list(chunk[0])) is TopK and "target_places" not in chunk[0]
        made = collate(chunk if stored else text_only(chunk))
        batch = {name: value if isinstance(value, str) else value.to(device) for name, value in made.items()}
        labels_N = completion_labels(batch)
        end_N = torch.isin(labels_N, torch.tensor(list(end_ids), device=device))
        found: dict[str, Any] = {"tokens": torch.ones_like(labels_N), "ended": end_N}
        stored_N: Any = None
        if stored:
            # All mass is in the tail at an end that the endpoint did not show: nothing is known of the teacher there.
            logprobs_NK: Any = batch["target_logprobs"]
            found["stored"] = stored_N = logprobs_NK.exp().sum(1) > 0
        with torch.inference_mode():
            for name, model in models.items():
                at = partial(_of_slice, logits_of(model, batch, heads[name]), labels_N, end_N, list(end_ids), batch, stored_N)
                of_model = by_slices(at, len(labels_N), width, labels_N.device.type)
                found |= {f"{name} {quantity}": value_N for quantity, value_N in of_model.items()}
        row_N = np.repeat(np.arange(len(chunk)), lengths)
        for name, value_N in found.items():
            parts.setdefault(name, []).append(np.bincount(row_N, value_N.cpu().double().numpy(), minlength=len(chunk)))
        report(len(chunk), sum(lengths))
    return {name: np.concatenate(sums) for name, sums in parts.items()}


def _of_slice(
    logits: Any, labels_N: Any, end_N: Any, end_ids: list[int], batch: Mapping[str, Any], stored_N: Any, here: slice
) -> dict[str, Any]:
    """The quantities of a model at a slice of the positions; with `stored_N` also `stored_kl`, 0 where nothing is stored."""
    import torch

    from llmdistill.data.collator import some_tokens

    logits_nV = logits[here].float()
    at = Positions(None, None, None, logits_nV.log_softmax(-1), labels_N[here], end_N[here], end_ids)
    found = {quantity: value(at) for quantity, value in QUANTITIES_OF_TEXT.items()}
    if stored_N is not None:
        found["stored_kl"] = torch.where(stored_N[here], _stored_kl(logits_nV, some_tokens(batch, here)), 0)
    return found


def _stored_kl(logits_NV: Any, batch: Mapping[str, Any]) -> Any:
    """KL(p ‖ q) over the stored tokens, with the rest as one outcome, (N,)."""
    from llmdistill.losses.divergences import Objective, picked_logits

    of_student = TopK.present(*picked_logits(logits_NV, batch["target_ids"], apart=True), batch)
    return TopK.loss_parts(*of_student, batch, Objective())["kl"]
