"""The refit of a pruned student, against a float64 solution of its own and what it must never do."""

import copy
import gc
import sys

import numpy as np
import pytest
import torch
import transformers

from llmdistill.config.student import Prune
from llmdistill.errors import InputError
from llmdistill.losses.hidden_states import of_pruned
from llmdistill.students.pruning import choose, measure, prune_model
from llmdistill.students.refit import refit, residual_paths, ridge_solution
from tests.students.test_pruning import SMALL

_GENERATOR = np.random.default_rng(0)
ROWS = [{"input_ids": _GENERATOR.integers(0, 64, n), "completion_start": 2} for n in (24, 9, 31, 17, 12)]
LINEAR = ["Llama", "Qwen2", "Qwen3", "Mistral", "Olmo", "Granite", "SmolLM3"]
WITH_A_NORM_BEHIND = ["Gemma2", "Gemma3Text", "Olmo2"]


def random_model(family="Llama", **changes):
    """With weights large enough that layers do something, and that no scale or bias of an architecture is trivial."""
    torch.manual_seed(0)
    sizes = SMALL if family != "Olmo" else {name: value for name, value in SMALL.items() if name != "head_dim"}
    sizes = {**sizes, "initializer_range": 0.3, **changes}
    if family == "Granite":
        sizes |= {"residual_multiplier": 0.22, "embedding_multiplier": 3.0}
    if family == "SmolLM3":
        sizes |= {"no_rope_layers": [1, 0, 1, 0]}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{'Gemma3' if family == 'Gemma3Text' else family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            if name.endswith("post_feedforward_layernorm.weight"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def cut_of(teacher, **prune):
    """A student by this configuration, and what of the teacher it holds."""
    prune = Prune(**prune)
    kept = choose(prune, teacher.config, measure(teacher, ROWS))
    return prune_model(teacher, kept), kept


def logits(model, rows=ROWS):
    with torch.no_grad():
        return torch.cat([model(torch.from_numpy(row["input_ids"])[None]).logits[0] for row in rows])


def divergence(teacher, student):
    p, q = (logits(model).double().log_softmax(-1) for model in (teacher, student))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def seen(model, layer, rows=ROWS):
    """Row by row, without padding: the inputs of the layer's `o_proj` and `down_proj` and its output, in float64."""
    heads, inputs, outputs = [], [], []
    module = model.model.layers[layer]
    handles = [
        module.self_attn.o_proj.register_forward_pre_hook(lambda module, args: heads.append(args[0][0])),
        module.mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0])),
        module.register_forward_hook(lambda module, args, output: outputs.append(output[0])),
    ]
    logits(model, rows)
    for handle in handles:
        handle.remove()
    return tuple(torch.cat(found).double().numpy() for found in (heads, inputs, outputs))


def relative(rest, target):
    """The mean over positions of the squared error over the squared norm."""
    return np.mean(np.sum(rest**2, -1) / np.sum(target**2, -1))


def ridge_regression(blocks, rest, target, ridge):
    """ΔWᵀ for each block of inputs, every position divided by the norm of its target; by stacking √ridge rows, not by AᵀA."""
    norm = np.linalg.norm(target, axis=-1, keepdims=True)
    norm[norm == 0] = np.inf
    a = np.concatenate(blocks, -1) / norm
    penalty = np.concatenate([np.full(block.shape[1], ridge * np.sum((block / norm) ** 2) / block.shape[1]) for block in blocks])
    stacked = np.concatenate([a, np.diag(np.sqrt(penalty))])
    solved = np.linalg.lstsq(stacked, np.concatenate([rest / norm, np.zeros((len(penalty), rest.shape[1]))]), rcond=None)[0]
    return np.split(solved, np.cumsum([block.shape[1] for block in blocks])[:-1])


@pytest.mark.parametrize("family", LINEAR + WITH_A_NORM_BEHIND)
def test_an_uncut_model_stays_as_it_is(family):
    teacher = random_model(family)
    student, kept = cut_of(teacher, layers=4)
    assert refit(student, teacher, kept, ROWS, 1.0) == [(0, 0)] * 4
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize(
    "prune",
    [
        {"layers": [0, 2]},
        {"layers": [1, 3], "intermediate_size": 20},
        {"key_value_heads": 2},
        {"layers": [0, 1, 3], "hidden_size": 18},
    ],
    ids=["layers", "neurons", "heads", "channels"],
)
def test_every_layer_has_the_weights_of_an_independent_ridge_regression(family, prune):
    """Solved again in numpy and float64 from the finished student, whose layers before the one in question are refitted."""
    teacher = random_model(family)
    student, kept = cut_of(teacher, **prune)
    before = copy.deepcopy(student)
    ridge = 0.3
    errors = refit(student, teacher, kept, ROWS, ridge, batch_size=2)
    scale = 0.22 if family == "Granite" else 1
    assert [path.scale for path in residual_paths(teacher, ROWS)] == pytest.approx([scale] * 4, rel=1e-5)
    assert [path.attention for path in residual_paths(teacher, ROWS)] == pytest.approx([scale] * 4, rel=1e-5)
    assert not any(path.norm for path in residual_paths(teacher, ROWS))
    for (layer, source), (old_error, new_error) in zip(of_pruned(kept.layers, 4), errors, strict=True):
        target = seen(teacher, source)[2][:, kept.hidden]
        new, old = student.model.layers[layer], before.model.layers[layer]
        o_delta, down_delta = (
            (part(new).weight - part(old).weight).detach().double().numpy()
            for part in (lambda one: one.self_attn.o_proj, lambda one: one.mlp.down_proj)
        )
        was = copy.deepcopy(student)  # with the layer as it was
        was.model.layers[layer].load_state_dict(old.state_dict())
        heads, a, out = seen(was, layer)
        assert old_error == pytest.approx(relative(target - out, target), rel=1e-3)
        want, _ = ridge_regression([scale * heads, scale * a], target - out, target, ridge)
        np.testing.assert_allclose(o_delta.T, want, rtol=0, atol=1e-4 * np.abs(want).max())
        was.model.layers[layer].self_attn.load_state_dict(new.self_attn.state_dict())
        _, a, out = seen(was, layer)
        (want,) = ridge_regression([scale * a], target - out, target, ridge)
        np.testing.assert_allclose(down_delta.T, want, rtol=0, atol=1e-4 * np.abs(want).max())
        assert new_error == pytest.approx(relative(target - seen(student, layer)[2], target), rel=1e-3)
        assert new_error <= old_error
        if new.mlp.down_proj.bias is not None:
            assert torch.equal(new.mlp.down_proj.bias, old.mlp.down_proj.bias)
    changed = {name for name, weight in student.state_dict().items() if not torch.equal(weight, before.state_dict()[name])}
    solved = ("mlp.down_proj", "self_attn.o_proj")
    assert changed == {f"model.layers.{layer}.{part}.weight" for layer in range(len(kept.layers)) for part in solved}
    assert divergence(teacher, student) < divergence(teacher, before)


def test_a_bias_is_left_alone():
    teacher = random_model(mlp_bias=True)
    student, kept = cut_of(teacher, layers=[0, 3])
    before = copy.deepcopy(student)
    refit(student, teacher, kept, ROWS, 1.0)
    assert divergence(teacher, student) < divergence(teacher, before)
    for old, new in zip(before.model.layers, student.model.layers, strict=True):
        assert torch.equal(old.mlp.down_proj.bias, new.mlp.down_proj.bias)
        assert not torch.equal(old.mlp.down_proj.weight, new.mlp.down_proj.weight)


def test_a_strong_ridge_keeps_the_old_weights():
    teacher = random_model()
    student, kept = cut_of(teacher, layers=[0, 3])
    before = copy.deepcopy(student)
    refit(student, teacher, kept, ROWS, 1e9)
    torch.testing.assert_close(student.state_dict(), before.state_dict(), rtol=0, atol=1e-6)


def test_enough_freedom_hits_the_teacher_exactly():
    """Fewer positions than neurons and hardly any ridge: every state is hit, so the logits are the teacher's."""
    rows = [{"input_ids": np.arange(5, 20), "completion_start": 2}]
    teacher = random_model()
    student, kept = cut_of(teacher, layers=[0, 3])
    errors = refit(student, teacher, kept, rows, 1e-4)
    assert errors[-1][1] < 1e-5
    assert errors[0][0] > 0.1
    torch.testing.assert_close(logits(student, rows), logits(teacher, rows), rtol=0, atol=0.02)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_padding_and_the_order_of_rows_do_not_matter(batch_size):
    teacher = random_model()
    want, kept = cut_of(teacher, layers=[1, 3], hidden_size=18)
    student = copy.deepcopy(want)
    refit(want, teacher, kept, ROWS, 1.0, batch_size=3)
    refit(student, teacher, kept, ROWS[::-1], 1.0, batch_size=batch_size)
    torch.testing.assert_close(student.state_dict(), want.state_dict(), rtol=0, atol=2e-5)


def test_memory_does_not_depend_on_the_number_of_rows(monkeypatch):
    def bytes_of_tensors():
        storages = (found.untyped_storage() for found in gc.get_objects() if type(found) is torch.Tensor)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def most(rows):
        found = []
        monkeypatch.setattr(module, "ridge_solution", lambda *args: (found.append(bytes_of_tensors()), ridge_solution(*args))[1])
        refit(*cut, rows, 1.0, batch_size=2)
        return max(found)

    module = sys.modules[refit.__module__]
    teacher = random_model()
    student, kept = cut_of(teacher, layers=[0, 2])
    cut = student, teacher, kept
    few, many = ([{"input_ids": np.arange(30) % 64, "completion_start": 2}] * count for count in (4, 64))
    ids_and_masks = 8 + 8 + 2 * 1
    assert most(many) - most(few) <= 60 * 30 * ids_and_masks


def test_sliding_windows_and_kinds_of_layers_are_those_of_the_model():
    """Layers that see two tokens and layers that see all: the sweep gives every one its own mask."""
    kinds = ["sliding_attention", "full_attention"] * 2
    teacher = random_model("Qwen2", layer_types=kinds, sliding_window=2, use_sliding_window=True)
    student, kept = cut_of(teacher, layers=4)
    assert refit(student, teacher, kept, ROWS, 1.0, batch_size=2)[-1] == (0, 0)
    student, kept = cut_of(teacher, layers=[1, 2])
    refit(student, teacher, kept, ROWS, 1.0, batch_size=2)
    target, out = seen(teacher, 3)[2], seen(student, 1)[2]
    again = refit(copy.deepcopy(student), teacher, kept, ROWS, 1e9, batch_size=2)
    assert again[-1][0] == pytest.approx(relative(target - out, target), rel=1e-3)


def test_a_refitted_student_loads_again_with_the_same_logits(tmp_path):
    teacher = random_model()
    student, kept = cut_of(teacher, layers=2, intermediate_size=32)
    refit(student, teacher, kept, ROWS, 1.0)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(student))


def normed(family, layer, x, epsilon):
    """The norm behind the MLP in numpy: x / √(mean x² + ε) times its gain."""
    weight = layer.post_feedforward_layernorm.weight.detach().double().numpy()
    gain = weight if family == "Olmo2" else 1 + weight
    return gain * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon), gain


@pytest.mark.parametrize("family", WITH_A_NORM_BEHIND)
def test_with_a_norm_behind_the_mlp_each_step_is_a_ridge_regression_with_its_divisors_fixed(family, monkeypatch):
    """One step, in numpy and float64; with more steps the error is smaller still, and never larger than before."""
    teacher = random_model(family)
    assert all(path.norm and path.scale == pytest.approx(1, rel=1e-5) for path in residual_paths(teacher, ROWS))
    student, kept = cut_of(teacher, layers=[0, 1, 3])
    several, before, ridge, epsilon = copy.deepcopy(student), copy.deepcopy(student), 0.3, teacher.config.rms_norm_eps
    all_errors = refit(several, teacher, kept, ROWS, ridge)
    monkeypatch.setattr("llmdistill.students.refit._STEPS", 1)
    errors = refit(student, teacher, kept, ROWS, ridge, batch_size=2)
    for (number, source), (old_error, new_error) in zip(of_pruned(kept.layers, 4), errors, strict=True):
        target, (_, a, out) = seen(teacher, source)[2], seen(student, number)
        layer, old = student.model.layers[number], before.model.layers[number].mlp.down_proj.weight.detach().double().numpy()
        new = layer.mlp.down_proj.weight.detach().double().numpy()
        (was, gain), (now, _) = (normed(family, layer, a @ weight.T, epsilon) for weight in (old, new))
        rest = target - (out - now + was)
        divisor = np.sqrt(np.mean((a @ old.T) ** 2, -1, keepdims=True) + epsilon)
        (want,) = ridge_regression([a / divisor], rest, target, ridge)
        want = want.T / gain[:, None]
        assert old_error == pytest.approx(relative(rest, target), rel=1e-3)
        if np.abs(new - old).max() > 0:  # the step made the error smaller and was kept
            np.testing.assert_allclose(new - old, want, rtol=0, atol=1e-4 * np.abs(want).max())
        assert new_error <= old_error
    assert errors[0] == (0, 0)  # nothing is missing behind it
    assert errors[1][1] < 0.9 * errors[1][0]
    assert all_errors[1][1] < errors[1][1]
    assert divergence(teacher, several) < divergence(teacher, before)


def test_a_gain_of_zero_leaves_its_weights_alone():
    teacher = random_model("Gemma2")
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.post_feedforward_layernorm.weight[5] = -1.0  # its gain is 1 + weight
    student, kept = cut_of(teacher, layers=[0, 3])
    before = copy.deepcopy(student)
    refit(student, teacher, kept, ROWS, 1.0)
    for old, new in zip(before.model.layers, student.model.layers, strict=True):
        assert torch.equal(old.mlp.down_proj.weight[5], new.mlp.down_proj.weight[5])
        assert not torch.equal(old.mlp.down_proj.weight[4], new.mlp.down_proj.weight[4])


@pytest.mark.parametrize("after", [torch.tanh, lambda normed: normed + 1], ids=["saturates", "shifts"])
def test_what_is_neither_linear_nor_an_rms_norm_is_refused(after):
    teacher = random_model("Gemma2")
    student, kept = cut_of(teacher, layers=[0, 3])
    before = copy.deepcopy(student.state_dict())
    for layer in student.model.layers:
        norm = layer.post_feedforward_layernorm
        norm.forward = lambda states, plain=norm.forward: after(plain(states))
    with pytest.raises(
        InputError, match=r"student.prune.refit: layer 0 of Gemma2.* linear neither in down_proj nor in an RMS norm"
    ):
        refit(student, teacher, kept, ROWS, 1.0)
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)


def test_what_is_always_zero_stays_and_what_is_not_finite_is_refused():
    zero, one = torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    assert torch.equal(ridge_solution(zero.clone(), zero[:, :2], 1.0, [3]), zero[:, :2])
    with pytest.raises(InputError, match="not finite"):
        ridge_solution(zero + torch.inf, one, 1.0, [3])
    with pytest.raises(InputError, match="not finite"):
        ridge_solution(torch.eye(3, dtype=torch.float64), one * torch.nan, 1.0, [3])


def test_the_ridge_is_relative_to_the_activations_of_each_block():
    diagonal = torch.tensor([1.0, 3.0, 0.0, 100.0], dtype=torch.float64)
    cross = torch.diag(diagonal.sign())
    want = torch.diag(torch.tensor([1 / (1 + 0.5 * 2), 1 / (3 + 0.5 * 2), 0, 1 / 150], dtype=torch.float64))
    torch.testing.assert_close(ridge_solution(torch.diag(diagonal), cross, 0.5, [2, 1, 1]), want)


def test_a_position_without_a_state_does_not_count():
    """The embedding of the padding token is zero, and so are all its states: there is no relative error."""
    teacher = random_model()
    student, kept = cut_of(teacher, layers=[0, 3])
    rows = [{"input_ids": np.concatenate([[0], row["input_ids"] % 63 + 1]), "completion_start": 2} for row in ROWS]
    errors = refit(student, teacher, kept, rows, 1.0)
    target, out = seen(teacher, 2, rows)[2], seen(student, 0, rows)[2]
    counted = np.linalg.norm(target, axis=-1) > 0
    assert sum(~counted) == len(rows)
    assert errors[0][1] == pytest.approx(relative(target[counted] - out[counted], target[counted]) * counted.mean(), rel=1e-3)
    assert errors[0][1] < 0.9 * errors[0][0]
