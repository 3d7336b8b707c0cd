"""`llmdistill inspect`: the contents of a dataset at a glance."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llmdistill.config import Generate
from llmdistill.data import targets
from llmdistill.data.alignment import shares
from llmdistill.data.batches import read_batches
from llmdistill.data.dataset import shard_files
from llmdistill.data.manifest import bytes_per_position, read_manifest
from llmdistill.data.shard_writer import SPLITS
from llmdistill.errors import InputError
from llmdistill.evaluation.statistics import share_text
from llmdistill.runs.progress import console, counted, printable
from llmdistill.tasks.task import Item, Task, check_targets, items_file, read_items, read_task
from llmdistill.teachers.thinking import behind_trace

_BAR = 24  # characters for all rows
_WRONG = 10  # answers that are printed
_LOOKED_AT = 8  # shards, of which the first rows tell about the targets; so that a large dataset takes no longer


def inspect(directory: Path, verify: bool = False, task: Path | None = None) -> None:
    """Print counts, bytes per position, kept mass and a sample, from `dataset.json` and a few rows.

    Args:
        directory: the dataset's.
        verify: read every shard and check it against the checksum in its name.
        task: file of a task of your own, by which answers to its held-out examples are scored, in place of the sample.

    Raises:
        InputError: there is no complete dataset of this schema, a shard is damaged, no row asks a held-out example, or
            an example's output could not be accepted.
    """
    manifest = read_manifest(directory)
    checked = sum(len(shard_files(directory, split)) for split in SPLITS) if verify else 0
    everything = [directory / entry["file"] for entry in manifest["shards"]]
    scored = _scored(directory, manifest, everything, read_task(task, "--task")) if task else []
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(manifest, everything):
        table.add_row(f"[bold]{name}[/bold]", escape(printable(value)))
    console.print(table, soft_wrap=False)
    if "steps" in manifest:
        console.print(_waterfall(manifest), soft_wrap=False)
    for split in SPLITS:
        entries = [entry for entry in manifest["shards"] if entry["split"] == split]
        if entries:
            rows, tokens, size = (sum(entry[key] for entry in entries) for key in ("rows", "tokens", "bytes"))
            text = f"{counted(rows, 'row')} · {counted(tokens, 'completion token')} · {size / 1e6:,.1f} MB"
            text += f" in {counted(len(entries), 'shard')}"
            console.print(f"[bold]{split:<6}[/bold] {text}")
    if verify:
        console.print(f"[bold]intact[/bold] the rows and checksums of {counted(checked, 'shard')}")
    if task:
        _print_scored(scored)
    else:
        _print_sample(everything[0])


def _scored(directory: Path, manifest: dict[str, Any], files: list[Path], task: Task) -> list[tuple[float, Item, str]]:
    """The score of every answer to a held-out example, with the example and the answer, lowest first.

    A reasoning trace is no part of the answer, as in `curate` and `eval`.
    """
    end = manifest["sampling"].get("thinking_end", Generate.model_fields["thinking_end"].default)
    name, file = items_file(task)
    held_out = read_items(file)
    check_targets(held_out, lambda output: task.rules.verdict(task, output))
    items = {item.input: item for item in held_out}
    rows = (row for table in read_batches(files, ["prompt", "completion"]) for row in table.to_pylist())
    asked = ((items.get(row["prompt"][-1]["content"]), row["completion"][-1]["content"]) for row in rows if row["prompt"])
    answers = ((item, behind_trace(text, end)) for item, text in asked)
    metric = task.rules.METRIC
    scored = [(task.rules.score(task, answer, item.output)[metric], item, answer) for item, answer in answers if item]
    if not scored:
        raise InputError(f"{directory}: no prompt is an example of {name}, the test of {task.file} (--task)")
    return sorted(scored, key=lambda entry: entry[0])


def _print_scored(scored: list[tuple[float, Item, str]]) -> None:
    """The mean score, and the worst answers next to the right ones."""
    wrong = [entry for entry in scored if entry[0] < 1]
    mean = sum(score for score, _, _ in scored) / len(scored)
    of = f"{len(scored) - len(wrong):,} of {counted(len(scored), 'answer')} to held-out examples are right"
    console.print(f"[bold]task  [/bold] {of} · score {mean:.2f}")
    for score, item, answer in wrong[:_WRONG]:
        told = {"input": item.input, "answer": answer, "right": item.output}
        text = Text("\n").join(Text(f"{name:<6} {printable(value)}") for name, value in told.items())
        title = Text(f"{printable(item.origin)} · score {score:.2f}")
        console.print(Panel(text, title=title, title_align="left"), soft_wrap=False)
    if len(wrong) > _WRONG:
        console.print(f"and {len(wrong) - _WRONG:,} more")


def _facts(manifest: dict[str, Any], files: list[Path]) -> list[tuple[str, str]]:
    teacher, sampling, kept = manifest["teacher"], manifest["sampling"], manifest["targets"]
    kind = targets.KINDS[kept["kind"]]
    theirs = manifest.get("teacher_tokenizer", manifest["tokenizer"])
    facts = [
        ("teacher", f"{teacher['model']} by {teacher['engine']}, vocabulary {theirs['vocab_size']:,}"),
        ("sampling", ", ".join(f"{key} {value}" for key, value in sampling.items()) or "unknown"),
        ("targets", ", ".join([kind.name, *(f"{key} = {kept[key]}" for key in [kind.size] if key in kept)])),
    ]
    several = manifest.get("teachers", {})
    facts[1:1] = [(f"  {name}", f"{one['model']}, {one['rows']:,} rows{_vocabulary(one)}") for name, one in several.items()]
    facts.append(("ended", _endings(files)))
    if kind.columns:
        facts.append(("size", f"{bytes_per_position(manifest['shards']):.0f} bytes per position"))
    if "alignment" in manifest:
        facts.append(("student", f"{manifest['student']['model']}, vocabulary {manifest['tokenizer']['vocab_size']:,}"))
        facts.append(("alignment", shares(manifest["alignment"])))
        facts += [(f"  {name}", shares(one)) for name, one in manifest["alignment"].get("teachers", {}).items()]
    return [*facts, *kind.facts(kept, partial(_some, files)).items(), ("repeats", manifest["determinism"])]


def _endings(files: list[Path]) -> str:
    """How the answers in a few shards ended, most frequent first."""
    reasons: Counter[str] = Counter()
    for rows in read_batches(_few(files), ["finish_reason"]):
        reasons.update(reason or "unknown" for reason in rows["finish_reason"].to_pylist())
    return ", ".join(f"{share_text(count / reasons.total())} {reason}" for reason, count in reasons.most_common())


def _vocabulary(teacher: dict[str, Any]) -> str:
    """The vocabulary of a teacher whose tokens differ from the others'."""
    return f", vocabulary {teacher['tokenizer']['vocab_size']:,}" if "tokenizer" in teacher else ""


def _waterfall(manifest: dict[str, Any]) -> Table:
    """What each step of `curate` kept of its input rows (█), and what it rejected or could not judge (░)."""
    rows = manifest["rows_in"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "in", "rejected", "failed", "kept"):
        table.add_column(name, justify="left" if name == "step" else "right")
    table.add_column("")
    for number, step in enumerate(manifest["steps"], start=1):
        counts = (step["rows_in"], step["rejected"], step["failed"], step["kept"])
        before, after = (round(_BAR * step[key] / rows) for key in ("rows_in", "kept"))
        bar = "█" * after + "░" * max(before - after, int(step["kept"] < step["rows_in"]))
        table.add_row(f"{number} {escape(step['name'])}", *(f"{count:,}" for count in counts), bar)
    return table


def _few(files: list[Path]) -> list[Path]:
    """A few of the shards, evenly spaced."""
    return [files[number] for number in np.unique(np.linspace(0, len(files) - 1, _LOOKED_AT).round().astype(int))]


def _some(files: list[Path], name: str) -> targets.Array:
    """A column's values in the first rows of a few shards, evenly spaced."""
    columns = [next(read_batches([file], [name]))[name].combine_chunks() for file in _few(files)]
    values: targets.Array = np.concatenate([column.flatten().to_numpy() for column in columns])
    return values


def _print_sample(file: Path) -> None:
    row = next(read_batches([file])).slice(0, 1).to_pylist()[0]
    for message in [*row["prompt"], *row["completion"]]:
        text, role = Text(printable(message["content"])), Text(printable(message["role"]))
        console.print(Panel(text, title=role, title_align="left"), soft_wrap=False)
    length = len(row["input_ids"]) - row["completion_start"]
    counts = f"{row['completion_start']} prompt tokens, {length} completion tokens"
    console.print(printable(f"row {row['id']} · {counts}, ended by {row['finish_reason']}"), markup=False)
