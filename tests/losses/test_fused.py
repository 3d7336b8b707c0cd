"""The fused loss against the formulas in float64, and against models' own logits."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmdistill import losses
from llmdistill.data.collator import DistillCollator, some_tokens
from llmdistill.losses import DIVERGENCES, Objective, fused
from llmdistill.models.forward import completion_logits, in_place_of_logits
from tests.factories import most_likely
from tests.losses.test_divergences import bucketed, pps_targets, topk

N, D, V, K = 13, 8, 40, 5
KINDS = [*DIVERGENCES, "sampled", "none"]


def problem(kind, dtype=torch.float32, bias=False, seed=0, size=1.0):
    """Hidden states, an output layer, labels and targets; some labels are in the support, some are not."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(N, D, generator=generator) * size).to(dtype).requires_grad_()
    layer = torch.nn.Linear(D, V, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    labels = torch.randint(0, V, (N,), generator=generator)
    teacher = torch.randn(N, V, generator=generator) * 2
    batch = {}
    if kind in DIVERGENCES:
        ids, logprobs, tail = topk(teacher, K)
        labels[::2] = ids[::2, 1]
        batch = {"target_kind": "topk", "target_ids": ids, "target_logprobs": logprobs, "target_tail": tail}
    elif kind == "sampled":
        ids, logweights, entropy = pps_targets(teacher, K, 1)
        batch = {"target_kind": "sampled", "target_ids": ids, "target_logweights": logweights}
        batch["target_entropy"] = entropy.float()
        labels[::2] = batch["target_ids"][::2, 1]
    batch["token_weights"] = torch.rand(N, generator=generator)
    batch["token_importance"] = torch.rand(N, generator=generator) * 3
    batch["token_logprobs"] = teacher.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return hidden, layer.to(dtype), labels, batch, teacher


def logits_of(hidden, layer, scale=1.0, softcap=None):
    logits = scale * F.linear(hidden, layer.weight, layer.bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def by_the_formula(logits, labels, batch, teacher, kind, alpha, temperature=1.0):
    """The loss and its parts from the definitions, in the precision of the logits."""
    parts = {"ce": F.cross_entropy(logits, labels, reduction="none")}
    parts["sequence_kl"] = batch["token_importance"] * (batch["token_logprobs"] + parts["ce"])
    if kind == "sampled":
        log_q = logits.log_softmax(-1).gather(1, batch["target_ids"])
        parts["kl"] = -(batch["target_logweights"].exp() * log_q).sum(-1) - batch["target_entropy"]
        choice = batch["target_ids"].gather(1, batch["target_logweights"].argmax(1, keepdim=True))[:, 0]
        parts["agreement"] = (logits.argmax(-1) == choice).double()
    elif kind != "none":
        parts["kl"] = bucketed("forward_kl", teacher, logits, batch["target_ids"], temperature)
        parts[kind] = bucketed(kind, teacher, logits, batch["target_ids"], temperature)
        parts["agreement"] = (logits.argmax(-1) == teacher.argmax(-1)).double()
    part = parts.get(kind, parts.get("kl", 0.0))
    loss = (1 - alpha) * 0.75 * parts["ce"] + alpha * part + (1 - alpha) * 0.25 * parts["sequence_kl"]
    return (loss * batch["token_weights"]).sum(), {name: value.sum() for name, value in parts.items() if name != "forward_kl"}


def objective_of(kind, alpha, temperature=1.0):
    name = kind if kind in DIVERGENCES else "forward_kl"
    return Objective(name, alpha, temperature, sequence_alpha=(1 - alpha) / 4)


def gradients(loss, hidden, layer):
    return torch.autograd.grad(loss, (hidden, *layer.parameters()))


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_formulas(kind, alpha, rows):
    if kind == "none" and alpha:
        pytest.skip("cross-entropy alone")
    temperature = 1.0 if kind == "sampled" else 2.0
    hidden, layer, labels, batch, teacher = problem(kind)
    loss, sums = fused.distillation_loss(
        hidden, fused.Head(layer), labels, batch, objective_of(kind, alpha, temperature), chunk_bytes=rows * 4 * V
    )
    exact = copy.deepcopy(layer).double()
    exact_hidden = hidden.detach().double().requires_grad_()
    want, parts = by_the_formula(logits_of(exact_hidden, exact), labels, batch, teacher, kind, alpha, temperature)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(
        {name: value.item() for name, value in parts.items()}, rel=1e-4
    )
    assert not any(value.requires_grad for value in sums.values())
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients(loss, hidden, layer), gradients(want, exact_hidden, exact), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
@pytest.mark.parametrize("kind", ["jsd", "sampled"])
def test_scale_softcap_and_bias(kind, scale, softcap, bias):
    hidden, layer, labels, batch, teacher = problem(kind, bias=bias)
    head = fused.Head(layer, scale, softcap)
    loss, _ = fused.distillation_loss(hidden, head, labels, batch, objective_of(kind, 0.6), chunk_bytes=5 * 4 * V)
    exact = copy.deepcopy(layer).double()
    exact_hidden = hidden.detach().double().requires_grad_()
    want, _ = by_the_formula(logits_of(exact_hidden, exact, scale, softcap), labels, batch, teacher, kind, 0.6)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients(loss, hidden, layer), gradients(want, exact_hidden, exact), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_no_farther_from_float64_than_the_plain_loss(kind, dtype, autocast):
    """|fused − exact| ≤ |plain − exact|, but for chance, of the loss and every gradient (the criterion of ml-cross-entropy)."""
    if autocast and dtype != torch.float32:
        pytest.skip("autocast is for float32 weights")
    alpha = 0.0 if kind == "none" else 0.7
    hidden, layer, labels, batch, teacher = problem(kind, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got, _ = fused.distillation_loss(
            hidden, fused.Head(layer), labels, batch, objective_of(kind, alpha), chunk_bytes=5 * 4 * V
        )
        plain, _ = losses.distillation_loss(logits_of(hidden, layer), labels, batch, objective_of(kind, alpha))
    exact = copy.deepcopy(layer).double()
    exact_hidden = hidden.detach().double().requires_grad_()
    want, _ = by_the_formula(logits_of(exact_hidden, exact), labels, batch, teacher, kind, alpha)
    found = [(value, *gradients(value, states, of)) for value, states, of in (
        (got, hidden, layer), (plain, hidden, layer), (want, exact_hidden, exact)
    )]  # fmt: skip
    for ours, theirs, truth in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs, truth = (tensor.detach().double() for tensor in (ours, theirs, truth))
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"adaptive_kl"}))  # whose weights have no gradient by definition
def test_gradients_by_finite_differences(kind):
    """The derivative along random directions, in float64, through the fused function alone."""
    hidden, layer, labels, batch, _ = problem(kind, torch.float64, bias=True)
    objective = objective_of(kind, 0.0 if kind == "none" else 0.7)
    head = fused.Head(layer, 0.7, 4.0)

    def value():
        return fused.distillation_loss(hidden, head, labels, batch, objective, chunk_bytes=5 * 4 * V)[0]

    tensors = [hidden, layer.weight, layer.bias]
    for tensor, gradient in zip(tensors, torch.autograd.grad(value(), tensors), strict=True):
        direction = torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                tensor.add_(direction, alpha=step)
                ends.append(value())
                tensor.sub_(direction, alpha=step)
        torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-6)


def online(teacher_vocab, bias=False):
    """The problem with a teacher's hidden states and output layer in place of targets, and its logits in float64."""
    hidden, layer, labels, batch, _ = problem("none", bias=bias)
    generator = torch.Generator().manual_seed(5)
    states, projection = torch.randn(N, 6, generator=generator), torch.nn.Linear(6, teacher_vocab, bias=bias)
    head = fused.Head(projection, 0.5, 4.0)
    with torch.no_grad():
        exact = logits_of(states.double(), copy.deepcopy(projection).double(), head.scale, head.softcap)
    return hidden, layer, labels, batch, fused.ChunkedLogits(states, head), exact


@pytest.mark.parametrize("teacher_vocab", [V, V + 3, V - 1])  # one of the two may be padded further; labels are below both
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_online_teacher_in_chunks(name, rows, teacher_vocab):
    hidden, layer, labels, batch, chunked, teacher = online(teacher_vocab, bias=True)
    labels = labels.clamp(max=V - 2)
    objective, head = Objective(name, 0.6, 2.0, sequence_alpha=0.1), fused.Head(layer, 0.7, 6.0)
    loss, sums = fused.distillation_loss(
        hidden, head, labels, {**batch, "teacher_logits": chunked}, objective, chunk_bytes=rows * 4 * V * 8
    )
    exact = copy.deepcopy(layer).double()
    exact_hidden = hidden.detach().double().requires_grad_()
    logits, shared = logits_of(exact_hidden, exact, 0.7, 6.0), min(V, teacher_vocab)
    p, q = ((side[:, :shared] / 2).log_softmax(-1) for side in (teacher, logits))
    ce = F.cross_entropy(logits, labels, reduction="none")
    sequence = batch["token_importance"] * (batch["token_logprobs"] + ce)
    part = DIVERGENCES[name](p, q) * 4
    want = ((0.3 * ce + 0.6 * part + 0.1 * sequence) * batch["token_weights"]).sum()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    assert sums["kl"].item() == pytest.approx((4 * (p.exp() * (p - q)).sum()).item(), rel=1e-4)
    assert sums["agreement"].item() == (teacher[:, :V].argmax(1) == logits.argmax(1)).sum().item()
    for got, expected in zip(gradients(loss, hidden, layer), gradients(want, exact_hidden, exact), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)


def test_the_logits_of_neither_model_are_held():
    hidden, layer, labels, batch, chunked, _ = online(V)
    with Largest() as largest:
        fused.distillation_loss(
            hidden, fused.Head(layer), labels, {**batch, "teacher_logits": chunked}, Objective(), chunk_bytes=2 * 4 * V * 8
        )[0].backward()
    assert largest.numbers <= V * D < N * V  # the gradient of the weight


def test_the_gradient_from_above_is_applied_once():
    """Gradient accumulation divides the loss; a second backward through the same graph is refused, not doubled."""
    hidden, layer, labels, batch, _ = problem("jsd")
    once = fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective_of("jsd", 0.5))[0]
    plain = gradients(once, hidden, layer)
    scaled = fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective_of("jsd", 0.5))[0] / -7
    for got, want in zip(torch.autograd.grad(scaled, (hidden, layer.weight), retain_graph=True), plain, strict=True):
        torch.testing.assert_close(got, want / -7)
    with pytest.raises(RuntimeError, match="a second backward pass, as its gradients are scaled"):
        scaled.backward()


def test_hooks_of_saved_tensors_see_no_gradient():
    """TRL's activation offloading would copy the weight's to the CPU and back."""
    hidden, layer, labels, batch, _ = problem("forward_kl")
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: seen.append(kept.shape) or kept, lambda kept: kept):
        loss = fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective_of("forward_kl", 0.5))[0]
    assert loss.requires_grad
    assert layer.weight.shape not in seen


def test_what_is_frozen_has_no_gradient_and_costs_none():
    hidden, layer, labels, batch, _ = problem("forward_kl")
    objective = objective_of("forward_kl", 0.5)
    full = gradients(fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective)[0], hidden, layer)
    layer.requires_grad_(False)
    fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective)[0].backward()
    torch.testing.assert_close(hidden.grad, full[0])
    assert layer.weight.grad is None
    layer.requires_grad_(True)
    fused.distillation_loss(hidden.detach(), fused.Head(layer), labels, batch, objective)[0].backward()
    torch.testing.assert_close(layer.weight.grad, full[1])
    with torch.no_grad(), Largest() as largest:
        loss, _ = fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective)
    assert not loss.requires_grad
    assert "aten.addmm_.default" not in largest.seen
    assert not any("backward" in name or "scatter_add" in name for name in largest.seen)


class Largest(TorchDispatchMode):
    """The most numbers that any one operation newly returned, and the operations seen."""

    def __enter__(self):
        self.numbers, self.seen = 0, set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen.add(str(function))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_never_n_by_v_numbers_in_memory(kind, autocast):
    hidden, layer, labels, batch, _ = problem(kind)
    objective = objective_of(kind, 0.0 if kind == "none" else 0.7)
    with Largest() as largest, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective, chunk_bytes=4 * 4 * V)[0].backward()
    assert largest.numbers == D * V  # the weight; a chunk is half of that
    with Largest() as largest:
        losses.distillation_loss(logits_of(hidden, layer), labels, batch, objective)[0].backward()
    assert largest.numbers == N * V


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_at_all(kind):
    """A batch whose completions were all cut off: zero everywhere, and every parameter takes part (DDP waits for them)."""
    hidden, layer, labels, batch, _ = problem(kind)
    nothing = some_tokens(batch, slice(0))
    loss, sums = fused.distillation_loss(hidden[:0], fused.Head(layer), labels[:0], nothing, objective_of(kind, 0.0))
    loss.backward()
    assert loss == 0
    assert layer.weight.grad.abs().max() == 0
    assert set(sums) == {
        "ce", "sequence_kl",
        *(["kl", "agreement"] if kind != "none" else []),
        *([kind] if kind in {*DIVERGENCES} - {"forward_kl"} else []),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind, dtype):
    """Logits of ±10,000: finite, and what the plain loss says."""
    hidden, layer, labels, batch, _ = problem(kind, dtype, size=1000.0)
    objective = objective_of(kind, 0.0 if kind == "none" else 0.7)
    if "target_tail" in batch:
        batch["target_tail"][:3] = 0.0
    loss, sums = fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective)
    plain, plain_sums = losses.distillation_loss(logits_of(hidden, layer), labels, batch, objective)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-3)
    for name, value in sums.items():
        torch.testing.assert_close(value, plain_sums[name], rtol=1e-4, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, hidden, layer))


def test_a_sample_may_hold_a_token_twice():
    hidden, layer, labels, batch, teacher = problem("sampled")
    batch["target_ids"][:, 1] = batch["target_ids"][:, 0]
    loss, _ = fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective_of("sampled", 0.8))
    want, _ = by_the_formula(logits_of(hidden, layer), labels, batch, teacher, "sampled", 0.8)
    torch.testing.assert_close(loss, want)
    for got, expected in zip(gradients(loss, hidden, layer), gradients(want, hidden, layer), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# An output layer that peft has its hands on.


def adapted(layer, rank=3, factor=1.5, **arguments):
    """The layer with an adapter of low rank on it, far from its initial value of nothing."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    arguments = {"r": rank, "lora_alpha": rank * factor, "init_lora_weights": False, **arguments}
    lora = Linear(layer, "default", config=LoraConfig(**arguments), r=rank, lora_alpha=rank * factor)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in (lora.lora_A, lora.lora_B):
            part["default"].weight.copy_(torch.randn(part["default"].weight.shape, generator=generator))
    return lora


def adapted_by_hand(hidden, lora, factor=1.5):
    """Copies in float64 of the hidden states and all weights, and the linear map that they stand for."""
    parts = [hidden, *lora.base_layer.parameters(), lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    exact = [part.detach().double().requires_grad_() for part in parts]
    bias = exact[2] if lora.base_layer.bias is not None else None
    return exact, F.linear(exact[0], exact[1] + factor * exact[-1] @ exact[-2], bias), parts


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (2.0, 5.0)])
@pytest.mark.parametrize("kind", ["jsd", "sampled"])
def test_an_adapter_on_the_head(kind, scale, softcap, bias, frozen):
    hidden, layer, labels, batch, teacher = problem(kind, bias=bias)
    lora = adapted(layer.requires_grad_(not frozen))
    head = fused.Head(lora, scale, softcap)
    loss, _ = fused.distillation_loss(hidden, head, labels, batch, objective_of(kind, 0.6), chunk_bytes=5 * 4 * V)
    exact, logits, parts = adapted_by_hand(hidden, lora)
    logits = scale * logits if softcap is None else softcap * torch.tanh(scale * logits / softcap)
    want, _ = by_the_formula(logits, labels, batch, teacher, kind, 0.6)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    loss.backward()
    for part, expected in zip(parts, torch.autograd.grad(want, exact), strict=True):
        if frozen and any(part is one for one in layer.parameters()):
            assert part.grad is None
        else:
            torch.testing.assert_close(part.grad.double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)])
@pytest.mark.parametrize("kind", ["forward_kl", "sampled"])
def test_an_adapter_no_farther_from_float64_than_pefts_own_forward(kind, dtype, autocast):
    hidden, layer, labels, batch, teacher = problem(kind, dtype)
    lora = adapted(layer.requires_grad_(False))  # of float32, whatever the layer's type is
    leaves = [hidden, lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    exact, logits, _ = adapted_by_hand(hidden, lora)
    want, _ = by_the_formula(logits, labels, batch, teacher, kind, 0.7)
    found = [[want, *torch.autograd.grad(want, [exact[0], *exact[-2:]])]]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for loss, _ in (
            fused.distillation_loss(hidden, fused.Head(lora), labels, batch, objective_of(kind, 0.7), chunk_bytes=5 * 4 * V),
            losses.distillation_loss(lora(hidden), labels, batch, objective_of(kind, 0.7)),
        ):
            found.append([loss, *torch.autograd.grad(loss, leaves)])
    for truth, ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        truth, ours, theirs = (tensor.detach().double() for tensor in (truth, ours, theirs))
        assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-6 * truth.norm()


def test_an_adapter_takes_no_matrix_of_the_size_of_the_head():
    hidden, layer, labels, batch, _ = problem("jsd")
    head = fused.Head(adapted(layer.requires_grad_(False)))
    with Largest() as largest:
        fused.distillation_loss(hidden, head, labels, batch, objective_of("jsd", 0.7), chunk_bytes=4 * 4 * V)[0].backward()
    assert largest.numbers == 4 * V < D * V  # a chunk


def test_the_dropout_of_an_adapter():
    """The same mask as in peft's own forward, since it is drawn once for all rows."""
    hidden, layer, labels, batch, _ = problem("forward_kl")
    lora = adapted(layer.requires_grad_(False), lora_dropout=0.5).train()
    objective = objective_of("forward_kl", 0.7)
    found = []
    for compute in (
        lambda: fused.distillation_loss(hidden, fused.Head(lora), labels, batch, objective, chunk_bytes=5 * 4 * V)[0],
        lambda: losses.distillation_loss(lora(hidden), labels, batch, objective)[0],
    ):
        torch.manual_seed(4)
        loss = compute()
        found.append([loss, *torch.autograd.grad(loss, [hidden, lora.lora_A["default"].weight])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Real architectures: what the head is, and that its loss is the one of the model's own logits.

SMALL = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": ("Llama", {"tie_word_embeddings": False}, 1.0, None),
    "llama tied": ("Llama", {"tie_word_embeddings": True}, 1.0, None),
    "qwen3": ("Qwen3", {"head_dim": 8}, 1.0, None),
    "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}, 1.0, 30.0),
    "gemma3": ("Gemma3", {"head_dim": 8}, 1.0, None),
    "gemma3 capped": ("Gemma3", {"head_dim": 8, "final_logit_softcapping": 7.5}, 1.0, 7.5),
    "cohere": ("Cohere", {"logit_scale": 0.0625}, 0.0625, None),
    "granite": ("Granite", {"logits_scaling": 6.0}, 1 / 6, None),
    "phi": ("Phi", {}, 1.0, None),  # its output layer has a bias
}


def build(name):
    import transformers

    family, extra, scale, softcap = MODELS[name]
    kind = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, kind)(**{**SMALL, **extra}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # logits large enough for a soft-cap to show
    return model.eval(), scale, softcap


def rows_and_batch(vocab, seed=3):
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {"input_ids": torch.randint(3, vocab, (length,), generator=generator).numpy(), "completion_start": start}
        for length, start in ((9, 4), (12, 3), (5, 4))
    ]
    batch = DistillCollator(0)(rows)
    ids, logprobs, tail = topk(torch.randn(len(batch["positions"]), vocab, generator=generator), K)
    return {**batch, "target_kind": "topk", "target_ids": ids, "target_logprobs": logprobs, "target_tail": tail}


def both_losses(model, head, wrapped=None, seed=3):
    """(loss, gradients by name) of the fused form and of the plain one, through the model's own forward."""
    objective = Objective("jsd", 0.6)
    batch = rows_and_batch(SMALL["vocab_size"], seed)
    labels = batch["labels"][batch["labels"] != -100]
    through, found = model if wrapped is None else wrapped, []
    for is_fused in (True, False):
        model.zero_grad()
        if is_fused:
            loss, _ = in_place_of_logits(
                through, batch, lambda hidden: fused.distillation_loss(hidden, head, labels, batch, objective)
            )
        else:
            loss, _ = losses.distillation_loss(completion_logits(through, batch), labels, batch, objective)
        loss.backward()
        found.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    return found


def assert_same(found):
    (loss, grads), (plain_loss, plain_grads) = found
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == plain_grads.keys()
    for name, gradient in plain_grads.items():
        assert (grads[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("name", MODELS)
def test_the_head_of_a_model_gives_the_loss_of_its_own_logits(name):
    model, scale, softcap = build(name)
    head = fused.find_head(model)
    assert head.layer is model.get_output_embeddings()
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    assert_same(both_losses(model, head))
    assert model.get_output_embeddings() is head.layer
    assert head.is_in(model), "the output layer's own forward is back"


def test_a_hook_by_which_trl_keeps_the_head_on_the_device_is_none_on_its_output():
    model, _, _ = build("llama")

    def hook(*_):
        return None

    model.lm_head.register_forward_hook(hook)
    assert fused.find_head(model) is None
    hook.__module__ = "trl.models.activation_offloading"
    assert fused.find_head(model) is not None


def test_what_is_not_a_known_head_is_not_taken_for_one():
    from peft import LoraConfig, get_peft_model

    class Shifted(type(build("llama")[0])):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(output.logits.shape[-1]) / 10
            return output

    model, _, _ = build("llama")
    assert fused.find_head(Shifted(model.config)) is None, "something is added to the logits"
    dora = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    assert fused.find_head(dora) is None, "an adapter that is not a sum"
    tokens = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5]})
    assert fused.find_head(get_peft_model(build("llama tied")[0], tokens)) is None, "single trained rows"
    biased = get_peft_model(build("phi")[0], LoraConfig(r=2, target_modules=["lm_head"], lora_bias=True))
    assert fused.find_head(biased) is None, "a bias of the adapter"

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["lm_head"]))
    head = fused.find_head(adapted)
    with adapted.disable_adapter():
        assert not head.is_in(adapted)
    assert head.is_in(adapted)
    adapted.merge_adapter()
    assert not head.is_in(adapted), "the adapter is in the weight by now"

    head = fused.find_head(model)
    handle = head.layer.register_forward_hook(lambda module, args, output: output * 2)
    assert fused.find_head(model) is None, "a hook on its output"
    assert not head.is_in(model)
    handle.remove()
    assert head.is_in(model)
    model.set_output_embeddings(torch.nn.Linear(16, 96, bias=False))
    assert not head.is_in(model), "another layer by now"


def test_adapters_elsewhere_and_a_frozen_head():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama tied")[0], LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    head = fused.find_head(model)
    assert head is not None
    found = both_losses(model, head)
    assert_same(found)
    assert all("lora" in name for name in found[0][1])


@pytest.mark.parametrize("how", ["lora", "two", "whole"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "gemma2", "cohere", "phi"])
def test_a_head_that_peft_trains(name, how):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    if how == "whole":
        lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(build(name)[0], lora)
    if how == "two":
        model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    head = fused.find_head(model)
    assert head.layer is model.get_output_embeddings()
    found = both_losses(model, head)
    assert_same(found)
    trained = {name.split(".")[-2] if "lora" not in name else name.split(".")[-3] for name in found[0][1] if "lm_head" in name}
    assert trained == ({"default"} if how == "whole" else {"lora_A", "lora_B"})
    assert all("lora" in name or "modules_to_save" in name for name in found[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_a_compiled_model_every_batch_is_a_new_one(backend):
    """Dynamo looks for no changed hooks: a loss that is put in by one would be that of the first batch for ever."""
    model, _, _ = build("llama")
    head = fused.find_head(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for seed in range(3):
        batch = rows_and_batch(SMALL["vocab_size"], seed)
        plain = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**plain, use_cache=False).logits
        torch.testing.assert_close(compiled(**plain, use_cache=False).logits, logits)  # nothing is left in it from before
        torch.testing.assert_close(completion_logits(compiled, batch), logits.flatten(0, 1)[batch["positions"]])
        assert head.is_in(compiled)
        fused_one, held = both_losses(model, head, compiled, seed)
        assert_same([fused_one, both_losses(model, head, seed=seed)[1]])
        assert_same([held, fused_one])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_under_ddp_every_parameter_takes_part(name, find_unused, tmp_path, monkeypatch):
    model, _, _ = build(name)
    head = fused.find_head(model)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
        assert head.is_in(wrapped)
        assert_same(both_losses(model, head, wrapped))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd", "total_variation", "neg_log_acceptance"])
@pytest.mark.parametrize("fused_form", [True, False])
def test_targets_that_the_student_does_not_have_are_part_of_the_rest(loss, fused_form):
    """A teacher padded further than its student: on the outcomes that both have, in float64."""
    hidden, layer, labels, _, _ = problem("forward_kl")
    teacher = torch.randn(N, V + 20, generator=torch.Generator().manual_seed(3)) * 2
    whole = most_likely(teacher.log_softmax(-1).numpy(), 12)
    assert (whole.ids_NK >= V).any()
    soft = whole.within(V)
    batch = {name: torch.from_numpy(values) for name, values in soft.batch().items()}
    labels[::3] = batch["target_ids"][::3, 0]
    batch |= {"target_kind": "topk", "token_weights": torch.ones(N)}
    objective = Objective(loss, 0.6)
    exact = copy.deepcopy(layer).double()
    exact_hidden = hidden.detach().double().requires_grad_()
    logits = logits_of(exact_hidden, exact)
    p_NV, q_NV = teacher.double().softmax(-1), logits.softmax(-1)
    want = (1 - 0.6) * F.cross_entropy(logits, labels, reduction="sum")
    for row in range(N):
        ids = [token for token in whole.ids_NK[row] if token < V]
        p, q = p_NV[row, ids], q_NV[row, ids]
        both = [torch.cat([kept, 1 - kept.sum()[None]]).log()[None] for kept in (p, q)]
        want = want + 0.6 * DIVERGENCES[loss](*both).sum()
    if fused_form:
        got, _ = fused.distillation_loss(hidden, fused.Head(layer), labels, batch, objective, chunk_bytes=5 * 4 * V)
    else:
        got, _ = losses.distillation_loss(logits_of(hidden, layer), labels, batch, objective)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    for mine, expected in zip(gradients(got, hidden, layer), gradients(want, exact_hidden, exact), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-3, atol=1e-4)
