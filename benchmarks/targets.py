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

The DistillKit captures are re-implemented from its README (recommended: k = 128, the first 16 in bfloat16, the others by
the terms 0 to 4 and sqrt in float32; budget: k = 50, 1 and the terms 0, 1 and sqrt), ids bit-packed at the width of the
vocabulary, one binary value a position, zstd; their errors are of what comes back, with the tail as one bucket.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import synthetic
import torch
from found import argument_parser, report

from llmdistill.config import Generate, Prompts, Targets, Teacher
from llmdistill.config.student import Prune
from llmdistill.data.collator import DistillCollator, completion_logits
from llmdistill.data.dataset import parquet_encoding
from llmdistill.data.targets import Multinomial, Sampled, TopK
from llmdistill.models.loading import load_model, load_tokenizer
from llmdistill.stages.prompts import load_prompts
from llmdistill.students.pruning import choose, prune_model
from llmdistill.teachers import EngineSpec, Request
from llmdistill.teachers.transformers import TransformersEngine

TEACHER = "models/SmolLM2-135M-Instruct"
GROUP = 1500
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
                print(f"| {name} | {row['bytes']:.1f} | {row['one']:.3f} | {row['mean']:.3f} | {row['bias']:.3f} |")
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
    for log_p, log_q in distributions(temperature, positions, teacher, student):
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
        table[name] = {
            "bytes": size_of(name, kept[name]),
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
    for name, k, exact, terms in (("budget", 50, 1, (0, 1, 0.5)), ("recommended", 128, 16, (0, 1, 2, 3, 4, 0.5))):
        top = log_p.topk(k)
        packed, back = distillkit(top.indices.numpy(), top.values.numpy(), exact, terms)
        found[f"DistillKit {name}, with tail"] = (bucket_gradient(q, top.indices, torch.from_numpy(back).exp()), packed)
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
    stored = Multinomial.from_kept(draws.numpy(), log_p.gather(1, draws).numpy())
    found["multinomial, 50 draws"] = (q.scatter_add(1, draws, torch.full(draws.shape, -1 / 50)), stored)
    return found


def bucket_gradient(q: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The gradient of −Σ_S p log q − r log Q, Q the student's mass outside: q Σ − p on S, q Σ − r q/Q elsewhere."""
    r = (1 - kept.sum(1, keepdim=True)).clamp(min=0)
    outside = q.scatter(1, ids, 0.0)
    total = kept.sum(1, keepdim=True) + r
    return (q * total - outside * r / outside.sum(1, keepdim=True)).scatter_add(1, ids, -kept)


def distillkit(ids_NK: Array, logprobs_NK: Array, exact: int, terms: tuple[float, ...]) -> tuple[list[bytes], Array]:
    """A capture as one binary value a position, and the log-probabilities that come back from it."""
    n, k = ids_NK.shape
    first = torch.from_numpy(logprobs_NK[:, :exact]).bfloat16()
    t = np.arange(1, k - exact + 1)
    basis = np.stack([t**term for term in terms], axis=1)
    coefficients = np.linalg.lstsq(basis, logprobs_NK[:, exact:].T, rcond=None)[0].T
    coefficients = np.ascontiguousarray(coefficients, dtype=np.float32)
    back = np.concatenate([first.float().numpy(), coefficients @ basis.T.astype(np.float32)], axis=1).astype(np.float32)
    bits = ((ids_NK[..., None] >> np.arange(16)) & 1).astype(np.uint8).reshape(n, k * 16)  # V = 49,152
    parts = (np.packbits(bits, axis=1), first.view(torch.uint8).numpy(), coefficients.view(np.uint8))
    return [row.tobytes() for row in np.concatenate(parts, axis=1)], back


def distributions(
    temperature: float, positions: int, teacher_path: str, student_path: str | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities of teacher and student at the completion positions of text that the teacher writes."""
    tokenizer = load_tokenizer(teacher_path, None)
    prompts = load_prompts(Prompts(source="prompts/seeds/general.jsonl", template="prompts/instruct.yaml"))
    ids = [
        tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]
    engine = TransformersEngine(
        EngineSpec(
            teacher=Teacher(model=teacher_path, engine="transformers", batch_size=16),
            sampling=Generate(max_tokens=96, temperature=temperature),
            kept=Targets(kind="none"),
            end_ids=[tokenizer.eos_token_id],
            max_model_len=max(map(len, ids)) + 96,
        )
    )
    (teacher,) = engine.models
    half = choose(Prune(layers=teacher.config.num_hidden_layers // 2, by="even"), teacher.config, None)
    student = load_model(student_path) if student_path else prune_model(teacher, half)
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
            yield both[0].clone(), both[1].clone()
            if not left:
                return
    raise SystemExit(f"the seed list gives {positions - left:,} positions only")


def size_of(name: str, kept: list[Any]) -> float:
    """Bytes a position of what is stored, in Parquet."""
    positions = sum(map(len, kept))
    if name.startswith("DistillKit"):
        columns = {"packed": pa.array([row for rows in kept for row in rows], pa.binary())}
    else:
        columns = type(kept[0]).encode(kept, 49152)
    return parquet_size(columns) / positions


def parquet_size(columns: dict[str, Any]) -> int:
    """Compressed bytes of the columns, in the encodings of a shard."""
    stream = io.BytesIO()
    table = pa.table(columns)
    pq.write_table(table, stream, **parquet_encoding(table.schema) | {"use_dictionary": False})
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
    sizes = [parquet_size(Sampled.encode([random_sample(vocab, positions, 18)], vocab)) for vocab in (152_064, 49_152)]
    return sizes[0] / sizes[1]


if __name__ == "__main__":
    main()
