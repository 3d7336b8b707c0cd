"""KL(teacher ‖ student) of pruned students before training, with and without the refit, on the demo's data.

    llmdistill generate configs/demo.yaml && llmdistill curate configs/demo.yaml
    python benchmarks/refit.py

Every student is pruned from the same teacher by the same measurements on the first training rows. Printed are nats per
token on the held-out rows (the first 83 completion tokens of twelve of them, as `llmdistill prune` says it), before any
training, and the processor's time for the refit.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from llmdistill.config import load_experiment
from llmdistill.config.student import Prune
from llmdistill.models.loading import load_model
from llmdistill.stages.prune import TeacherKl, calibration_and_others
from llmdistill.students.pruning import choose, measure, prune_model
from llmdistill.students.refit import refit

STUDENTS: dict[str, dict[str, Any]] = {
    "15 of 30 layers, by block influence": {"layers": 15},
    "the same, ridge 0.1": {"layers": 15, "ridge": 0.1},
    "15 of 30 layers, evenly spaced": {"layers": 15, "by": "even"},
    "1,024 of 1,536 neurons": {"intermediate_size": 1024},
    "2 of 3 key-value heads": {"key_value_heads": 2},
    "504 of 576 channels": {"hidden_size": 504},
}


def main() -> None:
    """Cut and refit every student, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="configuration of a curated experiment")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    experiment = load_experiment(arguments.config)
    teacher = load_model(experiment.teacher.model, experiment.teacher.revision, "float32")
    calibration, others = calibration_and_others(experiment, arguments.rows)
    tokens = sum(len(row["input_ids"]) for row in calibration)
    importance, nearness = measure(teacher, calibration), TeacherKl(teacher, others)
    found = {}
    print(f"| {len(calibration)} rows, {tokens:,} tokens | cut | refitted | seconds |\n| --- | ---: | ---: | ---: |")
    for name, section in STUDENTS.items():
        settings = Prune(**section)
        kept = choose(settings, teacher.config, importance)
        student = prune_model(teacher, kept)
        before = nearness.kl(student, torch.bfloat16)
        start = time.process_time()
        refit(student, teacher, kept, calibration, settings.ridge)
        seconds = time.process_time() - start
        found[name] = [before, nearness.kl(student, torch.bfloat16), seconds]
        print(f"| {name} | {before:.2f} | {found[name][1]:.2f} | {seconds:.0f} |", flush=True)
    first, second, _ = found["15 of 30 layers, by block influence"]
    print(f"\naim refitted_kl_over_cut_kl {second / first:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": arguments.rows, "tokens": tokens, "kl": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
