"""The training arguments of an experiment."""

import pytest

from llmdistill.config import load_experiment
from llmdistill.config.machine import Precision
from llmdistill.config.shipped import page
from llmdistill.errors import InputError
from llmdistill.training.settings import arguments_of

FLOAT32 = Precision("float32", "as configured")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "gradient_checkpointing is true .* and so is fsdp_activation_checkpointing"),
        ([("student.lora.r", "4")], "student.lora with fsdp_activation_checkpointing: its checkpoints lack the adapter"),
        ([("train.args.gradient_checkpointing", "false")], None),
    ],
)
@pytest.mark.parametrize("by", ["accelerate", "train.args"])
def test_checkpointing_by_fsdp_where_it_does_not_work(experiment_file, tmp_path, monkeypatch, overrides, message, by):
    overrides = [("train.args.gradient_checkpointing", "true"), *overrides]
    if by == "accelerate":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    else:
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it, and it is to be as it was
        overrides += [("train.args.fsdp", "true"), ("train.args.fsdp_config", "{activation_checkpointing: true}")]
    experiment = load_experiment(experiment_file, overrides)
    if message is None:
        assert arguments_of(experiment, tmp_path, False, FLOAT32).gradient_checkpointing is False
        return
    with pytest.raises(InputError, match=message):
        arguments_of(experiment, tmp_path, False, FLOAT32)


def test_one_process_uses_one_gpu_and_says_so(experiment_file, tmp_path, monkeypatch, capsys):
    from llmdistill.training.arguments import DistillConfig

    monkeypatch.setattr(DistillConfig, "n_gpu", property(lambda arguments: getattr(arguments, "_n_gpu", None) or 4))
    assert arguments_of(load_experiment(experiment_file), tmp_path, False, FLOAT32).n_gpu == 1
    assert f"uses one of 4 GPUs; see {page('distributed')}" in capsys.readouterr().out


def test_report_to_reaches_the_trainer(experiment_file, tmp_path):
    from transformers.integrations import WandbCallback, get_reporting_integration_callbacks

    assert arguments_of(load_experiment(experiment_file), tmp_path, False, FLOAT32).report_to == []
    experiment = load_experiment(experiment_file, [("train.args.report_to", "[wandb]")])
    passed = arguments_of(experiment, tmp_path, False, FLOAT32).report_to
    assert get_reporting_integration_callbacks(passed) == [WandbCallback]
