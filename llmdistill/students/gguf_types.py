"""The type of each weight in a GGUF file, as chosen by llama.cpp, and the conversion to it."""

from collections.abc import Sequence
from typing import Any, Literal

Quantisation = Literal["F16", "Q8_0", "Q4_K_M"]

# Replacement for rows that are not whole blocks of a type. K types have blocks of 256 weights, the others of 32.
_WITHOUT_WHOLE_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q5_0": "F16", "Q8_0": "F16"}


def wanted_type(name: str, shape: Sequence[int], quantisation: Quantisation, layers: int, tied: bool) -> str:
    """The type that a quantisation assigns to a weight, regardless of the length of its rows.

    Vectors (norms, biases) are F32. Q4_K_M uses Q4_K, but Q6_K for the output layer (or the embeddings if tied), and for the
    value and feed-forward down projections in the first and last eighth of the layers and every third one in between. llama.cpp
    has one more exception, for models of 80 layers, which is not implemented here.

    Args:
        name: name of the weight in GGUF.
        shape: shape of the weight.
        quantisation: quantisation of the file.
        layers: number of layers of the model.
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
    """That type, or llama.cpp's replacement for rows of `width` weights that are not whole blocks of it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    while width % GGML_QUANT_SIZES[GGMLQuantizationType[wanted]][0]:
        wanted = _WITHOUT_WHOLE_BLOCKS[wanted]
    return wanted


def encode(weight: Any, kind: str) -> Any:
    """Convert a float32 array to a GGUF type, as an array of bytes or floats.

    `gguf` writes every type except K types, which it only reads; libgguf has llama.cpp's code for those.
    """
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    if kind in ("Q4_K", "Q6_K"):
        import libgguf

        return libgguf.quantize_rows(weight, int(number))
    return gguf.quantize(weight, number)
