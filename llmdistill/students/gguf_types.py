"""Which type each weight of a GGUF file has, as llama.cpp chooses it, and the weights in that type."""

from collections.abc import Sequence
from typing import Any, Literal

Quantisation = Literal["F16", "Q8_0", "Q4_K_M"]

# What a row that is not whole blocks of a type has instead. K types have blocks of 256 weights, the others of 32.
_WITHOUT_WHOLE_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q5_0": "F16", "Q8_0": "F16"}


def wanted_type(name: str, shape: Sequence[int], quantisation: Quantisation, layers: int, tied: bool) -> str:
    """The type that a file of some quantisation wants for a weight, whatever the length of its rows.

    Vectors (norms, biases) are in F32. Q4_K_M has Q4_K, but Q6_K for the output layer, or the embeddings where they are that
    layer, and in the first and last eighth of the layers and every third between them for the values and the layers that
    lead out of the feed-forward blocks. llama.cpp has one more exception, for models of 80 layers, which is not made here.

    Args:
        name: of the weight, as GGUF has it.
        shape: of the weight.
        quantisation: of the file.
        layers: how many the model has.
        tied: whether the embeddings are the output layer.
    """
    if len(shape) < 2:
        return "F32"
    if quantisation != "Q4_K_M":
        return quantisation
    if name == ("token_embd.weight" if tied else "output.weight"):
        return "Q6_K"
    if name.endswith((".attn_v.weight", ".ffn_down.weight")):
        layer, eighth = int(name.split(".")[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return "Q6_K"
    return "Q4_K"


def fitting_type(wanted: str, width: int) -> str:
    """That type, or what llama.cpp takes instead for rows of `width` weights that are not whole blocks of it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    while width % GGML_QUANT_SIZES[GGMLQuantizationType[wanted]][0]:
        wanted = _WITHOUT_WHOLE_BLOCKS[wanted]
    return wanted


def encode(weight: Any, kind: str) -> Any:
    """A float32 array in a type of GGUF, as an array of bytes or of floats.

    `gguf` rounds to every type but the K types, which it only reads; libgguf has llama.cpp's own code for those.
    """
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    if kind in ("Q4_K", "Q6_K"):
        import libgguf

        return libgguf.quantize_rows(weight, int(number))
    return gguf.quantize(weight, number)
