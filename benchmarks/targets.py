"""Kinds of soft targets compared: bytes per position, and the error in the gradient.

    python benchmarks/targets.py                                  # a student before training
    python benchmarks/targets.py --student runs/demo/student     # and one after it

Real output of the demo teacher on prompts of the seed list, at sampling temperature 1 and 0.7: the teacher's full
distribution at every position, what each kind of target keeps of it, the size of that in Parquet, and the gradient of
the loss with respect to a student's logits, softmax(student) − target, against the full distribution's. The size
of an error depends on the student (--student): a trained one is close to the teacher and has a small exact gradient.

- **one position**: |error| of a single position's gradient, relative to the mean size of the exact one.
- **mean of 1,500**: the error left in the mean gradient over 1,500 positions, relative to the size of the exact mean
  gradient; the median over disjoint groups of positions.
- **bias**: the error left in the mean over all positions, less what noise alone would leave, relative likewise.

The captures of DistillKit are the two of its README (recommended: k = 128, the first 16 in bfloat16, the others by
the terms 0 to 4 and sqrt in float32; budget: k = 50, 1 and the terms 0, 1 and sqrt), with its arithmetic: ranks from 0, a
least-squares fit by a singular value decomposition in float32. Their errors are of what comes back, for both values of
its `missing_probability_handling`: "with tail" is `symmetric_uniform`, "zero" renormalises the k values. Their bytes are
those of its columns, lists of bytes, as its writer stores them (Snappy), and in parentheses with Zstandard, as ours are.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import synthetic
import torch
from found import argument_parser, report

from llmdistill.config import Generate, Prompts, Targets, Teacher
from llmdistill.config.section import Dtype
from llmdistill.config.student import Prune
from llmdistill.data.collator import DistillCollator
from llmdistill.data.convert.distillkit import Compression, pack
from llmdistill.data.shard_writer import parquet_encoding
from llmdistill.data.targets import Multinomial, Sampled, TopK
from llmdistill.models.forward import completion_logits
from llmdistill.models.loading import load_model, load_tokenizer
from llmdistill.stages.prompts import load_prompts
from llmdistill.students.pruning import choose, prune_model
from llmdistill.teachers import EngineSpec, Request
from llmdistill.teachers.transformers import TransformersEngine

TEACHER = "models/SmolLM2-135M-Instruct"
GROUP = 1500
COMMON: dict[str, Any] = {"d": 49152, "exact_dtype": "bfloat16", "residual_bins": [], "delta_encoding": False}
CAPTURES = {
    "budget": Compression(k=50, exact_k=1, polynomial_terms=[0, 1, "sqrt"], **COMMON),
    "recommended": Compression(k=128, exact_k=16, polynomial_terms=[0, 1, 2, 3, 4, "sqrt"], **COMMON),
}
Array = np.ndarray[Any, Any]


def main() -> None:
    """Print one table a temperature, the codec's speed, and the aims."""
    parser = argument_parser(__doc__)
    parser.add_argument("--positions", type=int, default=10_500, help="positions at each temperature")
    parser.add_argument("--student", help="a model directory (default: the teacher with every second layer)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tables = {}
    with tempfile.TemporaryDirectory() as directory:
        teacher = synthetic.teacher(Path(directory)) if arguments.smoke else TEACHER
        positions = GROUP if arguments.smoke else arguments.positions
        for temperature in (1.0, 0.7):
            tables[temperature] = measure(temperature, positions, teacher, arguments.student)
            print(f"\nText sampled at temperature {temperature:g}, {positions:,} positions\n")
            print("| targets | bytes per position | error, one position | error, mean of 1,500 | bias |")
            print("| --- | ---: | ---: | ---: | ---: |")
            for name, row in tables[temperature].items():
                size = f"{row['bytes']:.1f}" + (f" ({row['bytes_zstd']:.1f})" if "bytes_zstd" in row else "")
                print(f"| {name} | {size} | {row['one']:.3f} | {row['mean']:.3f} | {row['bias']:.3f} |")
    drawn = 50 if arguments.smoke else 2000
    speed, wide = codec_speed(drawn), wide_vocabulary(drawn)
    print(f"\ncodec at n = 16, one core: encodes {speed['encode']:,.0f}, decodes {speed['decode']:,.0f} positions/s")
    print(f"ids of a vocabulary of 152,064 instead of 49,152: {wide:.3f} × the bytes\n")
    best = tables[1.0]["sampled, n = 18"]
    aims = {
        "bytes_a_position": best["bytes"],
        "mean_gradient_error": best["mean"],
        "bias": best["bias"],
        "wide_vocabulary_ratio": wide,
        "decoded_positions_a_second": speed["decode"],
        "encoded_positions_a_second": speed["encode"],
    }
    report({"tables": tables}, aims, arguments.json)


def measure(temperature: float, positions: int, teacher: str, student: str | None) -> dict[str, dict[str, float]]:
    """Every kind's figures on the same positions."""
    generator = torch.Generator().manual_seed(1)
    errors: dict[str, list[Array]] = {}
    kept: dict[str, list[Any]] = {}
    sums: dict[str, list[Array]] = {}
    exact_norms, exact_sums = [], []
    pending: dict[str, Any] = {}
    count = 0
    for log_p, log_q, _ in distributions(positions, teacher, student, lambda layers: layers // 2, temperature):
        exact = log_q.exp() - log_p.exp()
        exact_norms.append(exact.norm(dim=1).numpy())
        gradients = {"exact": exact}
        for name, (gradient, stored) in estimates(log_p, log_q, generator).items():
            gradients[name] = gradient
            errors.setdefault(name, []).append((gradient - exact).norm(dim=1).numpy())
            kept.setdefault(name, []).append(stored)
        for start, end, full in groups(count, len(exact)):
            for name, gradient in gradients.items():
                pending[name] = pending.get(name, 0) + gradient[start:end].sum(0).numpy()
            if full:
                exact_sums.append(pending.pop("exact") / GROUP)
                for name, total in pending.items():
                    sums.setdefault(name, []).append(total / GROUP)
                pending = {}
        count += len(exact)
    scale = np.concatenate(exact_norms).mean()
    total_exact = np.mean(exact_sums, axis=0)
    table = {}
    for name, group_means in sums.items():
        deltas = [mean - exact for mean, exact in zip(group_means, exact_sums, strict=True)]
        relative = [float(np.linalg.norm(d) / np.linalg.norm(e)) for d, e in zip(deltas, exact_sums, strict=True)]
        noise = np.mean(np.concatenate(errors[name]) ** 2) / (GROUP * len(deltas))  # what independent errors would leave
        left = np.linalg.norm(np.mean(deltas, axis=0)) ** 2
        table[name] = sizes_of(kept[name]) | {
            "one": float(np.concatenate(errors[name]).mean() / scale),
            "mean": statistics.median(relative),
            "bias": float(np.sqrt(max(left - noise, 0)) / np.linalg.norm(total_exact)),
        }
    return table


def groups(count: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """Slices of a chunk that fall into one group each, and whether the group is full with it."""
    start = 0
    while start < length:
        end = min(length, start + GROUP - (count + start) % GROUP)
        yield start, end, (count + end) % GROUP == 0
        start = end


def estimates(log_p: torch.Tensor, log_q: torch.Tensor, generator: torch.Generator) -> dict[str, tuple[torch.Tensor, Any]]:
    """For every kind, the gradient that it gives and what it stores."""
    p, q = log_p.exp(), log_q.exp()
    found: dict[str, tuple[torch.Tensor, Any]] = {}
    for k in (16, 64):
        top = log_p.topk(k)
        soft = TopK.from_kept(top.indices.numpy(), top.values.numpy())
        found[f"top-{k}, with tail"] = (bucket_gradient(q, top.indices, top.values.exp()), soft)
        if k == 16:
            kept = torch.zeros_like(p).scatter(1, top.indices, top.values.exp())
            found["top-16, truncated"] = (q * kept.sum(1, keepdim=True) - kept, soft)
            found["top-16, renormalised"] = (q - kept / kept.sum(1, keepdim=True), soft)
    for name, config in CAPTURES.items():
        stored, top_ids, back = capture(log_p, config)
        found[f"DistillKit {name}, with tail"] = (bucket_gradient(q, top_ids, back.exp()), stored)
        found[f"DistillKit {name}, zero"] = (q.scatter_add(1, top_ids, -back.softmax(1)), stored)
    for n in (8, 12, 16, 18, 20, 24, 32):
        ids = Sampled.keep(log_p, n, torch.rand(len(log_p), 1, generator=generator, dtype=torch.float64))
        sample = Sampled.from_kept(ids.numpy(), log_p.gather(1, ids).numpy())
        weights = torch.from_numpy(sample.logweights_NK).exp()
        found[f"sampled, n = {n}"] = (q.scatter_add(1, torch.from_numpy(sample.ids_NK), -weights), sample)
    for k in (64, 256):
        within = torch.full_like(log_p, -torch.inf).scatter(1, log_p.topk(k).indices, log_p.topk(k).values).log_softmax(-1)
        ids = Sampled.keep(within, 16, torch.rand(len(log_p), 1, generator=generator, dtype=torch.float64))
        sample = Sampled.from_kept(ids.numpy(), within.gather(1, ids).numpy())
        weights = torch.from_numpy(sample.logweights_NK).exp()
        found[f"sampled, n = 16, from the top {k}"] = (q.scatter_add(1, torch.from_numpy(sample.ids_NK), -weights), sample)
    draws = Multinomial.keep(log_p, 50, torch.rand(len(log_p), 50, generator=generator, dtype=torch.float64))
    drawn = Multinomial.from_kept(draws.numpy(), log_p.gather(1, draws).numpy())
    found["multinomial, 50 draws"] = (q.scatter_add(1, draws, torch.full(draws.shape, -1 / 50)), drawn)
    return found


def bucket_gradient(q: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The gradient of −Σ_S p log q − r log Q, Q the student's mass outside: q Σ − p on S, q Σ − r q/Q elsewhere."""
    r = (1 - kept.sum(1, keepdim=True)).clamp(min=0)
    outside = q.scatter(1, ids, 0.0)
    total = kept.sum(1, keepdim=True) + r
    return (q * total - outside * r / outside.sum(1, keepdim=True)).scatter_add(1, ids, -kept)


def capture(log_p: torch.Tensor, config: Compression) -> tuple[dict[str, Array], torch.Tensor, torch.Tensor]:
    """DistillKit's columns of these positions, the ids (N, k), and the log-probabilities (N, k) that its reader returns."""
    top = log_p.topk(config.k)
    exact, rest = top.values[:, : config.exact_k].bfloat16(), top.values[:, config.exact_k :]
    ranks = torch.arange(rest.shape[1], dtype=torch.float32)
    basis = torch.stack([ranks.sqrt() if term == "sqrt" else ranks**term for term in config.polynomial_terms or []], dim=1)
    left, values, right = torch.linalg.svd(basis, full_matrices=False)
    inverse = torch.where(values > 1e-5, 1 / values, 0)
    coefficients = (right.T @ (inverse[:, None] * (left.T @ rest.T))).T.contiguous()
    back = torch.cat([exact.float(), (basis * coefficients[:, None]).sum(2)], dim=1)
    stored = {
        "compressed_logprobs": torch.cat([exact.view(torch.uint8), coefficients.view(torch.uint8)], dim=1).numpy(),
        "bytepacked_indices": pack(top.indices.numpy(), config.index_bits),
    }
    return stored, top.indices, back


def distributions(
    positions: int,
    teacher_path: str,
    student_path: str | None,
    layers: Callable[[int], int],
    temperature: float = 1.0,
    dtype: Dtype = "auto",
    by_student: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Log-probabilities of teacher and student (N, V) and the written tokens (N, 1), text by text.

    Args:
        positions: how many there are in all.
        teacher_path: the teacher's directory.
        student_path: the student's; None for the teacher with fewer layers.
        layers: how many of so many stay then.
        temperature: of the text.
        dtype: of both models.
        by_student: whether the student writes, and not the teacher.
    """
    tokenizer = load_tokenizer(teacher_path, None)
    prompts = load_prompts(Prompts(source="prompts/seeds/general.jsonl", template="prompts/instruct.yaml"))
    ids = [
        tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]
    engine = TransformersEngine(
        EngineSpec(
            teacher=Teacher(model=teacher_path, engine="transformers", dtype=dtype, batch_size=16),
            sampling=Generate(max_tokens=96, temperature=temperature),
            kept=Targets(kind="none"),
            end_ids=[tokenizer.eos_token_id],
            max_model_len=max(map(len, ids)) + 96,
        )
    )
    (teacher,) = engine.models
    fewer = Prune(layers=layers(teacher.config.num_hidden_layers), by="even")
    kept = choose(fewer, teacher.config, None)
    student = load_model(student_path, dtype=dtype) if student_path else prune_model(teacher, kept)
    if by_student:
        engine.models = [student.eval()]
    requests = [Request(index, prompt_ids, seed=index) for index, prompt_ids in enumerate(ids)]
    left = positions
    for start in range(0, len(requests), 16):
        batch = requests[start : start + 16]
        for completion, request in zip(engine.generate([batch]), batch, strict=True):
            row = {"input_ids": [*request.prompt_ids, *completion.ids], "completion_start": len(request.prompt_ids)}
            with torch.inference_mode():
                collated = DistillCollator(0)([row])
                both = [completion_logits(model, collated)[:left].float().log_softmax(-1) for model in (teacher, student)]
            left -= len(both[0])
            yield both[0].clone(), both[1].clone(), torch.from_numpy(completion.ids[: len(both[0])])[:, None]
            if not left:
                return
    raise SystemExit(f"the seed list gives {positions - left:,} positions only")


def sizes_of(kept: list[Any]) -> dict[str, float]:
    """Bytes a position of what is stored, in Parquet."""
    if isinstance(kept[0], dict):  # a capture of DistillKit: a list of bytes a position, a list of those a row
        positions = sum(len(rows["bytepacked_indices"]) for rows in kept)
        rows = {name: [batch[name].tolist() for batch in kept] for name in kept[0]}
        table = pa.table({name: pa.array(column, pa.list_(pa.list_(pa.uint8()))) for name, column in rows.items()})
        return {"bytes": parquet_size(table) / positions, "bytes_zstd": parquet_size(table, compression="zstd") / positions}
    return {"bytes": encoded_size(kept) / sum(map(len, kept))}


def encoded_size(kept: list[Any], vocab_size: int = 49152) -> int:
    """Bytes of targets in a shard."""
    table = pa.table(type(kept[0]).encode(kept, vocab_size))
    return parquet_size(table, **parquet_encoding(table.schema) | {"use_dictionary": False})


def parquet_size(table: pa.Table, **options: Any) -> int:
    """Compressed bytes of the table's columns."""
    stream = io.BytesIO()
    pq.write_table(table, stream, **options)
    metadata = pq.read_metadata(stream)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return sum(group.column(number).total_compressed_size for group in groups for number in range(metadata.num_columns))


def random_sample(vocab: int, positions: int, n: int) -> Sampled:
    """Targets of Zipf-like distributions over a vocabulary, for speed and width."""
    generator = torch.Generator().manual_seed(0)
    shape = -1.1 * torch.log(torch.arange(1, vocab + 1))
    parts = []
    for _ in range(positions // 50):
        log_p = (shape[torch.randperm(vocab, generator=generator)] + torch.randn(50, vocab, generator=generator)).log_softmax(-1)
        ids = Sampled.keep(log_p, n, torch.rand(50, 1, generator=generator, dtype=torch.float64))
        parts.append(Sampled.from_kept(ids.numpy(), log_p.gather(1, ids).numpy()))
    return Sampled(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("ids_NK", "logweights_NK", "exact_N", "entropy_N")))


def codec_speed(positions: int) -> dict[str, float]:
    """Positions a second, of sequences of so many, medians of nine rounds, encoding and decoding in turn; without compression."""
    torch.set_num_threads(1)
    soft = random_sample(49152, positions, 16)
    raw = (soft.ids_NK, soft.logweights_NK)
    speeds: dict[str, list[float]] = {"encode": [], "decode": []}
    sequences = 20
    for _ in range(9):
        start = time.perf_counter()
        stored = Sampled.encode([Sampled.from_kept(*raw) for _ in range(sequences)], 49152)
        speeds["encode"].append(sequences * len(soft) / (time.perf_counter() - start))
        flat = {name: column.flatten().to_numpy() for name, column in stored.items() if name != "target_entropy"}
        start = time.perf_counter()
        Sampled.decode(flat | {"target_entropy": np.zeros(sequences * len(soft), dtype=np.float32)})
        speeds["decode"].append(sequences * len(soft) / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def wide_vocabulary(positions: int) -> float:
    """Bytes of the same kind of distribution over 152,064 tokens, relative to 49,152."""
    sizes = [encoded_size([random_sample(vocab, positions, 18)], vocab) for vocab in (152_064, 49_152)]
    return sizes[0] / sizes[1]


if __name__ == "__main__":
    main()
