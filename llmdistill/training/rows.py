"""The rows that a student is trained on: those of the dataset and of the datasets mixed in, less those for validation."""

from pathlib import Path
from typing import Any

from llmdistill.config import Experiment
from llmdistill.data.batches import read_batches
from llmdistill.data.dataset import load_dataset, shard_files
from llmdistill.data.manifest import has_several_tokenizers
from llmdistill.data.subjects import conversation_keys, dataset_keys, is_held_out
from llmdistill.data.targets import KINDS, Sampled, SampledByStudent
from llmdistill.errors import InputError
from llmdistill.runs.progress import counted, say
from llmdistill.students.sides import training_dataset


def check_mix(experiment: Experiment, manifest: dict[str, Any], mixed: list[dict[str, Any]]) -> None:
    """Refuse to mix datasets with different vocabularies or kinds of targets."""
    for directory, other in zip(experiment.mixed_datasets, mixed, strict=True):
        if has_several_tokenizers(other):
            raise InputError(
                f"train.mix.datasets: the rows of {directory} are in the tokens of several teachers; mix in what `retokenize` "
                "makes of them"
            )
        for what, mine, theirs in (
            ("targets", _kind_of(manifest["targets"]), _kind_of(other["targets"])),
            ("vocabulary", manifest["tokenizer"]["vocabulary_hash"], other["tokenizer"]["vocabulary_hash"]),
            ("classes", *(one.get("alignment", {}).get("classes_hash") for one in (manifest, other))),
        ):
            if mine != theirs and not (what == "targets" and _are_the_teachers(mine, theirs)):
                raise InputError(f"train.mix.datasets: {directory} has different {what} than {training_dataset(experiment)}")


def mixed_rows(experiment: Experiment, rows: Any) -> Any:
    """The rows mixed with those of other datasets, up to their share, drawn without repeats."""
    mix = experiment.train.mix
    if mix is None:
        return rows
    import datasets
    import numpy as np

    # What one of the datasets holds out is no row of the others; none has what it holds out itself.
    held_out = {
        directory: _held_out_prompts(directory) for directory in (training_dataset(experiment), *experiment.mixed_datasets)
    }
    rows = _without(rows, training_dataset(experiment), held_out)
    parts = [_without(load_dataset(directory, "train"), directory, held_out) for directory in experiment.mixed_datasets]
    others = datasets.concatenate_datasets(parts)
    rows, others = _with_columns(rows, others), _with_columns(others, rows)
    wanted = min(round(len(rows) * mix.share / (1 - mix.share)), len(others))
    drawn = np.sort(np.random.default_rng(experiment.seed).permutation(len(others))[:wanted])
    say("train", f"{counted(len(rows), 'row')}, and {wanted:,} of the {len(others):,} of other datasets")
    columns = [name for name in rows.column_names if name in others.column_names]
    return datasets.concatenate_datasets([rows.select_columns(columns), others.select_columns(columns).select(drawn)])


def split(experiment: Experiment, dataset: Any) -> tuple[Any, Any]:
    """The rows for training and for validation, None if there are none; all rows of a prompt are on the same side.

    Raises:
        InputError: one side is empty.
    """
    share = experiment.train.validation
    if not share:
        return dataset, None
    sides = [is_held_out(key, f"{experiment.seed} validation", share) for key in dataset_keys(dataset)]
    rows = [[row for row, side in enumerate(sides) if side == wanted] for wanted in (False, True)]
    if not all(rows):
        raise InputError(
            f"train.validation is {share:g}: of {len(sides):,} rows, {len(rows[1]):,} would be used for validation and "
            f"{len(rows[0]):,} for training; both need at least one"
        )
    return dataset.select(rows[0]), dataset.select(rows[1])


def learnable(dataset: Any, arguments: Any) -> Any:
    """The rows with completion tokens to learn; reports the number of the others.

    Raises:
        InputError: there are none.
    """
    from llmdistill.training.trainer import with_completions

    try:
        kept = with_completions(dataset, arguments.max_length)
    except ValueError as error:
        raise InputError(f"train.args.max_length: {error}") from None
    if left := len(dataset) - len(kept):
        within = f" within train.args.max_length, {arguments.max_length:,} tokens" if arguments.max_length else ""
        say("train", f"leaves out {left:,} of {len(dataset):,} rows, which have no completion tokens{within}")
    return kept


def _kind_of(described: dict[str, Any]) -> tuple[str, Any]:
    """The kind and size of the targets; other entries are not known for every source."""
    return described["kind"], described.get(KINDS[described["kind"]].size or "")


def _are_the_teachers(mine: tuple[str, Any], theirs: tuple[str, Any]) -> bool:
    """Whether targets are the teacher's sample of its own text, learned next to the student's sample of its own text."""
    return (mine[0], theirs[0]) == (SampledByStudent.name, Sampled.name) and mine[1] == theirs[1]


def _with_columns(rows: Any, others: Any) -> Any:
    """Add columns of soft targets that only other rows have, as empty lists."""
    import datasets
    import pyarrow as pa

    for name in sorted(set(others.column_names) - set(rows.column_names)):
        if name.startswith("target_"):
            empty = pa.nulls(len(rows), others.data.schema.field(name).type).fill_null([])
            rows = datasets.concatenate_datasets([rows, datasets.Dataset(pa.table({name: empty}))], axis=1)
    return rows.with_format("numpy")


def _held_out_prompts(directory: Path) -> set[str]:
    """The subjects of a dataset's held-out rows."""
    tables = read_batches(shard_files(directory, "test"), ["prompt", "completion", "metadata"])
    return {key for table in tables for key in conversation_keys(table)}


def _without(rows: Any, directory: Path, held_out: dict[Path, set[str]]) -> Any:
    """The rows of a dataset whose subject is not held out elsewhere; reports how many are left out."""
    prompts = {prompt for other, found in held_out.items() if other != directory for prompt in found}
    if not prompts:
        return rows
    keys = dataset_keys(rows)
    kept = [number for number, key in enumerate(keys) if key not in prompts]
    if len(kept) < len(keys):
        say("train", f"leaves out {counted(len(keys) - len(kept), 'row')} whose prompts another dataset holds out")
    return rows.select(kept) if len(kept) < len(keys) else rows
