"""Micro-rounds with the real vLLM: weights are handed over in memory to an engine that runs."""

import os

import numpy as np
import pytest
import torch

from llmdistill import load_dataset
from llmdistill.config import Generate, Targets, Teacher
from llmdistill.models.loading import load_model
from tests.conftest import run_cli
from tests.factories import write_experiment, write_noisy, write_tiny_for_vllm
from tests.forked import context

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.engine
PROMPT, WRITTEN = 300, 8  # two whole blocks of the cache are shared


@pytest.fixture(scope="module")
def models(smollm2, tmp_path_factory):
    """A model, and one with other weights."""
    directory = tmp_path_factory.mktemp("models")
    first = write_tiny_for_vllm(directory / "first", smollm2)
    return first, write_noisy(first, directory / "second", 1)


def prompt_ids():
    return np.random.default_rng(0).integers(100, 40_000, PROMPT).tolist()


def _hand_over(first, second, file):
    """What an engine writes: with its own weights; with those of the second and the cache of the first; and once it has woken."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    from llmdistill.teachers import EngineSpec, Request, open_engine
    from llmdistill.teachers.resident import checkpoint_weights

    teacher = Teacher(model=str(first), engine="vllm", dtype="float32")
    sampling, targets = Generate(max_tokens=WRITTEN, min_tokens=WRITTEN, temperature=0), Targets(kind="topk", k=4)
    spec = EngineSpec(teacher, sampling, targets, [2], PROMPT + WRITTEN, beside_training="student")
    engine = open_engine(spec)
    found = []

    def write():
        (made,) = engine.generate([[Request(0, prompt_ids(), 1)]])
        found.append([made.ids.tolist(), made.token_logprobs.tolist()])

    write()
    weights = list(checkpoint_weights(load_model(str(second), dtype="float32"), first))
    engine.llm.collective_rpc("take_weights", args=(weights,))
    write()
    engine.rest()  # on a CPU vLLM has no sleep mode: nothing happens
    engine.wake(weights)
    write()
    engine.wake(list(checkpoint_weights(load_model(str(first), dtype="float32"), first)))
    write()
    torch.save(found, file)
    engine.close()


def written_by(model):
    """The greedy text of transformers, with its log-probabilities."""
    ids = torch.tensor([prompt_ids()])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False
    )
    with torch.inference_mode():
        logprobs = model(made).logits[0, PROMPT - 1 : -1].log_softmax(-1)
    return made[0, PROMPT:].tolist(), logprobs.gather(1, made[0, PROMPT:, None])[:, 0].numpy()


def test_an_engine_goes_on_with_other_weights_and_without_the_cache_of_the_old(models, tmp_path):
    process = context.Process(target=_hand_over, args=(*models, tmp_path / "found.pt"))
    process.start()
    process.join()
    assert process.exitcode == 0
    before, stale, after, again = torch.load(tmp_path / "found.pt")
    for model, found in ((models[0], before), (models[1], after), (models[0], again)):
        text, logprobs = written_by(load_model(str(model), dtype="float32"))
        assert found[0] == text
        np.testing.assert_allclose(found[1], logprobs, atol=2e-3)
    assert before[0] != after[0]
    # The weights alone are not enough: with the old keys and values of the prompt, it is neither model.
    assert np.abs(np.array(stale[1]) - np.array(after[1])).max() > 0.05


def test_micro_rounds_of_two_engines_and_a_trainer_in_one_process(models, tmp_path):
    """Every round is written by the weights of its step, and read by the teacher."""
    file = write_experiment(models[0], tmp_path)
    micro = "{n: 3, every: 2, loss: reverse_kl, args: {save_total_limit: null, learning_rate: 1.0e-2}}"
    how = ["--teacher.engine", "vllm", "--teacher.dtype", "float32", "--student.prune.layers", "1", "--rounds", micro]
    for command in ("generate", "curate", "train", "rounds"):
        result = run_cli(command, file, *how, VLLM_CPU_KVCACHE_SPACE="1", OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr
    output = tmp_path / "run"
    students = [load_model(str(output / "student"), dtype="float32")]
    for step in (2, 4, 6):
        students.append(load_model(str(output / f"rounds/student/checkpoints/checkpoint-{step}"), dtype="float32"))
    teacher = load_model(str(models[0]), dtype="float32")
    for number in range(3):
        here = output / f"rounds/step-{2 * number}"
        for mine, theirs in zip(load_dataset(here / "written/data"), load_dataset(here / "data"), strict=True):
            ids, start = torch.from_numpy(mine["input_ids"]).long(), int(mine["completion_start"])
            with torch.inference_mode():
                of_each = [
                    model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[start:, None])[:, 0].numpy()
                    for model in (*students, teacher)
                ]
            off = [np.abs(mine["token_logprobs"] - found).max() for found in of_each[:-1]]
            assert off[number] < 5e-3
            assert min(off[:number] + off[number + 1 :]) > 0.02
            np.testing.assert_allclose(theirs["token_logprobs"], of_each[-1], atol=5e-3)
