"""Effect of the kind of targets on the student: the same student, text, steps and seeds, trained on every kind.

    make demo && python benchmarks/outcome.py

The reference is the full distribution of an online teacher (`targets: online`). All other targets are
made from the same distribution by the package's own functions, stored, read back and trained on, with alpha 1: only
the targets differ. Text only is alpha 0. Every seed shuffles the rows and draws the samples anew. What is printed is
KL(teacher ‖ student) in nats per token on the demo's held-out rows, mean over the seeds with a 95% interval by bootstrap
over prompts; how far above the reference it is, paired on rows and seeds; and the same for the lowest and highest seed.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import synthetic
import torch
from found import argument_parser, report
from transformers.utils import logging

from llmdistill import DistillConfig, DistillTrainer, load_dataset
from llmdistill.config import Experiment, Targets, load_experiment
from llmdistill.data.collator import DistillCollator
from llmdistill.data.rows import Row, rows_to_table
from llmdistill.data.shard_writer import write_shard
from llmdistill.data.targets import TopK
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.statistics import draw_clusters, mean_interval
from llmdistill.models.forward import completion_logits
from llmdistill.models.loading import load_model

KINDS = {
    **{f"sampled, n = {n}": Targets(kind="sampled", n=n) for n in (8, 16, 32)},
    **{f"top-{k}, with tail": Targets(kind="topk", k=k) for k in (16, 64)},
    **{f"top-{k}, renormalised": Targets(kind="topk", k=k) for k in (16, 64)},
}
FULL, TEXT = "whole distribution", "text alone"
Array = np.ndarray[Any, Any]


def main() -> None:
    """Train on every kind with every seed; print the table and the aim."""
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    with synthetic.demo(arguments.smoke, "generate", "curate", "prune") as tiny:
        experiment = load_experiment(Path("configs/demo.yaml"), tiny)
        table = measure(experiment, *((2, 1) if arguments.smoke else (arguments.steps, arguments.seeds)))
    print(f"\n| trained on | held-out KL | above the {FULL} | lowest and highest seed |\n| --- | ---: | ---: | ---: |")
    for name, row in table.items():
        above = "" if name == FULL else f"{row['above']:+.1%} ({row['above_low']:+.1%} to {row['above_high']:+.1%})"
        seeds = "" if name == FULL else f"{row['seed_low']:+.1%}, {row['seed_high']:+.1%}"
        print(f"| {name} | {row['kl']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | {above} | {seeds} |")
    aims = {"sampled_16_above_full": table["sampled, n = 16"]["above"]}
    print()
    report({"table": table}, aims, arguments.json)


def measure(experiment: Experiment, steps: int, seeds: int) -> dict[str, dict[str, float]]:
    """Every kind's figures on the held-out rows."""
    teacher = load_model(experiment.teacher.model)
    rows, test = (load_dataset(experiment.directory("curated"), split) for split in ("train", "test"))
    found: dict[str, list[Array]] = {}
    for seed in range(seeds):
        for name, data in datasets_of(rows, seed, teacher):
            student = train(name, data, seed, steps, experiment, teacher)
            measured = fidelity({"teacher": teacher, "student": student}, test, 8)
            found.setdefault(name, []).append(measured["student kl"])
            print(f"seed {seed}  {name:<24}{measured['student kl'].sum() / measured['tokens'].sum():.4f}", flush=True)
    return summary(found, measured["tokens"], [str(prompt) for prompt in test.with_format(None)["prompt"]])


def datasets_of(rows: Any, seed: int, teacher: Any) -> Iterator[tuple[str, Any]]:
    """The demo's training rows with every kind of targets, drawn with the seed."""
    yield FULL, rows
    yield TEXT, rows
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, list[Row]] = {name: [] for name in KINDS}
    for row in rows:
        with torch.inference_mode():
            log_p = completion_logits(teacher, DistillCollator(pad_token_id=0)([row])).float().log_softmax(-1)
        for name, kept in KINDS.items():
            uniform = torch.rand(len(log_p), kept.stored.uniforms(kept.kept), generator=generator, dtype=torch.float64)
            ids = kept.stored.keep(log_p, kept.kept, uniform)
            soft = kept.stored.from_kept(ids.numpy(), log_p.gather(1, ids).numpy())
            if name.endswith("renormalised") and isinstance(soft, TopK):
                soft = TopK(soft.ids_NK, soft.logprobs_NK, np.zeros_like(soft.tail_N))  # the reader divides by the sum
            ids_T, start = row["input_ids"], int(row["completion_start"])
            made[name].append(Row(str(row["id"]), [], [], ids_T[:start], ids_T[start:], "stop", row["token_logprobs"], soft))
    for name, stored in made.items():
        with tempfile.TemporaryDirectory() as directory:
            shard = write_shard(Path(directory), "train", 0, 1, rows_to_table(stored, teacher.config.vocab_size))
            yield name, datasets.Dataset.from_parquet(str(shard.file), keep_in_memory=True).with_format("numpy")


def train(name: str, data: Any, seed: int, steps: int, experiment: Experiment, teacher: Any) -> Any:
    """The demo's student after so many steps of the demo's recipe."""
    recipe = {**experiment.train.args, "max_steps": steps, "seed": seed, "save_strategy": "no"}
    recipe |= {"report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as directory:
        arguments = DistillConfig(
            output_dir=directory,
            alpha=0.0 if name == TEXT else 1.0,
            use_cpu=not torch.accelerator.is_available(),
            logging_strategy="no",
            **{key: value for key, value in recipe.items() if not key.startswith("logging")},
        )
        student = load_model(str(experiment.directory("student-before")), dtype="float32")
        online = teacher if name == FULL else None
        DistillTrainer(model=student, args=arguments, train_dataset=data, teacher=online).train()
    return student.to(teacher.dtype).eval()  # as it would be saved


def summary(found: dict[str, list[Array]], tokens: Array, prompts: list[str]) -> dict[str, dict[str, float]]:
    """Means over tokens and seeds with intervals over prompts, and the same relative to the whole distribution."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    cluster = np.array([numbers[prompt] for prompt in prompts])
    draws = draw_clusters(len(numbers), 2000, seed=0)
    per_prompt = np.bincount(cluster, tokens)
    full = np.bincount(cluster, np.mean(found[FULL], axis=0))
    table = {}
    for name, seeds in found.items():
        sums = np.bincount(cluster, np.mean(seeds, axis=0))
        kl, above = mean_interval(sums, per_prompt, draws), mean_interval(sums - full, full, draws)
        by_seed = [mine.sum() / reference.sum() - 1 for mine, reference in zip(seeds, found[FULL], strict=True)]
        table[name] = {
            "kl": kl.mean,
            "low": kl.low,
            "high": kl.high,
            "above": above.mean,
            "above_low": above.low,
            "above_high": above.high,
            "seed_low": min(by_seed),
            "seed_high": max(by_seed),
        }
    return table


if __name__ == "__main__":
    main()
