"""`train` on what its configuration says: validation, early stopping, packing, schedules, the sequence-level KL."""

import json
import shutil

import numpy as np
import pytest

from llmdistill.config import load_experiment
from llmdistill.data.dataset import load_dataset
from llmdistill.errors import InputError
from llmdistill.stages.curate import curate
from llmdistill.stages.generate import generate
from llmdistill.stages.train import _settings, train
from llmdistill.training.arguments import DistillConfig
from llmdistill.workflow.stage import run_stage
from tests.integration.processes import rewind

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]


@pytest.fixture
def trained(experiment_file, tmp_path):
    """Train with overrides on the data of the small experiment; the log and the results."""
    made = load_experiment(experiment_file)
    generate(made)
    curate(made)

    def run(**overrides):
        experiment = load_experiment(experiment_file, [(f"train.{key}", json.dumps(value)) for key, value in overrides.items()])
        run_stage(experiment, "train")
        directory = tmp_path / "run/student"
        history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
        return history, json.loads((directory / "run.json").read_text())["results"], (directory / "README.md").read_text()

    return run


def test_validation_rows_are_measured_and_not_trained_on(trained, tmp_path):
    arguments = {"eval_steps": 2, "max_steps": 4, "num_train_epochs": 1, "per_device_train_batch_size": 1}
    history, results, card = trained(validation=0.3, **{f"args.{key}": value for key, value in arguments.items()})
    measured = [entry for entry in history if "eval_kl" in entry]
    assert [entry["step"] for entry in measured] == [2, 4]
    assert results["eval_kl"] == measured[-1]["eval_kl"]
    assert 0 <= results["eval_agreement"] <= 1
    assert "on validation rows" in card


def test_training_stops_where_validation_stops_falling(trained):
    """A learning rate of zero never gets better, so it ends after the first evaluation and `patience` more."""
    _, results, _ = trained(
        validation=0.3, early_stopping={"patience": 2},
        **{"args.eval_steps": 1, "args.save_steps": 1, "args.max_steps": 20, "args.learning_rate": 0.0},
    )  # fmt: skip
    assert results["steps"] == 3


def test_the_patience_counts_on_after_a_stop(trained, tmp_path):
    """Stopped after the first of two evaluations without improvement, it ends after the second, as if it had not stopped."""
    settings = {
        "validation": 0.3, "early_stopping": {"patience": 2}, "args.eval_steps": 1, "args.save_steps": 1,
        "args.max_steps": 20, "args.learning_rate": 0.0, "args.save_total_limit": 9,
    }  # fmt: skip
    trained(**settings)
    rewind(tmp_path / "run/student", 2)
    _, results, _ = trained(**settings)
    assert results["steps"] == 3


def test_the_best_checkpoint_is_the_one_that_is_kept(trained, tmp_path):
    """A learning rate that ruins the student: of all evaluations, the saved weights have the lowest KL."""
    arguments = {"eval_steps": 1, "save_steps": 1, "max_steps": 4, "learning_rate": 3.0, "warmup_steps": 1}
    arguments["lr_scheduler_type"] = "constant_with_warmup"  # a first step of nothing, then ruin
    arguments = {f"args.{name}": value for name, value in arguments.items()}
    history, results, card = trained(validation=0.3, early_stopping={"patience": 9}, **arguments)
    kls = [entry["eval_kl"] for entry in history if "eval_kl" in entry]
    assert kls[-1] > min(kls)
    state = json.loads((tmp_path / "run/student/trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(min(kls))
    best = 1 + int(np.argmin(kls))
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}")
    assert results["best_step"] == best < results["steps"]
    assert results["eval_kl"] == min(kls)
    (ce,) = [entry["ce"] for entry in history if entry["step"] == best and "ce" in entry]
    assert results["ce"] == ce
    assert f"{results['steps']}, with the weights of step {best}" in card


def test_what_is_watched_is_what_the_dataset_can_tell(experiment_file, tmp_path):
    """With `train.dataset`, `targets` may be of another kind: top-k targets tell the KL at any temperature."""
    made = load_experiment(experiment_file, [("targets.kind", "topk")])
    generate(made)
    curate(made)
    settings = {
        "dataset": str(made.directory("curated")),
        "temperature": 2.0,
        "validation": 0.3,
        "early_stopping": {"patience": 2},
    }
    settings["args"] = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "bf16": False}
    changes = [("targets", "{kind: sampled}"), *((f"train.{key}", json.dumps(value)) for key, value in settings.items())]
    train(load_experiment(experiment_file, changes))
    state = json.loads((tmp_path / "run/student/trainer_state.json").read_text())
    assert state["best_metric"] == min(entry["eval_kl"] for entry in state["log_history"] if "eval_kl" in entry)


@pytest.mark.parametrize("early", [False, True])
def test_a_training_that_had_ended_is_only_saved(trained, tmp_path, early):
    """Stopped behind its last step, inside an epoch: the weights, the steps and the counts are those of the whole run."""
    settings = {"args.save_steps": 1, "args.max_steps": 5, "args.learning_rate": 0.01, "args.lr_scheduler_type": "constant"}
    if early:
        settings |= {"validation": 0.3, "early_stopping": {"patience": 2}, "args.learning_rate": 0.0, "args.max_steps": 20}
        settings |= {"args.eval_steps": 1, "args.save_total_limit": 9}
    _, whole, _ = trained(**settings)
    student = tmp_path / "run/student"
    weights = (student / "model.safetensors").read_bytes()
    shutil.copytree(student / "checkpoints/checkpoint-1", tmp_path / "best")
    rewind(student, whole["steps"])
    shutil.copytree(tmp_path / "best", student / "checkpoints/checkpoint-1")  # the best one is never removed
    _, again, _ = trained(**settings)
    assert again == whole
    assert (student / "model.safetensors").read_bytes() == weights


def test_a_checkpoint_goes_on_with_as_many_rows_a_step(trained, tmp_path, monkeypatch):
    """Another number of processes would cut the order of the rows elsewhere."""
    settings = {"args.save_steps": 2, "args.max_steps": 4}
    trained(**settings)
    rewind(tmp_path / "run/student", 2)
    monkeypatch.setattr(DistillConfig, "world_size", 2)
    with pytest.raises(InputError, match=r"checkpoint-2 was trained with 2 rows per step, here it would be 4"):
        trained(**settings)


def test_a_checkpoint_need_not_know_every_callback(trained, tmp_path):
    """One from before a callback was added is gone on from, and the next checkpoints have the callback's state."""
    settings = {"args.save_steps": 2, "args.max_steps": 4}
    _, whole, _ = trained(**settings)
    rewind(tmp_path / "run/student", 2)
    file = tmp_path / "run/student/checkpoints/checkpoint-2/trainer_state.json"
    state = json.loads(file.read_text())
    rows = state["stateful_callbacks"].pop("RowsAStep")
    file.write_text(json.dumps(state))
    _, again, _ = trained(**settings)
    assert again == whole
    state = json.loads((tmp_path / "run/student/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["RowsAStep"] == rows


def test_what_was_counted_before_a_stop_is_counted(trained, tmp_path):
    """A checkpoint between two logs: the later log says what came after it, and all tokens are in the sum."""
    settings = {"args.save_steps": 2, "args.max_steps": 6, "args.logging_steps": 4}
    whole, results, _ = trained(**settings)
    rewind(tmp_path / "run/student", 2)
    again, counted, _ = trained(**settings)
    assert counted == results
    assert [entry["ce"] for entry in again if "ce" in entry] == [entry["ce"] for entry in whole if "ce" in entry]


def test_validation_goes_with_the_checkpoints_of_epochs(trained):
    arguments = {"save_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1}
    history, _, _ = trained(
        validation=0.3, early_stopping={"patience": 3}, **{f"args.{name}": value for name, value in arguments.items()}
    )
    assert [entry["epoch"] for entry in history if "eval_kl" in entry] == [1, 2]


def test_everything_at_once_from_yaml(trained):
    history, _, card = trained(
        alpha=0.2, alpha_end=0.6, sequence_alpha=0.3, position_weights="entropy", reduction="sequence", loss="jsd", beta=0.5,
        beta_end=0.1, **{"args.packing": True, "args.max_length": 64},
    )  # fmt: skip
    logged = [entry for entry in history if "ce" in entry]
    assert [entry["alpha"] for entry in logged] == pytest.approx([0.2, 0.4, 0.6])
    assert [entry["beta"] for entry in logged] == pytest.approx([0.5, 0.3, 0.1])
    assert all(np.isfinite([entry[name] for name in ("loss", "jsd", "kl", "sequence_kl")]).all() for entry in logged)
    assert (
        "0.5 to 0.1 × cross-entropy on the teacher's text + 0.2 to 0.6 × jsd (beta 0.5 to 0.1) + 0.3 × sequence-level KL, "
        "tokens weighted by the teacher's entropy, equal weight for every sequence" in card
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"alpha": 0.8, "sequence_alpha": 0.3}, "train: alpha 0.8 and sequence_alpha 0.3 must add up to at most 1"),
        ({"alpha_end": 0.8, "sequence_alpha": 0.3, "alpha": 0.1}, "alpha_end 0.8 and sequence_alpha 0.3"),
        ({"early_stopping": {"patience": 2}}, "early_stopping needs validation"),
        (
            {"early_stopping": {"patience": 2}, "validation": 0.1, "compare_text_only": True},
            "which early_stopping does not fix",
        ),
        ({"args.eval_strategy": "steps"}, "train.args.eval_strategy needs train.validation"),
        ({"validation": 0.001}, "both need at least one"),
        ({"args.packing": True}, "packing needs max_length"),
        ({"args.beta_end": 0.2}, "train.args.beta_end is set by the key train.beta_end"),
        ({"args.eval_on_start": True}, "train.args.eval_on_start needs train.validation"),
        ({"args.save_only_model": True}, "train.args.save_only_model would make it impossible to continue"),
        ({"args.ignore_data_skip": True}, "train.args.ignore_data_skip would train on the same rows again"),
        ({"args.model_init_kwargs": {}}, "train.args.model_init_kwargs is ignored"),
        ({"args.eos_token": "<x>"}, "train.args: eos_token='<x>' is not supported"),
        ({"args.eval_strategy": "no", "validation": 0.3}, "the rows of train.validation would be held out without being used"),
        ({"args.max_length": 0}, "train.args: max_length is 0: it should be greater than or equal to 1"),
        ({"args.fp16": True}, "fp16 training needs CUDA"),
        ({"args.fp16": True, "args.bf16": True}, "bf16 and fp16 are both true"),
        ({"args.lr_scheduler_type": "cosine_with_min_lr"}, "the optimiser or its schedule rejects this: .*min_lr"),
        ({"args.lr_scheduler_kwargs": {"foo": 1}}, "the optimiser or its schedule rejects this: .*foo"),
        ({"args.adam_beta2": 2.0}, "the optimiser or its schedule rejects this: .*beta"),
        ({"args.report_to": "foo"}, "train.args: foo is not supported"),
        ({"args.dataloader_drop_last": True, "args.per_device_train_batch_size": 64}, "are fewer than the 64 of a batch"),
        (
            {
                "early_stopping": {"patience": 2},
                "validation": 0.3,
                "args.restore_callback_states_from_checkpoint": False,
            },
            "restore_callback_states_from_checkpoint is false: train.early_stopping would restart",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(trained, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        trained(**overrides)
    assert not list((tmp_path / "run").glob("student/*"))


def test_the_sequence_level_kl_needs_text_that_could_have_been_any(experiment_file, tmp_path):
    made = load_experiment(experiment_file, [("generate.top_p", "0.9"), ("train.sequence_alpha", "0.1")])
    generate(made)
    curate(made)
    assert "sampling_logprob" not in load_dataset(tmp_path / "run/curated").column_names
    with pytest.raises(InputError, match="whose sampling probability is known"):
        train(made)
    assert not (tmp_path / "run/student").exists()


def test_an_adapter_that_could_not_be_merged_is_refused(experiment_file, tmp_path):
    made = load_experiment(experiment_file, [("student.lora.target_modules", '["q_proj", "lm_head"]')])
    generate(made)
    curate(made)
    with pytest.raises(InputError, match=r"student.lora: adapters on .*lm_head.*cannot be merged"):
        train(made)
    assert not (tmp_path / "run/student").exists()


def test_a_student_of_an_online_teacher_depends_on_what_that_computes_in(experiment_file):
    def settings(**changes):
        return _settings(load_experiment(experiment_file, list({"targets.kind": "online", **changes}.items())))

    assert settings() != settings(**{"teacher.dtype": "bfloat16"})
    stored = load_experiment(experiment_file), load_experiment(experiment_file, [("teacher.dtype", "bfloat16")])
    assert _settings(stored[0]) == _settings(stored[1])
