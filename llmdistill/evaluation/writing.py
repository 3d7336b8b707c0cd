"""Greedy answers of a model, each with the log-probabilities of its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmdistill.models.loading import continue_prompts
from llmdistill.runs.progress import StageBar, counted, say
from llmdistill.teachers.thinking import answer_ids


@dataclass(frozen=True)
class Written:
    """An answer: its text without trace and special tokens, and log q of every token in nats, including the end token."""

    text: str
    logprobs: list[float]


def answer_length(ids: Sequence[int], end_ids: Sequence[int]) -> int:
    """Tokens of an answer that may be padded after its end token, which is included."""
    return next((place for place, token in enumerate(ids, start=1) if token in end_ids), len(ids))


class _Recorder:
    """A logits processor for `generate` that records log q of the most likely token, which greedy decoding takes."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.steps.append(scores.float().log_softmax(-1).amax(-1).cpu())
        return scores


def write_answers(
    model: Any,
    prompts: list[list[int]],
    tokenizer: Any,
    end_ids: Sequence[int],
    batch_size: int,
    max_tokens: int,
    bar: StageBar,
    thinking_end: str,
) -> list[Written]:
    """A model's greedy answer to each prompt of token ids; an answer still within its reasoning trace has no text."""
    import torch

    answers: dict[int, Written] = {}
    thinking = 0  # answers whose trace does not end
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # similar lengths together, to reduce padding
    for start in range(0, len(order), batch_size):
        chunk, recorder = order[start : start + batch_size], _Recorder()
        written_BT = continue_prompts(
            model, [prompts[n] for n in chunk], max_tokens, end_ids, do_sample=False, logits_processor=[recorder]
        )
        behind = [answer_ids(tokenizer, ids, thinking_end) for ids in written_BT.numpy()]
        thinking += sum(not len(ids) for ids in behind)
        texts = tokenizer.batch_decode(behind, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        logprobs_BT = torch.stack(recorder.steps, dim=1).tolist()
        for number, text, ids, logprobs in zip(chunk, texts, written_BT.tolist(), logprobs_BT, strict=True):
            answers[number] = Written(text.strip(), logprobs[: answer_length(ids, end_ids)])
        bar.advance(len(chunk))
    if thinking:
        say(
            "warning",
            f"{thinking:,} of {counted(len(prompts), 'answer')} are a reasoning trace that does not end in {max_tokens:,} "
            "tokens; teacher.template_args may turn it off, as {enable_thinking: false} does for Qwen3",
        )
    return [answers[number] for number in range(len(prompts))]
