"""Teacher and student with different vocabularies: the same held-out text in the tokens of each, compared over root classes.

The rows are those of `retokenize`: each holds the text in the student's tokens and in the teacher's, and which of the teacher's
positions each of the student's belongs to. Where there is one, both distributions are summed up by class and compared like
distributions over tokens. What a whole text costs is told by each model in its own tokens, and compared by the byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmdistill.evaluation.metrics import Positions
from llmdistill.evaluation.statistics import Array
from llmdistill.models.root_classes import RootClasses

TEACHER = "teacher"


def ids_of(row: Mapping[str, Any], name: str) -> tuple[Array, int]:
    """A row's token ids as a model sees it, by the model's name, and where the completion begins."""
    ids, start = (
        ("teacher_ids", "teacher_start") if name == TEACHER and "teacher_ids" in row else ("input_ids", "completion_start")
    )
    return np.asarray(row[ids]), int(row[start])


def prompt_ids_of(row: Mapping[str, Any], name: str) -> list[int]:
    """The prompt of a row as a model sees it; the main teacher, of a row of another, in its own tokens."""
    if name == TEACHER and "main_prompt" in row:
        return [int(token) for token in row["main_prompt"]]
    ids, start = ids_of(row, name)
    prompt: list[int] = ids[:start].tolist()
    return prompt


def batches(
    models: dict[str, Any], rows: Any, batch_size: int, classes: RootClasses, end_ids: Sequence[int]
) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any], dict[str, Positions], Array, Array]]:
    """Batches of rows with the distributions of all models over classes.

    Args:
        models: by name; one of them is called `teacher`.
        rows: of `retokenize`.
        batch_size: rows in one forward pass.
        classes: of the rows.
        end_ids: the student's tokens that end a text.

    Yields:
        The rows; the sums over each row of −log q of its whole text by every model, in its own tokens, `NAME text_nll` (rows,);
        of every model what it thinks at the positions that both share; the row of each of these positions, and its place in the
        student's completion.
    """
    import torch

    from llmdistill.losses.classes import ClassTable, class_logits

    ends = np.unique(classes.student_V[[token for token in end_ids if token < len(classes.student_V)]]).tolist()
    table = ClassTable.of(classes, models[TEACHER].device)
    for first in range(0, len(rows), batch_size):
        chunk = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
        places = [np.asarray(row["target_places"]) for row in chunk]
        row_N = np.repeat(np.arange(len(chunk)), [len(place) for place in places])
        position_N = np.concatenate([np.arange(len(place)) for place in places])
        theirs = [len(ids) - start for ids, start in (ids_of(row, TEACHER) for row in chunk)]
        before = np.cumsum(theirs) - theirs
        index_N = np.concatenate([place + offset for place, offset in zip(places, before, strict=True)])
        soft_N = np.concatenate(places) >= 0
        found: dict[str, Any] = {}
        sums: dict[str, Any] = {}
        with torch.inference_mode():
            log_C = {}
            for name, model in models.items():
                logits_NV, labels_N, model_row_N = _logits(model, chunk, name)
                nll_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
                sums[f"{name} text_nll"] = _by_row(nll_N, model_row_N, len(chunk))
                shared = torch.from_numpy(index_N[soft_N] if name == TEACHER else np.flatnonzero(soft_N)).to(logits_NV.device)
                of_V = table.teacher_V[0] if name == TEACHER else table.student_GV[0]
                log_C[name] = class_logits(logits_NV[shared], of_V, table.count)
                if name == TEACHER:
                    log_p_SV = logits_NV[shared].log_softmax(-1)
                    sums["entropy"] = _by_row(-(log_p_SV.exp() * log_p_SV).sum(-1), row_N[soft_N], len(chunk))
                else:
                    class_S = table.student_GV[0][labels_N[shared]]
            p_SC = log_C[TEACHER].exp()
            sums["class_entropy"] = _by_row(-(p_SC * log_C[TEACHER]).sum(-1), row_N[soft_N], len(chunk))
            sums["positions"] = np.bincount(row_N, minlength=len(chunk))
            top_S5, end_S = p_SC.topk(5).indices, torch.isin(class_S, torch.tensor(ends, dtype=torch.long, device=class_S.device))
            for name, log_q_SC in log_C.items():
                found[name] = Positions(log_C[TEACHER], p_SC, top_S5, log_q_SC, class_S, end_S, ends)
        yield chunk, sums, found, row_N[soft_N], position_N[soft_N]


def _logits(model: Any, rows: Sequence[Mapping[str, Any]], name: str) -> tuple[Any, Any, Array]:
    """A model's logits (N, V) at all completion positions in its own tokens, the labels, and the row of each."""
    from llmdistill.data.collator import DistillCollator, completion_labels, completion_logits

    told = [ids_of(row, name) for row in rows]
    own = [{"input_ids": ids, "completion_start": start} for ids, start in told]
    batch = {key: value.to(model.device) for key, value in DistillCollator(pad_token_id=0)(own).items()}
    lengths = [len(ids) - start for ids, start in told]
    return completion_logits(model, batch).float(), completion_labels(batch), np.repeat(np.arange(len(own)), lengths)


def _by_row(value_N: Any, row_N: Array, rows: int) -> Array:
    return np.bincount(row_N, value_N.cpu().double().numpy(), minlength=rows)
