"""On-policy rounds compared with the same number of steps on the teacher's text.

    python benchmarks/rounds.py

The demo five times from the same prompts: all steps on the teacher's text; and two thirds of them, then the last third on the
student's own text with reverse KL, or on as many rows of each. Both with sampled targets, where the sample on its own text is the
student's, and with top-64 targets and the tail. Runs with one kind of targets have the same rows and the same pruned student.
Prints the KL on held-out teacher text and, on text that each student samples itself, KL(student ‖ teacher) and the teacher's
negative log-likelihood, in nats per token with 95% intervals.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import synthetic
from found import argument_parser, report

from llmdistill.config import load_experiment
from llmdistill.runs.files import read_json
from llmdistill.stages.table import STAGES
from llmdistill.workflow.plan import stages

TARGETS = {"sampled": "{kind: sampled, n: 16}", "topk": "{kind: topk, k: 64}"}
WAYS = (
    ("the teacher's text alone, sampled", "sampled", None),
    ("then its own, sampled from the student", "sampled", 0.0),
    ("then half its own, sampled from the student", "sampled", 0.5),
    ("the teacher's text alone, top-64", "topk", None),
    ("then its own, top-64 and tail", "topk", 0.0),
)


def main() -> None:
    """Print the table and the aims."""
    parser = argument_parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--output", type=Path, default=Path("runs/rounds"))
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--targets", choices=TARGETS, help="only the runs with this kind")
    arguments = parser.parse_args()
    with synthetic.demo(arguments.smoke) as tiny:
        if arguments.smoke:
            arguments.output, arguments.steps = Path(dict(tiny)["output"]), 3
            tiny += [("eval.own_prompts", "3"), ("eval.own_tokens", "8")]
        table = compare(arguments, tiny)
    print("| trained on | KL, held out | reverse KL, own text | teacher's NLL, own text |\n| --- | ---: | ---: | ---: |")
    for row in table:
        print(
            f"| {row['trained on']} | " + " | ".join(shown(row[key]) for key in ("held out", "reverse_kl", "teacher_nll")) + " |"
        )
    aims = {f"own_text_reverse_kl_{number}": row["reverse_kl"]["mean"] for number, row in enumerate(table)}
    print()
    report({"table": table}, aims, arguments.json)


def compare(arguments, tiny):
    """A row for each way."""
    both = {"train.compare_text_only": "false", "eval.tasks": "[]", "export": "null"}
    both |= {"eval.own_prompts": "34", "eval.own_tokens": "96", "generate.temperature": "1.0", "eval.samples": "0"}
    table: list[Any] = []
    firsts: dict[str, Any] = {}
    for number, (name, kind, share) in enumerate(WAYS):
        if arguments.targets not in (None, kind):
            continue
        output = arguments.output / str(number)
        first = firsts.setdefault(kind, output)
        if first != output and not output.exists():
            for part in ("data", "curated", "student-before"):
                shutil.copytree(first / part, output / part)
            relink(output, first)
        overrides = [*both.items(), ("targets", TARGETS[kind]), *tiny, ("output", str(output))]
        last = arguments.steps // 3
        steps = arguments.steps if share is None else arguments.steps - last
        overrides += [("train.args.max_steps", str(steps))]
        if share is not None:
            settings = {"n": 1, "loss": "reverse_kl", "args": {"max_steps": last, "warmup_steps": 2, "learning_rate": 5e-4}}
            overrides += [("rounds", json.dumps(settings | {"teacher_share": share}))]
        if arguments.smoke:  # in this process: starting one for each stage takes longer than all of it
            for stage in stages(load_experiment(arguments.config, overrides)):
                STAGES[stage.command].function(stage.experiment)
        else:
            words = [word for key, value in overrides for word in (f"--{key}", value)]
            subprocess.run([sys.executable, "-m", "llmdistill", "run", str(arguments.config), *words], check=True)
        models = {model["name"]: model for model in read_json(output / "eval/metrics.json")["models"]}
        table += [
            {"trained on": trained_on, "held out": models[model]["kl"], **models[model]["own_text"]}
            for model, trained_on in (("student", name), ("student, first round", f"before the round: {name}"))
            if model in models
        ]
    return table


def relink(output, first):
    """Copied stages name the first run's directories as their inputs: let them name their own."""
    for file in output.glob("*/run.json"):
        file.write_text(file.read_text().replace(f'"{first}/', f'"{output}/'))


def shown(found):
    return f"{found['mean']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


if __name__ == "__main__":
    main()
