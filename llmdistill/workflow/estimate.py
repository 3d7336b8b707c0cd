"""The approximate duration of the stages of a run on this machine, from a short measurement and the configuration.

The measurement runs in a process of its own (`python -m llmdistill.workflow.estimate`), so that who asks need not load torch.
Matrix products of the models' own shapes, a softmax over the vocabulary and a pass over memory are timed; the rest are factors
that were fitted on whole runs of `configs/demo.yaml`.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from llmdistill.config import Experiment
from llmdistill.evaluation import serving
from llmdistill.evaluation.own_tasks import OwnTask
from llmdistill.evaluation.tasks import read_own_tasks

# Seconds of a whole stage for each second of what is timed here: norms, attention, caches, Python.
_DECODING, _READING, _TRAINING = 1.4, 1.3, 0.95
# Starts of processes, in times that of importing torch here.
_STAGE_START, _VLLM_START = 4.0, 14.0
_SEQUENCES = 256  # that vLLM decodes together
_READ_ROWS = 1024  # tokens in one pass of reading and training
_SMALL_BATCH = 8
_PROMPT_TOKENS = 64
_CHARACTERS = 3.0  # of a token, in tasks of a user's own
_LONGEST = 1.25  # of the answers of a batch, which is decoded until all have ended, in times their mean
_ITEM_TOKENS = 140  # read for one item of a task, its choices together
_OPTIMISER_BYTES = 28  # a parameter: gradient, weight and two moments, read and written


@dataclass(frozen=True)
class Speed:
    """The result of the measurement.

    Attributes:
        start: seconds that importing torch takes.
        parameters: of the teacher's layers and of its output matrix, those of one token where it is a mixture of experts.
        layers: of the teacher.
        decode: seconds of all products of one decoding step of `batch` sequences, and of its softmax.
        small: seconds of all products of one decoding step of 8 sequences.
        read: seconds of all products for one token, in a pass of many.
        train: likewise, in the precision of training.
        byte: seconds to read or write one byte of memory.
        batch: sequences in a decoding step.
    """

    start: float
    parameters: int
    layers: int
    decode: float
    small: float
    read: float
    train: float
    byte: float
    batch: int


@dataclass(frozen=True)
class Asked:
    """A number of rows or items, and the tokens of the prompt and answer of one."""

    count: int
    prompt: float
    answer: float

    @classmethod
    def of_task(cls, own: OwnTask, limit: int | None) -> "Asked":
        """The items of a task, by the number of characters of their inputs and right answers."""
        items = own.items[:limit]
        prompt, answer = (sum(map(len, texts)) / len(items) for texts in zip(*((i.input, i.output) for i in items), strict=True))
        return cls(len(items), (len(own.task.told) + prompt) / _CHARACTERS, answer / _CHARACTERS)


def estimate(experiment: Experiment, stages: list[str], prompts: int) -> dict[str, float]:
    """Seconds of each stage; stages that cannot be estimated are left out.

    Args:
        experiment: the configuration.
        stages: their names, such as `generate`.
        prompts: how many prompts there are.
    """
    rows = prompts * experiment.generate.samples
    speed = measure(experiment, min(rows, _SEQUENCES))
    if speed is None:
        return {}
    own = [Asked.of_task(task, experiment.eval.task_limit) for task in read_own_tasks(experiment.eval.tasks)]
    asked = Asked(rows, _PROMPT_TOKENS, experiment.generate.max_tokens)
    if own and experiment.prompts and experiment.prompts.task:  # answers like those to the items
        asked = Asked(rows, own[0].prompt, min(own[0].answer, experiment.generate.max_tokens))
    tokens = rows * asked.answer
    start = _STAGE_START * speed.start
    share = _student_share(experiment, speed)
    row = asked.prompt + asked.answer
    held_out = max(rows * experiment.eval.held_out, 1)
    students = 1 + experiment.train.compare_text_only + (experiment.train.compare_examples is not None)
    models = 1 + share * (1 + students)  # the teacher, the student before, and those trained, in times of the teacher
    found = {
        "generate": _VLLM_START * speed.start
        + _DECODING * tokens / speed.batch * speed.decode
        + rows * asked.prompt * speed.read,
        "score": _VLLM_START * speed.start + _READING * tokens * speed.read,
        "curate": start,
        "prune": start + _READING * row * _pruning_rows(experiment, rows) * speed.read,
        "train": start + students * _training(experiment, speed, rows, row, share),
        "eval": start + models * _evaluation(experiment, speed, held_out * row, own),
        "export": start
        + len(experiment.export.formats if experiment.export else [])
        * (_READING * 3 * held_out * row * speed.read + share * _own_tasks(experiment, speed, own)),
        "report": start,
    }
    if not experiment.teacher.abilities.continuous_batching:
        steps = _LONGEST * tokens / min(experiment.teacher.batch_size, rows)
        found["generate"] = start + _DECODING * steps * (speed.small if speed.batch > _SMALL_BATCH else speed.decode)
    return {name: found[name] for name in stages if name in found}


def _student_share(experiment: Experiment, speed: Speed) -> float:
    """The student's size relative to the teacher's, as far as the configuration determines it."""
    prune = experiment.student.prune
    if prune is None or prune.layers is None:
        return 1.0
    return (prune.layers if isinstance(prune.layers, int) else len(prune.layers)) / max(speed.layers, 1)


def _pruning_rows(experiment: Experiment, rows: int) -> float:
    """Rows that go through a model of the teacher's size: for calibration and for evaluating the pruned student."""
    prune = experiment.student.prune
    if prune is None or not prune.measured:
        return 0.0
    return 3 * min(prune.calibration_rows, rows) + 4 * 12


def _training(experiment: Experiment, speed: Speed, rows: int, row_tokens: float, share: float) -> float:
    """Seconds of one training."""
    arguments = experiment.train.args
    batch = arguments.get("per_device_train_batch_size", 8) * arguments.get("gradient_accumulation_steps", 1)
    steps = arguments.get("max_steps", -1)
    if steps <= 0:
        steps = max(round(rows * arguments.get("num_train_epochs", 3) / batch), 1)
    passes = 3 + arguments.get("gradient_checkpointing", True)  # forward, and backward at twice its price
    update = speed.parameters * share * _OPTIMISER_BYTES * speed.byte
    return float(steps * (_TRAINING * passes * share * batch * row_tokens * speed.train + update))


def _evaluation(experiment: Experiment, speed: Speed, held_out_tokens: float, own: list[Asked]) -> float:
    """Seconds for one model of the teacher's size, with this many items of each of the user's own tasks."""
    settings = experiment.eval
    items = (len(settings.tasks) - len(own)) * (settings.task_limit or 100)
    read = held_out_tokens + items * _ITEM_TOKENS + 2 * settings.own_prompts * settings.own_tokens
    steps = settings.samples * settings.sample_tokens / 4
    steps += 3 * settings.own_tokens if settings.own_prompts else 0
    steps += sum(min(task.count, settings.timed_requests) * task.answer for task in own)  # one at a time
    spent = _READING * read * speed.read + _DECODING * steps * speed.small + _own_tasks(experiment, speed, own)
    if settings.speed == "transformers":
        return spent + _DECODING * serving.ROUNDS["transformers"] * settings.sample_tokens * speed.small
    prefill = settings.batch_size * serving.PROMPT_TOKENS["vllm"] * speed.read
    timed = prefill + settings.sample_tokens * _step(speed, settings.batch_size)
    return spent + _VLLM_START * speed.start + _DECODING * serving.ROUNDS["vllm"] * timed


def _own_tasks(experiment: Experiment, speed: Speed, own: list[Asked]) -> float:
    """Seconds for a model of the teacher's size to answer the items of each task."""
    batch = experiment.eval.batch_size
    steps = sum(math.ceil(task.count / batch) * _LONGEST * task.answer for task in own)
    read = sum(task.count * task.prompt for task in own)
    return _READING * read * speed.read + _DECODING * steps * _step(speed, batch)


def _step(speed: Speed, batch: int) -> float:
    """Seconds of the products in a decoding step of this many sequences, by linear interpolation of the measurements."""
    if batch <= _SMALL_BATCH or speed.batch <= _SMALL_BATCH:
        return speed.small
    slope = max(speed.decode - speed.small, 0.0) / (speed.batch - _SMALL_BATCH)
    return speed.small + slope * (batch - _SMALL_BATCH)


def measure(experiment: Experiment, batch: int) -> Speed | None:
    """Time this machine; None if torch is not installed or the teacher's configuration cannot be read."""
    teacher = experiment.teacher
    asked = {
        "model": teacher.model,
        "revision": teacher.revision,
        "trust_remote_code": teacher.trust_remote_code,
        "dtype": teacher.dtype,
        "batch": max(batch, 1),
        "train": {name: experiment.train.args[name] for name in ("bf16", "fp16") if name in experiment.train.args},
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "llmdistill.workflow.estimate", json.dumps(asked)],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return Speed(**json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, IndexError):
        return None


def said(seconds: dict[str, float]) -> str:
    """The estimate in words, such as `about 7 minutes on this machine: generate 3, train 2, eval 2`."""
    total = sum(seconds.values()) / 60
    long = {name: value / 60 for name, value in seconds.items() if value >= 0.1 * sum(seconds.values())}
    parts = ", ".join(f"{name} {_minutes(value)}" for name, value in long.items())
    return f"about {_minutes(total)} {'minute' if _minutes(total) == '1' else 'minutes'} on this machine ({parts})"


def _minutes(value: float) -> str:
    return f"{max(round(value), 1):,}" if value >= 0.75 else f"{max(value, 0.1):.1f}"


def main() -> None:
    """Measure this machine as specified by the JSON on the command line, and print a `Speed` as JSON."""
    asked = json.loads(sys.argv[1])
    begun = time.perf_counter()
    import torch

    imported = time.perf_counter() - begun

    from llmdistill.config.machine import inference_precision, torch_device, training_precision
    from llmdistill.models.loading import load_config, meta_model, torch_dtype

    config = load_config(asked["model"], asked["revision"], asked["trust_remote_code"]).get_text_config()
    model = meta_model(config)
    experts = getattr(config, "num_experts_per_tok", 1) / max(getattr(config, "num_experts", 0) or 1, 1)
    head = config.hidden_size * config.vocab_size
    inner = sum(
        parameter.numel() * (experts if "experts" in name else 1)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.shape[0] != config.vocab_size
    )
    device = torch_device()
    width, wide, vocabulary = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size), config.vocab_size

    def seconds(call: Any) -> float:
        """The shortest of several calls, to reduce the influence of other load."""
        taken: list[float] = []
        begun = time.perf_counter()
        while len(taken) < 3 or (time.perf_counter() - begun < 0.15 and len(taken) < 50):
            one = time.perf_counter()
            call()
            if device != "cpu":
                torch.accelerator.synchronize()
            taken.append(time.perf_counter() - one)
        return min(taken)

    def product(rows: int, n: int, dtype: Any) -> float:
        """Seconds per row and weight."""
        x, w = torch.randn(rows, width, device=device).to(dtype), torch.randn(n, width, device=device).to(dtype)
        return seconds(lambda: torch.nn.functional.linear(x, w)) / rows / (n * width)

    computed, trained = (
        torch_dtype(config.dtype if precision.dtype == "auto" else precision.dtype)
        for precision in (inference_precision(asked["dtype"]), training_precision(**asked["train"]))
    )
    batch = asked["batch"]
    logits, memory = torch.randn(batch, vocabulary, device=device), torch.randn(1 << 24, device=device)
    found = Speed(
        start=imported,
        parameters=int(inner) + head,
        layers=config.num_hidden_layers,
        decode=batch * (inner * product(batch, wide, computed) + head * product(batch, vocabulary, computed))
        + 3 * seconds(lambda: logits.log_softmax(-1)),
        small=_SMALL_BATCH * (inner * product(_SMALL_BATCH, wide, computed) + head * product(_SMALL_BATCH, vocabulary, computed)),
        read=(inner + head) * product(_READ_ROWS, wide, computed),
        train=(inner + head) * product(_READ_ROWS, wide, trained),
        byte=seconds(lambda: memory.add_(1)) / (8 * len(memory)),
        batch=batch,
    )
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
