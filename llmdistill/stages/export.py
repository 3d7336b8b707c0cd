"""`llmdistill export`: the student as directories to serve, whole and quantised, each measured against the student itself."""

import importlib.metadata
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.config.export import Export, Form
from llmdistill.config.machine import inference_precision
from llmdistill.data.dataset import MANIFEST, conversations, load_dataset, read_manifest
from llmdistill.errors import InputError
from llmdistill.evaluation import serving
from llmdistill.evaluation.fidelity import fidelity
from llmdistill.evaluation.statistics import Draws, check_clusters
from llmdistill.models.loading import (
    check_model_exists,
    load_config,
    load_model,
    load_tokenizer,
    model_bytes,
)
from llmdistill.runs import record
from llmdistill.runs.progress import StageBar, say, working
from llmdistill.students.quantization import (
    base_of,
    check_form,
    fitting_group_size,
    load_form,
    merge_adapters,
    stored_dtype,
    write_form,
)

EXPORT_VERSION = 1
RESULTS = "export.json"


def export(experiment: Experiment, dry_run: bool = False) -> None:
    """Write `OUTPUT/export/FORM` for every form asked for, and `OUTPUT/export/export.json`; finished forms are kept.

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
    manifest = read_manifest(experiment.dataset_directory)
    claimed, inputs = _claim(experiment, settings, source)
    for form in settings.formats:
        check_form(form, settings)
    if experiment.eval.speed == "vllm":
        serving.check_vllm("eval.speed")
    state = record.claim(directory, "export", claimed, inputs)
    results = _results(directory)
    missing = [form for form in settings.formats if form not in {made["name"] for made in results["formats"]}]
    if state == "done" and not missing:
        say("export", f"{directory} is finished")
        return
    _check_fit(source, settings, manifest)
    rows = load_dataset(experiment.dataset_directory, "test")
    prompts = conversations(rows.select_columns(["prompt", "completion", "metadata"]).with_format("arrow")[:])
    check_clusters(len(set(prompts)), "held-out prompts", "raise eval.held_out")
    draws = Draws.of(prompts, experiment.eval.resamples, experiment.seed)
    precision = inference_precision(experiment.eval.dtype)
    precision = record.begin_computing(directory, "export", claimed, inputs, experiment.seed, precision)
    with _whole(source, settings, directory, manifest["tokenizer"]) as model:
        for form in missing:
            made = _export_one(experiment, settings, form, model, precision.dtype, rows, draws)
            results = _results(directory) | {"source": str(source), "bytes": model_bytes(model)}
            results["formats"] = [*results["formats"], made]
            record.write_json(directory / RESULTS, results)
            say("export", _summary(made, results["bytes"]))
        if experiment.eval.speed == "vllm":
            results["serving"] = _serve(experiment, model, results["formats"])
            record.write_json(directory / RESULTS, results)
    record.finish(directory, {made["name"]: made["bytes"] for made in results["formats"]})


def _claim(experiment: Experiment, settings: Export, source: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings on which what is written depends, and the inputs; more formats may be asked for later."""
    _check_source(settings, source)
    base = [base_of(source)] if (source / "adapter_config.json").is_file() else []
    inputs = {model: record.model_fingerprint(model, None) for model in base}
    manifest = experiment.dataset_directory / MANIFEST
    inputs |= {str(source): record.model_fingerprint(str(source), None), str(manifest): record.sha256(manifest)}
    claimed = {
        "seed": experiment.seed,
        "eval": experiment.eval.model_dump(mode="json", include={"resamples", "speed"}),
        "export": settings.model_dump(mode="json", exclude={"formats"}),
    }
    return claimed, inputs


def _check_source(settings: Export, source: Path) -> None:
    """Refuse what is no model, or adapters without their base.

    Raises:
        InputError: naming the key.
    """
    if (source / "adapter_config.json").is_file():
        check_model_exists(base_of(source), "export.model: the adapters' base")
    else:
        check_model_exists(str(source), "export.model" if settings.model else "the student")


def _results(directory: Path) -> dict[str, Any]:
    found = record.read_json(directory / RESULTS) or {"schema_version": EXPORT_VERSION, "formats": []}
    if found.get("schema_version") != EXPORT_VERSION:
        raise InputError(
            f"{directory / RESULTS} is of schema {found.get('schema_version')}, this version writes {EXPORT_VERSION}"
        )
    return dict(found)


def _check_fit(source: Path, settings: Export, manifest: dict[str, Any]) -> None:
    """What the student's shape does not allow, from its configuration alone.

    Raises:
        InputError: it has other tokens than the held-out rows, or its layers do not divide into groups.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = base_of(source) if (source / "adapter_config.json").is_file() else str(source)
    config = load_config(model, None, key="export.model")
    size = config.get_text_config().vocab_size
    if size != manifest["tokenizer"]["vocab_size"]:
        raise InputError(
            f"{source} has {size:,} tokens, the dataset was written with {manifest['tokenizer']['vocab_size']:,}: "
            "what quantising costs is measured on its held-out rows, which have to be in the student's tokens"
        )
    if "w4a16" in settings.formats:
        with torch.device("meta"):
            fitting_group_size(AutoModelForCausalLM.from_config(config), settings.group_size)


@contextmanager
def _whole(source: Path, settings: Export, directory: Path, talks: dict[str, Any]) -> Iterator[str]:
    """A directory with the whole student in it: `source`, or where it holds adapters the base with them merged into it.

    Such a student has learnt the dataset's chat template and end tokens, which its base need not have.
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


def _export_one(
    experiment: Experiment, settings: Export, form: Form, model: str, dtype: str, rows: Any, draws: Draws
) -> dict[str, Any]:
    """Write one form, load it again and measure it; what `export.json` says of it."""
    path = experiment.directory("export") / form
    if path.exists():  # its measurement was interrupted
        shutil.rmtree(path)
    with working("export", f"writing {form}"), record.new_directory(path) as unfinished:
        tokenizer = load_tokenizer(model, None, key="export.model")
        how = write_form(form, model, unfinished, settings, _calibration(experiment, settings, form), tokenizer)
        record.write_text(unfinished / "README.md", _card(Path(model), form, how))
    with working("export", f"loading {form}"):
        models = {"teacher": load_model(model, dtype=dtype), form: load_form(str(path), dtype)}
    with StageBar(form, len(rows)) as bar:
        measured = fidelity(models, rows, experiment.eval.batch_size, report=bar.advance)
    return {
        "name": form,
        "path": str(path),
        "how": how,
        "bytes": model_bytes(str(path)),
        "engine": f"transformers {importlib.metadata.version('transformers')}",
        "kl": draws.interval(measured[f"{form} kl"], measured["tokens"]),
        "top1": draws.interval(measured[f"{form} top1"], measured["tokens"]),
        "held_out": {"rows": len(rows), "tokens": int(measured["tokens"].sum()), "prompts": draws.draws.shape[1]},
    }


def _serve(experiment: Experiment, model: str, formats: list[dict[str, Any]]) -> dict[str, Any]:
    """The student and every form of it in vLLM, side by side."""
    models = [serving.Served("student", model), *(serving.Served(made["name"], made["path"]) for made in formats)]
    served = serving.by_vllm(models, experiment.eval.batch_size, experiment.eval.sample_tokens)
    for entry in served["models"]:
        say("export", _speed_summary(entry))
    return served


def _calibration(experiment: Experiment, settings: Export, form: Form) -> list[list[int]]:
    """Token ids of rows of the training split, drawn by the seed; none where nothing is measured on them."""
    if form not in ("w8a8", "w4a16") or settings.rounding != "gptq":
        return []
    rows = load_dataset(experiment.dataset_directory, "train")
    chosen = random.Random(experiment.seed).sample(range(len(rows)), min(settings.calibration_rows, len(rows)))  # noqa: S311
    return [[int(token) for token in rows[number]["input_ids"]] for number in chosen]


def _card(model: Path, form: Form, how: str) -> str:
    """The student's own card, and what became of it here."""
    card = model / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {model.name}\n"
    return f"{text.rstrip()}\n\n## This copy\n\nExported by llmdistill as {form}: {how}.\n"


def _summary(made: dict[str, Any], whole: int | None) -> str:
    kl, top1 = made["kl"], made["top1"]
    share = f" ({made['bytes'] / whole:.0%})" if whole else ""
    return (
        f"{made['name']:<11} {made['bytes'] / 1e6:,.0f} MB{share} · {kl['mean']:.3f} nats from the student "
        f"({kl['low']:.3f} to {kl['high']:.3f}) · same next token {top1['mean']:.1%} ({top1['low']:.1%} to {top1['high']:.1%})"
    )


def _speed_summary(entry: dict[str, Any]) -> str:
    if "failed" in entry:
        return f"{entry['name']:<11} is not for this vLLM: {entry['failed']}"
    decode, ratio = entry["decode"], entry.get("decode_ratio", {"median": 1, "low": 1, "high": 1})
    writes = f"{decode['median']:,.0f} tok/s, {ratio['median']:.2f} × the student ({ratio['low']:.2f} to {ratio['high']:.2f})"
    reads = f"{entry['prefill']['median']:,.0f} tok/s, takes {entry['peak_bytes'] / 1e9:.1f} GB"
    return f"{entry['name']:<11} in vLLM writes {writes}, reads {reads}"
