"""Training recipes compared: learning rates, adapters, and losses between layers, on the demo's data.

    llmdistill generate configs/demo.yaml && llmdistill curate configs/demo.yaml && llmdistill prune configs/demo.yaml
    python benchmarks/recipes.py

Every variant trains the same student, the demo's pruned one, on the demo's rows with an online teacher (`targets:
online`), for the same steps, batches and seeds; only what its name says differs. What is printed is
KL(teacher ‖ student) in nats per token on the demo's held-out rows, for each seed. A few dozen steps tell which recipe learns
faster, not where each ends.
"""

import tempfile
from pathlib import Path
from typing import Any

import synthetic
import torch
from found import argument_parser, report
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from transformers.utils import logging

from llmdistill import DistillConfig, DistillTrainer, load_dataset
from llmdistill.config import Experiment, load_experiment
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.losses.hidden_states import of_pruned
from llmdistill.models.loading import load_model
from llmdistill.runs.record import read_json

GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "layers": {
        "the distribution alone": {},
        "+ hidden states, cosine": {"hidden": {"weight": 1.0, "loss": "cosine"}},
        "+ hidden states, mse": {"hidden": {"weight": 1.0, "loss": "mse"}},
        "+ attention": {"attention": {"weight": 1.0}},
        "+ hidden states, cosine, + attention": {"hidden": {"weight": 1.0, "loss": "cosine"}, "attention": {"weight": 1.0}},
    },
    "lora": {f"LoRA, learning rate {rate:g}": {"learning_rate": rate, "lora": 16} for rate in (1e-4, 1e-3, 3e-3, 1e-2)},
    "full": {f"all weights, learning rate {rate:g}": {"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3, 3e-3)},
}


def main() -> None:
    """Train every variant of the chosen groups with every seed, and print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=f"of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    steps, seeds = (2, 1) if arguments.smoke else (arguments.steps, arguments.seeds)
    logging.set_verbosity_error()
    with synthetic.demo(arguments.smoke, "generate", "curate", "prune") as tiny:
        found = measure(load_experiment(Path("configs/demo.yaml"), tiny), arguments.groups, steps, seeds)
    columns = " | ".join(f"seed {seed}" for seed in range(seeds))
    print(f"\n| {steps} steps | {columns} |\n| --- |{' ---: |' * seeds}")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    report({"steps": steps, "kl": found}, {}, arguments.json)  # it is there to choose by, and has no aim


def measure(experiment: Experiment, groups: list[str], steps: int, seeds: int) -> dict[str, list[float]]:
    """The KL of every variant, a value a seed."""
    teacher = load_model(experiment.teacher.model)
    test = load_dataset(experiment.directory("curated"), "test")
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        for group in groups:
            for name, variant in GROUPS[group].items():
                student = train(variant, seed, steps, experiment, teacher)
                measured = fidelity({"teacher": teacher, "student": student}, test, 8)
                found.setdefault(name, []).append(measured["student kl"].sum() / measured["tokens"].sum())
                print(f"seed {seed}  {name:<40}{found[name][-1]:.4f}", flush=True)
    return found


def train(variant: dict[str, Any], seed: int, steps: int, experiment: Experiment, teacher: Any) -> Any:
    """The demo's student after so many steps of the demo's recipe with the variant's changes."""
    changes = dict(variant)
    rank = changes.pop("lora", None)
    data, before = experiment.directory("curated"), experiment.directory("student-before")
    kept = read_json(before / "run.json")["results"]["layers"]
    pairs = {"hidden": of_pruned(kept, len(teacher.get_decoder().layers)), "attention": list(enumerate(kept))}
    for name in pairs.keys() & changes.keys():
        changes[name] = {**changes[name], "layers": pairs[name]}
    set_seed(seed)
    student = load_model(str(before), dtype="float32")
    if rank:
        student = get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    recipe = {**experiment.train.args, "max_steps": steps, "seed": seed, "save_strategy": "no"}
    recipe |= {"report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as directory:
        config = DistillConfig(
            output_dir=directory,
            use_cpu=not torch.accelerator.is_available(),
            logging_strategy="no",
            **{**recipe, **changes},
        )
        DistillTrainer(model=student, args=config, train_dataset=load_dataset(data, "train"), teacher=teacher).train()
    if rank:
        student = student.merge_and_unload()
    return student.to(teacher.dtype).eval()  # as it would be saved


if __name__ == "__main__":
    main()
