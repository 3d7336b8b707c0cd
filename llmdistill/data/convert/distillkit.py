"""DistillKit's compressed log-probabilities: how a position's k tokens and their log-probabilities become bytes.

Written from DistillKit's documentation (github.com/arcee-ai/DistillKit, "Compression Deep-Dive" and the fields of its
`logprob_compressor`). At each position the k tokens stand in descending order of probability, in two byte vectors:

- `bytepacked_indices`: the ids, ceil(log2 d) bits each, most significant bit first, one after the other, zero bits at the end.
- `compressed_logprobs`: `exact_k` values as floats; then the coefficients of Σ c·term(t), the curve of the other values
  over their rank t = 0, 1, … (or 0 to 1 with `normalize_t`); then each residual bin, a scale and signed integers that are
  added to the curve times that scale. They are the differences from the curve as computed in the precision of the
  coefficients. With `delta_encoding` all of this describes differences from one rank to the next.

Numbers are little-endian; each part begins on a byte.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator

from llmdistill.config import Section, read_yaml
from llmdistill.data.targets import Array
from llmdistill.errors import InputError

CONFIG_FILE = "compression_config.yaml"  # the name under which DistillKit's capture saves its configuration
Float = Literal["float16", "bfloat16", "float32", "float64"]
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_POSITIONS = 4096  # at a time: one bit of an id takes a byte on the way


class ResidualBin(Section):
    """Quantised differences from the curve for a run of ranks."""

    scale_dtype: Float
    """Precision of the scale."""
    element_bits: int = Field(gt=0, le=32)
    """Bits of one integer."""
    num_elements: int = Field(gt=0)
    """How many ranks it covers."""


class Compression(Section):
    """DistillKit's `logprob_compressor`; names and defaults are its own."""

    d: int = Field(gt=1)
    """Size of the vocabulary."""
    k: int = Field(gt=0)
    """Tokens per position."""
    exact_k: int = Field(ge=0)
    """How many of them, the most likely ones, have their log-probability stored as a float."""
    exact_dtype: Float = "float32"
    """Precision of those."""
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    """Terms of the curve: powers of the rank, its root, its exponential."""
    term_dtype: Float = "float32"
    """Precision of the coefficients."""
    residual_bins: list[ResidualBin]
    """Quantised differences from the curve."""
    delta_encoding: bool = True
    """Store each log-probability as the difference from the one before."""
    error_diffusion: bool = False
    """How the writer rounded; reading is the same."""
    normalize_t: bool = False
    """Ranks from 0 to 1."""

    @model_validator(mode="after")
    def _check(self) -> "Compression":
        covered = sum(part.num_elements for part in self.residual_bins)
        if self.exact_k > self.k or covered > self.k - self.exact_k:
            raise ValueError("exact_k and the residual bins together cover more than k values")
        return self

    @property
    def index_bits(self) -> int:
        """Number of bits per id."""
        return int(np.ceil(np.log2(np.float32(self.d))))

    @property
    def index_bytes(self) -> int:
        """Bytes of `bytepacked_indices` per position."""
        return -(-self.k * self.index_bits // 8)

    @property
    def logprob_bytes(self) -> int:
        """Bytes of `compressed_logprobs` per position."""
        bins = sum(_BYTES[part.scale_dtype] + -(-part.num_elements * part.element_bits // 8) for part in self.residual_bins)
        return self.exact_k * _BYTES[self.exact_dtype] + len(self.polynomial_terms or []) * _BYTES[self.term_dtype] + bins


def our_compression(vocab_size: int, k: int, exact_k: int) -> Compression:
    """The configuration we write: DistillKit's recommended one, with float16 for bfloat16, which is finer at the same size.

    Raises:
        InputError: `exact_k` leaves nothing that a polynomial is good for.
    """
    terms: list[int | Literal["sqrt", "exp"]] = [0, 1, 2, 3, 4, "sqrt"]
    if not 0 < exact_k <= k or 0 < k - exact_k <= len(terms):
        raise InputError(
            f"--exact-k {exact_k}: with {k} values per position it must be {k}, or from 1 to {max(k - len(terms) - 1, 0)} "
            f"so that more values are left than the curve's {len(terms)} coefficients"
        )
    return Compression(
        d=vocab_size,
        k=k,
        exact_k=exact_k,
        exact_dtype="float16",
        polynomial_terms=terms if exact_k < k else None,
        residual_bins=[],
        delta_encoding=False,
    )


def read_compression(file: Path) -> Compression:
    """The configuration that a capture was written with, alone or as the section `logprob_compressor`.

    Raises:
        InputError: names the file and the key.
    """
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; it must contain the `logprob_compressor` section that the capture was made with. "
            "Captures in the legacy layout (legacy_logit_compression) are not supported"
        )
    tree = read_yaml(file)
    try:
        return Compression.model_validate(tree.get("logprob_compressor", tree))
    except ValidationError as error:
        detail = error.errors()[0]
        raise InputError(f"{file}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}, got {detail['input']!r}") from None


def encode(ids_NK: Array, logprobs_NK: Array, config: Compression) -> tuple[Array, Array]:
    """Bytes of N positions, for a configuration made by `our_compression`.

    Args:
        ids_NK: tokens, in descending order of their log-probabilities.
        logprobs_NK: the log-probabilities.
        config: what to store how.

    Returns:
        `compressed_logprobs` (N, logprob_bytes) and `bytepacked_indices` (N, index_bytes), uint8.
    """
    parts = [_to_bytes(logprobs_NK[:, : config.exact_k].astype("<f2"))]
    if config.polynomial_terms:
        terms_tP = _terms(config, torch.float64).numpy()
        size_P = np.abs(terms_tP).max(axis=0)  # of like size, the terms do not swamp each other in the fit
        coefficients_NP = logprobs_NK[:, config.exact_k :].astype(np.float64) @ np.linalg.pinv(terms_tP / size_P).T / size_P
        parts.append(_to_bytes(coefficients_NP.astype("<f4")))
    return np.concatenate(parts, axis=1), pack(ids_NK, config.index_bits)


def decode(logprob_bytes: Array, index_bytes: Array, config: Compression) -> tuple[Array, Array]:
    """Ids (N, k), int64, and log-probabilities (N, k), float32, of N positions, in stored order."""
    ids_NK = unpack(index_bytes, config.k, config.index_bits)
    exact, rest = _split(logprob_bytes, config.exact_k * _BYTES[config.exact_dtype])
    curve_Nt = np.zeros((len(ids_NK), config.k - config.exact_k))
    if config.polynomial_terms:
        coefficients, rest = _split(rest, len(config.polynomial_terms) * _BYTES[config.term_dtype])
        curve_Nt += _in_parts(_curve, _from_bytes(coefficients, config.term_dtype), config)
    start = 0
    for part in config.residual_bins:
        scale, rest = _split(rest, _BYTES[part.scale_dtype])
        packed, rest = _split(rest, -(-part.num_elements * part.element_bits // 8))
        steps = unpack(packed, part.num_elements, part.element_bits)
        # One bit says minus or plus the scale; more bits count from the lowest step.
        steps = 2 * steps - 1 if part.element_bits == 1 else steps - (1 << (part.element_bits - 1))
        curve_Nt[:, start : start + part.num_elements] += steps * _from_bytes(scale, part.scale_dtype)
        start += part.num_elements
    logprobs_NK = np.concatenate([_from_bytes(exact, config.exact_dtype), curve_Nt], axis=1)
    if config.delta_encoding:
        logprobs_NK = logprobs_NK.cumsum(axis=1)
    return ids_NK, logprobs_NK.astype(np.float32)


def pack(values_NK: Array, bits: int) -> Array:
    """Integers as one bit stream per row, most significant bit first, padded with zero bits; uint8."""
    return _in_parts(_pack, values_NK, bits)


def unpack(packed: Array, count: int, bits: int) -> Array:
    """The first `count` integers of each row of such a stream; int64."""
    return _in_parts(_unpack, packed, count, bits)


def _pack(values_NK: Array, bits: int) -> Array:
    spread_NKb = np.unpackbits(values_NK.astype(">u4").view(np.uint8).reshape(*values_NK.shape, 4), axis=2)[:, :, 32 - bits :]
    return np.packbits(spread_NKb.reshape(len(values_NK), values_NK.shape[1] * bits), axis=1)


def _unpack(packed: Array, count: int, bits: int) -> Array:
    spread_NKb = np.zeros((len(packed), count, 32), dtype=np.uint8)
    spread_NKb[:, :, 32 - bits :] = np.unpackbits(packed, axis=1)[:, : count * bits].reshape(len(packed), count, bits)
    return np.packbits(spread_NKb, axis=2).view(">u4")[:, :, 0].astype(np.int64)


def _in_parts(function: Any, rows: Array, *arguments: Any) -> Array:
    parts = [function(rows[start : start + _POSITIONS], *arguments) for start in range(0, max(len(rows), 1), _POSITIONS)]
    return np.concatenate(parts)


def _curve(coefficients_NP: Array, config: Compression) -> Array:
    """The curve at each rank, shape (N, k − exact_k); with residuals, rounded as it was when they were computed."""
    dtype = getattr(torch, config.term_dtype) if config.residual_bins else torch.float64
    terms_tP = _terms(config, dtype)
    return (terms_tP * torch.from_numpy(coefficients_NP).to(dtype)[:, None]).sum(dim=2).double().numpy()


def _terms(config: Compression, dtype: torch.dtype) -> torch.Tensor:
    """The terms of the curve at each rank, shape (k − exact_k, terms)."""
    count = config.k - config.exact_k
    ranks = torch.linspace(0, 1, count, dtype=dtype) if config.normalize_t else torch.arange(count, dtype=dtype)
    terms = config.polynomial_terms or []
    return torch.stack([ranks**term if isinstance(term, int) else getattr(torch, term)(ranks) for term in terms], dim=1)


def _to_bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).view(np.uint8)


def _from_bytes(stored: Array, dtype: Float) -> Array:
    stored = np.ascontiguousarray(stored)
    if dtype == "bfloat16":  # the upper half of a float32
        values = (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = stored.view(f"<f{_BYTES[dtype]}")
    return values.astype(np.float64)


def _split(stored: Array, size: int) -> tuple[Array, Array]:
    return stored[:, :size], stored[:, size:]
