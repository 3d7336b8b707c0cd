import numpy as np
import pytest
import torch

from llmdistill.evaluation.writing import write_answers
from llmdistill.models.loading import load_model, load_tokenizer
from llmdistill.runs.progress import StageBar


def written(model, tokenizer, prompts, ends, longest):
    with StageBar("eval", len(prompts)) as bar:
        return write_answers(model, prompts, tokenizer, ends, 2, longest, bar, "</think>")


def test_answers_written_together_are_those_written_alone(tiny):
    """Text and log-probabilities, against `generate` on each prompt alone and one forward pass over all that it gave."""
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 2000, 3 + 2 * n).tolist() for n in range(5)]
    alone = [
        model.generate(
            ids := torch.tensor([prompt]), attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=2
        )[0]
        for prompt in prompts
    ]
    # Of one answer the third token ends it, so that some of a batch go on and one does not.
    end = int(alone[1][len(prompts[1]) + 2])
    for ends in ([2], [2, end]):
        for prompt, whole, answer in zip(prompts, alone, written(model, tokenizer, prompts, ends, 6), strict=True):
            answered = whole[len(prompt) :].tolist()
            length = next((n for n, token in enumerate(answered, start=1) if token in ends), 6)
            logprobs = model(whole[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1).tolist()
            wanted = [logprobs[n][token] for n, token in enumerate(answered[:length])]
            assert answer.logprobs == pytest.approx(wanted, abs=1e-5)
            if end not in ends:
                assert answer.text == tokenizer.decode(answered, skip_special_tokens=True).strip()


def test_a_reasoning_trace_is_no_part_of_an_answer(tiny, capsys):
    """Its log-probabilities are: they are those of the whole; and of one that does not end, nothing is left."""
    model, tokenizer = load_model(str(tiny), dtype="float32"), load_tokenizer(str(tiny), None)
    script = [tokenizer.encode(text) for text in ("<think>So it is.</think>\n\nYes.", "<think>Well, well, well")]
    longest = max(map(len, script)) + 1

    def scripted(ids_BT, scores_BV):
        for row, scores in zip(ids_BT, scores_BV, strict=True):
            told = script[0] if 7 in row[:2].tolist() else script[1] * longest
            token = [*told, 2][min(len(row) - 2, len(told))]
            scores[:] = -1e9
            scores[token] = 0
        return scores_BV

    generate = model.generate
    model.generate = lambda *args, logits_processor, **how: generate(*args, logits_processor=[scripted, *logits_processor], **how)
    first, second = written(model, tokenizer, [[5, 7], [5, 6]], [2], longest)
    assert (first.text, len(first.logprobs)) == ("Yes.", len(script[0]) + 1)
    assert (second.text, len(second.logprobs)) == ("", longest)
    assert "1 of 2 answers are a reasoning trace that does not end" in " ".join(capsys.readouterr().out.split())
