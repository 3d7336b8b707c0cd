"""Cards in the Hub's format: the contents of a model or dataset, its sources, and how it was made."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from llmdistill.config import Experiment
from llmdistill.config.student import Prune, Student
from llmdistill.data.alignment import shares
from llmdistill.data.targets import KINDS
from llmdistill.evaluation.metrics import first_table
from llmdistill.evaluation.statistics import interval_text
from llmdistill.models.licence import licence_of, of_weights, sentence
from llmdistill.runs.files import write_text
from llmdistill.runs.progress import counted, say

_RESULTS = "## Results"


def describe_targets(manifest: Mapping[str, Any]) -> str:
    """A dataset's soft targets in words, from its `dataset.json`."""
    targets = manifest["targets"]
    said = KINDS[targets["kind"]].sentence(targets)
    if "alignment" not in manifest:
        return said
    several = manifest["alignment"].get("teachers") or {"": manifest["alignment"]}
    shared = "; ".join(f"{name}: {shares(one)}" if name else shares(one) for name, one in several.items())
    return f"{said}; in the tokens of {manifest['student']['model']}, {shared}"


def write_card(file: Path, make: Callable[[], str]) -> None:
    """Write a card; on failure, only warn, so that no work is lost."""
    try:
        text = make()
    except Exception as error:
        say("warning", f"{file}: not written: {type(error).__name__}: {error}")
    else:
        write_text(file, text)


def _writers(manifest: dict[str, Any]) -> str:
    """The teachers in words."""

    def named(teacher: dict[str, Any]) -> str:
        return f"`{teacher['model']}`" + (f" at `{teacher['commit']}`" if teacher.get("commit") else "")

    several = manifest.get("teachers")
    if not several:
        return named(manifest["teacher"])
    return ", ".join(f"{named(teacher)} ({name}, {teacher['rows']:,} rows)" for name, teacher in several.items())


def _text(manifest: dict[str, Any]) -> str:
    """The writer of a dataset's text in words."""
    if source := manifest.get("text_from"):
        return f"from `{Path(source).name}`, scored by {_writers(manifest)}"
    return f"written by {_writers(manifest)}"


def dataset_card(manifest: dict[str, Any]) -> str:
    """The README.md of a dataset, from its `dataset.json`; the teacher's licence applies to the text that it has written.

    It has no `configs`: the splits are in the file names, and `datasets.load_dataset` would confuse a directory with them with
    any other of the same name in its cache, and old files with new ones.
    """
    written = "text_from" not in manifest
    head = {
        "task_categories": ["text-generation"],
        "tags": ["llmdistill", "distillation", *(["synthetic"] if written else [])],
        **(manifest["teacher"].get("licence", {}) if written else {}),
    }
    teacher, sampling = manifest["teacher"], manifest["sampling"]
    facts = {
        "text": _text(manifest),
        "engine": teacher["engine"],
        "sampling": ", ".join(f"{key} {value}" for key, value in sampling.items()) or "unknown",
        "soft targets": describe_targets(manifest),
        "rows": f"{manifest['rows']:,}",
        "completion tokens": f"{manifest['completion_tokens']:,}",
        "rejected": ", ".join(
            f"{step['rejected'] + step['failed']:,} {step['name']}"
            for step in manifest.get("steps", [])
            if step["kept"] < step["rows_in"]
        )
        or "none",
    }
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {"Text and soft" if written else "Soft"} targets of {teacher["model"].rstrip("/").split("/")[-1]}

Made with llmdistill.

{_table(facts)}

{sentence(teacher.get("licence", {}))}

The columns, the splits and everything needed to reproduce it are in `dataset.json`.
"""


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items())])


def _pruned_to(prune: Prune) -> str:
    given = prune.model_dump(exclude_none=True, exclude={"by", "calibration_rows", "refit", "ridge"})
    chosen = f" (by {prune.by})" if isinstance(prune.layers, int) else ""
    return ", ".join(f"{name} {value}" for name, value in given.items()) + chosen


def _starts_from(student: Student, base: str) -> str:
    if student.prune:
        return f"`{base}`, pruned to {_pruned_to(student.prune)}"
    if student.config is None:
        return f"`{base}`"
    changes = ", ".join(f"{name} {value}" for name, value in student.config.items())
    return f"random weights in the architecture of `{base}`" + (f" with {changes}" if changes else "")


def _describe_loss(arguments: Any) -> str:
    """Describe a `DistillConfig`: its terms with their weights, and the weighting of tokens if not uniform."""

    def number(start: float | None, end: float | None) -> str:
        return f"{start:.2g}" if end is None else f"{start:.2g} to {end:.2g}"

    ends = (arguments.alpha, arguments.alpha if arguments.alpha_end is None else arguments.alpha_end)
    rest = [1 - alpha - arguments.sequence_alpha for alpha in ends]
    terms = [f"{number(rest[0], None if rest[0] == rest[1] else rest[1])} × cross-entropy on the teacher's text"]
    if any(ends):
        beta = "" if arguments.beta is None else f" (beta {number(arguments.beta, arguments.beta_end)})"
        terms.append(f"{number(arguments.alpha, arguments.alpha_end)} × {arguments.loss}{beta}")
    if arguments.sequence_alpha:
        terms.append(f"{arguments.sequence_alpha:.2g} × sequence-level KL")
    if arguments.hidden:
        terms.append(f"{arguments.hidden['weight']:g} × hidden states ({arguments.hidden['loss']})")
    if arguments.attention:
        terms.append(f"{arguments.attention['weight']:g} × attention maps")
    weighted = (
        "" if arguments.position_weights == "uniform" else f", tokens weighted by the teacher's {arguments.position_weights}"
    )
    return " + ".join(terms) + weighted + (", equal weight for every sequence" if arguments.reduction == "sequence" else "")


def model_card(
    experiment: Experiment,
    manifest: dict[str, Any],
    name: str,
    arguments: Any,
    results: dict[str, float],
    examples: str | None = None,
    trained_on: tuple[int, int] | None = None,
) -> str:
    """The README.md of a trained student.

    Args:
        experiment: the configuration.
        manifest: manifest of its dataset.
        name: name of its directory.
        arguments: its `DistillConfig`.
        results: results of the training.
        examples: the only file that it has seen.
        trained_on: rows and completion tokens, including those mixed in and excluding those used for validation.
    """
    student, licence = experiment.student, manifest["teacher"].get("licence", {})
    base = student.model or experiment.teacher.model
    licences = [sentence(licence)]
    if base != experiment.teacher.model:  # its weights derive from that model, whatever the teacher's licence
        own = licence_of(base, student.revision)
        licences = [of_weights(base, own), *licences]
        licence = own or ({"license": "other"} if licence else {})
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        # The Hub accepts only its own names, and a new student has no base.
        **({} if Path(base).is_dir() or student.config is not None else {"base_model": base}),
        "tags": ["llmdistill", "distillation"],
        **licence,
    }
    shards = [shard for shard in manifest["shards"] if shard["split"] == "train"]
    rows, tokens = trained_on or (sum(shard[key] for shard in shards) for key in ("rows", "tokens"))
    targets = "none stored; the teacher ran during training" if experiment.targets.online else describe_targets(manifest)
    if examples:
        written, targets = f"the examples in {examples}", "none"
    else:
        mixed = [f"`{directory}`" for directory in experiment.train.mix.datasets] if experiment.train.mix else []
        also = f"; with rows of {', '.join(mixed)}" if mixed else ""
        written = f"{counted(rows, 'row')}, {counted(tokens, 'completion token')}, {_text(manifest)}{also}"
    facts = {
        "starts from": _starts_from(student, base),
        "loss": _describe_loss(arguments),
        "temperature": f"{arguments.temperature:g}",
        "data": written,
        "soft targets": targets,
        "steps": f"{results['steps']:,.0f}"
        + (f", with the weights of step {results['best_step']:,}" if "best_step" in results else ""),
        "last logged": ", ".join(f"{key} {results[key]:.3f} nats per token" for key in ("kl", "ce") if key in results),
    }
    if "eval_ce" in results:
        parts = (f"{key} {results[f'eval_{key}']:.3f} nats per token" for key in ("kl", "ce") if f"eval_{key}" in results)
        facts["on validation rows"] = ", ".join(parts)
    asked = experiment.model_dump(mode="json", include={"seed", "student", "train"}, exclude_none=True)
    settings = yaml.safe_dump(asked, sort_keys=False)
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {name}

A student of `{experiment.teacher.model}`, made with llmdistill.

{_table(facts)}

{" ".join(licences)}

## Usage

```python
from transformers import pipeline

chat = pipeline("text-generation", "PATH_OR_NAME_OF_THIS_MODEL")
print(chat([{{"role": "user", "content": "…"}}], max_new_tokens=256)[0]["generated_text"][-1]["content"])
```

`vllm serve PATH_OR_NAME_OF_THIS_MODEL` serves it.

## Configuration

```yaml
{settings.strip()}
```

Versions, seeds and hashes of all inputs are in `run.json`.
"""


def with_results(card: str, metrics: dict[str, Any], manifest: Mapping[str, Any]) -> str:
    """A student's card with the results of `eval`, replacing earlier ones.

    Args:
        card: the README.md of the student.
        metrics: the content of `metrics.json`.
        manifest: of the dataset whose held-out rows were measured.
    """
    student = next(model for model in metrics["models"] if model["name"] == "student")
    facts = {}
    for metric in first_table(metrics):
        mean, ends = interval_text(student[metric.name], ".3g", metric.factor)
        facts[f"{metric.definition}, {metric.unit}"] = f"{mean} (95% CI {ends})"
    for task in (metrics.get("tasks") or {"tasks": []})["tasks"]:
        mean, ends = interval_text(task["models"]["student"], ".1f", 100)
        teacher = task["models"].get("teacher")
        compared = f", teacher {interval_text(teacher, '.1f', 100)[0]}%" if teacher else ""
        facts[f"{task['name']}, {task['metric']}, %"] = f"{mean}% (95% CI {ends}){compared}"
    facts["parameters"] = f"{student['parameters']:,}"
    held_out = metrics["held_out"]
    what = "positions that both vocabularies share, of the text" if "classes" in held_out else "tokens"
    how = "scored" if "text_from" in manifest else "wrote"
    results = f"""{_RESULTS}

**{metrics["headline"]}**

{_table(facts)}

On {held_out["tokens"]:,} {what} that the teacher {how} for {held_out["prompts"]:,} prompts held out from training;
intervals over prompts.

"""
    card = without_results(card)
    place = next((card.index(heading) for heading in ("## Usage", "## Configuration") if heading in card), len(card))
    return _with_index(card[:place], student, metrics, f"held-out text that the teacher {how}") + results + card[place:]


def without_results(card: str) -> str:
    """A student's card as it was before `eval`."""
    card = re.sub(rf"^{_RESULTS}\n.*?(?=^## |\Z)", "", card, flags=re.DOTALL | re.MULTILINE)
    head, text = _split(card)
    head.pop("model-index", None)
    return _joined(head, text)


def _split(card: str) -> tuple[dict[str, Any], str]:
    """The YAML header of a card, and the rest."""
    if not card.startswith("---\n"):
        return {}, card
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head) or {}, text


def _joined(head: dict[str, Any], text: str) -> str:
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n{text}" if head else text


def _with_index(card: str, student: dict[str, Any], metrics: dict[str, Any], text: str) -> str:
    """Add the Hub's `model-index` to the header, which shows results next to the model."""
    head, rest = _split(card)
    if not head:
        return card
    dataset = {"name": text, "type": "llmdistill"}
    found = [
        {
            "type": metric.name,
            "name": f"{metric.definition}, {metric.unit}",
            "value": metric.factor * student[metric.name]["mean"],
        }
        for metric in first_table(metrics)
    ]
    results = [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": found}]
    for task in (metrics.get("tasks") or {"tasks": []})["tasks"]:
        value = {"type": task["metric"], "name": task["metric"], "value": task["models"]["student"]["mean"]}
        about = {"name": task["name"], "type": task["name"]}
        results.append({"task": {"type": "text-generation"}, "dataset": about, "metrics": [value]})
    return _joined(head | {"model-index": [{"name": Path(student["path"]).name, "results": results}]}, rest)
