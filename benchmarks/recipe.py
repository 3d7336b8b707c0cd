"""Training recipes compared on one student, the demo's by default: where it starts, learning rate and schedule, optimiser, loss.

    make demo && python benchmarks/recipe.py [GROUP or VARIANT ...] [--steps 36] [--seeds 3]

Every variant trains the configuration's student, pruned from its teacher, on its rows, with the same number of tokens; only
what its name says differs from the reference, which is the configuration with the steps asked for. Printed is
KL(teacher ‖ student) in nats per token on the held-out rows, the mean over the seeds with a 95% interval by bootstrap over
prompts, and the difference to the reference, paired on rows and seeds, also for the lowest and the highest seed. Every
training that ends is kept in a file, and is not made again; delete the file when the configuration or its rows change.
"""

import copy
import json
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import synthetic
import torch
from found import argument_parser, report
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from llmdistill import DistillConfig, DistillTrainer, load_dataset
from llmdistill.config import Experiment, load_experiment
from llmdistill.config.machine import training_precision
from llmdistill.config.student import Prune
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.statistics import cluster_numbers, draw_clusters, mean_interval
from llmdistill.losses.hidden_states import of_pruned
from llmdistill.models.loading import load_model
from llmdistill.stages.prune import calibration_and_others, rounded
from llmdistill.stages.table import STAGES
from llmdistill.students.layer_choice import parts_kept
from llmdistill.students.pruning import Kept, prune_model
from llmdistill.students.refit import refit
from llmdistill.training.settings import arguments_of

Array = np.ndarray[Any, Any]
REFERENCE = "as configured"


@dataclass(frozen=True)
class Variant:
    """What differs from the reference.

    Attributes:
        args: of `DistillConfig`.
        start: keys of `student.prune`; sizes below one are shares of the teacher's.
        two_rounds: half of the layers that go stay for the first third of the steps; then the rest is cut, and refitted again.
        samples: answers of the teacher to each prompt.
        ema: decay a step of the mean of the weights that is measured.
        muon: `torch.optim.Muon` for the layers' matrices, beside AdamW for the rest.
        lora: rank of adapters.
        rows: of a batch, as a share of the reference's; the steps are more or fewer accordingly.
        online: an online teacher in place of stored targets.
        hidden_until: share of the steps after which hidden states are no longer matched.
    """

    args: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    two_rounds: bool = False
    samples: int = 1
    ema: float | None = None
    muon: bool = False
    lora: int | None = None
    rows: float = 1.0
    online: bool = False
    hidden_until: float = 1.0


COSINE = {"weight": 1.0, "loss": "cosine"}
PLAIN = {"refit": False}
GROUPS: dict[str, dict[str, Variant]] = {
    "start": {
        "pruned without refit": Variant(start=PLAIN),
        "pruned without refit, learning rate 1e-3": Variant({"learning_rate": 1e-3}, PLAIN),
        "layers by KL": Variant(start={"by": "kl"}),
        "evenly spaced layers": Variant(start={"by": "even"}),
        "ridge 0.3": Variant(start={"ridge": 0.3}),
        "ridge 3": Variant(start={"ridge": 3.0}),
        "16 calibration rows": Variant(start={"calibration_rows": 16}),
        "128 calibration rows": Variant(start={"calibration_rows": 128}),
        "in two rounds": Variant(two_rounds=True),
    },
    "shape": {
        "20 layers of 1,024 neurons": Variant(start={"layers": 2 / 3, "intermediate_size": 2 / 3}),
        "24 layers of 768 neurons": Variant(start={"layers": 4 / 5, "intermediate_size": 1 / 2}),
    },
    "rate": {f"learning rate {rate:g}": Variant({"learning_rate": rate}) for rate in (1.5e-4, 4e-4)},
    "schedule": {
        "linear": Variant({"lr_scheduler_type": "linear"}),
        "WSD, the last third falls": Variant({"lr_scheduler_type": "warmup_stable_decay"}),
        "constant, EMA 0.9": Variant({"lr_scheduler_type": "constant_with_warmup"}, ema=0.9),
        "EMA 0.8": Variant(ema=0.8),
        "half the rows a batch": Variant(rows=0.5),
        "a quarter of the rows a batch": Variant(rows=0.25),
        "twice the rows a batch": Variant(rows=2.0),
    },
    "optimiser": {
        "Muon": Variant(muon=True),
        "Muon, learning rate 4e-4": Variant({"learning_rate": 4e-4}, muon=True),
        "AdamW, beta2 0.95": Variant({"adam_beta2": 0.95}),
    },
    "loss": {
        "alpha 1": Variant({"alpha": 1.0}),
        "alpha 0.7": Variant({"alpha": 0.7}),
        "alpha 0.5": Variant({"alpha": 0.5}),
        "positions by entropy": Variant({"position_weights": "entropy"}),
        "positions by certainty": Variant({"position_weights": "certainty"}),
        "four answers a prompt": Variant(samples=4),
    },
    "layers": {
        "online teacher": Variant(online=True),
        "online, + hidden states in the first fifth": Variant({"hidden": COSINE}, online=True, hidden_until=0.2),
        "online, + hidden states": Variant({"hidden": COSINE}, online=True),
    },
    "lora": {f"LoRA 16, learning rate {rate:g}": Variant({"learning_rate": rate}, lora=16) for rate in (1e-3, 3e-3)},
}


def main() -> None:
    """Train every variant of the chosen groups with every seed, and print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}, or single variants by name; default: all")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="the reference, with its rows")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kept", type=Path, help="file of the trainings that ended; default: runs/recipe-CONFIG.jsonl")
    parser.add_argument("--ended", action="store_true", help="train nothing: the table of the trainings that have ended")
    arguments = parser.parse_args()
    steps, seeds = (5, 1) if arguments.smoke else (arguments.steps, arguments.seeds)
    logging.set_verbosity_error()
    variants = {REFERENCE: Variant()}
    named = GROUPS | {name: {name: variant} for group in GROUPS.values() for name, variant in group.items()}
    for name in arguments.groups or GROUPS:
        if name not in named:
            parser.error(f"{name} is neither a group nor a variant")
        variants |= named[name]
    with synthetic.demo(arguments.smoke, "generate", "curate", "prune") as tiny:
        bench = Bench(load_experiment(arguments.config, tiny), steps)
        kept = arguments.kept or Path(f"runs/recipe-{arguments.config.stem}.jsonl")
        table = bench.measure(variants, seeds, None if arguments.smoke else kept, arguments.ended)
    print(f"\n| {steps} steps, {seeds} seeds | held-out KL | against {REFERENCE} | by seed |\n| --- | ---: | ---: | ---: |")
    for name, row in table.items():
        against = f"{row['more']:+.3f} ({row['more_low']:+.3f} to {row['more_high']:+.3f})" if name != REFERENCE else ""
        seeds_text = f"{row['seed_low']:+.3f} to {row['seed_high']:+.3f}" if name != REFERENCE else ""
        print(f"| {name} | {row['kl']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | {against} | {seeds_text} |")
    report({"steps": steps, "seeds": seeds, "table": table}, {}, arguments.json)  # it is there to choose by, and has no aim


def kept_in(file: Path | None) -> dict[str, dict[str, list[float]]]:
    """The trainings of a file by variant, steps and seed: sums of the KL and numbers of tokens, by row."""
    lines = file.read_text().splitlines() if file and file.exists() else []
    return {row.pop("key"): row for row in map(json.loads, lines)}


class Bench:
    """The teacher, rows and students of a configuration, each made once."""

    def __init__(self, experiment: Experiment, steps: int) -> None:
        self.experiment, self.steps = experiment, steps
        self.teacher = load_model(experiment.teacher.model, dtype="float32")
        self.test = load_dataset(experiment.directory("curated"), "test")
        self.settings = experiment.student.prune or Prune(layers=1)
        self._starts: dict[str, tuple[Any, Kept]] = {}

    def measure(self, variants: dict[str, Variant], seeds: int, file: Path | None, ended: bool) -> dict[str, dict[str, float]]:
        """Train all that the file does not have, one seed after the other, and compare them to the first.

        Args:
            variants: by name.
            seeds: of each.
            file: of the trainings that ended.
            ended: whether nothing is trained, and what has ended is compared.
        """
        found = kept_in(file)
        keys = {name: [f"{name}; {self.steps} steps; seed {seed}" for seed in range(seeds)] for name in variants}
        if ended:
            variants = {name: variant for name, variant in variants.items() if found.keys() >= set(keys[name])}
        for seed in range(seeds):
            for name, variant in variants.items():
                key = keys[name][seed]
                if key in found:
                    continue
                measured = fidelity({"teacher": self.teacher, "student": self.train(variant, seed)}, self.test, 8)
                found[key] = {"kl": measured["student kl"].tolist(), "tokens": measured["tokens"].tolist()}
                print(f"{key:<70}{measured['student kl'].sum() / measured['tokens'].sum():.4f}", flush=True)
                if file:
                    file.parent.mkdir(exist_ok=True)
                    with file.open("a") as lines:
                        lines.write(json.dumps({"key": key, **found[key]}) + "\n")
        by_name = {name: [np.array(found[key]["kl"]) for key in keys[name]] for name in variants}
        tokens = np.array(found[keys[REFERENCE][0]]["tokens"])
        return summary(by_name, tokens, [str(prompt) for prompt in self.test.with_format(None)["prompt"]])

    def train(self, variant: Variant, seed: int) -> Any:
        """The student after the steps."""
        set_seed(seed)
        if not variant.two_rounds:
            student, kept = self.start(variant.start)
            return self.finish(self.run(student, kept, variant, seed, self.steps))
        layers = self.settings.layers
        assert isinstance(layers, int)
        first = max(1, self.steps // 3)
        bigger, kept = self.start({"layers": (self.teacher.config.num_hidden_layers + layers) // 2})
        bigger = self.run(bigger, kept, variant, seed, first).eval()
        inner, _, _ = parts_kept(self.settings, bigger, self.calibration)
        student = prune_model(bigger, inner)
        kept = Kept([kept.layers[number] for number in inner.layers], inner.neurons, inner.heads, inner.hidden)
        refit(student, self.teacher, kept, self.calibration, self.settings.ridge)
        return self.finish(self.run(student, kept, variant, seed, self.steps - first))

    @property
    def calibration(self) -> list[dict[str, Any]]:
        """The rows on which the student is refitted."""
        return calibration_and_others(self.experiment, self.settings.calibration_rows)[0]

    def start(self, changes: dict[str, Any]) -> tuple[Any, Kept]:
        """The pruned student, in float32, and what it holds of the teacher."""
        key = repr(changes)
        if key not in self._starts:
            sizes = {"layers": self.teacher.config.num_hidden_layers, "intermediate_size": self.teacher.config.intermediate_size}
            shares = {name: round(size * changes[name]) for name, size in sizes.items() if changes.get(name, 1) < 1}
            settings = self.settings.with_(**changes | shares)
            rows, _ = calibration_and_others(self.experiment, settings.calibration_rows)
            kept, _, _ = parts_kept(settings, self.teacher, rows)
            student = prune_model(self.teacher, kept)
            if settings.refit:
                refit(student, self.teacher, kept, rows, settings.ridge)
            self._starts[key] = student, kept
        student, kept = self._starts[key]
        return copy.deepcopy(student), kept

    def rows(self, samples: int) -> Any:
        """The training rows; with more samples than the demo's, those of its training prompts in a dataset of its own."""
        curated = load_dataset(self.experiment.directory("curated"), "train")
        if samples == 1:
            return curated
        output = f"{self.experiment.output}-{samples}-samples"
        more = self.experiment.with_(output=output, generate=self.experiment.generate.with_(samples=samples))
        for stage in ("generate", "curate"):
            STAGES[stage].function(more)
        rows = load_dataset(more.directory("curated"), "train")
        prompts = {str(prompt) for prompt in self.test.with_format(None)["prompt"]}
        assert not prompts & {str(prompt) for prompt in rows.with_format(None)["prompt"]}
        return rows

    def run(self, student: Any, kept: Kept, variant: Variant, seed: int, steps: int) -> Any:
        """Train so many steps by the variant's recipe."""
        if variant.lora:
            student = get_peft_model(
                student, LoraConfig(r=variant.lora, lora_alpha=2 * variant.lora, target_modules="all-linear")
            )
        with tempfile.TemporaryDirectory() as directory:
            config = self.arguments(Path(directory), kept, variant, seed, steps)
            optimizer = MuonAndAdamW(student, config.learning_rate) if variant.muon else None
            teacher = self.teacher if variant.online else None
            trainer = DistillTrainer(student, config, self.rows(variant.samples), teacher, optimizers=(optimizer, None))
            if variant.ema:
                trainer.add_callback(Ema(student, variant.ema))
            if variant.hidden_until < 1:
                trainer.add_callback(WithoutHidden(trainer, int(config.max_steps * variant.hidden_until)))
            trainer.train()
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # its forward pass computes as its weights
        return student.merge_and_unload() if variant.lora else student

    def arguments(self, directory: Path, kept: Kept, variant: Variant, seed: int, steps: int) -> DistillConfig:
        """Those of the stage `train`, and what the variant changes."""
        precision = training_precision(not torch.accelerator.is_available())
        of_stage = partial(arguments_of, self.experiment, directory, False, precision)
        configured = of_stage().per_device_train_batch_size
        rows = max(1, int(configured * variant.rows))
        steps = steps * configured // rows
        more = {"per_device_train_batch_size": rows, "max_steps": steps, "seed": seed, **variant.args}
        if more.get("lr_scheduler_type") == "warmup_stable_decay":
            more["lr_scheduler_kwargs"] = {"num_decay_steps": max(1, steps // 3)}
        if "hidden" in more:
            more["hidden"] = {**more["hidden"], "layers": of_pruned(kept.layers, len(self.teacher.get_decoder().layers))}
        config: DistillConfig = of_stage({"save_strategy": "no", "logging_strategy": "no", **more})
        return config

    def finish(self, student: Any) -> Any:
        """The student as it would be saved."""
        return rounded(student, torch.bfloat16).eval()


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for embeddings and norms, at one rate (the update's size is matched)."""

    def __init__(self, model: Any, lr: float) -> None:
        of_layers = {name for name, weight in model.named_parameters() if ".layers." in name and weight.ndim == 2}
        matrices = [weight for name, weight in model.named_parameters() if name in of_layers]
        others = [weight for name, weight in model.named_parameters() if name not in of_layers]
        self.parts = [
            torch.optim.Muon(matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr, weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})

    def step(self, closure: Any = None) -> None:
        # Muon iterates in bfloat16, which takes many times as long as float32 where the processor has no such instructions.
        own = torch.Tensor.bfloat16 if training_precision(True).dtype == "bfloat16" else torch.Tensor.float
        with patch.object(torch.Tensor, "bfloat16", own):
            for part in self.parts:
                part.step()


class Ema(TrainerCallback):
    """An exponential moving average of the weights, which the model has after the training."""

    def __init__(self, model: Any, decay: float) -> None:
        self.model, self.decay = model, decay
        self.mean = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.steps = 0

    @torch.no_grad()
    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        for name, weight in self.model.named_parameters():
            self.mean[name].lerp_(weight, 1 - decay)

    @torch.no_grad()
    def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
        for name, weight in self.model.named_parameters():
            weight.copy_(self.mean[name])


class WithoutHidden(TrainerCallback):
    """Hidden states are matched up to a step."""

    def __init__(self, trainer: DistillTrainer, until: int) -> None:
        self.trainer, self.until = trainer, until

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.until:
            self.trainer.match = None


def summary(found: dict[str, list[Array]], tokens: Array, prompts: list[str]) -> dict[str, dict[str, float]]:
    """Means over tokens and seeds with intervals over prompts, and differences to the reference."""
    cluster = cluster_numbers(prompts)
    draws = draw_clusters(int(cluster.max()) + 1, 2000, seed=0)
    per_prompt = np.bincount(cluster, tokens)
    reference = found[REFERENCE]
    table = {}
    for name, seeds in found.items():
        sums = np.bincount(cluster, np.mean(seeds, axis=0))
        more = np.bincount(cluster, np.mean(seeds, axis=0) - np.mean(reference, axis=0))
        kl, difference = mean_interval(sums, per_prompt, draws), mean_interval(more, per_prompt, draws)
        by_seed = [(mine - other).sum() / tokens.sum() for mine, other in zip(seeds, reference, strict=True)]
        table[name] = {
            "kl": kl.mean,
            "low": kl.low,
            "high": kl.high,
            "more": difference.mean,
            "more_low": difference.low,
            "more_high": difference.high,
            "seed_low": float(min(by_seed)),
            "seed_high": float(max(by_seed)),
        }
    return table


if __name__ == "__main__":
    main()
