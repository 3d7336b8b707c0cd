"""What `eval` keeps when it is interrupted, and what it does not take from a model's own settings."""

import json

import numpy as np
import pytest
import torch

from llmdistill.config import Experiment, load_experiment
from llmdistill.evaluation import routes, serving
from llmdistill.evaluation.parts import Parts
from llmdistill.evaluation.win_rate import Comparison
from llmdistill.models.loading import continue_prompts, load_model, load_tokenizer
from llmdistill.models.token_bytes import token_bytes
from llmdistill.stages import evaluate as stage
from llmdistill.stages.curate import curate
from llmdistill.stages.generate import generate
from llmdistill.stages.train import train
from tests.factories import write_experiment


def test_parts_are_measured_once(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"a b": np.arange(3.0), "c": np.ones((2, 2))}

    for _ in range(2):
        parts = Parts(tmp_path / "parts")
        found = parts.arrays("x", measure)
        assert list(found) == ["a b", "c"]
        np.testing.assert_array_equal(found["c"], np.ones((2, 2)))
        assert parts.result("y", lambda: [1.5, None]) == [1.5, None]
    assert len(calls) == 1
    with pytest.raises(RuntimeError):
        parts.result("z", lambda: (_ for _ in ()).throw(RuntimeError))
    assert not list((tmp_path / "parts").glob("z*")), "what was not measured to its end is not there"
    parts.remove()
    assert not (tmp_path / "parts").exists()


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on_with_what_it_has(experiment_file, monkeypatch):
    """The texts fail at the first try; the second measures no row again and ends in the same numbers as one in one go."""
    experiment = load_experiment(experiment_file, [("eval.own_prompts", "2")])
    for before in (generate, curate, train):
        before(experiment)
    fidelity, asked = routes.fidelity, []

    def counted(models, rows, *args, **kwargs):
        asked.append(len(rows))
        return fidelity(models, rows, *args, **kwargs)

    monkeypatch.setattr(routes, "fidelity", counted)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "samples", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stage.evaluate(experiment)
    first = len(asked)
    assert first > 1, "held-out rows, and the own text of each model"
    stage.evaluate(experiment)
    assert len(asked) == first
    directory = experiment.directory("eval")
    assert not (directory / "parts").exists()
    metrics = json.loads((directory / "metrics.json").read_text())

    again = load_experiment(experiment_file, [("eval.own_prompts", "2"), ("eval.samples", "2")])
    for file in [*directory.iterdir()]:
        file.unlink()
    stage.evaluate(again)
    whole = json.loads((directory / "metrics.json").read_text())
    for model, other in zip(metrics["models"], whole["models"], strict=True):
        assert (model["kl"], model["own_text"]) == (other["kl"], other["own_text"])
    assert metrics["decoding"]["dtype"] == "float32"
    draft = metrics["models"][0]["draft"]  # the teacher's own: all is accepted, and a draft costs as much as what it saves
    assert draft["sampled"]["acceptance"]["mean"] == draft["temperature_0"]["acceptance"]["mean"] == 1
    assert draft["cost"] == {"median": 1, "low": 1, "high": 1}
    assert [cycle["gamma"] for cycle in draft["sampled"]["cycles"]] == list(range(1, 8)), "answers of eight tokens"
    assert {cycle["speed_up"]["mean"] for cycle in draft["sampled"]["cycles"]} == {1}


def test_the_bytes_of_a_text_are_those_of_all_its_tokens(tiny):
    """A trace and a call stand in the tokens but not in what is stored as the answer; the end token is no text."""
    tokenizer = load_tokenizer(str(tiny), None)
    tokenizer.clean_up_tokenization_spaces = True  # as in some published tokenizers: it takes spaces away
    told = "<think>1 + 1 = 2 , naïve 漢</think>It is 2 .<tool_call>add(1, 1)</tool_call>"
    ids = [*tokenizer(told)["input_ids"], 2]
    row = {"input_ids": np.array([5, 6, *ids]), "completion_start": 2, "completion": [{"content": "It is 2 ."}]}
    of_token = token_bytes(tokenizer)
    want = sum(len(of_token[token] or b"") for token in ids)
    assert stage.text_bytes_of([row], tokenizer).tolist() == [want] == [len(told.encode())]


def test_what_answers_begin_behind_is_part_of_the_claim_where_there_are_answers(tiny, tmp_path, monkeypatch):
    """Its default is left out, as in runs that are finished."""
    monkeypatch.setattr(stage, "_inputs", lambda *args: {})
    judge = {"model": str(tiny), "engine": "transformers"}

    def claimed(generate, **settings):
        told = {"output": str(tmp_path), "teacher": {"model": str(tiny)}, "student": {"prune": {"layers": 2}}}
        experiment = Experiment.model_validate({**told, "generate": generate, "eval": settings})
        return stage.claims(experiment)[0].settings.get("generate")

    other = {"thinking_end": "</reasoning>"}
    assert claimed(other, tasks=["hellaswag"]) == other
    assert claimed(other, win_rate={"judge": judge, "against": "student before"}) == other
    assert claimed(other) is None
    assert claimed({}, tasks=["hellaswag"]) is None


@pytest.mark.slow
def test_answers_that_are_judged_are_written_before_the_models_are_converted_to_be_timed(tiny, tmp_path, monkeypatch):
    """Else their precision would depend on what is timed, and on whether that was done in an earlier try."""
    made = []
    monkeypatch.setattr(serving, "by_transformers", lambda *args: made.append("timed") or 1 / 0)
    monkeypatch.setattr(Comparison, "answers", lambda *args: made.append("answered"))
    file = write_experiment(tiny, tmp_path)
    overrides = {"against": '"student before"', "judge.model": f'"{tiny}"', "judge.engine": "transformers", "prompts": "2"}
    experiment = load_experiment(file, [(f"eval.win_rate.{key}", value) for key, value in overrides.items()])
    for before in (generate, curate, train):
        before(experiment)
    with pytest.raises(ZeroDivisionError):
        stage.evaluate(experiment)
    assert made == ["answered", "timed"]


def test_greedy_text_is_greedy_whatever_the_model_was_published_with(tiny):
    model = load_model(str(tiny), dtype="float32")
    plain = continue_prompts(model, [[5, 6, 7], [8, 9]], 12, [2], do_sample=False)
    model.generation_config.repetition_penalty = 1.8
    model.generation_config.no_repeat_ngram_size = 2
    own = model.generation_config
    assert torch.equal(continue_prompts(model, [[5, 6, 7], [8, 9]], 12, [2], do_sample=False), plain)
    assert model.generation_config is own, "the model keeps what it was published with"
