"""`llmdistill export`: directories for serving the student, unquantised and quantised, compared with the student itself."""

import importlib.metadata
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.export import Export
from llmdistill.config.machine import inference_precision
from llmdistill.data.cards import without_results, write_card
from llmdistill.data.dataset import load_dataset
from llmdistill.data.manifest import MANIFEST, read_manifest
from llmdistill.data.subjects import dataset_keys
from llmdistill.errors import InputError
from llmdistill.evaluation import serving
from llmdistill.evaluation.exported_tasks import CASCADE, MeasuredTasks, for_a_server, measured_tasks, on_tasks
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.own_tasks import requests_of
from llmdistill.evaluation.statistics import Draws, check_clusters, interval_text
from llmdistill.evaluation.summary import exported_model, task_lines
from llmdistill.models.loading import (
    check_model_exists,
    hand_back_memory,
    load_config,
    load_model,
    load_tokenizer,
    meta_model,
    model_bytes,
    vocabulary_hash,
)
from llmdistill.runs import record
from llmdistill.runs.files import new_directory, read_json, write_json
from llmdistill.runs.inputs import model_fingerprint, sha256
from llmdistill.runs.progress import StageBar, say, working
from llmdistill.students.adapters import base_of, merge_adapters
from llmdistill.students.formats import FORMATS, ExportFormat, Source, stored_dtype
from llmdistill.students.sides import training_dataset

EXPORT_VERSION = 1
RESULTS = "export.json"


@dataclass(frozen=True)
class _HeldOut:
    """The data for measuring formats: the held-out rows, and resamples of their prompts."""

    rows: Any
    draws: Draws


def export(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/export/FORM` for every requested format, and `OUTPUT/export/export.json`; finished ones are kept.

    Raises:
        InputError: the student, the dataset, a library or the output directory is not usable; nothing was written.
    """
    settings, directory = experiment.export or Export(), experiment.directory("export")
    source = Path(settings.model or experiment.directory("student"))
    if dry_run:
        if settings.model:
            _check_source(settings, source)
        say("export", f"would write {', '.join(str(directory / form) for form in settings.formats)}")
        return
    manifest = read_manifest(training_dataset(experiment))
    _check_source(settings, source)
    check_libraries(experiment, settings)
    (claim,) = claims(experiment)
    state = record.claim(*claim)
    results, tasks = _results(directory), measured_tasks(experiment)
    there = {made["name"] for made in results["formats"]}
    missing = [form for form in settings.formats if form not in there]
    if state == "done" and not missing and not _without_tasks(results, tasks):
        say("export", f"{directory} is finished")
        return
    _check_fit(source, settings, manifest)
    held_out = _held_out(experiment)
    precision = inference_precision(experiment.eval.dtype)
    precision = record.begin_computing(*claim, experiment.seed, precision)
    with _whole(source, settings, directory, manifest["tokenizer"]) as model:
        for form in missing:
            made = _export_one(experiment, FORMATS[form], _source(experiment, FORMATS[form], model), precision.dtype, held_out)
            results = _results(directory) | {"source": str(source), "bytes": model_bytes(model)}
            results["formats"] = [*results["formats"], made]
            write_json(directory / RESULTS, results)
            say("export", _summary(made, results["bytes"], exported_model(experiment)))
        results = _results(directory)
        unmeasured = _without_tasks(results, tasks)
        for made in unmeasured:
            _on_tasks(experiment, model, made, tasks, manifest["tokenizer"]["end_token_ids"])
            write_json(directory / RESULTS, results)
        if experiment.eval.speed == "vllm" and (missing or unmeasured or "serving" not in results):
            hand_back_memory()
            results["serving"] = _serve(experiment, model, results["formats"], tasks, manifest["tokenizer"]["end_token_ids"])
            write_json(directory / RESULTS, results)
    record.finish(directory, {made["name"]: made["bytes"] for made in results["formats"]})


def _without_tasks(results: dict[str, Any], tasks: MeasuredTasks | None) -> list[dict[str, Any]]:
    """The formats that have not been evaluated on the tasks of `eval`."""
    return [made for made in results["formats"] if tasks and made.get("tasks", {}).get("of") != tasks.sha256]


def _on_tasks(experiment: Experiment, source: str, made: dict[str, Any], tasks: MeasuredTasks | None, end_ids: list[int]) -> None:
    """Evaluate a format on the tasks, and record it in its entry, on its card and in its `cascade.json`."""
    assert tasks is not None
    name, path = made["name"], Path(made["path"])
    with working("export", f"loading {name}"):
        model, tokenizer = FORMATS[name].load(str(path), made["dtype"]), load_tokenizer(str(path), None, key="export")
    made["tasks"] = on_tasks(tasks, model, tokenizer, end_ids, experiment)
    write_json(path / CASCADE, for_a_server(tasks, made["tasks"], made["dtype"], experiment.teacher.template_args))
    write_card(path / "README.md", lambda: _card(Path(source), FORMATS[name], made, exported_model(experiment)))
    for line in task_lines(made["tasks"]):
        say("export", f"{name:<11} {line}")


def check_libraries(experiment: Experiment, settings: Export) -> None:
    """Refuse formats whose library is not installed.

    Raises:
        InputError: names what to install.
    """
    for form in settings.formats:
        FORMATS[form].check_library(settings)
    if experiment.eval.speed == "vllm":
        serving.check_vllm("eval.speed")


def claims(experiment: Experiment) -> list[record.Claim]:
    """The exported formats, and what they depend on; more formats may be requested later."""
    settings = experiment.export or Export()
    source = Path(settings.model or experiment.directory("student"))
    timed = {"sample_tokens", "batch_size", "timed_requests"} if experiment.eval.speed == "vllm" else set()
    claimed = {
        "seed": experiment.seed,
        "eval": {
            **experiment.eval.model_dump(mode="json", include={"resamples", "speed"}),
            **experiment.eval.model_dump(mode="json", include={"dtype", *timed}, exclude_defaults=True),
        },
        "export": settings.model_dump(mode="json", exclude={"formats"}),
    }
    return [record.Claim(experiment.directory("export"), "export", claimed, _inputs(experiment, source))]


def _inputs(experiment: Experiment, source: Path) -> dict[str, str]:
    """Path or name and hash of the inputs; for adapters, also of their base."""
    models = [base_of(source)] if (source / "adapter_config.json").is_file() else []
    inputs = {model: model_fingerprint(model, None) for model in (*models, str(source))}
    manifest = training_dataset(experiment) / MANIFEST
    return inputs | {str(manifest): sha256(manifest)}


def _held_out(experiment: Experiment) -> _HeldOut:
    """The held-out rows of the dataset.

    Raises:
        InputError: they belong to fewer than two prompts.
    """
    rows = load_dataset(training_dataset(experiment), "test")
    prompts = dataset_keys(rows)
    check_clusters(len(set(prompts)), "held-out prompts", "raise eval.held_out")
    return _HeldOut(rows, Draws.of(prompts, experiment.eval.resamples, experiment.seed))


def _check_source(settings: Export, source: Path) -> None:
    """Refuse a directory that is not a model, or adapters without their base.

    Raises:
        InputError: names the key.
    """
    if (source / "adapter_config.json").is_file():
        check_model_exists(base_of(source), "export.model: the adapters' base")
    else:
        check_model_exists(settings.model or source, "export.model" if settings.model else "the student, which `train` writes")


def _results(directory: Path) -> dict[str, Any]:
    found = read_json(directory / RESULTS) or {"schema_version": EXPORT_VERSION, "formats": []}
    if found.get("schema_version") != EXPORT_VERSION:
        raise InputError(
            f"{directory / RESULTS}: schema_version is {found.get('schema_version')}, but this version writes {EXPORT_VERSION}"
        )
    return dict(found)


def _check_fit(source: Path, settings: Export, manifest: dict[str, Any]) -> None:
    """Check the student's shape, from its configuration only.

    Raises:
        InputError: it has other tokens than the held-out rows, or a format does not fit its layers or tokenizer.
    """
    model = base_of(source) if (source / "adapter_config.json").is_file() else str(source)
    config, tokenizer = load_config(model, None, key="export.model"), load_tokenizer(model, None, key="export.model")
    if vocabulary_hash(tokenizer) != manifest["tokenizer"]["vocabulary_hash"]:  # its output layer may be padded as it likes
        raise InputError(
            f"{source} and the dataset have different vocabularies; fidelity is measured on held-out rows, which must have the "
            "student's tokens"
        )
    checks = [check for form in settings.formats if (check := FORMATS[form].check)]
    if checks:
        shape = meta_model(config)
        for check in checks:
            check(shape, tokenizer, settings)


@contextmanager
def _whole(source: Path, settings: Export, directory: Path, talks: dict[str, Any]) -> Iterator[str]:
    """A directory with the whole student: `source`, or if it contains adapters, the base with them merged.

    Such a student has learned the dataset's chat template and end tokens, which its base need not have.
    """
    if not (source / "adapter_config.json").is_file():
        yield str(source)
        return
    merged = directory / ".merged.unfinished"
    shutil.rmtree(merged, ignore_errors=True)
    try:
        tokenizer = load_tokenizer(base_of(source), None, key="export.model")
        tokenizer.chat_template = talks["chat_template"]
        merge_adapters(source, stored_dtype(settings), talks["end_token_ids"], merged)
        tokenizer.save_pretrained(merged)
        yield str(merged)
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _source(experiment: Experiment, form: ExportFormat, model: str) -> Source:
    """The student with what is needed to write it; for gptq, rows of the training split, drawn by the seed."""
    settings = experiment.export or Export()
    tokenizer = load_tokenizer(model, None, key="export.model")
    if not form.by_gptq(settings):
        return Source(model, tokenizer, settings, [])
    rows = load_dataset(training_dataset(experiment), "train")
    chosen = random.Random(experiment.seed).sample(range(len(rows)), min(settings.calibration_rows, len(rows)))  # noqa: S311
    return Source(model, tokenizer, settings, [[int(token) for token in rows[number]["input_ids"]] for number in chosen])


def _export_one(experiment: Experiment, form: ExportFormat, source: Source, dtype: str, held_out: _HeldOut) -> dict[str, Any]:
    """Write one format, load it again and measure it; returns its entry in `export.json`."""
    name, path, whose = form.name, experiment.directory("export") / form.name, exported_model(experiment)
    if path.exists():  # its measurement was interrupted
        shutil.rmtree(path)
    with working("export", f"writing {name}"), new_directory(path) as unfinished:
        how = form.write(source, unfinished)
        source.tokenizer.save_pretrained(unfinished)
        write_card(unfinished / "README.md", lambda: _card(Path(source.model), form, {"how": how}, whose))
    with working("export", f"loading {name}"):
        models = {"teacher": load_model(source.model, dtype=dtype), name: form.load(str(path), dtype)}
    with StageBar(name, len(held_out.rows)) as bar:
        measured = fidelity(models, held_out.rows, experiment.eval.batch_size, report=bar.advance)
    draws, tokens = held_out.draws, measured["tokens"]
    made = {
        "name": name,
        "path": str(path),
        "how": how,
        "bytes": model_bytes(str(path)),
        "dtype": dtype,
        "engine": f"transformers {importlib.metadata.version('transformers')}",
        "kl": draws.interval(measured[f"{name} kl"], tokens, least=0),
        "top1": draws.share(measured[f"{name} top1"], tokens),
        "held_out": {"rows": len(held_out.rows), "tokens": int(tokens.sum()), "prompts": draws.draws.shape[1]},
    }
    write_card(path / "README.md", lambda: _card(Path(source.model), form, made, whose))
    return made


def _serve(
    experiment: Experiment, model: str, formats: list[dict[str, Any]], tasks: MeasuredTasks | None, end_ids: list[int]
) -> dict[str, Any]:
    """The student and every format of it in vLLM, side by side."""
    models = [serving.Served("student", model), *(serving.Served(made["name"], made["path"]) for made in formats)]
    requests: dict[str, dict[str, serving.Requests]] = {}
    if tasks and (count := experiment.eval.timed_requests):
        config, tokenizer = load_config(model, None, key="export.model"), load_tokenizer(model, None, key="export.model")
        how = (count, experiment.eval.task_limit, config, tokenizer, end_ids, experiment.teacher.template_args)
        requests = {own.task.name: dict.fromkeys((one.name for one in models), requests_of(own, *how)) for own in tasks.tasks}
    served = serving.by_vllm(models, experiment.eval.batch_size, experiment.eval.sample_tokens, requests)
    for entry in served["models"]:
        say("export", _speed_summary(entry, exported_model(experiment)))
    return served


def _card(model: Path, form: ExportFormat, made: dict[str, Any], whose: str) -> str:
    """The model's own card without its results, which do not apply to this format, plus its description."""
    card = model / "README.md"
    text = without_results(card.read_text(encoding="utf-8")) if card.is_file() else f"# {model.name}\n"
    measured = ""
    if "kl" in made:
        (kl, kl_ends), (top1, top1_ends) = interval_text(made["kl"], ".3g"), interval_text(made["top1"], ".1f", 100)
        held_out = made["held_out"]
        measured = (
            f"\nOn {held_out['tokens']:,} tokens for {held_out['prompts']:,} held-out prompts, compared in {made['dtype']}, it "
            f"is {kl} nats per token from {whose} before export (95% CI {kl_ends}) and has the same most likely token at "
            f"{top1}% (95% CI {top1_ends}) of them. The results of {whose} itself are in its own card.\n"
        )
    if "tasks" in made:
        lines = "".join(f"- {line}\n" for line in task_lines(made["tasks"]))
        measured += f"\nOn the tasks; when to ask the teacher instead is in `{CASCADE}`:\n\n{lines}"
    said = f"Exported by llmdistill as {form.name}: {made['how']}. Loaded by {form.loaded_by}."
    return f"{text.rstrip()}\n\n## This copy\n\n{said}\n{measured}"


def _summary(made: dict[str, Any], whole: int | None, whose: str) -> str:
    share = f" ({made['bytes'] / whole:.0%})" if whole else ""
    (kl, kl_ends), (top1, top1_ends) = interval_text(made["kl"], ".3f"), interval_text(made["top1"], ".1%")
    return (
        f"{made['name']:<11} {made['bytes'] / 1e6:,.0f} MB{share} · {kl} nats from {whose} ({kl_ends}) · "
        f"same next token {top1} ({top1_ends})"
    )


def _speed_summary(entry: dict[str, Any], whose: str) -> str:
    name = whose.removeprefix("the ") if entry["name"] == "student" else entry["name"]
    if "failed" in entry:
        return f"{name:<11} cannot be loaded by this vLLM: {entry['failed']}"
    writes = f"{entry['decode']['median']:,.0f} tok/s"
    if ratio := entry.get("decode_ratio"):
        writes += f", {ratio['median']:.2f} × {whose} ({ratio['low']:.2f} to {ratio['high']:.2f})"
    reads = f"{entry['prefill']['median']:,.0f} tok/s, memory {entry['peak_bytes'] / 1e9:.1f} GB"
    return f"{name:<11} in vLLM: decoding {writes}, prefill {reads}"
