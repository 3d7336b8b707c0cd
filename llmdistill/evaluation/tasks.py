"""Tasks with right answers, by lm-eval: read, checked and run on loaded models.

A task is a YAML file in lm-eval's format with its data next to it, or the name of one of lm-eval's tasks. A file with the key
`kind` is one of the user's own tasks, which own_tasks.py runs without lm-eval.
"""

import contextlib
import importlib.util
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmdistill.config import read_yaml
from llmdistill.config.shipped import find
from llmdistill.errors import InputError, not_installed
from llmdistill.evaluation.own_tasks import OwnTask, check_count, read_own
from llmdistill.evaluation.parts import Parts
from llmdistill.evaluation.statistics import check_clusters
from llmdistill.models.loading import plain_generation
from llmdistill.runs.progress import StageBar

_LOCAL = {"json", "csv", "parquet", "text"}  # dataset_path of those builders of `datasets` that read files
_FEW = 8  # items of a task of lm-eval checked before a model is loaded; of a file, all are
_SEED = 1234  # of lm-eval's choice of examples; the same for every model
SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "item": pa.string(),
        "cluster": pa.string(),
        "model": pa.string(),
        "score": pa.float64(),
        "answer": pa.string(),
        "target": pa.string(),
        # The other fields are only for the user's own tasks.
        "input": pa.string(),
        "logprobs": pa.list_(pa.float32()),  # log-probabilities of the answer's tokens, in nats
        "agrees": pa.bool_(),  # whether it agrees with the teacher's answer
    }
)


@dataclass(frozen=True)
class TaskFile:
    """A task's YAML file as read; `files` are the file and its data, by their paths as in the experiment."""

    file: Path
    config: dict[str, Any]
    files: dict[str, Path]


@dataclass(frozen=True)
class About:
    """The description of a task.

    Attributes:
        source: where it comes from.
        metric: the metric that gives the score of an item, from 0 to 1.
        chance: score of guessing; None if unknown.
        tables: what one of the user's own tasks has besides its score.
    """

    source: str
    metric: str
    chance: float | None
    tables: dict[str, Any] = field(default_factory=dict)


def read_tasks(names: Sequence[str]) -> list[TaskFile | OwnTask | str]:
    """The entries of `eval.tasks`: files read and checked, names of lm-eval's tasks unchanged.

    Raises:
        InputError: if lm-eval is needed and not installed, or a file or its data is unusable.
    """
    found = [_read(Path(name)) if _is_file(name) else name for name in names]
    if importlib.util.find_spec("lm_eval") is None and not all(isinstance(task, OwnTask) for task in found):
        raise not_installed("eval.tasks", "lm-eval", "tasks")
    seen: dict[str, str] = {}
    for name, task in zip(names, found, strict=True):
        called = task if isinstance(task, str) else task.task.name if isinstance(task, OwnTask) else task.config["task"]
        if called in seen:
            raise InputError(f"eval.tasks: {name} and {seen[called]} are both called {called}")
        seen[called] = name
    return found


def read_own_tasks(names: Sequence[str]) -> list[OwnTask]:
    """The user's own tasks in `eval.tasks`; lm-eval is not needed.

    Raises:
        InputError: if a file or its data is unusable.
    """
    found = [_read(Path(name)) for name in names if _is_file(name)]
    return [task for task in found if isinstance(task, OwnTask)]


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name


def _read(file: Path) -> TaskFile | OwnTask:
    """Read one file without anything that would run code: safe YAML has no tag `!function`."""
    found = find(file)
    config = read_yaml(file, "eval.tasks")
    if "kind" in config:
        return read_own(file)
    for key in ("include", "class", "group"):
        if key in config:
            raise InputError(f"{file}: {key} is not supported; write the whole task in this file")
    for key in ("task", "dataset_path", "test_split", "output_type"):
        if not isinstance(config.get(key), str):
            raise InputError(f"{file}: the key {key} is missing" if key not in config else f"{file}: {key} must be a name")
    files = {str(file): found}

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [resolved(entry) for entry in value]
        path = found.parent / str(value)
        if not path.is_file():
            raise InputError(f"{file}: dataset_kwargs.data_files: {value} not found next to it")
        files[str(file.parent / str(value))] = path
        return str(path)

    if config["dataset_path"] in _LOCAL:
        kwargs = config.get("dataset_kwargs")
        if not isinstance(kwargs, dict) or not kwargs.get("data_files"):
            raise InputError(f"{file}: the key dataset_kwargs.data_files is missing")
        config = {**config, "dataset_kwargs": {**kwargs, "data_files": resolved(kwargs["data_files"])}}
    elif (directory := Path(config["dataset_path"])).is_dir():
        files |= {str(path): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return TaskFile(file, config, files)


def files_of(tasks: Sequence[TaskFile | OwnTask | str]) -> dict[str, Path]:
    """All files that the tasks are read from, by their paths as in the experiment."""
    return {name: path for task in tasks if not isinstance(task, str) for name, path in task.files.items()}


def load_tasks(entries: Sequence[TaskFile | OwnTask | str], limit: int | None) -> dict[str, tuple[str, Any]]:
    """Every task by name: where it comes from, and lm-eval's object with its items, or the user's own task.

    Raises:
        InputError: if there is no such task, its data cannot be read or reached, or it runs model-written code.
    """
    loaded: dict[str, tuple[str, Any]] = {}
    for own in entries:
        if isinstance(own, OwnTask):
            check_count(own, limit)
            loaded[own.task.name] = (str(own.task.file), own)
    tasks = [task for task in entries if not isinstance(task, OwnTask)]
    if not tasks:
        return loaded
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    with _quiet():
        manager = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))  # reads 14,000 files if true
        for task in tasks:
            source = task if isinstance(task, str) else str(task.file)
            if isinstance(task, str) and task not in manager.all_tasks:
                raise InputError(f"eval.tasks: {task} is neither a task of lm-eval nor a file; file names end in .yaml")
            try:
                found = manager.load([task if isinstance(task, str) else task.config])["tasks"]
                for part in found.values():
                    _check(part, source, limit if isinstance(task, TaskFile) else min(limit or _FEW, _FEW))
            except InputError:
                raise
            except Exception as error:  # whatever lm-eval, datasets, jinja or the task itself raise
                raise InputError(f"eval.tasks: {source}: cannot be loaded: {_reason(error, task)}") from None
            for name, part in found.items():
                if name in loaded:
                    raise InputError(f"eval.tasks: {name} is part of {loaded[name][0]} and of {source}")
                loaded[name] = (source, part)
    return loaded


def _check(task: Any, source: str, limit: int | None) -> None:
    """Refuse what lm-eval would refuse, or fail on, only after loading the model."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"eval.tasks: {source}: runs code written by the model, which is not supported")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"eval.tasks: {source}: needs more than text, which is not supported")
    task.set_fewshot_seed(seed=_SEED)
    task.build_all_requests(limit=limit)
    docs = {instance.doc_id: instance.doc for instance in task.instances}
    check_clusters(len({_cluster(doc, str(number)) for number, doc in docs.items()}), f"items of the task {source}", "add more")


def _cluster(doc: Any, item: str) -> str:
    """The cluster of an item: the item alone unless it names a group."""
    cluster = doc.get("cluster") if isinstance(doc, dict) else None
    return f"item {item}" if cluster is None else str(cluster)


def _reason(error: Exception, task: TaskFile | str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    if cause is not None and str(cause):
        text += f" ({' '.join(str(cause).split())})"
    if isinstance(task, str):
        text = f"its data is on the Hub: {text}"
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
            text = f"HF_HUB_OFFLINE is set, and {text}"
    return text[:400]


def run_tasks(
    tasks: dict[str, tuple[str, Any]],
    models: dict[str, Any],
    tokenizers: dict[str, Any],
    batch_size: int,
    limit: int | None,
    template_args: dict[str, Any] | None,
    parts: Parts,
) -> tuple[pa.Table, dict[str, About], list[str]]:
    """Run every model on the same items: the scores, descriptions of the tasks, and lm-eval's warnings.

    Args:
        tasks: from `load_tasks`.
        models: the models by name.
        tokenizers: tokenizer of each, with its chat template, which is applied if there is one.
        batch_size: sequences per forward pass.
        limit: use only the first items of each task.
        template_args: more variables of the chat template.
        parts: where the scores of each model on each task are kept.

    Raises:
        InputError: if a task has no per-item score from 0 to 1.
    """
    import torch

    measured: list[tuple[str, dict[str, list[dict[str, Any]]]]] = []
    about: dict[str, About] = {}
    shared: dict[str, list[str]] = {}  # metrics that all models have so far, in the task's order
    warnings: list[str] = []
    files = {pair: f"task-{number}" for number, pair in enumerate(itertools.product(models, tasks))}
    done = sum(map(parts.has, files.values()))
    with StageBar("eval", len(files), done) as bar, torch.inference_mode():

        def measure(runner: Any, model: str, name: str) -> dict[str, Any]:
            _, task = tasks[name]
            bar.advance(0, facts=[f"{model} on {name}"])
            with plain_generation(models[model]):
                samples, cut = _run(runner, name, task, tokenizers[model].chat_template is not None, limit)
            bar.advance(1)
            rows = {metric: [_row(name, model, metric, each, task) for each in samples] for metric in _scores(task, samples)}
            return {"rows": rows, "metrics": samples[0]["metrics"], "chance": _chance(task, samples), "cut": cut}

        for model in models:
            runner = _runner(models[model], tokenizers[model], batch_size, template_args)
            for name, (source, _) in tasks.items():
                found = parts.result(files[model, name], partial(measure, runner, model, name))
                shared[name] = [metric for metric in shared.get(name, found["rows"]) if metric in found["rows"]]
                if not shared[name]:
                    metrics = ", ".join(found["metrics"])
                    raise InputError(f"eval.tasks: {source}: none of its metrics scores single items from 0 to 1: {metrics}")
                about[name] = About(source, shared[name][0], found["chance"])
                measured.append((name, found["rows"]))
                if cut := found["cut"]:
                    warnings.append(f"{name}: {cut} requests were too long for {model} and were truncated at the start")
        bar.advance(0, facts=["models on tasks"])
    rows = [row for name, scored in measured for row in scored[about[name].metric]]
    return pa.Table.from_pylist(rows, SCHEMA), about, warnings


def _runner(model: Any, tokenizer: Any, batch_size: int, template_args: dict[str, Any] | None) -> Any:
    """lm-eval's model, counting in `cut` the generation requests truncated at the start, which it logs only per batch."""
    import torch
    from lm_eval.models.huggingface import HFLM

    class Runner(HFLM):
        cut = 0

        def tok_batch_encode(
            self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, truncation: bool = False
        ) -> tuple[Any, Any]:
            ids_BT, mask_BT = super().tok_batch_encode(strings, padding_side, None, truncation)
            if left_truncate_len is None:
                return ids_BT, mask_BT
            self.cut += int((mask_BT.sum(dim=1) > left_truncate_len).sum())
            return ids_BT[:, -left_truncate_len:], mask_BT[:, -left_truncate_len:]

    with _quiet():
        # Log-probabilities in float32: in bfloat16, many choices would tie.
        return Runner(
            model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
            chat_template_args=template_args,
        )


def _run(runner: Any, name: str, task: Any, chat: bool, limit: int | None) -> tuple[list[dict[str, Any]], int]:
    """Run one model on one task: lm-eval's record of every item by the task's first filter, and the number of cut requests."""
    from lm_eval.evaluator import evaluate

    task.set_fewshot_seed(seed=_SEED)
    runner.cut = 0
    with _quiet() as log:
        found = evaluate(
            runner,
            {"tasks": {name: task}},
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
        )
    samples: list[dict[str, Any]] = found["samples"][name]
    first = samples[0]["filter"]
    cut = runner.cut + sum("tokens from the left" in line for line in log)  # likelihood requests have one line each
    return [sample for sample in samples if sample["filter"] == first], cut


def _scores(task: Any, samples: list[dict[str, Any]]) -> list[str]:
    """The task's metrics that are a number from 0 to 1 for every single item, where higher is better."""
    higher, number = task.higher_is_better(), (int, float, np.number, np.bool_)
    return [
        metric
        for metric in samples[0]["metrics"]
        if higher.get(metric, True)
        and all(isinstance(sample[metric], number) and 0 <= float(sample[metric]) <= 1 for sample in samples)
    ]


def _chance(task: Any, samples: list[dict[str, Any]]) -> float | None:
    """The score of guessing, if there is one right choice."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_target:
        return None
    return float(np.mean([1 / len(task.doc_to_choice(sample["doc"])) for sample in samples]))


def _row(task_name: str, model: str, metric: str, sample: dict[str, Any], task: Any) -> dict[str, Any]:
    doc = sample["doc"]
    identity = doc.get("id") if isinstance(doc, dict) else None
    item = str(sample["doc_id"] if identity is None else identity)
    answer: Any = sample["filtered_resps"][0]
    target: Any = sample["target"]
    if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input:
        choices = task.doc_to_choice(doc)
        likelihood = np.array([pair[0] for pair in sample["filtered_resps"][: len(choices)]])
        lengths = np.array([len(choice) for choice in choices]) if metric == "acc_norm" else 1
        answer = choices[int(np.argmax(likelihood / lengths))]
        target = choices[target] if isinstance(target, int) else target
    elif isinstance(answer, list) and answer and isinstance(answer[0], str):
        answer = answer[0]
    return {
        "task": task_name,
        "item": item,
        "cluster": _cluster(doc, item),
        "model": model,
        "score": float(sample[metric]),
        "answer": str(answer),
        "target": str(target),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Silence lm-eval's bars and log lines; the lines are collected, since some of them matter."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("lm_eval"), Collect(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield lines
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)
