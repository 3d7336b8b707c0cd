"""Micro-rounds: one training, for which the student in memory writes the rows of every round."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmdistill import load_dataset
from llmdistill.config import load_experiment
from llmdistill.data import shards
from llmdistill.data.manifest import read_manifest
from llmdistill.data.targets import SampledByStudent
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.runs.files import read_json
from llmdistill.runs.inputs import model_fingerprint
from llmdistill.runs.termination import exit_on_sigterm
from llmdistill.stages.rounds import rounds
from llmdistill.stages.table import STAGES
from llmdistill.stages.train import train
from llmdistill.training.trainer import DistillTrainer
from llmdistill.workflow.checks import check_stale
from llmdistill.workflow.plan import stages
from tests.conftest import run_cli
from tests.factories import write_experiment
from tests.forked import context

N, EVERY, BATCH = 3, 2, 2
MICRO = f"{{n: {N}, every: {EVERY}, loss: reverse_kl, args: {{save_total_limit: null, learning_rate: 1.0e-2}}}}"


def overrides(output, micro=MICRO):
    return [("rounds", micro), ("generate.rows_per_shard", "2"), ("output", str(output))]


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    """An experiment that has come as far as its first student."""
    directory = tmp_path_factory.mktemp("micro")
    file = write_experiment(tiny, directory)
    experiment = load_experiment(file, overrides(directory / "run"))
    for command in ("generate", "curate", "prune", "train"):
        STAGES[command].function(experiment.with_(rounds=None))
    return file, directory


@pytest.fixture(scope="module")
def undisturbed(prepared):
    """The same, with its micro-rounds, in one go."""
    file, directory = prepared
    rounds(load_experiment(file, overrides(directory / "run")))
    return directory / "run"


def copied(directory, output):
    """The experiment as it was before its rounds, in another directory."""
    return shutil.copytree(directory / "run", output, ignore=shutil.ignore_patterns("rounds"))


def step(output, number):
    return output / f"rounds/step-{number * EVERY}"


def rows_of(output):
    """Everything that the rounds have stored of their rows."""
    found = {}
    for number in range(N):
        for name in ("written/data", "data", "curated"):
            rows = load_dataset(step(output, number) / name)
            found[number, name] = [
                {key: np.asarray(row[key]).tolist() for key in rows.column_names if key != "metadata"} for row in rows
            ]
    return found


def all_log_probabilities(model, row):
    """Of every token at every position of the completion."""
    ids, start = torch.from_numpy(row["input_ids"]).long(), int(row["completion_start"])
    with torch.inference_mode():
        return model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1).numpy()


def log_probabilities(model, row):
    written = row["input_ids"][int(row["completion_start"]) :, None]
    return np.take_along_axis(all_log_probabilities(model, row), written, 1)[:, 0]


def test_each_round_is_written_by_the_weights_of_its_step(undisturbed, tiny):
    """The stored log-probabilities are those of the checkpoint at that step and of no other, by a forward of its own."""
    models = [load_model(str(undisturbed / "student"), dtype="float32")]
    for number in range(1, N + 1):
        models.append(load_model(str(undisturbed / f"rounds/student/checkpoints/checkpoint-{number * EVERY}"), dtype="float32"))
    teacher = load_model(str(tiny), dtype="float32")
    for number in range(N):
        written, read = (load_dataset(step(undisturbed, number) / name) for name in ("written/data", "data"))
        assert len(written) == EVERY * BATCH
        for mine, theirs in zip(written, read, strict=True):
            off = [np.abs(mine["token_logprobs"] - log_probabilities(model, mine)).max() for model in models]
            assert off[number] < 1e-4
            assert min(off[:number] + off[number + 1 :]) > 0.01
            np.testing.assert_allclose(theirs["token_logprobs"], log_probabilities(teacher, mine), atol=1e-4)
            assert mine["input_ids"].tolist() == theirs["input_ids"].tolist()


def test_the_text_is_that_of_the_checkpoint(prepared, tmp_path):
    """At temperature 0 the rows are what `model.generate` of transformers writes with the checkpoint of that step."""
    file, directory = prepared
    output = copied(directory, tmp_path / "run")
    rounds(load_experiment(file, [*overrides(output), ("generate.temperature", "0")]))
    texts = []
    for number in range(1, N):
        model = load_model(str(output / f"rounds/student/checkpoints/checkpoint-{number * EVERY}"), dtype="float32")
        for row in load_dataset(step(output, number) / "written/data"):
            start = int(row["completion_start"])
            prompt = torch.from_numpy(row["input_ids"][:start]).long()[None]
            made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
            assert made[0].tolist() == row["input_ids"].tolist()
            texts.append(made[0, start:].tolist())
    assert len({tuple(text) for text in texts}) > 1


def test_each_student_draws_its_own_sample(tiny, tmp_path):
    """With sampled targets the ids are drawn from the weights of the step; the log-probabilities are the teacher's."""
    output = tmp_path / "run"
    experiment = load_experiment(write_experiment(tiny, tmp_path), [*overrides(output), ("targets", "{kind: sampled, n: 6}")])
    for command in ("generate", "curate", "prune", "train"):
        STAGES[command].function(experiment.with_(rounds=None))
    rounds(experiment)
    teacher = load_model(str(tiny), dtype="float32")
    students = [output / "student", *(output / f"rounds/student/checkpoints/checkpoint-{n * EVERY}" for n in range(1, N))]
    for number, student in enumerate(students):
        model = load_model(str(student), dtype="float32")
        assert read_manifest(step(output, number) / "curated")["targets"]["kind"] == "sampled_by_student"
        for row in load_dataset(step(output, number) / "curated"):
            log_p, log_q = (all_log_probabilities(of, row) for of in (teacher, model))
            soft = SampledByStudent.of_rows([row], [len(log_p)])
            np.testing.assert_allclose(soft.logprobs_NK, np.take_along_axis(log_p, soft.ids_NK, 1), rtol=2**-10, atol=1e-3)
            weights = np.exp(np.take_along_axis(log_q, soft.ids_NK, 1) + soft.logdesign_NK)
            np.testing.assert_allclose(weights.sum(1), 1, atol=1e-2)  # as those of a systematic sample do
    history = read_json(output / "rounds/student/trainer_state.json")["log_history"]
    assert all(np.isfinite(entry["reverse_kl"]) for entry in history if "reverse_kl" in entry)


def test_rounds_are_datasets_with_their_lineage(undisturbed):
    ids = set()
    for number in range(N):
        here = step(undisturbed, number)
        run = read_json(here / "written/data/run.json")
        inputs = run["inputs"]
        assert inputs[str(undisturbed / "student")] == model_fingerprint(str(undisturbed / "student"), None)
        assert (str(undisturbed / "rounds/student") in inputs) == (number > 0)
        if number:
            assert str(step(undisturbed, number - 1) / "curated/dataset.json") in inputs
        assert read_json(here / "data/run.json")["status"] == "done"
        assert read_manifest(here / "data")["seed"] == number + 1
        ids.update(load_dataset(here / "curated")["id"])
    assert len(ids) == N * EVERY * BATCH
    run = read_json(undisturbed / "rounds/student/run.json")
    assert (run["stage"], run["status"], run["results"]["steps"]) == ("rounds", "done", N * EVERY)
    fingerprints = {read_manifest(step(undisturbed, number) / "written/data")["teacher"]["fingerprint"] for number in range(N)}
    assert len(fingerprints) == N


def test_one_schedule(prepared, undisturbed, tmp_path):
    """The learning rates are those of a plain training of as many steps."""
    file, directory = prepared
    args = json.dumps({"max_steps": N * EVERY, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "bf16": False})
    plain = [("output", str(tmp_path / "run")), ("train.args", args), ("train.dataset", str(directory / "run/curated"))]
    train(load_experiment(file, [*plain, ("student", json.dumps({"model": str(directory / "run/student")}))]))
    logged = [
        [entry["learning_rate"] for entry in read_json(path / "trainer_state.json")["log_history"] if "learning_rate" in entry]
        for path in (undisturbed / "rounds/student", tmp_path / "run/student")
    ]
    assert len(logged[0]) == N * EVERY
    assert logged[0] == logged[1]


def _killed(moment, file, settings, how=signal.SIGKILL):
    """Micro-rounds in a process that is killed at a moment."""
    exit_on_sigterm()

    def kill():
        os.kill(os.getpid(), how)

    stored, trained, steps = shards._store, DistillTrainer.training_step, []

    def store(making, *args):
        described = stored(making, *args)
        if str(making.directory).endswith(moment):
            kill()
        return described

    def training_step(*args, **kwargs):
        steps.append(1)
        if moment == f"training step {len(steps)}":
            kill()
        return trained(*args, **kwargs)

    shards._store, DistillTrainer.training_step = store, training_step
    rounds(load_experiment(file, settings))


@pytest.mark.parametrize(
    "moment",
    ["rounds/step-0/written/data", "rounds/step-2/written/data", "rounds/step-2/data", "training step 4"],
)
def test_a_killed_run_ends_in_the_same_rows_and_weights(prepared, undisturbed, tmp_path, moment):
    """In the middle of writing, of scoring and of the steps of a round."""
    _kill_and_go_on(prepared, tmp_path / "run", moment, MICRO, undisturbed)


def test_steps_without_a_checkpoint_are_trained_again_on_the_same_rows(prepared, tmp_path):
    micro = MICRO.replace("save_total_limit", "save_steps: 100, save_total_limit")
    file, directory = prepared
    copied(directory, tmp_path / "other")
    rounds(load_experiment(file, overrides(tmp_path / "other", micro)))
    _kill_and_go_on(prepared, tmp_path / "run", "training step 6", micro, tmp_path / "other")


def _kill_and_go_on(prepared, output, moment, micro, reference):
    """What was stored before the kill stays, and in the end everything is that of a run that was not killed."""
    file, directory = prepared
    copied(directory, output)
    settings = overrides(output, micro)
    process = context.Process(target=_killed, args=(moment, file, settings))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in output.glob("rounds/**/*.parquet")}
    assert before
    rounds(load_experiment(file, settings))
    assert before.items() <= {path: path.stat().st_mtime_ns for path in output.glob("rounds/**/*.parquet")}.items()
    assert rows_of(output) == rows_of(reference)
    mine, other = (load_file(path / "rounds/student/model.safetensors") for path in (output, reference))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_a_terminated_run_goes_on(prepared, undisturbed, tmp_path):
    """SIGTERM while the student writes ends the process at once, with the exit status of a stage that was preempted."""
    file, directory = prepared
    output = copied(directory, tmp_path / "run")
    process = context.Process(target=_killed, args=("rounds/step-4/written/data", file, overrides(output), signal.SIGTERM))
    process.start()
    process.join()
    assert process.exitcode == 143
    assert not (step(output, 2) / "written/data/dataset.json").exists()
    rounds(load_experiment(file, overrides(output)))
    assert rows_of(output) == rows_of(undisturbed)


def test_a_finished_run_does_nothing_and_other_settings_are_refused(prepared, undisturbed, capsys):
    file, _ = prepared
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    rounds(load_experiment(file, overrides(undisturbed)))
    assert "rounds/student is finished" in capsys.readouterr().out.replace("\n", "")
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before
    memory = [("teacher.engine_args", "{gpu_memory_utilization: 0.5}"), ("train.args.run_name", "again")]
    assert check_stale(load_experiment(file, [*overrides(undisturbed), *memory])) == {}
    other = load_experiment(file, overrides(undisturbed, MICRO.replace("1.0e-2", "2.0e-2")))
    with pytest.raises(InputError, match=r"rounds\.args\.learning_rate was 0\.01, is 0\.02"):
        rounds(other)
    stale = {str(path.relative_to(undisturbed)) for path in check_stale(other, remake=True)}
    later = {f"rounds/step-{number * EVERY}/{name}" for number in (1, 2) for name in ("written/data", "data", "curated")}
    assert later | {"rounds/student"} == {name for name in stale if name.startswith("rounds")}


def test_the_share_of_the_teachers_rows(prepared, tmp_path):
    file, directory = prepared
    output = copied(directory, tmp_path / "run")
    micro = "{n: 2, every: 2, teacher_share: 0.5, loss: reverse_kl, args: {learning_rate: 1.0e-2}}"
    result = run_cli("rounds", file, *(f"--{name}={value}" for name, value in overrides(output, micro)))
    assert result.returncode == 0, result.stderr
    assert len(load_dataset(output / "rounds/step-2/curated")) == EVERY * BATCH / 2
    assert "2 rows, and 2 of the" in result.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([("store", "s3://bucket/run")], "rounds.every does not support store"),
        ([("teacher.tensor_parallel_size", "2")], "teacher.tensor_parallel_size above 1"),
        ([("student.lora", "{}"), ("teacher.engine", "vllm")], "student.lora with engine vllm"),
        ([("train.validation", "0.2")], "rounds.every does not support train.validation"),
        ([("curate", "[{judge: {teacher: {model: a/b}}}]")], "a judge in curate"),
        ([("rounds.args.max_steps", "3")], "rounds.args.max_steps has no effect in micro-rounds"),
        ([("train.args.packing", "true")], "set rounds.args.packing to false"),
        ([("train.args.deepspeed", "zero.json")], "rounds.every does not support deepspeed zero.json"),
        ([("rounds.every", "0")], "rounds.every should be greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(prepared, tmp_path, changes, said):
    file, _ = prepared
    with pytest.raises(InputError, match=said):
        load_experiment(file, [*overrides(tmp_path / "run"), *changes])


def test_an_api_teacher_is_refused(prepared, tmp_path):
    file, _ = prepared
    teacher = "{model: m, engine: openai, url: http://localhost:1, tokenizer: t, api: completions, licence: mit}"
    changes = [("teacher", teacher), ("student", "{model: s}"), ("eval", "{}")]
    with pytest.raises(InputError, match=r"rounds\.every does not support teacher\.engine openai"):
        load_experiment(file, [*overrides(tmp_path / "run"), *changes])


def test_micro_rounds_are_one_stage(prepared, tmp_path, monkeypatch):
    file, _ = prepared
    experiment = load_experiment(file, overrides(tmp_path / "run"))
    assert [stage.name for stage in stages(experiment)] == [
        "generate", "curate", "prune", "train", "rounds", "eval", "report",
    ]  # fmt: skip
    assert experiment.directory("student") == tmp_path / "run/rounds/student"
    with pytest.raises(InputError, match="run `train` first"):
        rounds(experiment)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process on one device"):
        rounds(experiment)
