"""How near a model is to its teacher, token by token: sums for each row, from which means and their intervals are made.

At every position the teacher's whole distribution p, from its weights in float32, stands beside the model's q.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmdistill.evaluation import across
from llmdistill.evaluation.drafts import MODES, draft_sums
from llmdistill.evaluation.metrics import CONFIDENCES, ENTROPIES, POSITIONS, QUANTITIES, Positions
from llmdistill.evaluation.statistics import Array
from llmdistill.models.loading import continue_prompts
from llmdistill.models.root_classes import RootClasses

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Token:
    """A token of a held-out text: KL(p ‖ q) in nats where it was written, and both most likely five with their probabilities."""

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
        models: by name; one of them is called `teacher`.
        rows: with `input_ids` and `completion_start`.
        batch_size: rows in one forward pass.
        end_ids: the tokens that end a completion, of the student where the vocabularies differ.
        report: is told the rows and tokens that are done, after every batch.
        classes: of rows from `retokenize`, whose teacher has another vocabulary: everything is over classes then, at the
            positions that both share.

    Returns:
        `tokens`, `ended`, whether the text ends, and for every model `NAME QUANTITY` of all quantities of the metrics: `NAME
        kl`, `NAME top1`, … Of them `confidence` and `truth` are in groups by the confidence. `tokens by position`, `tokens
        by entropy`, `NAME kl by position` and `NAME kl by entropy` are in groups too; and of every model as a draft what
        `draft_sums` returns, and `NAME MODE by position`. With classes, of which no draft can be made, there are also `NAME
        text_nll`, of the whole text, `positions`, and the sums of `entropy` and `class_entropy` of the teacher.
    """
    parts: dict[str, list[Array]] = {}
    batches = (
        _batches(models, rows, batch_size, list(end_ids))
        if classes is None
        else _across(models, rows, batch_size, classes, end_ids)
    )
    for values, row_N, count, whole in batches:
        position_N = values.pop("position")
        groups = {
            "position": np.searchsorted(POSITIONS, position_N, side="right") - 1,
            "entropy": np.searchsorted(ENTROPIES, values.pop("entropy").clip(min=0), side="right") - 1,
        }
        sizes = {"position": len(POSITIONS), "entropy": len(ENTROPIES)}
        sums = {"tokens": np.bincount(row_N, minlength=count), **whole}
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
    """The first `most` completion tokens of a row, each with what both models thought of its place."""
    import torch

    from llmdistill.data.collator import DistillCollator, completion_logits

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
    """What a model itself answers to the first prompts, sampled at temperature 1, as rows.

    `name` tells in which tokens it sees the prompts. Each row says whether it `ended` by itself, and the `number` of the row that
    its prompt is from.
    """
    import torch

    seen: dict[tuple[int, ...], int] = {}
    for number, row in enumerate(rows):
        if prompt_ids := across.prompt_ids_of(row, name):
            seen.setdefault(tuple(prompt_ids), number)
        if len(seen) == count:
            break
    prompts = sorted(seen, key=len)  # of like length in one batch
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


def _batches(
    models: dict[str, Any], rows: Any, batch_size: int, end_ids: list[int]
) -> Iterator[tuple[dict[str, Array], Array, int, dict[str, Array]]]:
    """For each batch: values at every completion position, the row of each, how many rows there are, and sums of these."""
    import torch

    from llmdistill.data.collator import DistillCollator, completion_logits, text_only

    collate, size = DistillCollator(pad_token_id=0), common_size(models.values())
    for first in range(0, len(rows), batch_size):
        chunk = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
        lengths = np.array([len(row["input_ids"]) - int(row["completion_start"]) for row in chunk])
        row_N = np.repeat(np.arange(len(chunk)), lengths)
        position_N = np.arange(len(row_N)) - np.repeat(lengths.cumsum() - lengths, lengths)
        with torch.inference_mode():
            batch = {name: values.to(models["teacher"].device) for name, values in collate(text_only(chunk)).items()}
            labels_N = batch["labels"][batch["labels"] != -100]
            end_N = torch.isin(labels_N, torch.tensor(end_ids, device=labels_N.device))
            p_NV = completion_logits(models["teacher"], batch)[:, :size].float().log_softmax(-1)
            truth_NV, p_top = p_NV.exp(), p_NV.topk(5).indices
            found = {"entropy": -(truth_NV * p_NV).sum(-1), "ended": end_N}
            for name, model in models.items():
                q_NV = p_NV if name == "teacher" else completion_logits(model, batch)[:, :size].float().log_softmax(-1)
                measured = _quantities(Positions(p_NV, truth_NV, p_top, q_NV, labels_N, end_N, end_ids))
                found |= {f"{name} {quantity}": value for quantity, value in measured.items()}
        yield _arrays(found) | {"position": position_N}, row_N, len(chunk), {}


def _across(
    models: dict[str, Any], rows: Any, batch_size: int, classes: RootClasses, end_ids: Sequence[int]
) -> Iterator[tuple[dict[str, Array], Array, int, dict[str, Array]]]:
    """The same over classes, for models of two vocabularies."""
    for chunk, sums, positions, row_N, position_N in across.batches(models, rows, batch_size, classes, end_ids):
        teacher = positions["teacher"]
        found = {"entropy": -(teacher.p_NV * teacher.log_p_NV).sum(-1), "ended": teacher.end_N}
        for name, at in positions.items():
            found |= {f"{name} {quantity}": value for quantity, value in _quantities(at).items()}
        yield _arrays(found) | {"position": position_N}, row_N, len(chunk), sums


def _arrays(found: dict[str, Any]) -> dict[str, Array]:
    return {name: value.cpu().double().numpy() for name, value in found.items()}


def common_size(models: Iterable[Any]) -> int:
    """The tokens that all models have: the output layer of one may be padded further than another's."""
    return min(int(model.config.get_text_config().vocab_size) for model in models)


def _quantities(at: Positions) -> dict[str, Any]:
    """All that is summed, at every position; what it takes in memory between goes with the call."""
    return {name: quantity(at) for name, quantity in QUANTITIES.items()}


def _sums(row_N: Array, group_N: Array, value_N: Array | None, rows: int, groups: int) -> Array:
    """Of the values, or of ones, in each row and group."""
    return np.bincount(row_N * groups + group_N, value_N, minlength=rows * groups).reshape(rows, groups)
