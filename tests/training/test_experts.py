"""Students that are a mixture of experts: the loss of a family's own forward, the router's part of it included."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmdistill import DistillConfig, DistillTrainer, load_dataset
from llmdistill.data.collator import DistillCollator
from tests.factories import make_row, write_rows
from tests.training.steps import gradients_of_one_step

SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def model_of(family):
    config = CONFIG_MAPPING[family](**SMALL, **FAMILIES[family])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    generator = np.random.default_rng(0)
    made = [make_row(str(n), generator.integers(3, 500, 4), generator.integers(3, 500, 3 + 2 * n)) for n in range(4)]
    return load_dataset(write_rows(tmp_path_factory.mktemp("rows"), made, kind="none", vocab_size=512))


@pytest.fixture
def trainer_of(rows, smollm2, tmp_path):
    """A trainer on the text alone, for one step."""

    def trainer_of(model, **arguments):
        always = {"alpha": 0.0, "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
        made = DistillConfig(output_dir=str(tmp_path), logging_steps=1, **always, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        return DistillTrainer(model=model, args=made, train_dataset=rows, processing_class=tokenizer)

    return trainer_of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_familys_own_loss(family, rows, trainer_of):
    """Cross-entropy over the completion tokens and the router's loss with the configuration's coefficient."""
    model, own = model_of(family), model_of(family)
    trainer = trainer_of(
        model,
        per_device_train_batch_size=4,
        learning_rate=0.0,
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_grad_norm=0,
        train_sampling_strategy="sequential",
    )
    found = gradients_of_one_step(trainer)

    batch = DistillCollator(0)([rows[n] for n in range(4)])
    own.train()
    own.config.output_router_logits = True
    output = own(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert output.aux_loss > 0
    output.loss.backward()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(output.loss.item(), rel=1e-4)
    assert log["router"] == pytest.approx(output.aux_loss.item(), rel=1e-4)
    for name, parameter in own.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_routers_loss_without_a_gradient_is_refused(trainer_of):
    """Under reentrant checkpointing the router's logits are those of a pass without gradients."""
    trainer = trainer_of(model_of("mixtral"), gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match="has no gradient under reentrant gradient checkpointing"):
        trainer.train()


def test_a_dense_model_of_such_a_family_has_no_router(trainer_of):
    config = CONFIG_MAPPING["granitemoehybrid"](
        **SMALL,
        num_local_experts=0,
        shared_intermediate_size=48,
        mamba_n_heads=8,
        layer_types=["attention"] * 2,
        position_embedding_type="rope",
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    trainer = trainer_of(model)
    trainer.train()
    assert "router" not in trainer.state.log_history[0]
    assert np.isfinite(trainer.state.log_history[0]["loss"])
