"""The sections of gpu.py that train: `step`, `compile`, `showcase` and `packing`."""

import gc
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import synthetic
from found import Found
from gpu_loss import OURS
from race import peak_gb, quiet, race

ROOT = Path(__file__).resolve().parent.parent
SFT, LIGER = "TRL SFT", "TRL SFT, Liger"
WAYS: dict[str, dict[str, Any]] = {  # of batching in the showcase
    "as it is": {},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "padding-free": {"padding_free": True},
    "padding-free, flex attention": {"padding_free": True, "attention": "flex_attention"},
}


def step(small: bool, found: Found) -> None:
    """A cell for each vocabulary and length; ratios to TRL's SFT."""
    cells = [(512, 48, 2)] if small else [(v, t, b) for v in (49_152, 151_936) for t, b in ((2048, 4), (8192, 1))]
    contenders: dict[str, dict[str, Any]] = {name: {"targets": how} for name, how in list(OURS.items())[: 1 if small else None]}
    contenders[SFT] = {"targets": None}
    if importlib.util.find_spec("liger_kernel") and not small:
        contenders[LIGER] = {"targets": None, "use_liger_kernel": True}
    ratios: dict[str, list[float]] = {"seconds": [], "memory": []}
    for vocab, tokens, batch in cells:
        spec = {"shape": "tiny" if small else "small", "vocab": vocab, "tokens": tokens, "batch": batch}
        done = raced({name: {**spec, **more} for name, more in contenders.items()}, small, found, "step")
        base = done.get(SFT, {})
        for name, one in done.items():
            ratio = {kind: one[kind] / base[kind] if base else float("nan") for kind in ratios}
            cell = {"V": vocab, "T": tokens, "rows": batch, "trainer": name}
            times = {"ms a step": one["seconds"] * 1e3, "ratio": ratio["seconds"]}
            found.row("step", **cell, **times, **{"peak GB": one["memory"], "ratio GB": ratio["memory"]})
            if name in OURS and base:
                for kind, value in ratio.items():
                    ratios[kind].append(value)
    for kind, values in ratios.items():
        if values:
            found.aim(f"gpu_step_{kind}_over_trl_sft", max(values))


def compiled(small: bool, found: Found) -> None:
    """The same steps with and without `torch_compile`; the losses of all steps are compared."""
    for vocab, tokens, batch in ((49_152, 2048, 4),):
        spec = {"shape": "small", "vocab": vocab, "tokens": tokens, "batch": batch, "targets": ("sampled", 16)}
        done = raced({"as it is": spec, "compiled": {**spec, "torch_compile": True}}, small, found, "compile")
        for name, one in done.items():
            figures = {"ms a step": one["seconds"] * 1e3, "peak GB": one["memory"]}
            found.row(
                "compile", V=vocab, T=tokens, step=name, **figures, **{"first loss": one["losses"][0], "last": one["losses"][-1]}
            )
        if len(done) == 2:
            plain, ours = (done[name] for name in ("as it is", "compiled"))
            pairs = list(zip(ours["losses"], plain["losses"], strict=True))
            off = max(abs(a - b) / abs(b) for a, b in pairs)
            if off > 0.02:
                found.failed(f"compile: the losses differ by {off:.2%}")
            found.aim("gpu_compile_loss_difference", off)
            found.aim("gpu_compile_seconds_ratio", ours["seconds"] / plain["seconds"])


def raced(specs: dict[str, dict[str, Any]], small: bool, found: Found, section: str) -> dict[str, dict[str, Any]]:
    """What each process found; those that ended are failures."""
    rounds, warm_up = (1, 0) if small else (12, 4)
    done = race(str(ROOT / "benchmarks/gpu.py"), specs, rounds, warm_up, partial=True)
    for name in specs.keys() - done.keys():
        (found.skipped if name == LIGER else found.failed)(f"{section}: {name}: its process ended, see above")
    return done


def make_trainer(spec: dict[str, Any]) -> Any:
    """The trainer of one process of a race; without targets it is TRL's."""
    import trl

    from llmdistill import DistillConfig, DistillTrainer

    kind, kept = spec["targets"] or ("none", 1)
    prompt = min(128, spec["tokens"] // 4)
    made = synthetic.rows(spec["vocab"], [(prompt, spec["tokens"] - prompt)] * (4 * spec["batch"]), kind, kept)
    model = synthetic.llama(spec["shape"], spec["vocab"])
    how = settings(max_steps=spec["turns"], per_device_train_batch_size=spec["batch"])
    how |= {name: spec[name] for name in ("torch_compile", "use_liger_kernel") if name in spec}
    more = {"model": model, "processing_class": synthetic.tokenizer()}
    if spec["targets"]:
        return DistillTrainer(args=DistillConfig(**how), train_dataset=synthetic.dataset(made, spec["vocab"]), **more)
    return trl.SFTTrainer(args=trl.SFTConfig(**how, max_length=None), train_dataset=synthetic.plain(made), **more)


def settings(**more: Any) -> dict[str, Any]:
    """Arguments of every training here, as the product's own but for what is given."""
    import torch

    return {
        "output_dir": str(Path(tempfile.gettempdir()) / "llmdistill-gpu"), "bf16": True, "gradient_checkpointing": False,
        "learning_rate": 1e-4, "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "seed": 0, "use_cpu": not torch.cuda.is_available(), **more,
    }  # fmt: skip


def showcase(small: bool, found: Found) -> None:
    """The median over the logged steps; the batch is that of the configuration, however it is laid out."""
    import numpy as np
    import torch
    import yaml

    arguments = yaml.safe_load((ROOT / "configs/showcase.yaml").read_text())["train"]["args"]
    arguments.pop("num_train_epochs")
    generator = np.random.default_rng(0)
    vocab, count = (512, 8) if small else (49_152, 2048)
    lengths = np.minimum(generator.lognormal(5.2, 0.7, count).astype(int) + 16, 512)
    pairs = [(int(generator.integers(30, 60)), int(length)) for length in lengths]
    rows = synthetic.dataset(synthetic.rows(vocab, pairs, "sampled", 16), vocab)
    if small:
        arguments |= {"per_device_train_batch_size": 2}
    for name, changes in list(WAYS.items())[: 1 if small else None]:
        gc.collect()  # the trainer before this one
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            figures = trained({**arguments, **changes}, rows, vocab, small)
        except Exception as error:  # the other ways say something all the same
            found.raised(f"showcase: {name}", error)
            continue
        found.row("showcase", batching=name, **figures, **{"peak GB": peak_gb()})
        if not changes:
            found.aim("gpu_showcase_tokens_per_s", figures["tokens/s"])
            if figures["mfu"] is not None:
                found.aim("gpu_showcase_mfu", figures["mfu"])


def trained(arguments: dict[str, Any], rows: Any, vocab: int, small: bool) -> dict[str, Any]:
    """Steps, and the medians of what the trainer logs of them."""
    from transformers import TrainerCallback

    from llmdistill import DistillConfig, DistillTrainer

    attention = arguments.pop("attention", None)
    seconds, first = (0.0, 0) if small else (10.0, 4)  # the first steps do not count

    class Stop(TrainerCallback):
        start = float("inf")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == max(first, 1):
                self.start = time.monotonic()
            control.should_training_stop = time.monotonic() - self.start >= seconds and state.global_step > first

    model = synthetic.llama("tiny" if small else "showcase", vocab, attn_implementation=attention)
    how = DistillConfig(**settings(max_steps=10_000, **arguments))
    trainer = DistillTrainer(
        model=model, args=how, train_dataset=rows, processing_class=synthetic.tokenizer(), callbacks=[Stop()]
    )
    quiet(trainer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "tokens_per_s" in entry][first:]
    shares = [entry["mfu"] for entry in logged if "mfu" in entry]
    return {
        "steps": len(logged),
        "tokens/s": statistics.median(entry["tokens_per_s"] for entry in logged),
        "mfu": statistics.median(shares) if shares else None,
        "last loss": logged[-1]["loss"],
    }


def packing(small: bool, found: Found) -> None:
    """Gradients of rows in one line against those of the same rows padded; then the trainer's own ways of batching."""
    import torch

    from llmdistill.training.packing import check_apart

    gpu = torch.cuda.is_available()
    vocab = 512 if small else 49_152
    made = synthetic.rows(
        vocab, [(5, 20), (9, 31), (3, 12), (7, 25)] if small else [(40, 700), (20, 300), (60, 500), (30, 90)], "topk", 8
    )
    rows = list(synthetic.dataset(made, vocab))
    ways = ["eager", "sdpa"] + (["flex_attention"] if gpu else [])
    if importlib.util.find_spec("flash_attn"):
        ways.append("flash_attention_2")
    worst = 0.0
    for attention in ways:
        try:
            model = synthetic.llama("tiny" if small else "showcase", vocab, attn_implementation=attention)
            model = model.to("cuda" if gpu else "cpu")
            half = attention.startswith("flash")  # which has no float32
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):
                check_apart(model)
            padded, line = (flat_gradient(model, rows, in_a_line, half) for in_a_line in (False, True))
            off = float((line - padded).norm() / padded.norm())
            found.row("packing", attention=attention, precision="bfloat16" if half else "float32", **{"gradient off by": off})
            if not off < (0.05 if half else 1e-3):
                found.failed(f"packing: {attention}: the gradient is off by {off:.2g}")
            worst = worst if half else max(worst, off)
        except Exception as error:
            found.raised(f"packing: {attention}", error)
    found.aim("gpu_packing_gradient_difference", worst)
    in_the_trainer(small, vocab, made, found)


def flat_gradient(model: Any, rows: list[Any], in_a_line: bool, half: bool) -> Any:
    """Of the loss as the trainer computes it, with respect to all weights."""
    import torch
    from accelerate.utils import send_to_device

    from llmdistill.data.collator import DistillCollator, completion_labels
    from llmdistill.losses import Objective, fused
    from llmdistill.models.forward import in_place_of_logits

    batch = send_to_device(DistillCollator(0, padding_free=in_a_line)(rows), model.device)
    labels_N = completion_labels(batch)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):
        head = fused.find_head(model)
    assert head is not None
    model.train().zero_grad()
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=half):
        value, _ = in_place_of_logits(
            model, batch, lambda hidden_ND: fused.distillation_loss(hidden_ND, head, labels_N, batch, Objective())
        )
    value.backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters() if parameter.grad is not None])


def in_the_trainer(small: bool, vocab: int, made: list[Any], found: Found) -> None:
    """One step on the same rows, padded, padding-free and packed: the loss and the norm of its gradient."""
    from llmdistill import DistillConfig, DistillTrainer

    longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in made)
    ways: dict[str, dict[str, Any]] = {
        "padded": {},
        "padding_free": {"padding_free": True},
        "packing": {"packing": True, "max_length": 2 * longest},
    }
    seen = []
    for name, more in ways.items():
        how = DistillConfig(**settings(max_steps=1, per_device_train_batch_size=len(made), **{**more, "bf16": False}))
        trainer = DistillTrainer(
            model=synthetic.llama("tiny" if small else "showcase", vocab),
            args=how, train_dataset=synthetic.dataset(made, vocab), processing_class=synthetic.tokenizer(),
        )  # fmt: skip
        quiet(trainer)
        trainer.train()
        seen.append({key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm")})
        found.row("packing in the trainer", batching=name, loss=seen[-1]["loss"], **{"gradient norm": seen[-1]["grad_norm"]})
    off = max(abs(one[key] / seen[0][key] - 1) for one in seen for key in one)
    if off > 1e-3:
        found.failed(f"packing: in the trainer losses or gradients differ by {off:.2g}")
    found.aim("gpu_packing_trainer_difference", off)
