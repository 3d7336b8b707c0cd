"""Training with rounded weights, and the group size of scales."""

import importlib.util
from typing import Any

from llmdistill.errors import InputError, not_installed

_GROUP_SIZES = (128, 64, 32)


def fake_quantise(model: Any, group_size: int | None) -> None:
    """Make every layer that w4a16 quantises use its weights rounded to nearest; gradients bypass the rounding.

    This is the straight-through estimator of Bengio et al. 2013, arXiv 1308.3432; for language models with a teacher, see
    LLM-QAT (Liu et al. 2023, arXiv 2305.17888). The weights themselves are trained unrounded.

    Raises:
        InputError: if torchao is not installed, or the layers do not divide into groups.
    """
    if importlib.util.find_spec("torchao") is None:
        raise not_installed("train.fake_quantize", "torchao", "export")
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    head = model.get_output_embeddings()
    how = IntxFakeQuantizeConfig(torch.int4, group_size=fitting_group_size(model, group_size), is_symmetric=True)
    layers = lambda module, name: isinstance(module, torch.nn.Linear) and module is not head  # noqa: E731
    quantize_(model, QATConfig(weight_config=how, step="prepare"), filter_fn=layers)


def unfake(model: Any) -> None:
    """Undo `fake_quantise`: the same weights in plain layers."""
    if any(hasattr(module, "weight_fake_quantizer") for module in model.modules()):
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(step="convert"), filter_fn=lambda module, name: hasattr(module, "weight_fake_quantizer"))


def fitting_group_size(model: Any, wanted: int | None) -> int:
    """The number of weights of a row that share a scale, such that every row of a quantised layer is a whole number of groups.

    Raises:
        InputError: if the requested size does not divide a layer's rows, or none of the usual ones does.
    """
    import torch

    head = model.get_output_embeddings()
    linear = {name: m.in_features for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    for size in (wanted,) if wanted else _GROUP_SIZES:
        odd = next(((name, width) for name, width in linear.items() if width % size), None)
        if odd is None:
            return size
    name, width = odd or ("", 0)
    tried = "export.group_size" if wanted else "w4a16 needs export.group_size: the smallest usual size,"
    raise InputError(f"{tried} {size} does not divide the {width:,} inputs of {name}")
