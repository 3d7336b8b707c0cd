"""Teacher and student with different vocabularies: the same held-out text in the tokens of each, compared over root classes.

The rows are those of `retokenize`: each holds the text in the student's tokens and in the teacher's, and the teacher position
that corresponds to each student position. Where there is one, both distributions are summed by class and compared like
distributions over tokens. The cost of a whole text is computed by each model in its own tokens, and compared per byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from llmdistill.evaluation.slices import Compared, by_slices, widest
from llmdistill.evaluation.statistics import Array
from llmdistill.models.root_classes import RootClasses

if TYPE_CHECKING:
    from llmdistill.losses.classes import ClassTable

TEACHER = "teacher"


def ids_of(row: Mapping[str, Any], name: str) -> tuple[Array, int]:
    """A row's token ids as a model sees it, by the model's name, and the start of the completion."""
    ids, start = (
        ("teacher_ids", "teacher_start") if name == TEACHER and "teacher_ids" in row else ("input_ids", "completion_start")
    )
    return np.asarray(row[ids]), int(row[start])


def prompt_ids_of(row: Mapping[str, Any], name: str) -> list[int]:
    """The prompt of a row as a model sees it; for the main teacher and a row of another one, in the main teacher's tokens."""
    if name == TEACHER and "main_prompt" in row:
        return [int(token) for token in row["main_prompt"]]
    ids, start = ids_of(row, name)
    prompt: list[int] = ids[:start].tolist()
    return prompt


def batches(
    models: dict[str, Any], rows: Any, batch_size: int, classes: RootClasses, end_ids: Sequence[int]
) -> Iterator[Compared]:
    """Batches of rows, compared over classes at the positions that both vocabularies share.

    The `sums` of a batch are `positions`, those of the student's whole completions; `NAME text_nll`, −log q of the whole text
    by every model, in its own tokens; and the `entropy` of the teacher over its tokens at the shared positions.

    Args:
        models: the models by name; one of them is called `teacher`.
        rows: rows of `retokenize`.
        batch_size: rows per forward pass.
        classes: the classes of the rows.
        end_ids: the student's tokens that end a text.
    """
    import torch

    from llmdistill.losses.classes import ClassTable
    from llmdistill.losses.fused import find_head

    ends = np.unique(classes.student_V[[token for token in end_ids if token < len(classes.student_V)]]).tolist()
    table = ClassTable.of(classes, models[TEACHER].device)
    heads, width = {name: find_head(model) for name, model in models.items()}, max(widest(models.values()), table.count)
    for first in range(0, len(rows), batch_size):
        chunk = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
        places = [np.asarray(row["target_places"]) for row in chunk]
        row_N = np.repeat(np.arange(len(chunk)), [len(place) for place in places])
        position_N = np.concatenate([np.arange(len(place)) for place in places])
        theirs = [len(ids) - start for ids, start in (ids_of(row, TEACHER) for row in chunk)]
        before = np.cumsum(theirs) - theirs
        index_N = np.concatenate([place + offset for place, offset in zip(places, before, strict=True)])
        soft_N = np.concatenate(places) >= 0
        sums: dict[str, Array] = {"positions": np.bincount(row_N, minlength=len(chunk))}
        logits: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        with torch.inference_mode():
            for name, model in models.items():
                logits[name], labels_N, model_row_N = _logits(model, chunk, name, heads[name])
                shared_N = index_N[soft_N] if name == TEACHER else np.flatnonzero(soft_N)
                shared[name] = torch.from_numpy(shared_N).to(labels_N.device)
                of_text = partial(_of_text, logits[name], labels_N, name == TEACHER)
                text = by_slices(of_text, len(labels_N), width, labels_N.device.type)
                sums[f"{name} text_nll"] = _by_row(text["nll"], model_row_N, len(chunk))
                if name == TEACHER:
                    sums["entropy"] = _by_row(text["entropy"][shared[name]], row_N[soft_N], len(chunk))
                else:
                    class_S = table.student_GV[0][labels_N[shared[name]]]
        logprobs = partial(_logprobs, logits, shared, table)
        yield Compared(len(chunk), row_N[soft_N], position_N[soft_N], class_S, ends, width, logprobs, sums)


def _logits(model: Any, rows: Sequence[Mapping[str, Any]], name: str, head: Any) -> tuple[Any, Any, Array]:
    """A model's logits (N, V) at all completion positions in its own tokens, to be sliced, the labels, and the row of each."""
    from llmdistill.data.collator import DistillCollator, completion_labels
    from llmdistill.losses.fused import logits_of

    told = [ids_of(row, name) for row in rows]
    own = [{"input_ids": ids, "completion_start": start} for ids, start in told]
    batch = {key: value.to(model.device) for key, value in DistillCollator(pad_token_id=0)(own).items()}
    lengths = [len(ids) - start for ids, start in told]
    return logits_of(model, batch, head), completion_labels(batch), np.repeat(np.arange(len(own)), lengths)


def _of_text(logits: Any, labels_N: Any, with_entropy: bool, here: slice) -> dict[str, Any]:
    """−log q of the tokens of a slice, and the entropy of q there if requested."""
    log_q_nV = logits[here].float().log_softmax(-1)
    found = {"nll": -log_q_nV.gather(1, labels_N[here, None])[:, 0]}
    if with_entropy:
        found["entropy"] = -(log_q_nV.exp() * log_q_nV).sum(-1)
    return found


def _logprobs(logits: Mapping[str, Any], shared: Mapping[str, Any], table: "ClassTable", name: str, here: slice) -> Any:
    """A model's log-probabilities of the classes at a slice of the shared positions, (n, C)."""
    from llmdistill.losses.classes import class_logits

    of_V = table.teacher_V[0] if name == TEACHER else table.student_GV[0]
    return class_logits(logits[name][shared[name][here]], of_V, table.count)


def _by_row(value_N: Any, row_N: Array, rows: int) -> Array:
    return np.bincount(row_N, value_N.cpu().double().numpy(), minlength=rows)
