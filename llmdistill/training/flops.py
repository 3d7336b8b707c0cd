"""How much arithmetic a training step takes, and how much of what the device can do that is."""

from dataclasses import dataclass
from typing import Any

import torch

# Dense bfloat16 (float16 before Ampere) peak, TFLOP/s without sparsity, from the makers' data sheets.
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

    A matrix product of a token with P weights takes 2P forward, 2P for the gradient of its input and, where the weights
    are trained, 2P for theirs (Kaplan et al. 2020, arXiv 2001.08361, appendix B; nothing for gradient checkpointing, as in
    PaLM's model FLOPs utilisation, arXiv 2204.02311). A causal attention over T tokens takes 2T² products of width
    heads × head size forward, half of which are masked, and twice that backward.

    Attributes:
        body: a token through all linear layers but the output layer.
        head: a completion token through the output layer.
        attention: for each squared token of a sequence's length.
    """

    body: float
    head: float
    attention: float

    def of(self, tokens: float, completion_tokens: float, squares: float) -> float:
        """For so many tokens, so many of them in completions, in sequences whose squared lengths add up to `squares`."""
        return self.body * tokens + self.head * completion_tokens + self.attention * squares


def training_flops(model: Any, head: torch.nn.Module) -> Flops:
    """Of a decoder whose linear layers are `torch.nn.Linear` (quantised ones too), `head` its output layer."""
    body = out = 0.0
    inside_head = set(head.modules())  # itself, or what peft put around it
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        cost = module.in_features * module.out_features * (6 if module.weight.requires_grad else 4)
        if module in inside_head:
            out += cost
        else:
            body += cost
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Flops(body, out, 6.0 * config.num_hidden_layers * config.num_attention_heads * width)


def peak_flops(device: torch.device) -> float | None:
    """What one device can do in bfloat16, a second; None if that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for known, peak in _PEAKS.items() if known in name), None)
