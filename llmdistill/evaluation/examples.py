"""Individual held-out rows to look at: the models' answers, token by token, and the student's wins and losses."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from llmdistill.evaluation.across import prompt_ids_of
from llmdistill.evaluation.fidelity import token_view
from llmdistill.evaluation.statistics import Array
from llmdistill.models.loading import continue_prompts

_VIEWED, _VIEWED_TOKENS = 3, 96  # texts shown token by token, and how much of each
_EXAMPLES, _EXAMPLE_CHARACTERS = 3, 600
_ITEMS = 25  # per task, of those won and of those lost


def _question(prompt: list[dict[str, str]]) -> str:
    """A prompt without its system message."""
    return "\n".join(message["content"] for message in prompt if message["role"] != "system")


def samples(
    models: dict[str, Any], rows: Any, tokenizers: dict[str, Any], end_ids: dict[str, list[int]], count: int, new_tokens: int
) -> list[dict[str, Any]]:
    """The models' greedy answers to the first held-out prompts; for a teacher without weights, the start of its stored text."""
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    for row in rows:
        question = _question(row["prompt"])
        if len(found) == count or question in seen or not all(prompt_ids_of(row, name) for name in models):
            continue
        seen.add(question)
        answers = {}
        if "teacher" not in models:
            ids, start = np.asarray(row["input_ids"]), int(row["completion_start"])
            answers["teacher"] = _decoded(tokenizers["student"], ids[start : start + new_tokens])
        for name, model in models.items():
            written_BT = continue_prompts(model, [prompt_ids_of(row, name)], new_tokens, end_ids[name], do_sample=False)
            answers[name] = _decoded(tokenizers[name], written_BT[0])
        found.append({"prompt": question, "answers": answers})
    return found


def _decoded(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def views(models: dict[str, Any], rows: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """A few held-out texts, token by token: from different prompts, and of medium length."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]) - int(rows[number]["completion_start"]))
    chosen = [order[(2 * number + 1) * len(order) // (2 * _VIEWED)] for number in range(min(_VIEWED, len(order)))]
    return [
        {
            "prompt": _question(rows[number]["prompt"]),
            "tokens": [
                asdict(t) for t in token_view(models["teacher"], models["student"], rows[number], tokenizer, _VIEWED_TOKENS)
            ],
        }
        for number in dict.fromkeys(chosen)
    ]


def won_and_lost(measured: dict[str, Array], rows: Any, rival: str, by: str) -> dict[str, Any]:
    """The rows where the student is closest to the teacher relative to a rival, and where it is farthest.

    Args:
        measured: sums over the tokens of each row.
        rows: the rows.
        rival: name of the other model.
        by: `kl`, or `nll` of the teacher's text, in nats per token.
    """
    mine, theirs = (measured[f"{name} {by}"] / np.maximum(measured["tokens"], 1) for name in ("student", rival))
    order = np.argsort(mine - theirs, kind="stable")
    count = min(_EXAMPLES, len(order) // 2)

    def shown(numbers: Array) -> list[dict[str, Any]]:
        return [
            {
                "prompt": _question(rows[int(number)]["prompt"])[:_EXAMPLE_CHARACTERS],
                "text": rows[int(number)]["completion"][0]["content"][:_EXAMPLE_CHARACTERS],
                "student": float(mine[number]),
                "rival": float(theirs[number]),
            }
            for number in numbers
        ]

    return {
        "rival": rival,
        "by": by,
        "won": shown(order[:count]),
        "lost": shown(order[::-1][:count]),
        "better": float((mine < theirs).mean()),
    }


def apart(student: pa.Table, teacher: pa.Table) -> dict[str, Any]:
    """The items of a task on which the student is worse or better than the teacher: how many, and the first of each.

    Those with the largest difference come first; among equals, those where the student was most certain.

    Args:
        student: the student's rows of `tasks.parquet`.
        teacher: the teacher's rows for the same items, in the same order.
    """
    gain = student["score"].to_numpy() - teacher["score"].to_numpy()
    logprobs = np.array([np.sum(tokens) for tokens in student["logprobs"].to_pylist()])

    def shown(sign: int) -> list[dict[str, Any]]:
        numbers = [int(number) for number in np.lexsort((-logprobs, -sign * gain)) if sign * gain[number] > 0]
        return [
            {
                "item": student["item"][number].as_py(),
                **{name: student[name][number].as_py()[:_EXAMPLE_CHARACTERS] for name in ("input", "target")},
                "student": student["answer"][number].as_py()[:_EXAMPLE_CHARACTERS],
                "teacher": teacher["answer"][number].as_py()[:_EXAMPLE_CHARACTERS],
                "probability": float(np.exp(logprobs[number])),
            }
            for number in numbers[:_ITEMS]
        ]

    return {"worse": int((gain < 0).sum()), "better": int((gain > 0).sum()), "lost": shown(-1), "won": shown(1)}
