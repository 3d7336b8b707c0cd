"""`dataset.json`: what a dataset is, and its shards with their counts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from llmdistill.data import targets
from llmdistill.data.alignment import Alignment
from llmdistill.data.cards import dataset_card, write_card
from llmdistill.data.shard_writer import SHARD_NAME, SPLITS, Shard
from llmdistill.errors import InputError
from llmdistill.runs.files import check_shape, read_json, write_json
from llmdistill.runs.record import read_run

SCHEMA_VERSION = 1
MANIFEST = "dataset.json"
_MANIFEST: dict[str, type] = {
    "teacher": dict,
    "tokenizer": dict,
    "sampling": dict,
    "targets": dict,
    "determinism": str,
    "rows": int,
    "completion_tokens": int,
    "shards": list,
}
_TOKENIZER = {
    "vocab_size": int,
    "vocabulary_hash": str,
    "end_token_ids": list,
    "special_token_ids": list,
    "chat_template": object,
}
_STEP: dict[str, type] = {"name": str, "rows_in": int, "rejected": int, "failed": int, "kept": int}  # of `curate`
_ALIGNED = dict.fromkeys(Alignment.SORTS, int)
_SHARD: dict[str, type] = {"file": str, "split": str, "rows": int, "tokens": int, "bytes": int, "target_bytes": int}


def write_manifest(directory: Path, shards: list[Shard], description: dict[str, Any]) -> None:
    """Write the card and `dataset.json`: the description, and every shard with its counts. Then the dataset is complete."""
    for split in SPLITS:  # two workers that made the same shard at the same moment: the first by name stays
        kept = {shard.file for shard in shards}
        for file in set(directory.glob(f"{split}-*.parquet")) - kept:
            file.unlink(missing_ok=True)
    entries = [describe_shard(shard) for shard in shards]
    manifest = {
        "format": "llmdistill",
        "schema_version": SCHEMA_VERSION,
        **description,
        "rows": sum(entry["rows"] for entry in entries),
        "completion_tokens": sum(entry["tokens"] for entry in entries),
        "shards": entries,
    }
    write_card(directory / "README.md", lambda: dataset_card(manifest))
    write_json(directory / MANIFEST, manifest)


def describe_shard(shard: Shard) -> dict[str, Any]:
    """The entry of a shard in `dataset.json`, from its footer."""
    metadata = pq.read_metadata(shard.file)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(metadata.num_columns)]
    return {
        "file": shard.file.name,
        "split": shard.split,
        "rows": metadata.num_rows,
        "tokens": sum(column.num_values for column in columns if column.path_in_schema.startswith("token_logprobs")),
        "bytes": shard.file.stat().st_size,
        "target_bytes": sum(column.total_compressed_size for column in columns if column.path_in_schema.startswith("target_")),
    }


def read_manifest(directory: Path, key: str | None = None) -> dict[str, Any]:
    """Read `dataset.json`, after checking that its schema is supported and its shards exist.

    Args:
        directory: of the dataset.
        key: of the configuration that names it, for the error.

    Raises:
        InputError: there is no complete dataset, or it is of another schema.
    """
    named = f" ({key})" if key else ""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such dataset{named}")
    manifest: dict[str, Any] | None = read_json(directory / MANIFEST)
    if manifest is None:
        unfinished = read_run(directory)
        reason = (
            f"not finished; run `{unfinished['stage']}` again to continue"
            if unfinished
            else f"not a dataset, it has no {MANIFEST}"
        )
        raise InputError(f"{directory}: {reason}{named}")
    file = directory / MANIFEST
    check_shape(file, manifest, {})
    if manifest.get("format") != "llmdistill" or manifest.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{directory / MANIFEST}: schema_version is {manifest.get('schema_version')!r}, this version reads {SCHEMA_VERSION}"
        )
    check_shape(file, manifest, _MANIFEST)
    if (kind := check_shape(file, manifest["targets"], {"kind": str}, "targets")["kind"]) not in targets.KINDS:
        raise InputError(f"{file}: targets.kind is {kind!r}, this version reads {', '.join(targets.KINDS)}")
    size = targets.KINDS[kind].size
    check_shape(file, manifest["targets"], {size: int} if size else {}, "targets")
    check_shape(file, manifest["teacher"], {"model": str, "engine": str}, "teacher")
    for name in {"tokenizer", "teacher_tokenizer"} & manifest.keys():
        check_shape(file, manifest[name], _TOKENIZER, name)
    _check_teachers(file, manifest)
    _check_derived(file, manifest)
    _check_shards(file, manifest["shards"])
    return manifest


def _check_shards(file: Path, entries: Sequence[Any]) -> None:
    """Refuse invalid entries of `shards` in `dataset.json`, and shards that are missing.

    Raises:
        InputError: names the file and the key.
    """
    if not entries:
        raise InputError(f"{file}: shards is empty")
    names = set[str]()
    for number, entry in enumerate(entries):
        at = f"shards.{number}"
        check_shape(file, entry, _SHARD, at)
        name, split = entry["file"], entry["split"]
        if negative := [key for key, kind in _SHARD.items() if kind is int and entry[key] < 0]:
            raise InputError(f"{file}: {at}.{negative[0]} is {entry[negative[0]]}, must be at least 0")
        match = SHARD_NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{file}: {at}.file is {name!r}, which is not the name of a shard")
        if match["split"] != split:
            raise InputError(f"{file}: {at}.split is {split!r}, but the file is {name}")
        if name in names:
            raise InputError(f"{file}: {at}.file is {name}, which is listed twice")
        names.add(name)
        if not (file.parent / name).is_file():
            raise InputError(f"{file.parent / name}: the shard is missing")


def _check_teachers(file: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse invalid entries about several teachers; if one has its own tokenizer, all must have one.

    Raises:
        InputError: names the file and the key.
    """
    teachers = check_shape(file, manifest.get("teachers", {}), {}, "teachers")
    for name, teacher in teachers.items():
        check_shape(file, teacher, {"model": str, "rows": int}, f"teachers.{name}")
    for name, teacher in teachers.items() if any("tokenizer" in teacher for teacher in teachers.values()) else ():
        check_shape(file, teacher.get("tokenizer"), _TOKENIZER, f"teachers.{name}.tokenizer")


def _check_derived(file: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse invalid entries about `curate` and `retokenize`.

    Raises:
        InputError: names the file and the key.
    """
    if "steps" in manifest:
        check_shape(file, manifest, {"rows_in": int, "steps": list})
        for number, step in enumerate(manifest["steps"]):
            check_shape(file, step, _STEP, f"steps.{number}")
    if "alignment" in manifest:
        check_shape(file, manifest, {"alignment": dict, "student": dict})
        check_shape(file, manifest["student"], {"model": str}, "student")
        alignment = manifest["alignment"]
        several = check_shape(file, alignment.get("teachers", {}), {}, "alignment.teachers")
        for at, one in {"alignment": alignment, **{f"alignment.teachers.{name}": one for name, one in several.items()}}.items():
            check_shape(file, one, _ALIGNED, at)
        check_shape(file, manifest, {"teacher_tokenizer": dict})


def has_several_tokenizers(manifest: Mapping[str, Any]) -> bool:
    """Whether the rows are in the tokens of their own teachers, which have different ids or templates; from `dataset.json`."""
    return "alignment" not in manifest and any("tokenizer" in teacher for teacher in manifest.get("teachers", {}).values())


def bytes_per_position(shards: Sequence[dict[str, Any]]) -> float:
    """Compressed bytes of the target columns per completion token, from the entries of `dataset.json`."""
    return sum(entry["target_bytes"] for entry in shards) / max(sum(entry["tokens"] for entry in shards), 1)
