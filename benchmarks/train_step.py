"""Cost of a distillation step compared with plain fine-tuning: time and peak memory of one optimiser step, by trainer.

    python benchmarks/train_step.py            # everything
    python benchmarks/train_step.py --quick    # one setting and a corner of the second table, in minutes
    python benchmarks/train_step.py --smoke    # tiny random models, to check that it runs; figures have no meaning

**Steps.** The same 15-layer student (81M parameters, V = 49,152), rows, order, optimiser and precision for all, completions
only; every trainer in a process of its own, and one step of each in turn. A step is everything from one end of
`optimizer.step` to the next: reading and collating rows, loss, gradients, optimiser, logging.

- **llmdistill**: `DistillTrainer` on stored sampled targets, n = 16.
- **TRL SFT**: `trl.SFTTrainer` as it comes, with its fused output layer.
- **transformers SFT**: `transformers.Trainer`, with the logits that the model's own loss holds.
- **dense distillation**: the same stored targets by log-softmax over all logits and a gather.
- **llmdistill, online**: `DistillTrainer` with a teacher (134M) that runs beside the student.
- **TRL distillation**: the loss of `trl.DistillationTrainer`, forward KL from the hidden states of the same teacher.

**The loss layer alone.** Hidden states of T completion tokens to the loss and the gradients of hidden states and weight, in
bfloat16 by autocast, for the output layers of three models: top-K targets in the fused form, beside the cross-entropy of
TRL's fused output layer.

Time is the median over rounds; in the second table over three, and a single one for 8,192 tokens. On a CPU it is the
processor time of one thread, so that what else the machine does is not in it, on a GPU the time that passes. Memory is the
highest resident set of the process, for the layer what that rises by; on a GPU `torch.cuda.max_memory_allocated`.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
from found import argument_parser, report
from race import Turns, peak_gb, race, train_in_turns

TEACHER = "models/SmolLM2-135M-Instruct"
OURS, SFT, PLAIN = "llmdistill", "TRL SFT", "transformers SFT"
ONLINE, BESIDE = "llmdistill, online", "TRL distillation"
TRAINERS = (OURS, SFT, PLAIN, "dense distillation", ONLINE, BESIDE)
SETTINGS = {
    "bfloat16": {"bf16": True, "gradient_checkpointing": False},
    "float32": {"bf16": False, "gradient_checkpointing": False},
    "bfloat16, gradient checkpointing": {"bf16": True, "gradient_checkpointing": True},
}
HEADS = {"SmolLM2-135M": (49_152, 576), "Qwen3-0.6B": (151_936, 1024), "Gemma-3-270m": (262_144, 640)}
TINY = "tiny"
LENGTHS, SIZES_K = (512, 2048, 8192), (16, 64, 128)
LAYER = ("fused, top-k", "TRL cross-entropy")


def main() -> None:
    """Print both tables and the aims."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each trainer")
    parser.add_argument("--batch", type=int, default=4, help="rows of up to 256 tokens per step")
    parser.add_argument("--quick", action="store_true", help="one setting, two lengths, three rounds")
    parser.add_argument("--only", choices=("steps", "layer"))
    parser.add_argument("--heads", nargs="*", default=list(HEADS), choices=list(HEADS), help="output layers of the second table")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        work(arguments.one)
        return
    quick, smoke = arguments.quick or arguments.smoke, arguments.smoke
    rounds = 1 if smoke else 3 if quick else arguments.rounds
    found: dict[str, Any] = {}
    if arguments.only != "layer":
        found["steps"] = steps(rounds, arguments.batch, list(SETTINGS)[: 1 if quick else None], smoke)
    if arguments.only != "steps":
        found["layer"] = layer([TINY] if smoke else arguments.heads, arguments.quick)
    report(found, aims(found), arguments.json)


def aims(found: dict[str, Any]) -> dict[str, float]:
    """The worst of the settings, and of the layer's sizes."""
    named = {}
    for kind in ("seconds", "memory"):
        for theirs in (SFT, PLAIN):
            ratios = [row[OURS][kind] / row[theirs][kind] for row in found.get("steps", [])]
            if ratios:
                named[f"step_{kind}_over_{theirs.lower().replace(' ', '_')}"] = max(ratios)
        ratios = [row[ONLINE][kind] / row[BESIDE][kind] for row in found.get("steps", [])]
        if ratios:
            named[f"online_step_{kind}_over_trl_distillation"] = max(ratios)
        ratios = [row[LAYER[0]][kind] / row[LAYER[1]][kind] for row in found.get("layer", [])]
        if ratios:
            named[f"layer_{kind}_over_trl_sft"] = max(ratios)
    return named


def steps(rounds: int, batch: int, settings: list[str], smoke: bool) -> list[dict[str, Any]]:
    """A row a setting."""
    table = []
    with tempfile.TemporaryDirectory() as directory:
        teacher = synthetic.teacher(Path(directory) / "teacher") if smoke else TEACHER
        print(f"{prepare(Path(directory), teacher)}, {batch} in a batch\n")
        print("| setting | trainer | s per step | ratio | peak GB | ratio | first loss |\n|" + " --- |" * 2 + " ---: |" * 5)
        for setting in settings:
            spec = {"what": "step", "setting": setting, "batch": batch, "data": directory, "teacher": teacher}
            row = race(__file__, {trainer: {**spec, "trainer": trainer} for trainer in TRAINERS}, rounds)
            table.append({"setting": setting, **row})
            for trainer in TRAINERS:
                one, base = row[trainer], row[SFT]
                pairs = [f"{one[kind]:.2f} | {one[kind] / base[kind]:.2f}" for kind in ("seconds", "memory")]
                print(f"| {setting} | {trainer} | {' | '.join(pairs)} | {one['loss']:.4f} |", flush=True)
    print()
    return table


def layer(heads: list[str], quick: bool) -> list[dict[str, Any]]:
    """A row for each size of the loss layer; K is nothing to a cross-entropy, which is measured once for all K."""
    cells = [(head, length, k) for head in heads for length in LENGTHS for k in SIZES_K if k == SIZES_K[0] or length == 2048]
    if heads == [TINY]:
        cells = [(TINY, 64, 16)]
    if quick:
        cells = [cell for cell in cells if cell[0] == "SmolLM2-135M" and cell[1] < 8192]
    table: list[dict[str, Any]] = []
    print("| head | V | D | T | K | fused s | TRL s | ratio | fused GB | TRL GB | ratio |\n| --- |" + " ---: |" * 10)
    for head, length, k in cells:
        vocab, hidden = (512, 32) if head == TINY else HEADS[head]
        spec = {"what": "layer", "vocab": vocab, "hidden": hidden, "tokens": length, "k": k}
        rounds = 3 if length < 8192 else 1  # by then a minute each
        once = {LAYER[1]: table[-1][LAYER[1]]} if k != SIZES_K[0] else {}
        row = race(__file__, {name: {**spec, "loss": name} for name in LAYER if name not in once}, rounds) | once
        table.append({"head": head, **{name: spec[name] for name in ("vocab", "hidden", "tokens", "k")}, **row})
        pairs = [[row[name][kind] for name in LAYER] for kind in ("seconds", "memory")]
        figures = " | ".join(f"{a:.2f} | {b:.2f} | {a / b:.2f}" for a, b in pairs)
        print(f"| {head} | {vocab:,} | {hidden:,} | {length:,} | {k} | {figures} |", flush=True)
    print()
    return table


def work(spec: dict[str, Any]) -> None:
    """One process of a race."""
    if spec["what"] == "layer":
        layer_work(spec)
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    train_in_turns(make_trainer(spec))


def prepare(directory: Path, teacher_directory: str) -> str:
    """Rows of this repository's documentation with the teacher's targets, and the student."""
    import torch

    from llmdistill.config import Prune
    from llmdistill.data.collator import DistillCollator
    from llmdistill.data.manifest import write_manifest
    from llmdistill.data.rows import Row, rows_to_table
    from llmdistill.data.shard_writer import finished_shards, write_shard
    from llmdistill.data.targets import Sampled
    from llmdistill.models.forward import completion_logits
    from llmdistill.models.loading import load_model, load_tokenizer
    from llmdistill.students.pruning import choose, prune_model

    teacher, tokenizer = load_model(teacher_directory), load_tokenizer(teacher_directory, None)
    vocab, generator = teacher.config.vocab_size, np.random.default_rng(0)
    if teacher_directory == TEACHER:
        text = "\n".join(page.read_text() for page in sorted(Path("docs").glob("*.md")))
        ids = np.array(tokenizer(text)["input_ids"])
    else:
        ids = generator.integers(3, vocab, 2_000)
    rows: list[Row] = []
    at = 0
    while at + 256 < len(ids) and len(rows) < 96:
        start, length = int(generator.integers(32, 96)), int(generator.integers(160, 257))
        row = ids[at : at + length]
        at += length
        with torch.inference_mode():
            batch = DistillCollator(0)([{"input_ids": row, "completion_start": start}])
            logprobs = completion_logits(teacher, batch).float().log_softmax(-1).cpu()
        kept = Sampled.keep(logprobs, 16, torch.from_numpy(generator.random((len(logprobs), 1))))
        soft = Sampled.from_kept(kept.numpy(), logprobs.gather(1, kept).numpy())
        written = logprobs.numpy()[np.arange(length - start), row[start:]]
        message = [{"role": "user", "content": ""}]
        rows.append(Row(str(len(rows)), message, message, row[:start].tolist(), row[start:], "stop", written, soft))
    data = directory / "data"
    write_shard(data, "train", 0, 1, rows_to_table(rows, vocab))
    about = synthetic.described("sampled", vocab, n=16) | {"teacher": {"model": teacher_directory, "engine": "transformers"}}
    write_manifest(data, finished_shards(data, "train"), about)
    layers = teacher.config.num_hidden_layers // 2
    prune_model(teacher, choose(Prune(layers=layers, by="even"), teacher.config, None)).save_pretrained(directory / "student")
    tokenizer.save_pretrained(directory / "student")
    completion = sum(len(row.completion_ids) for row in rows) / len(rows)
    return f"{len(rows)} rows of {at / len(rows):.0f} tokens, {completion:.0f} of them completion"


def make_trainer(spec: dict[str, Any]) -> Any:
    """The trainer of one process."""
    import torch
    import transformers
    import trl

    from llmdistill import DistillConfig, DistillTrainer, load_dataset
    from llmdistill.models.loading import load_model, load_tokenizer

    data = Path(spec["data"])
    arguments = {
        "output_dir": str(data / "out"), "max_steps": spec["turns"], "per_device_train_batch_size": spec["batch"],
        "learning_rate": 1e-4, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 0,
        "use_cpu": not torch.accelerator.is_available(), **SETTINGS[spec["setting"]],
    }  # fmt: skip
    student, tokenizer = load_model(str(data / "student"), dtype="float32"), load_tokenizer(str(data / "student"), None)
    rows, name = load_dataset(data / "data"), spec["trainer"]
    if "distill" in name:
        teacher = load_model(spec["teacher"]).requires_grad_(False) if name in (ONLINE, BESIDE) else None
        kind = {"dense distillation": dense, BESIDE: beside}.get(name, lambda base: base)(DistillTrainer)
        online = {"teacher": teacher} if name == ONLINE else {}
        trainer = kind(model=student, args=DistillConfig(**arguments), train_dataset=rows, processing_class=tokenizer, **online)
        trainer.beside = teacher
        return trainer
    plain = rows.with_format(None).map(
        lambda row: {"labels": [-100] * row["completion_start"] + row["input_ids"][row["completion_start"] :]},
        remove_columns=[column for column in rows.column_names if column != "input_ids"],
    )
    if name == SFT:
        arguments["max_length"] = None
        return trl.SFTTrainer(
            model=student, args=trl.SFTConfig(**arguments), train_dataset=plain, processing_class=tokenizer
        )  # fmt: skip
    return transformers.Trainer(
        model=student,
        args=transformers.TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=plain,
        data_collator=trl.trainer.sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0),
    )


def dense(base: type) -> type:
    """The usual way: all logits, their log-softmax, and a gather."""

    class Dense(base):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
            log_q = logits.float().log_softmax(-1).flatten(0, 1)
            rows = inputs["positions"][:, None]
            labels = inputs["labels"][inputs["labels"] != -100]
            ce = -log_q[rows[:, 0], labels].sum()
            kl = -(inputs["target_logweights"].exp() * log_q[rows, inputs["target_ids"]]).sum() - inputs["target_entropy"].sum()
            return ((1 - self.args.alpha) * ce + self.args.alpha * kl) / num_items_in_batch

    return Dense


def beside(base: type) -> type:
    """The loss of `trl.DistillationTrainer` with the teacher's pass, as its `_compute_loss` puts it together."""
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    class Beside(base):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
            mask = inputs["labels"][:, 1:] != -100
            first = int(mask.any(0).int().argmax())  # what comes before all completions is not projected
            hidden = model.base_model(**given).last_hidden_state[:, first:-1]
            with torch.no_grad():
                teacher = self.beside.base_model(**given).last_hidden_state[:, first:-1]
            heads = (one.get_output_embeddings().weight for one in (model, self.beside))
            return _chunked_divergence_loss(
                hidden, teacher, *heads, mask[:, first:], beta=0.0, num_items_in_batch=num_items_in_batch
            )[0]  # fmt: skip

    return Beside


def layer_work(spec: dict[str, Any]) -> None:
    """The loss layer of one size."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    vocab, tokens, k = spec["vocab"], spec["tokens"], spec["k"]
    head = torch.nn.Linear(spec["hidden"], vocab, bias=False, device=device)
    hidden = torch.randn(tokens, spec["hidden"], device=device).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device=device)
    compute = layer_losses(head, hidden, labels, k)[spec["loss"]]
    before = peak_gb()
    turns = Turns()
    turns.wait()
    for _ in range(spec["turns"]):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            compute().backward()
        head.weight.grad = hidden.grad = None
        turns.done()
        turns.wait()
    turns.say({"memory": max(peak_gb() - before, 1e-6)})  # in GB: the resident set is told in kB


def layer_losses(head: Any, hidden: Any, labels: Any, k: int) -> dict[str, Callable[[], Any]]:
    """The two losses by name."""
    import torch
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    from llmdistill import losses
    from llmdistill.losses import fused

    ids = torch.randint(0, head.out_features - k, (len(labels), 1), device=labels.device) + torch.arange(k, device=labels.device)
    logprobs = torch.full(ids.shape, -1.0, device=labels.device).log_softmax(-1) - 0.1
    tail = 1 - logprobs.exp().sum(-1)
    batch = {"target_kind": "topk", "target_ids": ids, "target_logprobs": logprobs, "target_tail": tail}
    batch["token_weights"] = torch.ones(len(labels), device=labels.device)

    def fused_topk() -> Any:
        loss, _ = fused.distillation_loss(hidden, fused.Head(head), labels, batch, losses.Objective())
        return loss

    def cross_entropy() -> Any:
        outputs = ("log_probs", "entropy", "is_top1")  # those that SFTTrainer asks for
        return -ChunkedLogProbFunction.apply(hidden, head.weight, None, labels, 1.0, 32768, None, 1.0, outputs)[0].sum()

    return dict(zip(LAYER, (fused_topk, cross_entropy), strict=True))


if __name__ == "__main__":
    main()
