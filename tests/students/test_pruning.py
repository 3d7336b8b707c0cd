import numpy as np
import pytest
import torch
import transformers

from llmdistill.config.student import Prune
from llmdistill.errors import InputError
from llmdistill.models.loading import load_model
from llmdistill.students.pruning import choose, evenly_spaced, measure, prune_model

ROWS = [{"input_ids": np.arange(5, 5 + n), "completion_start": 2} for n in (4, 9, 6)]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Granite", "SmolLM3", "Olmo", "Olmo2"]


def small_model(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL)
    name = "Gemma3" if family == "Gemma3Text" else family
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def test_evenly_spaced():
    assert evenly_spaced(12, 6) == [0, 2, 4, 7, 9, 11]
    assert evenly_spaced(4, 4) == [0, 1, 2, 3]
    assert evenly_spaced(4, 1) == [0]


@pytest.mark.parametrize("layers", [0, 5, [], [1, 0], [0, 0], [0, 4], [-1]])
def test_layers_that_are_not_there(layers, tiny):
    with pytest.raises(InputError, match=r"student.prune.layers"):
        choose(Prune(layers=layers), load_model(str(tiny)).config, None)


@pytest.mark.parametrize("key", ["intermediate_size", "key_value_heads", "hidden_size"])
def test_more_than_there_is(key, tiny):
    model = load_model(str(tiny))
    with pytest.raises(InputError, match=rf"student.prune.{key} is 999, but the teacher has"):
        choose(Prune(**{key: 999}), model.config, measure(model, ROWS))


def test_nothing_to_prune_is_refused():
    with pytest.raises(ValueError, match="give at least one of layers"):
        Prune()


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_that_do_nothing_are_found_and_their_loss_changes_nothing(family):
    """Two layers, a third of the neurons of every layer and one head group write nothing; the model without them is the same."""
    model = small_model(family)
    generator = np.random.default_rng(0)
    dead_neurons, dead_heads = {}, {}
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            # A post-norm would blow a zero up to a direction of its own, but zero stays zero.
            if number in (1, 2):
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            dead_neurons[number] = np.sort(generator.permutation(48)[:16])
            layer.mlp.up_proj.weight[dead_neurons[number]] = 0
            dead_heads[number] = int(generator.integers(3))
            rows = slice(8 * dead_heads[number], 8 * dead_heads[number] + 8)
            layer.self_attn.v_proj.weight[rows] = 0
            if layer.self_attn.v_proj.bias is not None:
                layer.self_attn.v_proj.bias[rows] = 0
    importance = measure(model, ROWS, batch_size=2)
    assert importance.layers[[1, 2]] == pytest.approx([0, 0], abs=1e-6)
    # Olmo2 has norms over all heads together, which see that a head is missing.
    prune = Prune(layers=2, by="block_influence", intermediate_size=32, key_value_heads=3 if family == "Olmo2" else 2)
    kept = choose(prune, model.config, importance)
    assert kept.layers == [0, 3]
    for place, number in enumerate(kept.layers):
        assert not set(kept.neurons[place]) & set(dead_neurons[number])
        assert len(kept.heads[place]) == 3 or dead_heads[number] not in kept.heads[place]
    student = prune_model(model, kept)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(student(ids).logits, model(ids).logits)
    decoded = student.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)  # the cache counts layers from 0 again
    assert decoded.tolist() == model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    config = student.config
    heads = len(kept.heads[0])
    assert (config.num_hidden_layers, config.intermediate_size, config.num_key_value_heads) == (2, 32, heads)
    assert (config.num_attention_heads, config.head_dim) == (2 * heads, 8)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_are_always_zero_go_first_and_the_rest_loads_again(family, tmp_path):
    model = small_model(family)
    dead = [3, 7, 11, 17, 20, 23]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, dead] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[dead] = 0
            layer.mlp.down_proj.weight[dead] = 0
    kept = choose(Prune(hidden_size=18), model.config, measure(model, ROWS))
    assert not set(kept.hidden) & set(dead)
    student = prune_model(model, kept)
    ids = torch.arange(20)[None]
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.hidden_size == 18
    assert again.get_input_embeddings().weight.shape == (64, 18)
    torch.testing.assert_close(again(ids).logits, student(ids).logits)


def test_a_size_that_the_architecture_does_not_allow(tiny):
    model = load_model(str(tiny))
    with pytest.raises(InputError, match=r"cannot have these sizes: .*size \(30\) is not a multiple"):
        prune_model(model, choose(Prune(hidden_size=30), model.config, measure(model, ROWS)))


def test_the_importance_is_a_mean_over_tokens_without_padding(tiny):
    """Batches of one and of three give the same numbers, and those of the neurons are the mean |input of down_proj|."""
    model = load_model(str(tiny))
    apart, together = measure(model, ROWS, batch_size=1), measure(model, ROWS, batch_size=3)
    for part in ("layers", "neurons", "heads", "hidden"):
        np.testing.assert_allclose(getattr(apart, part), getattr(together, part), rtol=1e-4, atol=1e-7)
    seen = []
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].abs()))
    with torch.inference_mode():
        for row in ROWS:
            model(torch.from_numpy(row["input_ids"])[None])
    np.testing.assert_allclose(apart.neurons[2], torch.cat(seen).mean(0), rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {}), ("gptj", {"rotary_dim": 4}), ("bloom", {"n_layer": 2, "n_head": 4}), ("falcon", {}),
        ("mpt", {}), ("mamba", {}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 24}), ("rwkv", {"attention_hidden_size": 24}), ("gpt_neox", {}),
    ],
)  # fmt: skip
def test_an_architecture_that_is_built_otherwise_is_refused(family, settings):
    sizes = {name: size for name, size in SMALL.items() if name not in ("head_dim", "num_key_value_heads", "intermediate_size")}
    config = transformers.AutoConfig.for_model(family, **{**sizes, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=f"{type(model).__name__} is not built like llama models"):
        measure(model, ROWS)
