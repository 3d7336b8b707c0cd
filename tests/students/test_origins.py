"""Fresh students: the teacher's architecture with other sizes."""

import types

import pytest
import torch
import transformers

from llmdistill.config import Experiment
from llmdistill.config.student import Student
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.students.origins import freeze_unread, fresh, pair_layers
from tests.students.test_pruning import FAMILIES, SMALL


def config_of(family, **changes):
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    config.dtype = torch.bfloat16
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_other_sizes(family, tmp_path):
    changes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    student = fresh(config_of(family), {**changes, "intermediate_size": 20}, seed=0)
    assert {name: getattr(student.config, name) for name in changes} == changes
    layer = student.model.layers[1]
    assert layer.self_attn.q_proj.weight.shape == (16, 16)  # 2 heads of 8, the teacher's head_dim
    assert layer.self_attn.k_proj.weight.shape == (8, 16)
    assert layer.mlp.up_proj.weight.shape == (20, 16)
    assert student.dtype == torch.bfloat16
    assert student.get_input_embeddings().weight.shape == (64, 16)
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(again(ids).logits, student(ids).logits)


def test_weights_depend_on_the_seed_and_on_nothing_else():
    config = config_of("Llama")
    torch.manual_seed(1)
    first = fresh(config, {"num_hidden_layers": 2}, seed=7)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # the caller's random numbers are left alone
    second, other = fresh(config, {"num_hidden_layers": 2}, seed=7), fresh(config, {"num_hidden_layers": 2}, seed=8)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert first.state_dict()[name].float().std().item() == pytest.approx(config.initializer_range, rel=0.1)


def test_what_no_text_goes_through_is_frozen():
    """Exactly the weights without a gradient after a pass over text; of a model of text alone, none."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
    text = {**SMALL, "head_dim": 8, "tie_word_embeddings": True}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 16}, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    model(input_ids=torch.arange(5)[None]).logits.sum().backward()
    unread = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    freeze_unread(model)
    assert unread == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert any("vision_tower" in name for name in unread)
    plain = fresh(config_of("Llama"), {"num_hidden_layers": 1}, seed=0)
    freeze_unread(plain)
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_kinds_of_layers_follow_the_number_of_layers():
    """Gemma alternates sliding and full attention; the teacher's pattern goes on, or ends earlier."""
    config = config_of("Gemma2", layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"])
    assert fresh(config, {"num_hidden_layers": 3}, seed=0).config.layer_types == [*["sliding_attention"] * 2, "full_attention"]
    longer = fresh(config, {"num_hidden_layers": 6}, seed=0).config.layer_types
    assert longer == [*config.layer_types, "sliding_attention", "sliding_attention"]
    given = ["full_attention"] * 2
    assert fresh(config, {"num_hidden_layers": 2, "layer_types": given}, seed=0).config.layer_types == given


def test_the_whole_architecture_is_a_change_of_nothing():
    config = config_of("Llama")
    student = fresh(config, {}, seed=0)
    assert {**student.config.to_dict(), "architectures": None} == {**config.to_dict(), "architectures": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 16}, "no such key student.config.hiden_size: LlamaConfig has no such key; did you mean .*hidden_size"),
        ({"torch_dtype": "float32"}, "no such key student.config.torch_dtype"),
        ({"vocab_size": 32}, "student.config.vocab_size cannot be changed: the student has the teacher's tokenizer"),
        ({"eos_token_id": 3}, "student.config.eos_token_id cannot be changed"),
        ({"hidden_size": 25}, r"LlamaConfig cannot have hidden_size 25: .*size \(25\) is not a multiple"),
        ({"num_key_value_heads": 4}, "LlamaConfig cannot have num_key_value_heads 4: "),
        ({"hidden_size": "wide"}, "LlamaConfig cannot have hidden_size wide: "),
        ({"num_hidden_layers": -1}, "LlamaConfig cannot have num_hidden_layers -1: "),
        ({"num_hidden_layers": 0}, "LlamaConfig cannot have num_hidden_layers 0: "),
        ({"layer_types": ["full_attention"]}, "no such key student.config.layer_types"),
    ],
)
def test_keys_and_sizes_that_there_are_not(changes, message):
    with pytest.raises(InputError, match=message):
        fresh(config_of("Llama"), changes, seed=0)


def test_default_learning_rates():
    """Adapters take ten times the rate of all weights."""
    rates = [Student(**origin).default_learning_rate for origin in ({"model": "m"}, {"prune": {"layers": 2}}, {"config": {}})]
    assert rates == sorted(rates)
    for origin in ({"model": "m"}, {"prune": {"layers": 2}}):
        assert Student(**origin, lora={}).default_learning_rate == 10 * Student(**origin).default_learning_rate


@pytest.mark.parametrize(
    ("way", "width", "refused"), [("FSDP", 16, True), ("DEEPSPEED", 16, True), ("FSDP", 24, False), ("", 16, False)]
)
def test_a_projector_is_not_sharded(way, width, refused, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    experiment = Experiment(output="o", teacher={"model": "t"}, student={"config": {}})
    arguments = types.SimpleNamespace(hidden={"layers": None}, attention=None, fsdp=None, deepspeed=None)
    changes = {"hidden_size": width, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    student, teacher = (fresh(config_of("Llama"), given, seed=0) for given in (changes, {}))
    if refused:
        with pytest.raises(InputError, match="need a projector, which FSDP and DeepSpeed do not support"):
            pair_layers(experiment, arguments, student, teacher)
    else:
        pair_layers(experiment, arguments, student, teacher)
        assert arguments.hidden["layers"] == [(0, 1), (1, 3)]


def test_a_model_that_does_not_fit_is_refused_with_both_sizes(tiny, monkeypatch):
    monkeypatch.setattr("llmdistill.models.loading.free_memory", lambda device: 500_000)
    with pytest.raises(InputError, match=r"`student`: the weights of .* take 0.0 GB in float32, but only 0.0 GB are free"):
        load_model(str(tiny), key="the model `student`")
