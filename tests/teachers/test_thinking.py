"""Reasoning traces: where they end, and what is stored of a row that had one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from hypothesis import given
from hypothesis import strategies as st

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.data import targets
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model, load_tokenizer
from llmdistill.stages.generate import generate
from llmdistill.teachers.thinking import answer_ids, answer_start, behind_trace


class Letters:
    """A tokenizer whose token n is the n-th of these pieces."""

    pieces = ("a", " ", "\n", "</thi", "nk>", "</think>", "nk> b", "é")

    def decode(self, ids):
        return "".join(self.pieces[number] for number in ids)


@given(st.lists(st.integers(0, 7), max_size=30))
def test_the_answer_begins_behind_the_first_end_and_white_space(numbers):
    """Against a walk from the left."""
    ids, tokenizer, want = np.array(numbers, dtype=np.int64), Letters(), None
    for count in range(1, len(ids) + 1):
        if "</think>" in tokenizer.decode(ids[:count]):
            want = next((place for place in range(count, len(ids)) if tokenizer.pieces[ids[place]].strip()), None)
            break
    assert answer_start(tokenizer, ids, "</think>") == want


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n\n</think>\n\nYes.", "Yes."),
        ("Hm. Hm.\n</think>\nYes. </think>", "Yes. </think>"),  # where the template has begun the trace
        (" <think>Hm.", ""),
        ("<think>Hm.</think>", ""),
        ("Yes, <think> is a mark.", "Yes, <think> is a mark."),
        ("Yes. ", "Yes. "),
        ("", ""),
    ],
)
def test_the_text_behind_a_trace(text, answer):
    assert behind_trace(text, "</think>") == answer


def test_the_tokens_behind_a_trace():
    ids = np.array([3, 4, 2, 0, 7])  # </think>\naé
    assert answer_ids(Letters(), ids, "</think>").tolist() == [0, 7]
    assert answer_ids(Letters(), ids[:3], "</think>").tolist() == []
    assert answer_ids(Letters(), ids[3:], "</think>").tolist() == [0, 7]


def test_an_answer_has_no_place_in_a_trace_that_the_template_begins(experiment_file, tiny, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny, teacher)
    shutil.copy(Path(trl.__file__).parent / "chat_templates/deepseek_r1_distill.jinja", teacher / "chat_template.jinja")
    chosen = [("teacher.model", str(teacher)), ("generate.thinking", "removed"), ("curate", "[finish_reason:]")]
    experiment = load_experiment(experiment_file, chosen)
    with pytest.raises(InputError, match=r"generate\.thinking: removed, but the chat template of .* opens a trace"):
        generate(experiment)
    assert not experiment.directory("data").exists()


@pytest.mark.slow
@pytest.mark.parametrize("thinking", ["masked", "removed"])
def test_a_trace_is_not_learned_and_the_targets_are_those_of_what_is_stored(experiment_file, tiny, thinking):
    end = "x"  # stands for one: about half of the tiny model's answers hold it
    chosen = [("generate.max_tokens", "40"), ("curate", "[finish_reason: {keep: [length, stop]}]")]
    chosen += [("generate.thinking", thinking), ("generate.thinking_end", end)]
    tokenizer, model = load_tokenizer(str(tiny), None), load_model(str(tiny))
    experiment = load_experiment(experiment_file, chosen)
    generate(experiment)
    rows = load_dataset(experiment.directory("data"))
    answered = [row for row in rows if row["finish_reason"] != "no_answer"]
    assert 0 < len(answered) < len(rows)
    assert "sampling_logprob" not in rows.column_names
    for row in rows:
        ids, start = row["input_ids"].tolist(), int(row["completion_start"])
        trace = json.loads(str(row["metadata"]))["llmdistill"]["thinking"]
        prompt = tokenizer.decode(ids[:start], skip_special_tokens=True)
        if row["finish_reason"] == "no_answer":
            assert len(ids) == start + 1
        else:
            last = tokenizer.decode(tokenizer(trace)["input_ids"][-2:])
            assert end in last
        assert row["completion"][0]["content"] == tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert prompt.endswith(trace) == (thinking == "masked" or not trace)
        assert prompt.split("assistant\n")[-1] == (trace if thinking == "masked" else "")
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1).numpy()
        np.testing.assert_allclose(row["token_logprobs"], logprobs[np.arange(len(ids) - start), ids[start:]], atol=2e-4)
        soft = targets.TopK.of_rows([row], [len(ids) - start])
        np.testing.assert_allclose(soft.logprobs_NK, np.take_along_axis(logprobs, soft.ids_NK, 1), atol=5e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("generate.thinking", "removed")], "add the step finish_reason to curate"),
        ([("generate.min_tokens", "9")], "min_tokens is 9, more than max_tokens 8"),
        (
            [("generate.json_schema", "{type: object}")],
            "json_schema needs constrained decoding, which teacher.engine vllm, server and openai support",
        ),
        ([("generate.json_schema", "{type: thing}"), ("teacher.engine", "vllm")], "is not a valid JSON schema"),
        (
            [("generate.json_schema", "{}"), ("generate.thinking", "masked"), ("teacher.engine", "vllm")],
            "no reasoning trace to mask or remove",
        ),
    ],
)
def test_what_cannot_be_is_refused(experiment_file, overrides, message):
    with pytest.raises(InputError, match=message):
        load_experiment(experiment_file, overrides)
