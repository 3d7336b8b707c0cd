"""`llmdistill eval`: how far the student is from the teacher on held-out text, with intervals, and what it costs."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill import stage
from llmdistill.config import Experiment
from llmdistill.dataset import MANIFEST, load_dataset, read_manifest
from llmdistill.errors import InputError
from llmdistill.importance import effective_sample_size, importance, log_importance
from llmdistill.models import check_model_exists, load_config, load_model, load_tokenizer, model_bytes
from llmdistill.progress import StageBar, console, say
from llmdistill.statistics import Interval, check_clusters, draw_clusters, mean_interval
from llmdistill.student import before
from llmdistill.task_scores import measure_tasks
from llmdistill.tasks import files_of, load_tasks, read_tasks
from llmdistill.win_rate import Comparison

METRICS_VERSION = 1
_MEASURES = ("kl", "top1", "nll")
_ROUNDS = 3  # of interleaved decoding; the median counts
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Subject:
    """A model under measurement."""

    name: str
    path: str
    revision: str | None = None
    trust_remote_code: bool = False


def evaluate(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/eval/metrics.json`, and `rows.parquet` with every row's own numbers.

    Raises:
        InputError: a model or the held-out rows are missing, or the vocabularies differ.
    """
    directory = experiment.directory("eval")
    subjects = _subjects(experiment)
    task_files = read_tasks(experiment.eval.tasks)
    if dry_run:
        say("eval", f"would compare {', '.join(subject.name for subject in subjects)} and write {directory}")
        return
    manifest = read_manifest(experiment.dataset_directory)
    for subject in subjects:
        check_model_exists(subject.path, f"the model `{subject.name}`")
    settings = experiment.model_dump(mode="json", include={"seed", "eval"})
    inputs = {subject.path: stage.model_fingerprint(subject.path, subject.revision) for subject in subjects}
    inputs[str(experiment.dataset_directory / MANIFEST)] = stage.sha256(experiment.dataset_directory / MANIFEST)
    inputs |= {str(file): stage.sha256(file) for file in files_of(task_files)}
    comparison = Comparison(experiment, experiment.eval.win_rate) if experiment.eval.win_rate else None
    inputs |= comparison.inputs() if comparison else {}
    if stage.claim(directory, "eval", settings, inputs) == "done":
        say("eval", f"{directory} is finished")
        return
    tasks = load_tasks(task_files, experiment.eval.task_limit)
    for subject in subjects:
        _check_vocabulary(subject, manifest)
    with console.status("loading the models"):
        rows = load_dataset(experiment.dataset_directory, "test")
        models = {s.name: load_model(s.path, s.revision, "auto", s.trust_remote_code) for s in subjects}
        teacher = experiment.teacher
        tokenizer = load_tokenizer(teacher.model, teacher.revision, teacher.trust_remote_code)
        prompts = [str(prompt) for prompt in rows.with_format(None)["prompt"]]
    warning = check_clusters(len(set(prompts)), "held-out prompts", "raise eval.held_out")

    stage.begin(directory, "eval", settings, inputs, experiment.seed)
    measured = fidelity(models, rows, experiment.eval.batch_size)
    metrics = _metrics(experiment, subjects, models, measured, prompts)
    metrics["warnings"] = [warning] if warning else []
    _add_sequence_kl(metrics, measured, rows, prompts, experiment.seed)
    if tasks:
        metrics |= measure_tasks(tasks, models, tokenizer, experiment, directory)
    with console.status("writing samples"):
        metrics["samples"] = _samples(models, rows, tokenizer, experiment.eval.samples, experiment.eval.sample_tokens)
    if comparison:
        end_ids = manifest["tokenizer"]["end_token_ids"]
        metrics["win_rate"] = comparison.measure(models, rows, tokenizer, end_ids, directory)
    table = pa.table({"id": [str(value) for value in rows.with_format(None)["id"]], **measured})
    pq.write_table(table, directory / "rows.parquet")
    stage.write_json(directory / "metrics.json", metrics)
    stage.finish(directory, {"headline": metrics["headline"]})
    say("eval", _summary(metrics))


def _metrics(
    experiment: Experiment, subjects: list[Subject], models: dict[str, Any], measured: dict[str, Array], prompts: list[str]
) -> dict[str, Any]:
    """The content of `metrics.json`, but for the samples."""
    settings = experiment.eval
    speeds = _decoding_speed(models, settings.batch_size, settings.sample_tokens)
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    cluster = np.array([numbers[prompt] for prompt in prompts])
    draws = draw_clusters(len(numbers), settings.resamples, experiment.seed)
    tokens = measured["tokens"]
    described = [
        {
            "name": subject.name,
            "path": subject.path,
            "parameters": sum(parameter.numel() for parameter in models[subject.name].parameters()),
            "bytes": model_bytes(subject.path),
            "decode_tokens_per_s": speeds[subject.name],
            **{name: asdict(_interval(measured[f"{subject.name} {name}"], tokens, cluster, draws)) for name in _MEASURES},
        }
        for subject in subjects
    ]
    return {
        "schema_version": METRICS_VERSION,
        "headline": headline(described),
        "held_out": {
            "rows": len(prompts),
            "tokens": int(tokens.sum()),
            "prompts": len(numbers),
            "resamples": settings.resamples,
        },
        "models": described,
        "differences": list(_differences(subjects, measured, cluster, draws)),
        "decoding": {
            "engine": "transformers",
            "batch": settings.batch_size,
            "new_tokens": settings.sample_tokens,
            "rounds": _ROUNDS,
        },
    }


def _add_sequence_kl(metrics: dict[str, Any], measured: dict[str, Array], rows: Any, prompts: list[str], seed: int) -> None:
    """Where the held-out text is a sample: KL(teacher ‖ model) over whole texts, in nats a text, by importance weights."""
    try:
        weights = importance(log_importance(rows))
    except ValueError:  # text of another origin, or cut by top-p or top-k: the estimate does not exist
        return
    _, cluster = np.unique(prompts, return_inverse=True)
    draws = draw_clusters(cluster.max() + 1, metrics["held_out"]["resamples"], seed)
    metrics["held_out"]["effective_rows"] = effective_sample_size(weights)
    for model in metrics["models"]:
        # log p(y|x) − log q(y|x), both from weights in this process
        nats = measured[f"{model['name']} nll"] - measured["teacher nll"]
        model["sequence_kl"] = asdict(_interval(weights * nats, weights, cluster, draws))


def headline(models: list[dict[str, Any]]) -> str:
    """The one line: how much smaller and faster the student is, and what it keeps."""
    by_name = {model["name"]: model for model in models}
    teacher, student = by_name["teacher"], by_name["student"]
    smaller = 1 - student["parameters"] / teacher["parameters"]
    faster = student["decode_tokens_per_s"] / teacher["decode_tokens_per_s"]
    kept = student["top1"]
    size = f"{smaller:.0%} smaller" if smaller > 0 else f"{-smaller:.0%} larger" if smaller < 0 else "same size"
    return (
        f"{size} · {faster:.1f}× {'faster' if faster >= 1 else 'the speed'} · keeps {kept['mean']:.0%} of the teacher's "
        f"next-token choices (95% CI {100 * kept['low']:.0f} to {100 * kept['high']:.0f})"
    )


def _subjects(experiment: Experiment) -> list[Subject]:
    teacher = experiment.teacher
    found = [
        Subject("teacher", teacher.model, teacher.revision, teacher.trust_remote_code),
        Subject("student before", *before(experiment)),
        Subject("student", str(experiment.directory("student"))),
    ]
    if experiment.train.compare_text_only:
        found.append(Subject("student, text only", str(experiment.directory("student-text-only"))))
    return found


def _check_vocabulary(subject: Subject, manifest: dict[str, Any]) -> None:
    size = load_config(subject.path, subject.revision, subject.trust_remote_code, subject.name).get_text_config().vocab_size
    if size != manifest["tokenizer"]["vocab_size"]:
        raise InputError(
            f"{subject.path} has {size:,} tokens, the held-out rows were written with {manifest['tokenizer']['vocab_size']:,}: "
            "a KL between different vocabularies is not defined"
        )


def fidelity(models: dict[str, Any], rows: Any, batch_size: int) -> dict[str, Array]:
    """Each row's sums over its completion tokens: `NAME kl`, `NAME top1`, `NAME nll` for every model, and `tokens`.

    The teacher's full distribution comes from its own weights here, in float32, not from the stored targets.
    """
    import torch

    from llmdistill.collator import DistillCollator, completion_logits

    collate = DistillCollator(pad_token_id=0)
    sums: dict[str, list[Array]] = {}
    with torch.inference_mode(), StageBar("eval", len(rows)) as bar:
        for start in range(0, len(rows), batch_size):
            chunk = [rows[number] for number in range(start, min(start + batch_size, len(rows)))]
            batch = {name: values.to(models["teacher"].device) for name, values in collate(chunk).items()}
            lengths = np.array([len(row["input_ids"]) - int(row["completion_start"]) for row in chunk])
            labels_N = batch["labels"][batch["labels"] != -100]
            teacher_NV = completion_logits(models["teacher"], batch).float().log_softmax(-1)
            for name, model in models.items():
                student_NV = teacher_NV if name == "teacher" else completion_logits(model, batch).float().log_softmax(-1)
                values = {
                    "kl": (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1),
                    "top1": (teacher_NV.argmax(-1) == student_NV.argmax(-1)).float(),
                    "nll": -student_NV.gather(1, labels_N[:, None])[:, 0],
                }
                for metric, value_N in values.items():
                    per_row = [part.double().sum().item() for part in value_N.split(lengths.tolist())]
                    sums.setdefault(f"{name} {metric}", []).append(np.array(per_row))
            sums.setdefault("tokens", []).append(lengths)
            bar.advance(len(chunk), int(lengths.sum()) * len(models))
    return {name: np.concatenate(parts) for name, parts in sums.items()}


def _interval(sums: Array, tokens: Array, cluster: Array, draws: Array) -> Interval:
    return mean_interval(np.bincount(cluster, sums), np.bincount(cluster, tokens), draws)


def _differences(subjects: list[Subject], measured: dict[str, Array], cluster: Array, draws: Array) -> Iterator[dict[str, Any]]:
    """The student minus each of its rivals, on the same rows and draws."""
    for rival in subjects:
        if rival.name.startswith("student") and rival.name != "student":
            for metric in _MEASURES:
                sums = measured[f"student {metric}"] - measured[f"{rival.name} {metric}"]
                yield {
                    "better": "student",
                    "worse": rival.name,
                    "metric": metric,
                    **asdict(_interval(sums, measured["tokens"], cluster, draws)),
                }


def _decoding_speed(models: dict[str, Any], batch: int, new_tokens: int) -> dict[str, float]:
    """Tokens a second of greedy decoding with transformers; the models take turns, the median of the rounds counts."""
    import torch

    speeds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode(), console.status("timing"):
        for _ in range(_ROUNDS):
            for name, model in models.items():
                ids = torch.full((batch, 16), 3, device=model.device)
                start = time.perf_counter()
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                    pad_token_id=0,
                )
                speeds[name].append(batch * new_tokens / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def _samples(models: dict[str, Any], rows: Any, tokenizer: Any, count: int, new_tokens: int) -> list[dict[str, Any]]:
    """The models' greedy answers to the first held-out prompts."""
    import torch

    samples: list[dict[str, Any]] = []
    seen: set[str] = set()
    for row in rows:
        prompt_ids = np.asarray(row["input_ids"])[: int(row["completion_start"])]
        question = "\n".join(message["content"] for message in row["prompt"] if message["role"] != "system")
        if len(samples) == count or question in seen:
            continue
        seen.add(question)
        answers = {}
        for name, model in models.items():
            ids = torch.tensor(prompt_ids, dtype=torch.long, device=model.device)[None]
            with torch.inference_mode():
                output = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
                )
            answers[name] = tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True)
        samples.append({"prompt": question, "answers": answers})
    return samples


def _summary(metrics: dict[str, Any]) -> str:
    kl = {model["name"]: model["kl"] for model in metrics["models"]}

    def show(name: str) -> str:
        return f"{kl[name]['mean']:.2f} ± {(kl[name]['high'] - kl[name]['low']) / 2:.2f}"

    text_only = f", same steps without soft targets {show('student, text only')}" if "student, text only" in kl else ""
    return f"student {show('student')} nats from the teacher (before {show('student before')}{text_only})"
