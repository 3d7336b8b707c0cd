"""Cost of 4-bit weights for a student with standard training, and for one with quantisation-aware training.

    make demo && python benchmarks/quantisation.py

The same student, data, steps and seeds; the one difference is `train.fake_quantize: w4a16`. Each is then exported as w4a16,
rounded to the nearest, and the usual one also by GPTQ where llm-compressor is installed (`--gptq`). What is printed is
KL(teacher ‖ student) in nats per token on the demo's held-out rows, before and after, mean over the seeds with a 95% interval
by bootstrap over prompts; and by how much the quantisation-aware student is closer, paired on rows and seeds.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import synthetic
from found import argument_parser, report

from llmdistill import load_dataset
from llmdistill.config import Experiment, load_experiment
from llmdistill.config.export import Export
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.statistics import Draws
from llmdistill.models.loading import load_model, load_tokenizer
from llmdistill.stages.train import train
from llmdistill.students.formats import FORMATS, Source

ROUNDINGS: tuple[Literal["nearest"], Literal["gptq"]] = ("nearest", "gptq")
USUAL, ROUNDED = "trained as usual", "trained through rounded weights"
Array = np.ndarray[Any, Any]
Overrides = list[tuple[str, str]]


def main() -> None:
    """Train both with every seed, quantise and measure; print the table and the aim."""
    parser = argument_parser(__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="output directory of the demo")
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="number of held-out rows (default: all)")
    parser.add_argument("--gptq", action="store_true", help="also by GPTQ")
    arguments = parser.parse_args()
    with synthetic.demo(arguments.smoke, "generate", "curate", "prune") as tiny:
        if arguments.smoke:
            arguments.run, arguments.steps, arguments.seeds = Path(dict(tiny)["output"]), 2, 1
        compare(arguments, tiny)


def compare(arguments: argparse.Namespace, tiny: Overrides) -> None:
    """Everything, once the demo's dataset and student are there."""
    rows = load_dataset(arguments.run / "curated", "test")
    rows = rows.select(range(min(arguments.rows or len(rows), len(rows))))
    found: dict[str, list[Array]] = {}
    for seed in range(arguments.seeds):
        for name, measured in students(arguments, tiny, seed, rows):
            found.setdefault(name, []).append(measured)
            print(f"seed {seed}  {name:<60}{measured[0].sum() / measured[1].sum():.4f}", flush=True)
    figures = summary(found, [str(prompt) for prompt in rows.with_format(None)["prompt"]])
    print("\n| student | KL from the teacher | 95% interval |\n| --- | ---: | ---: |")
    for name, (mean, low, high) in figures.items():
        print(f"| {name} | {mean:.4f} | {low:.4f} to {high:.4f} |")
    print()
    about = {"steps": arguments.steps, "seeds": arguments.seeds, "rows": len(rows), "figures": figures}
    report(about, {"nearer_when_trained_through_rounded_weights": figures["difference"][0]}, arguments.json)


def students(arguments: argparse.Namespace, tiny: Overrides, seed: int, rows: Any) -> Iterator[tuple[str, Array]]:
    """The sums of KL and the tokens of every row for every way to a quantised student."""
    with tempfile.TemporaryDirectory() as directory:
        for name, how in ((USUAL, None), (ROUNDED, "w4a16")):
            experiment = experiment_of(arguments, tiny, seed, how, Path(directory) / name.replace(" ", "-"))
            train(experiment)
            source = str(experiment.directory("student"))
            yield name, measure(experiment, load_model(source), rows)
            for rounding in ROUNDINGS[: 2 if arguments.gptq and how is None else 1]:
                out = Path(directory) / f"{name}-{rounding}".replace(" ", "-")
                out.mkdir()
                settings = Export(formats=["w4a16"], rounding=rounding)
                taken = load_dataset(arguments.run / "curated", "train").take(settings.calibration_rows)
                calibration = [[int(token) for token in row["input_ids"]] for row in taken] if rounding == "gptq" else []
                w4a16 = FORMATS["w4a16"]
                w4a16.write(Source(source, load_tokenizer(source, None), settings, calibration), out)
                yield f"{name}, w4a16 by {rounding}", measure(experiment, w4a16.load(str(out), "auto"), rows)


def experiment_of(
    arguments: argparse.Namespace, tiny: Overrides, seed: int, fake_quantize: str | None, output: Path
) -> Experiment:
    """The demo with its student given, so that it is not cut again."""
    overrides = {
        "output": output,
        "seed": seed,
        "student.model": arguments.run / "student-before",
        "train.dataset": arguments.run / "curated",
        "train.compare_text_only": "false",
        "train.fake_quantize": fake_quantize or "null",
        "train.args.max_steps": arguments.steps,
    }
    return load_experiment(Path("configs/demo.yaml"), [*tiny, *((key, str(value)) for key, value in overrides.items())])


def measure(experiment: Experiment, student: Any, rows: Any) -> Array:
    """Each row's sum of KL(teacher ‖ student) and its tokens; shape (2, rows)."""
    models = {"teacher": load_model(experiment.teacher.model), "student": student}
    measured = fidelity(models, rows, experiment.eval.batch_size)
    return np.stack([measured["student kl"], measured["tokens"]])


def summary(found: dict[str, list[Array]], prompts: list[str]) -> dict[str, tuple[float, float, float]]:
    """Means over seeds with their intervals, and the difference between both ways to a quantised student."""
    draws = Draws.of(prompts, 2000, 0)

    def interval(kl: Array, tokens: Array) -> tuple[float, float, float]:
        made = draws.interval(kl, tokens)
        return made["mean"], made["low"], made["high"]

    mean = {name: np.mean(measured, axis=0) for name, measured in found.items()}
    figures = {name: interval(*measured) for name, measured in mean.items()}
    usual, rounded = (mean[f"{name}, w4a16 by nearest"] for name in (USUAL, ROUNDED))
    return {**figures, "difference": interval(usual[0] - rounded[0], usual[1])}


if __name__ == "__main__":
    main()
