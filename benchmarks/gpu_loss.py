"""The sections `loss` and `layer` of gpu.py: how exact and how fast the output layer's loss is."""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import synthetic
from found import Found
from race import clock

OURS = {"llmdistill, sampled 16": ("sampled", 16), "llmdistill, top-k 64": ("topk", 64)}


def loss(small: bool, found: Found) -> None:
    """A row for each precision and output layer, the worst of all divergences and kinds of targets."""
    import torch

    from llmdistill.losses import DIVERGENCES

    worst = 0.0
    kinds = [*DIVERGENCES, "sampled", "multinomial", "none"]
    for dtype in ("float32", "bfloat16", "float16"):
        for head in ("plain", "tied", "soft-cap", "LoRA"):
            off: dict[str, list[tuple[float, float]]] = {"loss": [], "hidden": [], "weight": []}
            for kind in kinds[:: 4 if small else 1]:
                for name, (ours, theirs) in compare(kind, head, getattr(torch, dtype), small).items():
                    off[name].append((ours, theirs))
                    # The loss is one number, and how its roundings cancel is chance.
                    slack = max(torch.finfo(getattr(torch, dtype)).eps / 8 if name == "loss" else 0.0, 2e-6)
                    worst = max(worst, ours / (theirs + slack))
                    if ours > 1.5 * theirs + slack:
                        found.failed(f"loss: {dtype}, {head}, {kind}: {name} is off by {ours:.2g}, plain by {theirs:.2g}")
            errors: dict[str, float] = {}
            for name, pairs in off.items():
                errors |= {f"fused {name}": max(pair[0] for pair in pairs), f"plain {name}": max(pair[1] for pair in pairs)}
            found.row("loss", dtype=dtype, head=head, **errors)
    found.aim("gpu_loss_error_over_plain", worst)


def compare(kind: str, head: str, dtype: Any, small: bool) -> dict[str, tuple[float, float]]:
    """Relative errors of the fused and of the plain form: of the loss, the hidden states' gradient and the weights'."""
    import torch

    from llmdistill import losses
    from llmdistill.losses import fused

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    n, width, vocab, kept = (33, 16, 300, 8) if small else (512, 576, 49_152, 64)
    layer = torch.nn.Linear(width, vocab, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        layer.weight.normal_(std=2 / width**0.5)
    hidden_ND = torch.randn(n, width, device=device).to(dtype)
    labels_N = torch.randint(0, vocab, (n,), device=device)
    batch = soft_targets(kind, torch.randn(n, vocab, device=device) * 3, kept)
    batch["token_weights"] = torch.rand(n, device=device)
    objective = losses.Objective(kind if kind in losses.DIVERGENCES else "forward_kl", 0.0 if kind == "none" else 0.7)
    made = adapted(layer, dtype) if head == "LoRA" else layer
    softcap = 30.0 if head == "soft-cap" else None
    found = {}
    for form in ("exact", "fused", "plain"):
        wide = form == "exact"
        mine = copy.deepcopy(made).double() if wide else copy.deepcopy(made)
        states_ND = (hidden_ND.double() if wide else hidden_ND.clone()).requires_grad_()
        entering_ND = states_ND
        if head == "tied":  # so that a gradient reaches the matrix from both sides
            entering_ND = states_ND + torch.nn.functional.embedding(labels_N.flip(0), mine.weight)
        given = {k: v.double() if wide and torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
        if form == "fused":
            value, _ = fused.distillation_loss(entering_ND, fused.Head(mine, 1.0, softcap), labels_N, given, objective, 1 << 24)
        else:
            logits_NV = mine(entering_ND)
            logits_NV = logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)
            value, _ = losses.distillation_loss(logits_NV, labels_N, given, objective)
        trained = [parameter for parameter in mine.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(value, [states_ND, *trained])
        weights = torch.cat([gradient.double().flatten() for gradient in gradients[1:]])
        found[form] = {"loss": value.detach().double(), "hidden": gradients[0].double(), "weight": weights}
    return {
        name: tuple(float((found[form][name] - truth).norm() / truth.norm()) for form in ("fused", "plain"))  # type: ignore[misc]
        for name, truth in found["exact"].items()
    }


def soft_targets(kind: str, teacher_NV: Any, kept: int) -> dict[str, Any]:
    """The targets of a batch, from the teacher's logits, as the engines make them."""
    import torch

    from llmdistill.data.targets import KINDS, TopK

    if kind == "none":
        return {}
    stored, device = KINDS.get(kind, TopK), teacher_NV.device
    logprobs_NV = teacher_NV.log_softmax(-1)
    uniform_NU = torch.rand(len(teacher_NV), stored.uniforms(kept), dtype=torch.float64, device=device)
    ids_NK = stored.keep(logprobs_NV, kept, uniform_NU)
    soft = stored.from_kept(ids_NK.cpu().numpy(), logprobs_NV.gather(1, ids_NK).cpu().numpy())
    assert soft is not None
    tensors = {name: torch.from_numpy(values).to(device) for name, values in soft.batch().items()}
    return {"target_kind": stored.name, **tensors}


def adapted(layer: Any, dtype: Any) -> Any:
    """The layer, frozen, under a LoRA of rank 8, in its own precision."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    holder = torch.nn.ModuleDict({"head": layer.requires_grad_(False)})
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=["head"], init_lora_weights=False), holder)
    return holder["head"].to(layer.weight.device, dtype)


def layer(small: bool, found: Found) -> None:
    """Milliseconds from hidden states to the gradients, in bfloat16 by autocast; the forms take turns."""
    import torch
    from train_step import LAYER, layer_losses

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cells = [(512, 32, 64)] if small else [(v, d, t) for v, d in ((49_152, 576), (151_936, 1024)) for t in (2048, 8192)]
    ratios = []
    for vocab, width, tokens in cells:
        torch.manual_seed(0)
        head = torch.nn.Linear(width, vocab, bias=False, device=device)
        hidden_TD = torch.randn(tokens, width, device=device).requires_grad_()
        labels_T = torch.randint(0, vocab, (tokens,), device=device)
        forms = layer_losses(head, hidden_TD, labels_T, 16 if small else 64)
        works: dict[str, Callable[[], None]] = {}
        for name, form in forms.items():
            works[name] = partial(forward_and_backward, form, head, hidden_TD)
        works["three products"] = partial(three_products, hidden_TD.detach().bfloat16(), head.weight.detach().bfloat16())
        took = in_turns(works, 1 if small else 10)
        figures = {f"{name} ms": seconds * 1e3 for name, seconds in took.items()}
        ratios.append(took[LAYER[0]] / max(took[LAYER[1]], 1e-9))
        found.row("layer", V=vocab, D=width, T=tokens, **figures, ratio=ratios[-1])
    found.aim("gpu_layer_seconds_over_trl_sft", max(ratios))
    collating(small, found)


def forward_and_backward(compute: Callable[[], Any], head: Any, hidden_TD: Any) -> None:
    import torch

    with torch.autocast(hidden_TD.device.type, dtype=torch.bfloat16):
        compute().backward()
    head.weight.grad = hidden_TD.grad = None


def three_products(x_TD: Any, weight_VD: Any) -> None:
    """Forward, and the gradients of both factors."""
    logits_TV = x_TD @ weight_VD.t()
    _ = logits_TV @ weight_VD, logits_TV.t() @ x_TD


def collating(small: bool, found: Found) -> None:
    """Of one batch of 8,192 positions, on the CPU, where training does it between two steps."""
    from llmdistill.data.collator import DistillCollator

    vocab, length = (512, 64) if small else (151_936, 2048)
    for kind, kept in OURS.values():
        rows = list(synthetic.dataset(synthetic.rows(vocab, [(64, length)] * 4, kind, kept), vocab))
        collator = DistillCollator(0)
        took = []
        for _ in range(5):
            start = time.perf_counter()
            collator(rows)
            took.append(time.perf_counter() - start)
        found.row("collating", targets=kind, kept=kept, positions=4 * length, ms=min(took) * 1e3)


def in_turns(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after two rounds that do not count."""
    took: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 2):
        for name, work in works.items():
            start = clock()
            work()
            took[name].append(clock() - start)
    return {name: statistics.median(seconds[2:]) for name, seconds in took.items()}
