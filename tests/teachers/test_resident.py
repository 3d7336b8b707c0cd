"""Engines that stay in memory while the student trains."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmdistill.config import Generate, Targets, Teacher
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.teachers import Engine, EngineSpec, resident
from llmdistill.teachers.resident import Resident, checkpoint_weights
from tests.factories import nearby


def spec(model, engine="vllm", length=16):
    return EngineSpec(Teacher(model=str(model), engine=engine), Generate(max_tokens=4), Targets(kind="topk", k=4), [2], length)


class SleepingLLM:
    """A double of `vllm.LLM` with its sleep mode, which vLLM has on GPUs only.

    As there, memory that sleeps cannot be written or used, level 2 keeps no weights, and the prefix cache outlives new ones.
    """

    def __init__(self):
        self.awake, self.weights, self.cached, self.asleep_for_others = {"weights", "kv_cache"}, "those on the disk", None, []

    def sleep(self, level):
        assert self.awake == {"weights", "kv_cache"}, "sleeps already"
        self.awake, self.cached = set(), None
        self.asleep_for_others.append(level)
        if level == 2:
            self.weights = None

    def wake_up(self, tags):
        assert not set(tags) & self.awake, "is awake"
        self.awake |= set(tags)

    def collective_rpc(self, method, args):
        assert method == "take_weights"
        assert "weights" in self.awake, "no memory to write to"
        (self.weights,) = args

    def reset_prefix_cache(self):
        self.cached = None
        return True

    def write(self):
        assert self.awake == {"weights", "kv_cache"}, "sleeps"
        self.cached = self.cached or self.weights
        return self.weights, self.cached


@pytest.fixture
def vllm_engine():
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from llmdistill.teachers.vllm import VllmEngine

    def made(level):
        engine = VllmEngine.__new__(VllmEngine)
        engine.llm, engine._sleep_level, engine._rests = SleepingLLM(), level, False
        return engine

    return made


def test_the_student_sleeps_without_its_weights_and_wakes_with_others(vllm_engine):
    engine = vllm_engine(2)
    assert engine.llm.write() == ("those on the disk",) * 2
    for weights in ("of step 8", "of step 16"):
        engine.rest()
        engine.rest()
        assert (engine.llm.awake, engine.llm.weights) == (set(), None)
        engine.wake(weights)
        assert engine.llm.write() == (weights, weights)
    engine.wake("handed over while it is awake")
    assert engine.llm.write() == ("handed over while it is awake",) * 2


def test_the_teacher_sleeps_and_wakes_as_it_was(vllm_engine):
    engine = vllm_engine(1)
    engine.rest()
    assert engine.llm.awake == set()
    engine.wake()
    assert engine.llm.write() == ("those on the disk",) * 2
    assert engine.llm.asleep_for_others == [1]


def test_without_a_sleep_mode_only_weights_change(vllm_engine):
    engine = vllm_engine(0)
    engine.rest()
    engine.wake("of step 8")
    assert engine.llm.write() == ("of step 8",) * 2
    assert engine.llm.asleep_for_others == []


def test_a_cache_that_stays_is_an_error(vllm_engine, monkeypatch):
    engine = vllm_engine(2)
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="prefix cache"):
        engine.wake("of step 8")


def test_levels_and_processes(monkeypatch):
    """On a GPU each of the two engines sleeps in a process of its own: vLLM has one sleeping engine a process."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm import platforms

    from llmdistill.teachers.vllm import _choose_process, _sleep_level

    found = {}
    for is_cpu in (True, False):
        monkeypatch.setattr(platforms.current_platform.__class__, "is_cpu", lambda self, is_cpu=is_cpu: is_cpu)
        for model in (None, "teacher", "student"):
            monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "as it was")
            one = EngineSpec(**{**vars(spec("m")), "beside_training": model})
            _choose_process(one)
            found[is_cpu, model] = _sleep_level(one), os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    assert found == {
        (True, None): (0, "as it was"),
        (True, "teacher"): (0, "as it was"),
        (True, "student"): (0, "0"),
        (False, None): (0, "as it was"),
        (False, "teacher"): (1, "1"),
        (False, "student"): (2, "0"),
    }


class Recorded(Engine):
    """An engine that only remembers what it was asked."""

    def __init__(self, spec):
        self.spec, self.tokens, self.told = spec, 7, []

    def rest(self):
        self.told.append("rest")

    def wake(self, weights=None):
        self.told.append(weights and dict(weights).keys())

    def close(self):
        self.told.append("close")

    generate = score = None


def test_an_engine_is_started_once_and_again_for_longer_sequences(tiny, monkeypatch):
    monkeypatch.setattr(resident, "open_engine", Recorded)
    teacher = Resident("teacher", longest=20)
    first = teacher.open(spec(tiny))
    assert (first.spec.max_model_len, first.spec.beside_training, first.tokens) == (20, "teacher", 0)
    teacher.rest()
    assert teacher.open(spec(tiny, length=20)) is first
    longer = teacher.open(spec(tiny, length=21))
    assert longer is not first
    assert longer.spec.max_model_len == 21
    teacher.close()
    assert (first.told, longer.told) == ([None, "rest", None, "close"], [None, "close"])


def test_the_students_engine_gets_its_weights(tiny, monkeypatch):
    monkeypatch.setattr(resident, "open_engine", Recorded)
    student = Resident("student", longest=20)
    engine = student.open(spec(tiny))
    student.student = nearby(tiny)
    student.open(spec(tiny))
    assert engine.told == [None, load_model(str(tiny)).state_dict().keys() - {"lm_head.weight"}]


def test_transformers_writes_with_the_model_itself(tiny):
    student = Resident("student", longest=20)
    student.student = nearby(tiny)
    assert student.open(spec(tiny, "transformers")).models == [student.student]


@pytest.mark.parametrize("tied", [True, False])
def test_weights_have_the_names_of_the_checkpoint(tiny, tmp_path, tied):
    """What is handed over is what `save_pretrained` stores; the output layer once where it is the embedding."""
    from safetensors.torch import load_file

    config = load_model(str(tiny)).config
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    stored, found = load_file(tmp_path / "model.safetensors"), dict(checkpoint_weights(model, tmp_path))
    assert stored.keys() == found.keys()
    assert ("lm_head.weight" in found) != tied
    assert all(torch.equal(stored[name], found[name]) for name in stored)
    assert all(found[name].data_ptr() == tensor.data_ptr() for name, tensor in model.named_parameters())  # no copy


def test_other_names_are_refused(tiny, tmp_path):
    model = load_model(str(tiny))
    model.save_pretrained(tmp_path)
    model.model.layers[0].mlp.gate_proj.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(
        InputError, match=r"differ in model\.layers\.0\.mlp\.gate_proj\.bias, so its weights cannot be passed to vLLM"
    ):
        list(checkpoint_weights(model, tmp_path))
