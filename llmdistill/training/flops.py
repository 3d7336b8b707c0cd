"""The arithmetic of a training step, and its share of the device's peak."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

# Dense bfloat16 (float16 before Ampere) peak in TFLOP/s without sparsity, from the vendors' data sheets.
_PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "L4": 121,
    "T4": 65,
    "V100": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
    "MI250": 383,
}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one training step's forward and backward passes.

    A matrix product of a token with P weights takes 2P forward, 2P for the gradient of its input and, if the weights are
    trained, 2P for theirs (Kaplan et al. 2020, arXiv 2001.08361, appendix B; nothing for gradient checkpointing, as in
    PaLM's model FLOPs utilisation, arXiv 2204.02311). Causal attention over T tokens takes 2T² products of width
    heads × head size forward, half of which are masked, and twice that backward.

    Attributes:
        body: per token, through all linear layers except the output layer.
        head: per completion token, through the output layer.
        attention: per squared token of a sequence's length.
    """

    body: float
    head: float
    attention: float

    def of(self, tokens: float, completion_tokens: float, squares: float) -> float:
        """FLOPs for so many tokens, so many of them in completions, in sequences whose squared lengths add up to `squares`."""
        return self.body * tokens + self.head * completion_tokens + self.attention * squares


def training_flops(model: Any, head: torch.nn.Module) -> Flops:
    """FLOPs of a decoder with `head` as its output layer, including quantised linear layers and mixtures of experts.

    Only the experts that process a token count. Attention counts if the configuration has its size; of recurrent layers, only
    the linear parts count.
    """
    body = out = 0.0
    inside_head = set(head.modules())  # itself, or its peft wrapper
    config = model.config.get_text_config()
    for name, module in model.named_modules():
        cost = _linear(module) + (_experts(module, config) if "experts" in name else 0.0)
        if module in inside_head:
            out += cost
        else:
            body += cost
    heads, layers = _setting(config, "num_attention_heads"), _setting(config, "num_hidden_layers")
    width = _setting(config, "head_dim") or _setting(config, "hidden_size") / max(heads, 1)
    return Flops(body, out, 6.0 * layers * heads * width)


def _linear(module: torch.nn.Module) -> float:
    """FLOPs per token of a linear layer; GPT-2 has its own type."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features * module.out_features * (6 if module.weight.requires_grad else 4)
    if isinstance(module, Conv1D):
        return module.weight.numel() * (6 if module.weight.requires_grad else 4)
    return 0.0


def _experts(module: torch.nn.Module, config: Any) -> float:
    """FLOPs per token of experts whose matrices are stacked in one parameter, (experts, ., .)."""
    stacked = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    active = _setting(config, "num_experts_per_tok") or 1
    return float(sum(p.numel() / len(p) * min(active, len(p)) * (6 if p.requires_grad else 4) for p in stacked))


def _setting(config: Any, name: str) -> float:
    """A number in the configuration; 0 if missing or different per layer."""
    try:
        value = getattr(config, name, None)
    except (AttributeError, RuntimeError):  # transformers raises the latter for per-layer settings
        value = None
    return float(value) if isinstance(value, (int, float)) else 0.0


def peak_flops(device: torch.device) -> float | None:
    """Peak bfloat16 FLOPs per second of one device; None if unknown."""
    if device.type != "cuda":
        return None
    return _peak_of(torch.cuda.get_device_name(device))


def _peak_of(name: str) -> float | None:
    """Look up by the GPU's name: an `RTX A1000` is not an `A100`, and a laptop GPU is slower than its desktop namesake."""
    if "Laptop" in name:
        return None
    return next((peak * 1e12 for known, peak in _PEAKS.items() if re.search(rf"\b{known}(?![A-Za-z0-9])", name)), None)
