"""The configurations for `accelerate launch`: read by accelerate itself, with every key known, and what they set."""

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from llmdistill.training.trainer import add_up_in_float32
from tests.conftest import ROOT

PATHS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


def launched(path, *flags):
    """The arguments and the environment that accelerate makes of a configuration before it starts anything."""
    command = ["--config_file", str(path), "--main_process_port", "0", *flags, "-m", "llmdistill", "train", "C.yaml"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # as `launch_command` sets it
        return arguments, prepare_deepspeed_cmd_env(arguments)[1]
    return arguments, prepare_multi_gpu_env(arguments)


@pytest.fixture
def as_environment(monkeypatch):
    def set_all(environment):
        for name, value in environment.items():
            if name.startswith(("FSDP_", "ACCELERATE_")):
                monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes) == (1, 8)
    flags = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert (yaml.safe_load(path.read_text()).get(section) or {}).keys() <= flags
    command = f"accelerate launch --config_file configs/accelerate/{path.name} -m llmdistill train C.yaml"
    assert command in path.read_text()
    assert f"configs/accelerate/{path.name}" in (ROOT / "docs/distributed.md").read_text()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_one_machine_and_several(path):
    arguments, environment = launched(path)
    assert (arguments.nproc_per_node, arguments.module, arguments.gpu_ids) == ("8", True, "all")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no", "what train.args.bf16 says is not overruled"
    machines = ["--num_machines=2", "--num_processes=16", "--machine_rank=1", "--main_process_ip=10.0.0.1"]
    arguments, _ = launched(path, *machines, "--main_process_port=29400")
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert arguments.rdzv_endpoint == "10.0.0.1:29400"


def test_fsdp2(as_environment):
    _, environment = launched(ROOT / "configs/accelerate/fsdp2.yaml")
    as_environment(environment)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert plugin.cpu_ram_efficient_loading
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage):
    _, environment = launched(ROOT / f"configs/accelerate/deepspeed_zero{stage}.yaml")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    assert (environment.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL") == "true") == (stage == 3)


def test_ddp_is_neither():
    arguments, environment = launched(ROOT / "configs/accelerate/ddp.yaml")
    assert arguments.multi_gpu
    assert "ACCELERATE_USE_FSDP" not in environment
    assert "ACCELERATE_USE_DEEPSPEED" not in environment


def test_fsdp2_adds_up_gradients_in_float32():
    """Accelerate would add them up in bfloat16; what the weights and the products are in stays."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    before = plugin.mixed_precision_policy
    add_up_in_float32(plugin)
    assert (before.reduce_dtype, plugin.mixed_precision_policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert plugin.mixed_precision_policy.param_dtype == before.param_dtype == torch.bfloat16
    assert plugin.mixed_precision_policy.output_dtype == before.output_dtype
    none = FullyShardedDataParallelPlugin(fsdp_version=2)
    add_up_in_float32(none)
    assert none.mixed_precision_policy is None
