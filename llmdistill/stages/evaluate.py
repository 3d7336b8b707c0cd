"""`llmdistill eval`: the distance of the student from the teacher on held-out text, with intervals, and its cost.

For a teacher behind an API, without weights, only its text is known: `teacher` is then not one of the models.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmdistill.config import Experiment
from llmdistill.config.machine import inference_precision
from llmdistill.data.cards import with_results, write_card
from llmdistill.data.dataset import load_dataset
from llmdistill.data.importance import effective_sample_size, importance, log_importance
from llmdistill.data.manifest import MANIFEST, read_manifest
from llmdistill.data.rows import whole_conversation
from llmdistill.data.subjects import dataset_keys
from llmdistill.errors import InputError, UnusableError
from llmdistill.evaluation import drafts, serving
from llmdistill.evaluation.examples import samples, views, won_and_lost
from llmdistill.evaluation.fidelity import own_text
from llmdistill.evaluation.metrics import METRICS, OWN_TEXT_METRICS, Metric, Sums, compared_by
from llmdistill.evaluation.own_tasks import OwnTask, requests_of
from llmdistill.evaluation.parts import Parts
from llmdistill.evaluation.routes import by_teacher, fidelity_to_own, shared, teachers_of_rows
from llmdistill.evaluation.serving import Requests, Served
from llmdistill.evaluation.statistics import Array, Draws, check_clusters
from llmdistill.evaluation.summary import final_lines, headline
from llmdistill.evaluation.task_scores import measure_tasks
from llmdistill.evaluation.tasks import TaskFile, files_of, load_tasks, read_tasks
from llmdistill.evaluation.text import text_sums
from llmdistill.evaluation.win_rate import Comparison
from llmdistill.models.loading import (
    check_model_exists,
    hand_back_memory,
    load_config,
    load_model,
    load_tokenizer,
    model_bytes,
    vocabulary_hash,
)
from llmdistill.models.root_classes import RootClasses
from llmdistill.runs import record
from llmdistill.runs.files import write_json, write_parquet
from llmdistill.runs.inputs import model_fingerprint, sha256
from llmdistill.runs.progress import StageBar, say, working
from llmdistill.students.origins import before
from llmdistill.students.sides import Sides, sides_of, tokenizer_of, training_dataset

METRICS_VERSION = 2


@dataclass(frozen=True)
class _Plan:
    """What is compared, and by which measures besides those on the held-out rows.

    Attributes:
        subjects: the models.
        tasks: of `eval.tasks`, read and checked.
        comparison: by the judge, if there is one.
    """

    subjects: list[Served]
    tasks: list[TaskFile | OwnTask | str]
    comparison: Comparison | None


@dataclass(frozen=True)
class _Loaded:
    """The models and the data to measure them on.

    Attributes:
        models: by name.
        tokenizers: of each model.
        rows: held out.
        prompts: the conversation that each row belongs to.
        draws: resamples of the prompts.
        end_ids: the tokens that end a completion, of each model.
        sides: if the student's vocabulary differs from a teacher's, both, by teacher; else None.
        teachers: the name of each row's teacher; empty where there is a single one.
        dtype: that the models are in.
    """

    models: dict[str, Any]
    tokenizers: dict[str, Any]
    rows: Any
    prompts: list[str]
    draws: Draws
    end_ids: dict[str, list[int]]
    sides: dict[str, Sides] | None
    teachers: list[str]
    dtype: str

    @property
    def classes(self) -> dict[str, RootClasses] | None:
        """The classes in which vocabularies are compared, by teacher."""
        return {name: sides.classes for name, sides in self.sides.items()} if self.sides else None

    @property
    def ends(self) -> list[int]:
        """The tokens that end a completion of the rows."""
        return self.end_ids["student" if self.sides else "teacher"]

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher's weights are available."""
        return "teacher" in self.models


def evaluate(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/eval/metrics.json`, and `rows.parquet` with the numbers of every row.

    Raises:
        InputError: a model or the held-out rows are missing, or the vocabularies differ.
    """
    directory, plan = experiment.directory("eval"), _plan(experiment)
    if dry_run:
        _check_models(experiment, plan, written=False)
        say("eval", f"would compare {', '.join(subject.name for subject in plan.subjects)} and write {directory}")
        return
    manifest = read_manifest(training_dataset(experiment))
    _check_models(experiment, plan)
    claim = _claim(experiment, plan)
    if record.claim(*claim) == "done":
        say("eval", f"{directory} is finished")
        return
    if plan.comparison:
        plan.comparison.check()
    tasks = load_tasks(plan.tasks, experiment.eval.task_limit)
    for subject in (*plan.subjects, *_other_teachers(experiment)):
        _check_vocabulary(subject, manifest)
    rows = held_out_rows(experiment)
    prompts = dataset_keys(rows)
    warning = check_clusters(len(set(prompts)), "held-out prompts", "raise eval.held_out")
    precision = inference_precision(experiment.eval.dtype)
    precision = record.begin_computing(*claim, experiment.seed, precision)
    parts = Parts(directory / "parts")
    # Before the models are loaded here: they might not fit into the memory together.
    by_vllm = experiment.eval.speed == "vllm"
    requests = _requests(experiment, plan, manifest)
    served = parts.result("speed", lambda: _served_by_vllm(experiment, plan.subjects, requests)) if by_vllm else None
    draws = Draws.of(prompts, experiment.eval.resamples, experiment.seed)
    with working("eval", "loading the models"):
        models = _load(plan.subjects, precision.dtype)
        tokenizers = {subject.name: _tokenizer(experiment, subject, manifest) for subject in plan.subjects}
        ends = {name: _described(manifest, name)["end_token_ids"] for name in models}
        sides = sides_of(experiment, manifest) if "alignment" in manifest and "teacher" in models else None
    teachers = teachers_of_rows(experiment, rows.with_format(None)["metadata"])
    rows = _with_main_prompts(rows, teachers, experiment, sides, manifest) if sides and experiment.teachers else rows
    loaded = _Loaded(models, tokenizers, rows, prompts, draws, ends, sides, teachers, precision.dtype)

    measured = parts.arrays("fidelity", lambda: _measure(experiment, loaded))
    found: dict[str, Any] = {}
    if tasks:
        found |= parts.result("tasks", lambda: measure_tasks(tasks, models, tokenizers, ends, experiment, parts, directory))
    own = _own_texts(loaded, experiment, parts) if experiment.eval.own_prompts and loaded.has_teacher else {}
    found |= parts.result("texts", lambda: _texts(experiment, loaded, measured))
    metrics = _metrics(experiment, plan.subjects, loaded, measured) | found | {"warnings": [warning] if warning else []}
    _add_own_texts(metrics, own, experiment)
    comparison = plan.comparison
    answered = comparison.answers(models, rows, prompts, tokenizers, ends, parts) if comparison else None
    # The last of these models: what is timed is in the precision that it is used in, the judge needs the memory.
    timed = experiment.eval
    served = served or parts.result(
        "speed", lambda: serving.by_transformers(models, timed.batch_size, timed.sample_tokens, requests)
    )
    _add_speeds(metrics, served)
    if comparison and answered:
        models.clear()
        hand_back_memory()
        metrics["win_rate"] = parts.result("win_rate", lambda: comparison.judged(answered, parts, directory))
    _write(experiment, directory, metrics, measured, loaded, manifest)
    record.finish(directory, {"headline": metrics["headline"]})
    parts.remove()
    for stage, text in final_lines(metrics):
        say(stage, text)


def _plan(experiment: Experiment) -> _Plan:
    """The plan, as far as the configuration determines it.

    Raises:
        InputError: a library, a task or the judge's template is missing, or cannot be used.
    """
    settings, subjects = experiment.eval, _subjects(experiment)
    if settings.speed == "vllm":
        serving.check_vllm("eval.speed")
    tasks = read_tasks(settings.tasks)
    comparison = Comparison(experiment, settings.win_rate) if settings.win_rate else None
    return _Plan(subjects, tasks, comparison)


def _check_models(experiment: Experiment, plan: _Plan, written: bool = True) -> None:
    """Check that every model exists.

    Args:
        experiment: the configuration.
        plan: with the models.
        written: also those that the run writes.

    Raises:
        InputError: a model is missing.
    """
    for subject in [*plan.subjects, *_other_teachers(experiment)]:
        is_ours, what = Path(subject.path).is_relative_to(experiment.output), f"the model `{subject.name}`"
        if written or not is_ours:
            check_model_exists(Path(subject.path) if is_ours else subject.path, what)


def claims(experiment: Experiment) -> list[record.Claim]:
    """The results, and what they depend on."""
    return [_claim(experiment, _plan(experiment))]


def _claim(experiment: Experiment, plan: _Plan) -> record.Claim:
    settings = experiment.model_dump(mode="json", include={"seed", "eval"})
    if experiment.eval.tasks and experiment.teacher.template_args:
        settings["teacher"] = {"template_args": experiment.teacher.template_args}  # with which every model is asked
    told = experiment.generate.model_dump(mode="json", include={"thinking_end"}, exclude_defaults=True)
    if told and (experiment.eval.tasks or experiment.eval.win_rate):
        settings["generate"] = told  # behind which every answer begins
    return record.Claim(experiment.directory("eval"), "eval", settings, _inputs(experiment, plan))


def _inputs(experiment: Experiment, plan: _Plan) -> dict[str, str]:
    """Path or name and hash of the inputs."""
    inputs = {subject.path: model_fingerprint(subject.path, subject.revision) for subject in plan.subjects}
    inputs |= {other.model: model_fingerprint(other.model, other.revision) for other in experiment.teachers.values()}
    manifests = [directory / MANIFEST for directory in (training_dataset(experiment), *experiment.mixed_datasets)]
    inputs |= {str(file): sha256(file) for file in manifests}
    inputs |= {name: sha256(file) for name, file in files_of(plan.tasks).items()}
    return inputs | (plan.comparison.inputs if plan.comparison else {})


def held_out_rows(experiment: Experiment) -> Any:
    """The held-out rows of the dataset, and of those mixed in."""
    import datasets

    parts = [load_dataset(directory, "test") for directory in (training_dataset(experiment), *experiment.mixed_datasets)]
    columns = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    return datasets.concatenate_datasets([part.select_columns(columns) for part in parts])


def _load(subjects: list[Served], dtype: str) -> dict[str, Any]:
    """The models by name."""
    return {
        s.name: load_model(s.path, s.revision, dtype, s.trust_remote_code, f"the model `{s.name}`", spread=True) for s in subjects
    }


def _described(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """The dataset's entry for the tokenizer of a model."""
    if "alignment" in manifest and name.startswith("teachers."):
        return tokenizer_of(manifest, name.removeprefix("teachers."))
    described: dict[str, Any] = manifest.get("teacher_tokenizer" if name == "teacher" else "tokenizer", manifest["tokenizer"])
    return described


def _with_main_prompts(
    rows: Any, teachers: list[str], experiment: Experiment, sides: dict[str, Sides], manifest: dict[str, Any]
) -> Any:
    """The rows, each with its prompt in the main teacher's tokens; empty if its template refuses it."""
    chat, found, own = sides[experiment.main].teacher_chat, [], tokenizer_of(manifest, experiment.main)
    for row, name in zip(rows.with_format(None), teachers, strict=True):
        prompt_ids = row["teacher_ids"][: row["teacher_start"]]
        if tokenizer_of(manifest, name) != own:
            (*messages, _), tools = whole_conversation(row)
            try:
                prompt_ids = chat.prompt_ids(messages, tools)
            except UnusableError:
                prompt_ids = []
        found.append(prompt_ids)
    return rows.with_format(None).add_column("main_prompt", found).with_format("numpy")


def _tokenizer(experiment: Experiment, subject: Served, manifest: dict[str, Any]) -> Any:
    """The tokenizer for a model's input: with one vocabulary the teacher's, which every student has too."""
    if "alignment" not in manifest or subject.name == "teacher":
        name, revision, key = experiment.tokenizer
        return load_tokenizer(name, revision, experiment.teacher.trust_remote_code, key)
    tokenizer = load_tokenizer(subject.path, subject.revision, subject.trust_remote_code, f"the model `{subject.name}`")
    tokenizer.chat_template = manifest["tokenizer"]["chat_template"]
    return tokenizer


def _measure(experiment: Experiment, loaded: _Loaded) -> dict[str, Array]:
    """The sums of `fidelity` over every held-out row; of `text_sums` without a teacher."""
    models = loaded.models
    with StageBar("eval", len(loaded.rows)) as bar:

        def report(rows: int, tokens: int) -> None:
            bar.advance(rows, tokens * len(models))

        if not loaded.has_teacher:
            return text_sums(models, loaded.rows, experiment.eval.batch_size, loaded.end_ids["student"], report)
        return fidelity_to_own(
            experiment,
            models,
            loaded.rows,
            loaded.teachers,
            loaded.dtype,
            loaded.classes,
            batch_size=experiment.eval.batch_size,
            end_ids=loaded.ends,
            report=report,
        )


def _metrics(experiment: Experiment, subjects: list[Served], loaded: _Loaded, measured: dict[str, Array]) -> dict[str, Any]:
    """The content of `metrics.json`, except results that need more than the models' distributions on held-out text."""
    ids = loaded.rows.select_columns(["input_ids", "completion_start"])
    text_bytes, weights = text_bytes_of(ids, loaded.tokenizers["student"]), _importance(loaded.rows)
    shown = [metric for metric in METRICS if loaded.has_teacher or metric.of_text]
    described = [
        {
            "name": subject.name,
            "path": subject.path,
            "parameters": sum(parameter.numel() for parameter in loaded.models[subject.name].parameters()),
            "bytes": model_bytes(subject.path),
            **_computed(shown, Sums(subject.name, measured, loaded.draws, text_bytes, weights)),
        }
        for subject in subjects
    ]
    tokens = measured["tokens"]
    held_out = {
        "rows": len(tokens),
        "tokens": int(tokens.sum()),
        "prompts": loaded.draws.draws.shape[1],
        "resamples": experiment.eval.resamples,
    }
    if loaded.classes:
        held_out["classes"] = shared(next(iter(loaded.classes.values())), measured)
        if experiment.teachers:
            held_out["classes"]["count"] = {name: classes.count for name, classes in loaded.classes.items()}
    if measured.get("stored", np.zeros(1)).any():
        held_out["stored"] = float(measured["stored"].sum() / tokens.sum())
    if weights is not None and loaded.has_teacher:
        held_out["effective_rows"] = effective_sample_size(weights)
    metrics = {
        "schema_version": METRICS_VERSION,
        "held_out": held_out,
        "models": described,
        "differences": list(_differences(subjects, measured | {"bytes": text_bytes}, loaded.draws)),
    }
    if experiment.teachers:
        names = [subject.name for subject in subjects]
        metrics["teachers"] = by_teacher(experiment, names, measured, loaded.teachers, loaded.prompts, text_bytes, loaded.classes)
    return metrics


def _add_speeds(metrics: dict[str, Any], served: dict[str, Any]) -> None:
    """The cost of every model, and the headline, which includes it."""
    speeds = {entry["name"]: entry for entry in served["models"]}
    for described in metrics["models"]:
        described |= speeds[described["name"]]
        described["decode_tokens_per_s"] = described["decode"]["median"]
        if "draft" in described:
            drafts.add_speed_ups(described["draft"], described.get("decode_ratio"))
    metrics["decoding"] = {name: value for name, value in served.items() if name != "models"}
    metrics["headline"] = headline(metrics["models"], served["engine"], metrics.get("tasks"))


def _computed(metrics: Iterable[Metric], sums: Sums) -> dict[str, Any]:
    """Omit metrics that are not defined."""
    values = {metric.name: metric.compute(sums) for metric in metrics}
    return {name: value for name, value in values.items() if value is not None}


def text_bytes_of(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> Array:
    """Length in UTF-8 bytes of the text of each row's completion tokens, including traces and tool calls.

    Args:
        rows: with `input_ids` and `completion_start`.
        tokenizer: of these ids.
    """
    answers = (row["input_ids"][row["completion_start"] :] for row in rows)
    texts = (tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in answers)
    return np.array([max(len(text.encode()), 1) for text in texts])


def _importance(rows: Any) -> Array | None:
    """The weight of each row, if the held-out text is a sample."""
    try:
        return importance(log_importance(rows))
    except ValueError:  # text of another origin, or cut by top-p or top-k: the weights do not exist
        return None


def _own_texts(loaded: _Loaded, experiment: Experiment, parts: Parts) -> dict[str, dict[str, Any]]:
    """Evaluation of each model on its own text: distance from the teacher, length, and whether it ends."""
    settings, models = experiment.eval, loaded.models

    def measure(name: str) -> dict[str, Any]:
        ends = loaded.end_ids[name]
        written = own_text(models[name], loaded.rows, settings.own_prompts, settings.own_tokens, ends, experiment.seed, name)
        text_bytes = text_bytes_of(written, loaded.tokenizers[name])
        teachers = [loaded.teachers[row["number"]] for row in written]
        ended = np.array([row["ended"] for row in written], dtype=np.int64)
        ours = bool(loaded.sides) and name != "teacher"
        if name == "teacher":  # its own text, on the prompts of other teachers, too
            teachers = [experiment.main] * len(written)
        elif loaded.sides:
            asked = ((row, loaded.rows[row["number"]], loaded.sides[its]) for row, its in zip(written, teachers, strict=True))
            written = [sides.with_teachers(row, prompt) for row, prompt, sides in asked]
        compared = {"teacher": models["teacher"], name: models[name]}
        ends = loaded.ends if ours else loaded.end_ids["teacher"]
        how = {"batch_size": settings.batch_size, "end_ids": ends}
        classes = loaded.classes if ours else None
        sums = fidelity_to_own(experiment, compared, written, teachers, loaded.dtype, classes, **how) | {"ended": ended}
        draws = Draws.of([loaded.prompts[row["number"]] for row in written], settings.resamples, experiment.seed)
        metrics = [metric for metric in OWN_TEXT_METRICS if not (loaded.classes and metric.name == "teacher_nll")]
        return {
            "prompts": len(written),
            "tokens": int(sums["tokens"].sum()),
            **_computed(metrics, Sums(name, sums, draws, text_bytes)),
        }

    files = {name: f"own-text-{number}" for number, name in enumerate(models)}
    with StageBar("eval", len(models), sum(map(parts.has, files.values()))) as bar:

        def measured(name: str) -> dict[str, Any]:
            found = measure(name)
            bar.advance(1, found["tokens"], [f"own text of {name}"])
            return found

        return {name: parts.result(file, partial(measured, name)) for name, file in files.items()}


def _add_own_texts(metrics: dict[str, Any], own: dict[str, dict[str, Any]], experiment: Experiment) -> None:
    for described in metrics["models"] if own else []:
        prompts = own[described["name"]].pop("prompts")
        described["own_text"] = own[described["name"]]
        metrics["own_text"] = {"prompts": prompts, "max_tokens": experiment.eval.own_tokens}


def _texts(experiment: Experiment, loaded: _Loaded, measured: dict[str, Array]) -> dict[str, Any]:
    """Individual texts for readers."""
    settings, models, rows = experiment.eval, loaded.models, loaded.rows
    rival = next(name for name in reversed(models) if name != "student")
    mains = rows.select([number for number, name in enumerate(loaded.teachers) if name == experiment.main])
    with working("eval", "writing samples"):
        return {
            "samples": samples(models, rows, loaded.tokenizers, loaded.end_ids, settings.samples, settings.sample_tokens),
            "views": views(models, mains, loaded.tokenizers["teacher"]) if loaded.has_teacher and not loaded.classes else [],
            "examples": won_and_lost(measured, rows, rival, "kl" if loaded.has_teacher else "nll"),
        }


def _write(
    experiment: Experiment,
    directory: Path,
    metrics: dict[str, Any],
    measured: dict[str, Array],
    loaded: _Loaded,
    manifest: dict[str, Any],
) -> None:
    """Write the numbers of every row, `metrics.json`, and the results on the student's card."""
    flat = {name: values for name, values in measured.items() if values.ndim == 1}
    names = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in loaded.prompts]
    ids = [str(value) for value in loaded.rows.with_format(None)["id"]]
    teachers = {"teacher": loaded.teachers} if experiment.teachers else {}
    write_parquet(directory / "rows.parquet", pa.table({"id": ids, "conversation": names, **teachers, **flat}))
    write_json(directory / "metrics.json", metrics)
    card = experiment.directory("student") / "README.md"
    if card.is_file():
        write_card(card, lambda: with_results(card.read_text(encoding="utf-8"), metrics, manifest))


def _subjects(experiment: Experiment) -> list[Served]:
    """The models: first the teacher, if its weights are available."""
    teacher, found = experiment.teacher, []
    if not teacher.abilities.api:
        found = [Served("teacher", teacher.model, teacher.revision, teacher.trust_remote_code, teacher.tensor_parallel_size)]
    found += [
        Served("student before", *before(experiment)),
        Served("student", str(experiment.directory("student"))),
    ]
    if experiment.rounds:
        found.append(Served("student, first round", str(experiment.first_student)))
    if experiment.train.compare_examples:
        found.append(Served("student, examples only", str(experiment.directory("student-examples"))))
    if experiment.train.compare_text_only:
        found.append(Served("student, text only", str(experiment.directory("student-text-only"))))
    return found


def _other_teachers(experiment: Experiment) -> list[Served]:
    """The teachers besides the main one."""
    others = {name: teacher for name, teacher in experiment.teachers.items() if name != experiment.main}
    return [Served(f"teachers.{name}", t.model, t.revision, t.trust_remote_code) for name, t in others.items()]


def _requests(experiment: Experiment, plan: _Plan, manifest: dict[str, Any]) -> dict[str, dict[str, Requests]]:
    """The requests on which every model is timed, by task and model."""
    settings, found = experiment.eval, dict[str, dict[str, Requests]]()
    own = [task for task in plan.tasks if isinstance(task, OwnTask)] if settings.timed_requests else []
    for subject in plan.subjects if own else []:
        tokenizer, ends = _tokenizer(experiment, subject, manifest), _described(manifest, subject.name)["end_token_ids"]
        config = load_config(subject.path, subject.revision, subject.trust_remote_code, f"the model `{subject.name}`")
        how = (settings.timed_requests, settings.task_limit, config, tokenizer, ends, experiment.teacher.template_args)
        for task in own:
            found.setdefault(task.task.name, {})[subject.name] = requests_of(task, *how)
    return found


def _served_by_vllm(experiment: Experiment, subjects: list[Served], requests: dict[str, dict[str, Requests]]) -> dict[str, Any]:
    """The cost of every model in vLLM."""
    served = serving.by_vllm(subjects, experiment.eval.batch_size, experiment.eval.sample_tokens, requests)
    for entry in served["models"]:
        if "failed" in entry:
            raise InputError(
                f"eval.speed is vllm, which does not run the model `{entry['name']}`: {entry['failed']}; "
                "set eval.speed to transformers"
            )
    return served


def _check_vocabulary(subject: Served, manifest: dict[str, Any]) -> None:
    how = (subject.path, subject.revision, subject.trust_remote_code, f"the model `{subject.name}`")
    told = _described(manifest, subject.name)
    if vocabulary_hash(load_tokenizer(*how)) == told["vocabulary_hash"]:
        return  # one output layer may still be padded further than the other
    size = load_config(*how).get_text_config().vocab_size
    raise InputError(
        f"{subject.path} has a vocabulary of {size:,} tokens, but that of the held-out rows has {told['vocab_size']:,}"
    )


def _differences(subjects: list[Served], measured: dict[str, Array], draws: Draws) -> Iterator[dict[str, Any]]:
    """The student minus each of its rivals, on the same rows and draws."""
    compared = compared_by(subjects[0].name == "teacher", "positions" in measured)
    for rival in subjects:
        if rival.name.startswith("student") and rival.name != "student":
            for metric in compared:
                if f"student {metric.name}" in measured and measured[metric.over].any():
                    sums = measured[f"student {metric.name}"] - measured[f"{rival.name} {metric.name}"]
                    found = draws.interval(sums, measured[metric.over])
                    yield {"better": "student", "worse": rival.name, "metric": metric.name, **found}
            nats = [Sums(name, measured, draws).text_nll for name in ("student", rival.name)]
            found = draws.interval((nats[0] - nats[1]) / np.log(2), measured["bytes"])
            yield {"better": "student", "worse": rival.name, "metric": "bits_per_byte", **found}
