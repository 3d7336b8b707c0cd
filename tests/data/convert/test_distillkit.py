"""The codec against readers that share nothing with it: Python integers, `struct`, torch's bfloat16, least squares."""

import struct

import numpy as np
import pytest
import torch
import yaml

from llmdistill.data.convert.distillkit import Compression, decode, encode, our_compression, pack, read_compression, unpack
from llmdistill.errors import InputError


def bits_of(row, bits, count):
    """The first integers of a stream of bits, most significant first, by Python's own arithmetic."""
    text = "".join(f"{byte:08b}" for byte in row)
    return [int(text[n * bits : (n + 1) * bits], 2) for n in range(count)]


def curve(coefficients, terms, rank):
    value = {"sqrt": rank**0.5, "exp": np.exp(rank)}
    return sum(c * (rank**term if isinstance(term, int) else value[term]) for c, term in zip(coefficients, terms, strict=True))


def descending(positions, k, vocab=1000, seed=0):
    logprobs = torch.from_numpy(np.random.default_rng(seed).normal(size=(positions, vocab)) * 3).log_softmax(-1)
    top = logprobs.topk(k)
    return top.indices.numpy(), top.values.numpy()


@pytest.mark.parametrize(("vocab", "k"), [(1000, 7), (49152, 16), (65536, 3), (65537, 3), (151936, 128)])
def test_ids_are_one_stream_of_bits(vocab, k):
    config = our_compression(vocab, k, k)
    ids = np.random.default_rng(0).integers(0, vocab, size=(5, k))
    ids[0, 0], ids[1, -1] = vocab - 1, vocab - 1
    packed = pack(ids, config.index_bits)
    assert config.index_bits == (vocab - 1).bit_length()
    assert packed.shape == (5, config.index_bytes)
    assert [bits_of(row, config.index_bits, k) for row in packed] == ids.tolist()
    assert unpack(packed, k, config.index_bits).tolist() == ids.tolist()


def test_more_positions_than_fit_at_once():
    ids = np.random.default_rng(0).integers(0, 1000, size=(9000, 3))
    assert unpack(pack(ids, 10), 3, 10).tolist() == ids.tolist()
    assert pack(ids[:0], 10).shape == (0, 4)


def test_all_values_exact():
    ids, logprobs = descending(6, 8)
    stored, packed = encode(ids, logprobs, our_compression(1000, 8, 8))
    assert stored.shape == (6, 16)
    read = np.array([struct.unpack("<8e", row.tobytes()) for row in stored])
    np.testing.assert_array_equal(read, logprobs.astype(np.float16))
    again = decode(stored, packed, our_compression(1000, 8, 8))
    assert again[0].tolist() == ids.tolist()
    np.testing.assert_array_equal(again[1], read.astype(np.float32))


def test_the_curve_is_the_best_there_is():
    ids, logprobs = descending(20, 64)
    config = our_compression(1000, 64, 16)
    stored, packed = encode(ids, logprobs, config)
    assert stored.shape[1] == config.logprob_bytes == 16 * 2 + 6 * 4
    coefficients = np.array([struct.unpack("<6f", row[32:].tobytes()) for row in stored], dtype=np.float64)
    read = np.stack([curve(coefficients.T, config.polynomial_terms, rank) for rank in range(48)], axis=1)
    terms = np.stack([np.arange(48.0) ** n for n in range(5)] + [np.sqrt(np.arange(48.0))], axis=1)
    best = terms @ np.linalg.lstsq(terms, logprobs[:, 16:].T, rcond=None)[0]
    np.testing.assert_allclose(read, best.T, atol=2e-4)
    np.testing.assert_allclose(decode(stored, packed, config)[1][:, 16:], read, atol=1e-5)


def test_a_capture_in_bfloat16_with_differences_and_residuals():
    """The fields of DistillKit's documentation that we read but do not write."""
    config = Compression.model_validate(
        {
            "d": 300,
            "k": 7,
            "exact_k": 2,
            "exact_dtype": "bfloat16",
            "polynomial_terms": [0, "exp"],
            "term_dtype": "float16",
            "residual_bins": [
                {"scale_dtype": "float32", "element_bits": 3, "num_elements": 3},
                {"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 1},
            ],
            "normalize_t": True,
        }
    )
    exact = torch.tensor([-0.1234, -1.5], dtype=torch.bfloat16)
    steps, scale = [0, 7, 5], 0.25  # three bits: from −4 to 3
    sign, sign_scale = 1, torch.tensor([0.5], dtype=torch.bfloat16)
    stored = (
        exact.view(torch.uint8).numpy().tobytes()
        + struct.pack("<2e", -0.5, -0.125)
        + struct.pack("<f", scale)
        + bytes([0b000_111_10, 0b1_0000000])
        + sign_scale.view(torch.uint8).numpy().tobytes()
        + bytes([sign << 7])
    )
    assert len(stored) == config.logprob_bytes
    ids = [0, 299, 256, 1, 2, 3, 4]
    packed = int("".join(f"{n:09b}" for n in ids) + "0", 2).to_bytes(8, "big")

    read_ids, logprobs = decode(np.frombuffer(stored, np.uint8)[None], np.frombuffer(packed, np.uint8)[None], config)
    assert read_ids.tolist() == [ids]
    line = [float(np.float16(-0.5) - np.float16(0.125) * np.exp(np.float16(rank / 4))) for rank in range(5)]
    differences = [*exact.double().tolist(), *line]
    for place, step in enumerate(steps):
        differences[2 + place] += (step - 4) * scale
    differences[5] += (2 * sign - 1) * 0.5
    np.testing.assert_allclose(logprobs[0], np.cumsum(differences), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_residuals_make_up_for_the_precision_of_the_curve(dtype):
    """Written as DistillKit writes: coefficients and curve in `term_dtype`, then what is missing, in steps of its largest/128."""
    _, logprobs = descending(50, 40)
    terms = [0, 1, 2, "sqrt"]
    bins = [{"scale_dtype": "float32", "element_bits": 8, "num_elements": 38}]
    config = Compression.model_validate(
        {"d": 1000, "k": 40, "exact_k": 2, "polynomial_terms": terms, "term_dtype": dtype, "residual_bins": bins}
        | {"delta_encoding": False}
    )
    precision = getattr(torch, dtype)
    rank = torch.arange(38, dtype=precision)
    basis = torch.stack([rank**0, rank, rank**2, rank.sqrt()], dim=1)
    rest = torch.from_numpy(logprobs[:, 2:]).float()
    coefficients = torch.linalg.lstsq(basis.float(), rest.T).solution.T.to(precision).contiguous()
    residuals = rest - (basis * coefficients[:, None]).sum(-1).float()
    scale = residuals.abs().amax(1, keepdim=True) / 128
    steps = (residuals / scale).round().clamp(-128, 127)
    parts = (torch.from_numpy(logprobs[:, :2]).float().contiguous(), coefficients, scale, (steps + 128).to(torch.uint8))
    stored = torch.cat([part.view(torch.uint8) for part in parts], dim=1).numpy()
    assert stored.shape[1] == config.logprob_bytes
    _, read = decode(stored, np.zeros((50, config.index_bytes), np.uint8), config)
    # Half a step from what was written, and a whole one where the largest is positive: 127 is the last step.
    assert (np.abs(read[:, 2:] - rest.numpy()) <= scale.numpy() * 1.001).all()
    assert np.abs(read[:, 2:] - rest.numpy()).mean() < 0.3 * scale.mean()


@pytest.mark.parametrize("exact_k", [0, 2, 7, 9, -1])
def test_a_curve_with_as_many_coefficients_as_values_is_refused(exact_k):
    with pytest.raises(InputError, match=f"--exact-k {exact_k}: with 8 values per position it must be 8, or from 1 to 1"):
        our_compression(1000, 8, exact_k)


def test_the_configuration_file(tmp_path):
    file = tmp_path / "compression_config.yaml"
    with pytest.raises(InputError, match=r"compression_config.yaml: no such file; it must contain"):
        read_compression(file)
    ours = our_compression(1000, 64, 16)
    for tree in (ours.model_dump(), {"logprob_compressor": ours.model_dump()}):
        file.write_text(yaml.safe_dump(tree))
        assert read_compression(file) == ours
    file.write_text("{d: 100, k: 4, exact_k: 5, residual_bins: []}")
    with pytest.raises(InputError, match=r"compression_config.yaml: .*cover more than k"):
        read_compression(file)
    file.write_text("{vocab_size: 100, k: 4, exact_k: 4, polynomial_degree: 8}")
    with pytest.raises(InputError, match=r"compression_config.yaml: d: Field required"):
        read_compression(file)
