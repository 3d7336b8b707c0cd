"""The estimate before a run: plain sums of what was measured."""

import json
from types import SimpleNamespace

import pytest

from llmdistill.config import load_experiment
from llmdistill.workflow import estimate
from llmdistill.workflow.estimate import Speed

NOTHING = SimpleNamespace(stdout="")
SPEED = Speed(start=1, parameters=100, layers=4, decode=2, small=0.5, read=0.01, train=0.02, byte=0, batch=8)


@pytest.fixture
def experiment(experiment_file):
    return load_experiment(experiment_file, [("train.args.max_steps", "10"), ("generate.max_tokens", "36")])


@pytest.fixture
def seconds(experiment, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda experiment, batch: SPEED)
    return lambda **changes: estimate.estimate(experiment.model_copy(update=changes), ["generate", "train", "eval"], 8)


def test_training_grows_with_its_steps(seconds, experiment):
    """10 steps of 2 rows of 100 tokens; forward and backward, and what the factor adds."""
    longer = experiment.train.model_copy(update={"args": {**experiment.train.args, "max_steps": 20}})
    once, twice = seconds()["train"], seconds(train=longer)["train"]
    each = estimate._TRAINING * 3 * 2 * (36 + estimate._PROMPT_TOKENS) * SPEED.train
    students = 1 + experiment.train.compare_text_only
    share = estimate._student_share(experiment, SPEED)
    assert twice - once == pytest.approx(10 * students * share * each)


def test_more_samples_take_longer(seconds, experiment):
    """In vLLM: 24 more rows of 36 tokens, eight at a time, and their prompts."""
    vllm = experiment.teacher.model_copy(update={"engine": "vllm"})
    rows = 8 * experiment.generate.samples
    more = experiment.generate.model_copy(update={"samples": 4 * experiment.generate.samples})
    added = 3 * rows * (estimate._DECODING * 36 / SPEED.batch * SPEED.decode + estimate._PROMPT_TOKENS * SPEED.read)
    once, longer = seconds(teacher=vllm)["generate"], seconds(teacher=vllm, generate=more)["generate"]
    assert longer - once == pytest.approx(added)


def test_items_of_ones_own_tasks_are_answered_in_batches(seconds, experiment, monkeypatch):
    """200 of 300 items, in batches of 8, prompts of 50 tokens and answers of 20: by the teacher, and by its students."""
    settings = experiment.eval.model_copy(update={"batch_size": 8, "task_limit": 200, "timed_requests": 0})
    items = [SimpleNamespace(input="i" * 90, output="o" * 60)] * 300
    task = SimpleNamespace(items=items, task=SimpleNamespace(told="t" * 60))
    before = seconds(eval=settings)["eval"]
    monkeypatch.setattr(estimate, "read_own_tasks", lambda names: [task])
    after = seconds(eval=settings.model_copy(update={"tasks": ["own.yaml"]}))["eval"]
    each = estimate._DECODING * 200 / 8 * estimate._LONGEST * 20 * SPEED.small + estimate._READING * 200 * 50 * SPEED.read
    students = 1 + 1 + experiment.train.compare_text_only
    assert after - before == pytest.approx(each * (1 + students * estimate._student_share(experiment, SPEED)))


def test_only_what_is_asked_for_is_estimated(seconds):
    assert set(seconds()) == {"generate", "train", "eval"}


@pytest.mark.slow
def test_a_real_measurement(experiment):
    found = estimate.measure(experiment, 4)
    assert found is not None
    assert found.layers == 4
    assert min(found.decode, found.small, found.read, found.train, found.byte) > 0


def test_code_of_the_teachers_repository_runs_only_if_it_is_trusted(experiment, monkeypatch):
    asked = []
    monkeypatch.setattr(estimate.subprocess, "run", lambda command, **how: asked.append(json.loads(command[-1])) or NOTHING)
    for trusted in (False, True):
        teacher = experiment.teacher.model_copy(update={"trust_remote_code": trusted})
        estimate.measure(experiment.model_copy(update={"teacher": teacher}), 4)
    assert [each["trust_remote_code"] for each in asked] == [False, True]


def test_without_a_model_there_is_none(experiment):
    missing = experiment.teacher.model_copy(update={"model": "/nowhere/at/all"})
    assert estimate.measure(experiment.model_copy(update={"teacher": missing}), 4) is None


def test_in_words():
    assert estimate.said({"generate": 120, "train": 240, "curate": 6}) == "about 6 minutes on this machine (generate 2, train 4)"
    assert estimate.said({"train": 60}) == "about 1 minute on this machine (train 1)"
