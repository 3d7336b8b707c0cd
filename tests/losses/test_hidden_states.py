"""Losses between layers: the formulas in float64, the pairs of layers, and training with them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmdistill import load_dataset
from llmdistill.config.student import Prune
from llmdistill.losses.hidden_states import (
    LOSSES,
    Attention,
    Hidden,
    LayerMatch,
    attention_kl,
    cosine,
    evenly,
    mse,
    of_pruned,
    resolve,
)
from llmdistill.models.loading import load_model
from llmdistill.students.pruning import choose, prune_model
from tests.training.steps import gradients_of_one_step
from tests.training.test_trainer import make_trainer

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def maps(seed, shape, sharpness=3.0):
    """Attention maps of which the last third of the positions is masked."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=shape) * sharpness
    scores[..., -(shape[-1] // 3) :] = -np.inf
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 40), scale=st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_hidden_states_against_float64(seed, size, scale):
    generator = np.random.default_rng(seed)
    mine, theirs = generator.normal(size=(5, size)) * scale, generator.normal(size=(5, size)) * scale
    lengths = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
    want = {"cosine": 1 - (mine * theirs).sum(1) / lengths, "mse": ((mine - theirs) ** 2).sum(1) / size}
    for name, loss in LOSSES.items():
        for dtype, tolerance in TOLERANCE.items():
            a, b = (torch.from_numpy(values).to(dtype) for values in (mine, theirs))
            got = loss(a, b)
            assert got.dtype == torch.float32
            unit = 1 if name == "cosine" else want["mse"].max()
            np.testing.assert_allclose(got.numpy(), want[name], rtol=0, atol=(tolerance * 4 + 1e-6) * unit)


@given(seed=st.integers(0, 10**6), sharpness=st.sampled_from([0.1, 3.0, 60.0]), heads=st.sampled_from([(4, 4), (6, 4)]))
@settings(max_examples=50, deadline=None)
def test_attention_maps_against_float64(seed, sharpness, heads):
    p, q = (maps(seed + n, (5, count, 12), sharpness) for n, count in enumerate(heads))
    a, b = (p, q) if heads[0] == heads[1] else (p.mean(1, keepdims=True), q.mean(1, keepdims=True))
    a, b = np.maximum(a, 1e-300), np.maximum(b, 2.0**-126)
    want = np.where(a > 1e-300, a * np.log(a / b), 0).sum(2).mean(1)
    got = attention_kl(torch.from_numpy(q).float(), torch.from_numpy(p).float())
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-5)
    rough = attention_kl(torch.from_numpy(q).bfloat16(), torch.from_numpy(p).bfloat16())
    assert torch.isfinite(rough).all()
    assert (rough >= -1e-6).all()
    assert attention_kl(torch.from_numpy(p).bfloat16(), torch.from_numpy(p).bfloat16()).abs().max() < 1e-6


@pytest.mark.parametrize("loss", [cosine, mse, lambda a, b: attention_kl(a.softmax(1)[:, None], b.softmax(1)[:, None])])
def test_gradients_are_those_of_float64(loss):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: loss(values, b), a)


def test_pairs_of_layers():
    assert evenly(3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert evenly(4, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert evenly(2, 30) == [(0, 14), (1, 29)]
    assert evenly(4, 2)[-1] == (3, 1)
    # Layer 1 of the teacher went, so layer 0 of the student gives what layer 2 used to get, the output of layer 1.
    assert of_pruned([0, 2, 3], 6) == [(0, 1), (1, 2), (2, 5)]
    assert of_pruned([0, 1, 2], 3) == [(0, 0), (1, 1), (2, 2)]
    assert resolve([(0, 5)], 2, 6) == [(0, 5)]
    for wrong in ([(2, 0)], [(0, 6)], [(-1, 0)], []):
        with pytest.raises(ValueError, match="layers: "):
            resolve(wrong, 2, 6)


def test_a_student_without_layers_that_did_nothing_has_nothing_to_learn(tiny):
    """Its default pairs are right: where only layers without effect went, every compared state and map is equal."""
    teacher = load_model(str(tiny))
    with torch.no_grad():
        for number in (1, 2):
            teacher.model.layers[number].self_attn.o_proj.weight.zero_()
            teacher.model.layers[number].mlp.down_proj.weight.zero_()
    kept = [0, 3]
    student = prune_model(teacher, choose(Prune(layers=kept), teacher.config, None))
    ids = torch.arange(5, 25).view(2, 10)
    batch = {"positions": torch.tensor([2, 3, 12, 19]), "token_weights": torch.ones(4)}
    found = {}
    for name, states, maps in (("right", of_pruned(kept, 4), list(enumerate(kept))), ("wrong", [(0, 3)], [(0, 3)])):
        match = LayerMatch(student, teacher, Hidden(loss="mse", layers=states), Attention(layers=maps))
        with torch.no_grad(), match.watch(teacher, "teacher") as theirs, match.watch(student, "student") as ours:
            teacher(ids)
            student(ids)
            found[name] = match.loss(ours, theirs, batch)[1]
    assert found["right"]["hidden"] == pytest.approx(0, abs=1e-8)
    assert found["right"]["attention"] == pytest.approx(0, abs=1e-6)
    assert min(found["wrong"].values()) > 0.1


def narrow():
    """A student of another width, depth and number of heads than the tiny teacher."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


WITH = {"alpha": 0.5, "hidden": {"weight": 0.5, "loss": "mse"}, "attention": {"weight": 2.0, "layers": [[0, 1], [1, 3]]}}


def trainer_of(tiny, text_rows, output, **arguments):
    return make_trainer(tiny, text_rows, output, narrow(), load_model(str(tiny)), **{**WITH, **arguments})


def test_one_batch_of_eight_equals_eight_accumulated_batches_of_one(tiny, text_rows, tmp_path):
    whole = trainer_of(tiny, text_rows, tmp_path, per_device_train_batch_size=8)
    parts = trainer_of(tiny, text_rows, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    want, got = gradients_of_one_step(whole), gradients_of_one_step(parts)
    assert want["hidden_projector.weight"].norm() > 0
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    logs = [trainer.state.log_history[0] for trainer in (whole, parts)]
    for key in ("loss", "ce", "kl", "hidden", "attention"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-4)


def test_what_is_logged_is_the_formula(tiny, text_rows, tmp_path):
    """Row by row in float64, without padding, by the models' own hidden states and attention maps."""
    trainer = trainer_of(tiny, text_rows, tmp_path, per_device_train_batch_size=8)
    projector = trainer.match.projector.weight.detach().double().numpy().T.copy()
    student, teacher = narrow().double(), load_model(str(tiny)).double()
    student.set_attn_implementation("eager")
    teacher.set_attn_implementation("eager")
    hidden = attention = tokens = 0.0
    for row in load_dataset(text_rows):
        ids, start = torch.tensor(row["input_ids"])[None].long(), int(row["completion_start"])
        here = slice(start - 1, ids.shape[1] - 1)
        ours, theirs = (model(ids, output_hidden_states=True, output_attentions=True) for model in (student, teacher))
        # hidden_states[0] are the embeddings, [1] is what layer 0 gives; the last is normalised, so layer 1 is left out of it
        mine, aim = (states.detach()[0, here].numpy() for states in (ours.hidden_states[1], theirs.hidden_states[2]))
        hidden += ((mine @ projector - aim) ** 2).mean(1).sum()
        for pair in ((0, 1), (1, 3)):
            q, p = (
                maps.attentions[layer].detach()[0, :, here].mean(0).numpy()
                for maps, layer in zip((ours, theirs), pair, strict=True)
            )
            attention += np.where(p > 0, p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300)), 0).sum() / 2
        tokens += ids.shape[1] - start
    trainer.match.pairs["hidden"] = [(0, 1)]
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["hidden"] == pytest.approx(hidden / tokens, rel=1e-4)
    assert log["attention"] == pytest.approx(attention / tokens, rel=1e-3)
    want = 0.5 * log["ce"] + 0.5 * log["kl"] + 0.5 * log["hidden"] + 2 * log["attention"]
    assert log["loss"] == pytest.approx(want, rel=1e-3)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(tiny, text_rows, tmp_path):
    runs = []
    for on in (False, True):
        trainer = trainer_of(tiny, text_rows, tmp_path, per_device_train_batch_size=8, gradient_checkpointing=on)
        runs.append(gradients_of_one_step(trainer))
    for name, gradient in runs[0].items():
        torch.testing.assert_close(runs[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_rows_one_behind_the_other_have_the_same_values(tiny, text_rows, tmp_path):
    """Without padding, eager attention keeps them apart by their positions; teacher and student alike."""
    padded, lined_up = (
        trainer_of(tiny, text_rows, tmp_path, per_device_train_batch_size=8, padding_free=free) for free in (False, True)
    )
    want, got = gradients_of_one_step(padded), gradients_of_one_step(lined_up)
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 1e-3 * gradient.norm(), name
    logs = [trainer.state.log_history[0] for trainer in (padded, lined_up)]
    for key in ("loss", "hidden", "attention"):
        assert logs[1][key] == pytest.approx(logs[0][key], rel=1e-4)


def test_reentrant_checkpointing_would_lose_the_gradient_and_is_refused(tiny, text_rows, tmp_path):
    again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RuntimeError, match="no gradient reaches the student's layers"):
        trainer_of(tiny, text_rows, tmp_path, **again).train()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_projector_learns_resumes_and_is_not_saved_with_the_student(tiny, text_rows, tmp_path, lora):
    from peft import LoraConfig, get_peft_model
    from safetensors import safe_open

    def make(output):
        torch.manual_seed(5)
        model = get_peft_model(narrow(), LoraConfig(r=2, target_modules="all-linear")) if lora else narrow()
        arguments = {**WITH, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
        return make_trainer(tiny, text_rows, output, model, load_model(str(tiny)), **arguments)

    whole = make(tmp_path / "whole")
    before = whole.match.projector.weight.detach().clone()
    whole.train()
    assert not torch.equal(whole.match.projector.weight, before)
    again = make(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch.testing.assert_close(again.match.projector.weight, whole.match.projector.weight)

    whole.save_model(str(tmp_path / "student"))
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert not any("projector" in name for name in names)
    (weights,) = (tmp_path / "student").glob("*model.safetensors")
    with safe_open(weights, "pt") as file:
        assert not any("projector" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": {"loss": "l1"}}, "loss is 'l1', must be one of cosine, mse"),
        ({"hidden": {"weight": 0}}, "weight must be above 0"),
        ({"attention": {"weight": -1}}, "weight must be above 0"),
        ({"hidden": {"layers": [[0, 9]]}}, r"no pair \[0, 9\]: the student has layers 0 to 1"),
    ],
)
def test_what_cannot_be_compared(tiny, text_rows, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tiny, text_rows, tmp_path, **arguments)


def test_there_must_be_a_teacher(tiny, text_rows, tmp_path):
    with pytest.raises(ValueError, match="hidden and attention need a teacher"):
        make_trainer(tiny, text_rows, tmp_path, narrow(), alpha=0.0, hidden={})


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_a_family_whose_attention_is_not_found_is_refused_before_the_first_step(family):
    config = CONFIG_MAPPING[family](vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"the layers of (Bloom|Falcon)ForCausalLM have no self_attn, attn or attention"):
        LayerMatch(model, model, None, Attention())
    LayerMatch(model, model, Hidden(), None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_layers_are_found_in_every_family(family):
    """What is watched is what the model itself returns as hidden states and attention maps."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 32}
    more = {"gpt2": {}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}.get(family, {"intermediate_size": 48})
    config = CONFIG_MAPPING[family](**sizes, **more, attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    match = LayerMatch(model, model, Hidden(layers=[[0, 0], [1, 1]]), Attention(layers=[[1, 1]]))
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), match.watch(model, "teacher") as seen:
        output = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    for layer in (0, 1):
        torch.testing.assert_close(seen["hidden", layer], output.hidden_states[layer + 1])
    torch.testing.assert_close(seen["attention", 1], output.attentions[1])
