"""KL(teacher ‖ student) of pruned students before training, with and without the refit, on the demo's data.

    llmdistill generate configs/demo.yaml && llmdistill curate configs/demo.yaml
    python benchmarks/refit.py

Every student is pruned from the same teacher by the same measurements on the first training rows. Printed are nats per
token on the held-out rows (the first 83 completion tokens of twelve of them, as `llmdistill prune` says it), before any
training, and the processor's time for measuring, choosing and the refit.
"""

import time
from pathlib import Path
from typing import Any

import synthetic
import torch
from found import argument_parser, report

from llmdistill.config import Experiment, load_experiment
from llmdistill.config.student import Prune
from llmdistill.models.loading import load_model
from llmdistill.stages.prune import calibration_and_others, rounded
from llmdistill.students.layer_choice import TeacherKl, parts_kept
from llmdistill.students.pruning import prune_model
from llmdistill.students.refit import refit


def main() -> None:
    """Cut and refit every student, and print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="configuration of a curated experiment")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    arguments = parser.parse_args()
    with synthetic.demo(arguments.smoke, "generate", "curate") as tiny:
        figures = measure_all(load_experiment(arguments.config, tiny), arguments.rows)
    cut_kl, refitted_kl, _ = next(iter(figures["kl"].values()))
    print()
    report(figures, {"refitted_kl_over_cut_kl": refitted_kl / cut_kl}, arguments.json)


def students(config: Any) -> dict[str, dict[str, Any]]:
    """By name: half of the layers, two thirds of the neurons, a key-value head less, seven eighths of the channels."""
    layers, neurons, heads = config.num_hidden_layers // 2, config.intermediate_size * 2 // 3, config.num_key_value_heads - 1
    channels = config.hidden_size * 7 // 8
    of_layers = f"{layers} of {config.num_hidden_layers} layers"
    return {
        f"{of_layers}, by block influence": {"layers": layers},
        "the same, ridge 0.1": {"layers": layers, "ridge": 0.1},
        f"{of_layers}, evenly spaced": {"layers": layers, "by": "even"},
        f"{neurons:,} of {config.intermediate_size:,} neurons": {"intermediate_size": neurons},
        f"{heads} of {config.num_key_value_heads} key-value heads": {"key_value_heads": heads},
        f"{channels} of {config.hidden_size} channels": {"hidden_size": channels},
        f"{of_layers}, by KL": {"layers": layers, "by": "kl"},
    }


def measure_all(experiment: Experiment, rows: int) -> dict[str, Any]:
    """The KL of every student before and after the refit, and the seconds that this takes."""
    teacher = load_model(experiment.teacher.model, experiment.teacher.revision, "float32")
    calibration, others = calibration_and_others(experiment, rows)
    tokens = sum(len(row["input_ids"]) for row in calibration)
    nearness = TeacherKl(teacher, others)
    found = {}
    print(f"| {len(calibration)} rows, {tokens:,} tokens | cut | refitted | seconds |\n| --- | ---: | ---: | ---: |")
    for name, section in students(teacher.config).items():
        settings = Prune(**section)
        start = time.process_time()
        kept, _, _ = parts_kept(settings, teacher, calibration)
        student = prune_model(teacher, kept)
        before = nearness.kl(rounded(student, torch.bfloat16))
        refit(student, teacher, kept, calibration, settings.ridge)
        seconds = time.process_time() - start
        found[name] = [before, nearness.kl(rounded(student, torch.bfloat16)), seconds]
        print(f"| {name} | {before:.2f} | {found[name][1]:.2f} | {seconds:.0f} |", flush=True)
    return {"rows": rows, "tokens": tokens, "kl": found}


if __name__ == "__main__":
    main()
