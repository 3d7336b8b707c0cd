"""Every argument of TRL and transformers works, or is refused by name."""

import dataclasses

import pytest

from llmdistill import DistillConfig
from llmdistill.training.arguments import _ALLOWED
from llmdistill.training.settings import _REFUSED

OWN = {
    "loss", "alpha", "alpha_end", "temperature", "beta", "beta_end", "sequence_alpha", "position_weights", "reduction", "hidden",
    "attention", "max_length", "packing", "padding_free",
}  # fmt: skip
# Passed on to transformers and TRL, which do what they say.
_WORK = """
accelerator_config activation_offloading adam_beta1 adam_beta2 adam_epsilon auto_find_batch_size bf16 data_seed
dataloader_drop_last dataloader_multiprocessing_context dataloader_num_workers
dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm eval_delay
eval_on_start eval_steps eval_strategy fp16 fsdp fsdp_config full_determinism gradient_accumulation_steps
gradient_checkpointing gradient_checkpointing_kwargs greater_is_better include_num_input_tokens_seen learning_rate
liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica log_on_each_node logging_first_step
logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps
metric_for_best_model neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules parallelism_config
per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project remove_unused_columns report_to
restore_callback_states_from_checkpoint router_aux_loss_coef run_name save_on_each_node save_steps save_strategy
save_total_limit seed skip_memory_metrics tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
trackio_bucket_id trackio_space_id trackio_static_space_id use_cache use_cpu use_liger_kernel
warmup_steps weight_decay
"""
WORK = set(_WORK.split())
UPLOADS = {"push_to_hub"}  # and all that begin with hub_
OTHERWISE = {  # a value that is refused, where "another" would not do
    "assistant_only_loss": True, "average_tokens_across_devices": False, "completion_only_loss": False, "eval_packing": True,
    "label_smoothing_factor": 0.1, "loss_type": "dft", "packing_strategy": "wrapped", "pad_to_multiple_of": 8,
    "dataset_kwargs": {"add_special_tokens": False}, "dataset_num_proc": 2, "shuffle_dataset": True, "label_names": ["labels"],
    "include_for_metrics": ["loss"], "batch_eval_metrics": True, "eval_do_concat_batches": False, "eval_use_gather_object": True,
    "eval_accumulation_steps": 2, "bf16_full_eval": True, "fp16_full_eval": True, "dataloader_in_order": False,
    "train_sampling_strategy": "batch_rebalance",
}  # fmt: skip


def test_every_argument_is_known():
    """A field that a new version brings works or is refused: put it where it belongs."""
    fields = {field.name for field in dataclasses.fields(DistillConfig)}
    uploads = UPLOADS | {name for name in fields if name.startswith("hub_")}
    groups = [OWN, WORK, set(_ALLOWED), set(_REFUSED) - OWN, uploads]
    assert set().union(*groups) == fields
    assert sum(map(len, groups)) == len(fields), "one of them is in two groups"


@pytest.mark.parametrize("name", sorted(_ALLOWED))
def test_what_would_be_ignored_or_break_the_loss_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}=.* is not supported by DistillTrainer: "):
        DistillConfig(output_dir=str(tmp_path), report_to="none", **{name: OTHERWISE.get(name, "another")})


@pytest.mark.parametrize(
    ("name", "value"), [("dispatch_batches", True), ("even_batches", False), ("use_seedable_sampler", False)]
)
def test_batches_that_processes_would_share_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"accelerator_config.{name}={value} is not supported"):
        DistillConfig(output_dir=str(tmp_path), report_to="none", accelerator_config={name: value})


def test_the_defaults_and_what_is_derived_of_them_are_taken_again(tmp_path):
    made = DistillConfig(output_dir=str(tmp_path), report_to="none")
    dataclasses.replace(made, output_dir=str(tmp_path / "other"))
