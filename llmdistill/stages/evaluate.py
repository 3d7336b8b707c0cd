"""`llmdistill eval`: how far the student is from the teacher on held-out text, with intervals, and what it costs."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill.config import Experiment
from llmdistill.config.machine import inference_precision
from llmdistill.data.cards import with_results
from llmdistill.data.dataset import MANIFEST, conversations, load_dataset, read_manifest
from llmdistill.data.importance import effective_sample_size, importance, log_importance
from llmdistill.errors import InputError
from llmdistill.evaluation import serving
from llmdistill.evaluation.examples import samples, views, won_and_lost
from llmdistill.evaluation.fidelity import ENTROPIES, MEASURES, POSITIONS, Array, fidelity, own_text
from llmdistill.evaluation.serving import Served
from llmdistill.evaluation.statistics import Draws, check_clusters, percentile_interval
from llmdistill.evaluation.task_scores import measure_tasks
from llmdistill.evaluation.tasks import files_of, load_tasks, read_tasks
from llmdistill.evaluation.win_rate import Comparison
from llmdistill.models.loading import check_model_exists, load_config, load_model, load_tokenizer, model_bytes
from llmdistill.runs import record
from llmdistill.runs.progress import StageBar, say, working
from llmdistill.students.origins import before

METRICS_VERSION = 2
_COMPARED = ("kl", "top1", "nll")  # between the student and its rivals
_FEWEST = 5  # conversations that a group of positions must be in


def evaluate(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/eval/metrics.json`, and `rows.parquet` with every row's own numbers.

    Raises:
        InputError: a model or the held-out rows are missing, or the vocabularies differ.
    """
    directory = experiment.directory("eval")
    subjects = _subjects(experiment)
    if experiment.eval.speed == "vllm":
        serving.check_vllm("eval.speed")
    task_files = read_tasks(experiment.eval.tasks)
    if dry_run:
        say("eval", f"would compare {', '.join(subject.name for subject in subjects)} and write {directory}")
        return
    manifest = read_manifest(experiment.dataset_directory)
    for subject in subjects:
        check_model_exists(subject.path, f"the model `{subject.name}`")
    settings = experiment.model_dump(mode="json", include={"seed", "eval"})
    inputs = {subject.path: record.model_fingerprint(subject.path, subject.revision) for subject in subjects}
    inputs[str(experiment.dataset_directory / MANIFEST)] = record.sha256(experiment.dataset_directory / MANIFEST)
    inputs |= {name: record.sha256(file) for name, file in files_of(task_files).items()}
    inputs |= {str(mixed / MANIFEST): record.sha256(mixed / MANIFEST) for mixed in experiment.mixed_datasets}
    comparison = Comparison(experiment, experiment.eval.win_rate) if experiment.eval.win_rate else None
    inputs |= comparison.inputs() if comparison else {}
    if record.claim(directory, "eval", settings, inputs) == "done":
        say("eval", f"{directory} is finished")
        return
    tasks = load_tasks(task_files, experiment.eval.task_limit)
    for subject in subjects:
        _check_vocabulary(subject, manifest)
    rows = held_out_rows(experiment)
    prompts = conversations(rows.select_columns(["prompt", "completion", "metadata"]).with_format("arrow")[:])
    warning = check_clusters(len(set(prompts)), "held-out prompts", "raise eval.held_out")
    served = _served_by_vllm(experiment, subjects) if experiment.eval.speed == "vllm" else None
    with working("eval", "loading the models"):
        models = {
            s.name: load_model(s.path, s.revision, experiment.eval.dtype, s.trust_remote_code, f"the model `{s.name}`")
            for s in subjects
        }
        teacher = experiment.teacher
        tokenizer = load_tokenizer(teacher.model, teacher.revision, teacher.trust_remote_code)

    precision = inference_precision(experiment.eval.dtype)
    # It starts over where it was interrupted, so what an earlier try computed in does not bind this one.
    record.begin(directory, "eval", settings, inputs, experiment.seed, precision=precision.recorded)
    say("eval", f"computes in {precision}")
    end_ids = manifest["tokenizer"]["end_token_ids"]
    with StageBar("eval", len(rows)) as bar:
        measured = fidelity(models, rows, experiment.eval.batch_size, end_ids, lambda n, t: bar.advance(n, t * len(models)))
    draws = Draws.of(prompts, experiment.eval.resamples, experiment.seed)
    served = served or serving.by_transformers(models, experiment.eval.batch_size, experiment.eval.sample_tokens)
    metrics = _metrics(experiment, subjects, models, measured, _text_bytes(rows), draws, served)
    metrics["warnings"] = [warning] if warning else []
    _add_sequence_kl(metrics, measured, rows, draws)
    if tasks:
        metrics |= measure_tasks(tasks, models, tokenizer, experiment, directory)
        metrics["headline"] = headline(metrics["models"], served["engine"], metrics["tasks"])
    if experiment.eval.own_prompts:
        _add_own_text(metrics, models, rows, experiment, end_ids)
    with working("eval", "writing samples"):
        metrics["samples"] = samples(models, rows, tokenizer, experiment.eval.samples, experiment.eval.sample_tokens)
        metrics["views"] = views(models, rows, tokenizer)
        rival = next(subject.name for subject in reversed(subjects) if subject.name != "student")
        metrics["examples"] = won_and_lost(measured, rows, rival)
    if comparison:
        metrics["win_rate"] = comparison.measure(models, rows, tokenizer, end_ids, directory)
    flat = {name: values for name, values in measured.items() if values.ndim == 1}
    names = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in prompts]
    table = pa.table({"id": [str(value) for value in rows.with_format(None)["id"]], "conversation": names, **flat})
    pq.write_table(table, directory / "rows.parquet")
    record.write_json(directory / "metrics.json", metrics)
    card = experiment.directory("student") / "README.md"
    if card.is_file():
        record.write_text(card, with_results(card.read_text(encoding="utf-8"), metrics))
    record.finish(directory, {"headline": metrics["headline"]})
    say("eval", _summary(metrics))
    if comparison and (wins := metrics["win_rate"]["win_rate"]):
        say("eval", f"student wins {_share(wins, 'prompts')} against the {comparison.settings.against}, says the judge")
    for text in _warnings(metrics):
        say("warning", text)


def held_out_rows(experiment: Experiment) -> Any:
    """The held-out rows of the dataset, and of those that are mixed in."""
    import datasets

    parts = [load_dataset(directory, "test") for directory in (experiment.dataset_directory, *experiment.mixed_datasets)]
    columns = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    return datasets.concatenate_datasets([part.select_columns(columns) for part in parts])


def _metrics(
    experiment: Experiment,
    subjects: list[Served],
    models: dict[str, Any],
    measured: dict[str, Array],
    text_bytes: Array,
    draws: Draws,
    served: dict[str, Any],
) -> dict[str, Any]:
    """The content of `metrics.json`, but for what needs more of the models than their distributions on held-out text."""
    settings = experiment.eval
    speeds = {entry["name"]: entry for entry in served["models"]}
    tokens = measured["tokens"]
    described = [
        {
            "name": subject.name,
            "path": subject.path,
            "parameters": sum(parameter.numel() for parameter in models[subject.name].parameters()),
            "bytes": model_bytes(subject.path),
            "decode_tokens_per_s": speeds[subject.name]["decode"]["median"],
            **speeds[subject.name],
            **{name: draws.interval(measured[f"{subject.name} {name}"], tokens) for name in MEASURES},
            "bits_per_byte": draws.interval(measured[f"{subject.name} nll"] / np.log(2), text_bytes),
            **_groups(subject.name, measured, draws),
        }
        for subject in subjects
    ]
    return {
        "schema_version": METRICS_VERSION,
        "headline": headline(described, served["engine"]),
        "held_out": {
            "rows": len(tokens),
            "tokens": int(tokens.sum()),
            "prompts": draws.draws.shape[1],
            "resamples": settings.resamples,
        },
        "models": described,
        "differences": list(_differences(subjects, measured, draws)),
        "decoding": {name: value for name, value in served.items() if name != "models"},
    }


def _text_bytes(rows: Any) -> Array:
    """Bytes of each completion in UTF-8."""
    texts = rows.select_columns(["completion"]).with_format(None)["completion"]
    return np.array([max(sum(len(message["content"].encode()) for message in messages), 1) for messages in texts])


def _groups(name: str, measured: dict[str, Array], draws: Draws) -> dict[str, Any]:
    """What is not one mean: the KL by position and by the teacher's entropy, calibration, and where texts end."""
    found: dict[str, Any] = {}
    for by, begins in (("position", POSITIONS), ("entropy", ENTROPIES)):
        sums_RG, tokens_RG = measured[f"{name} kl by {by}"], measured[f"tokens by {by}"]
        found[f"kl_by_{by}"] = [
            {"from": begin, "tokens": int(tokens.sum()), **draws.interval(sums, tokens)}
            for begin, sums, tokens in zip(begins, sums_RG.T, tokens_RG.T, strict=True)
            if np.count_nonzero(draws.sums(tokens)) >= _FEWEST
        ]
    ended, tokens = measured["ended"], measured["tokens"]
    if np.count_nonzero(draws.sums(ended)) >= _FEWEST:
        found["end"] = draws.interval(measured[f"{name} end"], ended)
    found["early_end"] = draws.interval(measured[f"{name} early"], tokens - ended)
    found["calibration_error"] = _calibration(measured[f"{name} confidence"], measured[f"{name} truth"], tokens, draws)
    return found


def _calibration(confidence_RG: Array, truth_RG: Array, tokens: Array, draws: Draws) -> dict[str, float]:
    """How far q of the model's choice is from p of it: Σ |confidence − truth| over groups of positions by that q."""
    gap_CG = np.stack([draws.sums(gap) for gap in (confidence_RG - truth_RG).T], axis=1)
    resampled = np.abs(draws.draws @ gap_CG).sum(1) / (draws.draws @ draws.sums(tokens))
    return asdict(percentile_interval(np.abs(gap_CG.sum(0)).sum() / tokens.sum(), resampled))


def _add_own_text(metrics: dict[str, Any], models: dict[str, Any], rows: Any, experiment: Experiment, end_ids: list[int]) -> None:
    """What each model writes by itself: how near it stays to the teacher there, how long it is, and whether it ends."""
    settings = experiment.eval
    with StageBar("eval", len(models)) as bar:
        for described in metrics["models"]:
            name = described["name"]
            written = own_text(models[name], rows, settings.own_prompts, settings.own_tokens, end_ids, experiment.seed)
            sums = fidelity({"teacher": models["teacher"], name: models[name]}, written, settings.batch_size, end_ids)
            tokens, each = sums["tokens"], np.ones(len(written))
            draws = Draws.of([str(number) for number in range(len(written))], settings.resamples, experiment.seed)
            described["own_text"] = {
                "tokens": int(tokens.sum()),
                "reverse_kl": draws.interval(sums[f"{name} reverse_kl"], tokens),
                "teacher_nll": draws.interval(sums["teacher nll"], tokens),
                "length": draws.interval(tokens, each),
                "ended": draws.interval(np.array([row["ended"] for row in written], dtype=float), each),
            }
            bar.advance(1, int(tokens.sum()), [f"own text of {name}"])
    metrics["own_text"] = {"prompts": len(written), "max_tokens": settings.own_tokens}


def _add_sequence_kl(metrics: dict[str, Any], measured: dict[str, Array], rows: Any, draws: Draws) -> None:
    """Where the held-out text is a sample: KL(teacher ‖ model) over whole texts, in nats a text, by importance weights."""
    try:
        weights = importance(log_importance(rows))
    except ValueError:  # text of another origin, or cut by top-p or top-k: the estimate does not exist
        return
    metrics["held_out"]["effective_rows"] = effective_sample_size(weights)
    for model in metrics["models"]:
        # log p(y|x) − log q(y|x), both from weights in this process
        nats = measured[f"{model['name']} nll"] - measured["teacher nll"]
        model["sequence_kl"] = draws.interval(weights * nats, weights)


def headline(models: list[dict[str, Any]], engine: str, tasks: dict[str, Any] | None = None) -> str:
    """The one line: how much smaller and faster the student is, and what it keeps."""
    by_name = {model["name"]: model for model in models}
    teacher, student = by_name["teacher"], by_name["student"]
    smaller = 1 - student["parameters"] / teacher["parameters"]
    faster = student["decode_tokens_per_s"] / teacher["decode_tokens_per_s"]
    where = " in vLLM" if engine == "vllm" else ""
    size = f"{smaller:.0%} smaller" if smaller > 0 else f"{-smaller:.0%} larger" if smaller < 0 else "same size"
    keeps = "keeps " + _share(student["top1"], "the teacher's next-token choices")
    if tasks and tasks["together"]["kept"]:
        keeps += f" and {_share(tasks['together']['kept'], 'its task score')}"
    return f"{size} · {faster:.1f}× {'faster' if faster >= 1 else 'the speed'}{where} · {keeps}"


def _share(kept: dict[str, float], of: str) -> str:
    return f"{kept['mean']:.0%} of {of} (95% CI {100 * kept['low']:.0f} to {100 * kept['high']:.0f})"


def _subjects(experiment: Experiment) -> list[Served]:
    teacher = experiment.teacher
    found = [
        Served("teacher", teacher.model, teacher.revision, teacher.trust_remote_code, teacher.tensor_parallel_size),
        Served("student before", *before(experiment)),
        Served("student", str(experiment.directory("student"))),
    ]
    if experiment.rounds:
        found.append(Served("student, first round", str(experiment.first_student)))
    if experiment.train.compare_text_only:
        found.append(Served("student, text only", str(experiment.directory("student-text-only"))))
    return found


def _served_by_vllm(experiment: Experiment, subjects: list[Served]) -> dict[str, Any]:
    """The cost of every model in vLLM, before it is loaded here: they might not fit into the memory together."""
    served = serving.by_vllm(subjects, experiment.eval.batch_size, experiment.eval.sample_tokens)
    for entry in served["models"]:
        if "failed" in entry:
            raise InputError(
                f"eval.speed is vllm, which does not run the model `{entry['name']}`: {entry['failed']}; "
                "set eval.speed to transformers"
            )
    return served


def _check_vocabulary(subject: Served, manifest: dict[str, Any]) -> None:
    size = load_config(subject.path, subject.revision, subject.trust_remote_code, subject.name).get_text_config().vocab_size
    if size != manifest["tokenizer"]["vocab_size"]:
        raise InputError(
            f"{subject.path} has {size:,} tokens, the held-out rows were written with {manifest['tokenizer']['vocab_size']:,}: "
            "a KL between different vocabularies is not defined"
        )


def _differences(subjects: list[Served], measured: dict[str, Array], draws: Draws) -> Iterator[dict[str, Any]]:
    """The student minus each of its rivals, on the same rows and draws."""
    for rival in subjects:
        if rival.name.startswith("student") and rival.name != "student":
            for metric in _COMPARED:
                sums = measured[f"student {metric}"] - measured[f"{rival.name} {metric}"]
                yield {
                    "better": "student",
                    "worse": rival.name,
                    "metric": metric,
                    **draws.interval(sums, measured["tokens"]),
                }


def _warnings(metrics: dict[str, Any]) -> Iterator[str]:
    """What the reader of the figures has to know of them; the report has it, too."""
    yield from metrics["warnings"]
    tasks = metrics.get("tasks", {"tasks": [], "warnings": []})
    yield from tasks["warnings"]
    yield from (f"{task['name']}: {task['warning']}" for task in tasks["tasks"] if task["warning"])
    yield from metrics.get("win_rate", {"warnings": []})["warnings"]


def _summary(metrics: dict[str, Any]) -> str:
    kl = {model["name"]: model["kl"] for model in metrics["models"]}

    def show(name: str) -> str:
        return f"{kl[name]['mean']:.2f} ± {(kl[name]['high'] - kl[name]['low']) / 2:.2f}"

    text_only = f", same steps without soft targets {show('student, text only')}" if "student, text only" in kl else ""
    return f"student {show('student')} nats from the teacher (before {show('student before')}{text_only})"
