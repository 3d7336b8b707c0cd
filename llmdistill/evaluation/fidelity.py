"""Per-token fidelity of a model to its teacher: sums for each row, from which means and intervals are computed.

At every position, the teacher's full distribution p, from its weights in float32, is compared with the model's q.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llmdistill.evaluation import across
from llmdistill.evaluation.drafts import MODES, draft_sums
from llmdistill.evaluation.metrics import CONFIDENCES, ENTROPIES, POSITIONS, QUANTITIES, Positions
from llmdistill.evaluation.slices import Compared, by_slices, widest
from llmdistill.evaluation.statistics import Array
from llmdistill.models.loading import continue_prompts
from llmdistill.models.root_classes import RootClasses

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Token:
    """A token of a held-out text: KL(p ‖ q) in nats at its position, and the five most likely tokens of both models."""

    text: str
    kl: float
    teacher: list[tuple[str, float]]
    student: list[tuple[str, float]]


def fidelity(
    models: dict[str, Any],
    rows: Any,
    batch_size: int,
    end_ids: Sequence[int] = (),
    report: Report = lambda rows, tokens: None,
    classes: RootClasses | None = None,
) -> dict[str, Array]:
    """Each row's sums over its completion tokens, shape (rows,) or (rows, groups).

    Args:
        models: the models by name; one of them is called `teacher`.
        rows: with `input_ids` and `completion_start`.
        batch_size: rows per forward pass.
        end_ids: the tokens that end a completion, in the student's tokens if the vocabularies differ.
        report: called with the number of finished rows and tokens after every batch.
        classes: for rows from `retokenize`, whose teacher has a different vocabulary; everything is then over classes, at
            the positions that both share.

    Returns:
        `tokens`, `ended`, whether the text ends, and for every model `NAME QUANTITY` for all quantities of the metrics:
        `NAME kl`, `NAME top1`, … Of these, `confidence` and `truth` are grouped by confidence. `tokens by position`,
        `tokens by entropy`, `NAME kl by position` and `NAME kl by entropy` are grouped too. For every model as a draft
        model, there are the results of `draft_sums` and `NAME MODE by position`. With classes, which do not allow drafts,
        there are also `NAME text_nll`, of the whole text, `positions`, and the sums of the teacher's `entropy` and
        `class_entropy`.
    """
    parts: dict[str, list[Array]] = {}
    batches = (
        _batches(models, rows, batch_size, end_ids)
        if classes is None
        else across.batches(models, rows, batch_size, classes, end_ids)
    )
    for batch in batches:
        values, row_N, position_N, count = _values(batch, models), batch.row_N, batch.position_N, batch.rows
        entropy_N = values.pop("entropy")
        groups = {
            "position": np.searchsorted(POSITIONS, position_N, side="right") - 1,
            "entropy": np.searchsorted(ENTROPIES, entropy_N.clip(min=0), side="right") - 1,
        }
        sizes = {"position": len(POSITIONS), "entropy": len(ENTROPIES)}
        sums = {"tokens": np.bincount(row_N, minlength=count), **batch.sums}
        if classes is not None:
            sums["class_entropy"] = np.bincount(row_N, entropy_N, minlength=count)
        for name, group_N in groups.items():
            sums[f"tokens by {name}"] = _sums(row_N, group_N, None, count, sizes[name])
            for model in models:
                sums[f"{model} kl by {name}"] = _sums(row_N, group_N, values[f"{model} kl"], count, sizes[name])
        for model in models:
            if classes is None:
                sums |= draft_sums(values, model, row_N, position_N, count)
            for mode, quantity in MODES.items() if classes is None else ():
                accepted_N = values[f"{model} {quantity}"]
                sums[f"{model} {mode} by position"] = _sums(row_N, groups["position"], accepted_N, count, len(POSITIONS))
            confidence_N, truth_N = values.pop(f"{model} confidence"), values.pop(f"{model} truth")
            bin_N = (confidence_N * CONFIDENCES).astype(int).clip(max=CONFIDENCES - 1)
            for name, value_N in (("confidence", confidence_N), ("truth", truth_N)):
                sums[f"{model} {name}"] = _sums(row_N, bin_N, value_N, count, CONFIDENCES)
        sums |= {name: np.bincount(row_N, value_N, minlength=count) for name, value_N in values.items()}
        for name, value in sums.items():
            parts.setdefault(name, []).append(value)
        report(count, int(sums["tokens"].sum()))
    return {name: np.concatenate(found) for name, found in parts.items()}


def token_view(teacher: Any, student: Any, row: Any, tokenizer: Any, most: int) -> list[Token]:
    """The first `most` completion tokens of a row, each with the predictions of both models."""
    import torch

    from llmdistill.data.collator import DistillCollator
    from llmdistill.models.forward import completion_logits

    start = int(row["completion_start"])
    cut: dict[str, Any] = {"input_ids": np.asarray(row["input_ids"])[: start + most], "completion_start": start}
    batch = {name: values.to(teacher.device) for name, values in DistillCollator(pad_token_id=0)([cut]).items()}
    with torch.inference_mode():
        size = common_size((teacher, student))
        p_NV, q_NV = (completion_logits(model, batch)[:, :size].float().log_softmax(-1) for model in (teacher, student))
        kl_N = (p_NV.exp() * (p_NV - q_NV)).sum(-1).tolist()
        p_best, q_best = p_NV.topk(5), q_NV.topk(5)

    def named(best: Any, number: int) -> list[tuple[str, float]]:
        pairs = zip(best.indices[number].tolist(), best.values[number].exp().tolist(), strict=True)
        return [(tokenizer.decode([token]), round(probability, 4)) for token, probability in pairs]

    return [
        Token(tokenizer.decode([int(token)]), round(kl_N[number], 4), named(p_best, number), named(q_best, number))
        for number, token in enumerate(cut["input_ids"][start:])
    ]


def own_text(
    model: Any, rows: Any, count: int, new_tokens: int, end_ids: Sequence[int], seed: int, name: str = ""
) -> list[dict[str, Any]]:
    """A model's own answers to the first prompts, sampled at temperature 1, as rows.

    `name` determines in which tokens it sees the prompts. Each row has `ended`, whether it ended by itself, and `number`, the
    row that its prompt is from.
    """
    import torch

    seen: dict[tuple[int, ...], int] = {}
    for number, row in enumerate(rows):
        if prompt_ids := across.prompt_ids_of(row, name):
            seen.setdefault(tuple(prompt_ids), number)
        if len(seen) == count:
            break
    prompts = sorted(seen, key=len)  # similar lengths in one batch
    found = []
    torch.manual_seed(seed)
    for first in range(0, len(prompts), 32):
        batch = prompts[first : first + 32]
        answers_BT = continue_prompts(model, batch, new_tokens, end_ids, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        for ids, answer in zip(batch, answers_BT.numpy(), strict=True):
            ends = np.flatnonzero(np.isin(answer, end_ids))
            answer = answer[: ends[0] + 1] if len(ends) else answer
            row = {"input_ids": np.array([*ids, *answer]), "completion_start": len(ids), "ended": len(ends) > 0}
            found.append({**row, "number": seen[ids]})
    return found


def _batches(models: dict[str, Any], rows: Any, batch_size: int, end_ids: Sequence[int]) -> Iterator[Compared]:
    """Batches of rows, compared over tokens at every completion position."""
    import torch

    from llmdistill.data.collator import DistillCollator, completion_labels, text_only
    from llmdistill.losses.fused import find_head, logits_of

    collate, size = DistillCollator(pad_token_id=0), common_size(models.values())
    heads, width = {name: find_head(model) for name, model in models.items()}, widest(models.values())
    for first in range(0, len(rows), batch_size):
        chunk = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
        lengths = np.array([len(row["input_ids"]) - int(row["completion_start"]) for row in chunk])
        row_N = np.repeat(np.arange(len(chunk)), lengths)
        position_N = np.arange(len(row_N)) - np.repeat(lengths.cumsum() - lengths, lengths)
        with torch.inference_mode():
            batch = {name: values.to(models["teacher"].device) for name, values in collate(text_only(chunk)).items()}
            logits = {name: logits_of(model, batch, heads[name]) for name, model in models.items()}
        logprobs = partial(_logprobs, logits, size)
        yield Compared(len(chunk), row_N, position_N, completion_labels(batch), list(end_ids), width, logprobs, {})


def _logprobs(logits: Mapping[str, Any], size: int, name: str, here: slice) -> Any:
    """A model's log-probabilities of the tokens that all models have, (n, V)."""
    return logits[name][here][:, :size].float().log_softmax(-1)


def _values(batch: Compared, names: Collection[str]) -> dict[str, Array]:
    """At every position, the teacher's `entropy`, whether it `ended` there, and all quantities of every model."""
    import torch

    ends = torch.tensor(batch.ends, dtype=torch.long, device=batch.labels_N.device)

    def measure(here: slice) -> dict[str, Any]:
        labels_n, log_p_nV = batch.labels_N[here], batch.logprobs("teacher", here)
        p_nV, top_n5, end_n = log_p_nV.exp(), log_p_nV.topk(5).indices, torch.isin(labels_n, ends)
        found = {"entropy": -(p_nV * log_p_nV).sum(-1), "ended": end_n}
        for name in names:
            log_q_nV = log_p_nV if name == "teacher" else batch.logprobs(name, here)
            at = Positions(log_p_nV, p_nV, top_n5, log_q_nV, labels_n, end_n, batch.ends)
            found |= {f"{name} {quantity}": value(at) for quantity, value in QUANTITIES.items()}
            del at, log_q_nV  # before the next model's
        return found

    with torch.inference_mode():
        found = by_slices(measure, len(batch.labels_N), batch.width, batch.labels_N.device.type)
    return {name: value.cpu().double().numpy() for name, value in found.items()}


def common_size(models: Iterable[Any]) -> int:
    """The tokens that all models have: some output layers are padded further than others."""
    return min(int(model.config.get_text_config().vocab_size) for model in models)


def _sums(row_N: Array, group_N: Array, value_N: Array | None, rows: int, groups: int) -> Array:
    """Sums of the values, or counts, by row and group."""
    return np.bincount(row_N * groups + group_N, value_N, minlength=rows * groups).reshape(rows, groups)
