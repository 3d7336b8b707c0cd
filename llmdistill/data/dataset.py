"""A dataset: a directory of Parquet shards and one `dataset.json`. The format is described in docs/dataset.md.

A shard is named `SPLIT-INDEX-of-COUNT-CHECKSUM.parquet`. It is written under a hidden name and renamed when it is
whole, so a shard that is there is done and says itself what its bytes must hash to.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmdistill.data import targets
from llmdistill.data.alignment import Alignment
from llmdistill.data.cards import dataset_card, write_card
from llmdistill.data.ngrams import normalised
from llmdistill.errors import InputError, NonFiniteError
from llmdistill.runs import lock
from llmdistill.runs.files import check_shape, fsync_directory, read_json, write_json
from llmdistill.runs.inputs import sha256
from llmdistill.runs.lock import writer_name
from llmdistill.runs.record import read_run

if TYPE_CHECKING:
    import datasets

SCHEMA_VERSION = 1
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
_LIST_ENTRIES = 1 << 30
_FAILED = b"llmdistill.failed"
_BILL = b"llmdistill.bill"
ROW_GROUP = 1000  # rows; what a reader has to hold at a time
TOKENS_AT_ONCE = 1 << 16  # about what a reader that decodes targets holds
MANIFEST = "dataset.json"
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
SHARD_NAME = re.compile(r"(?P<split>train|test)-(?P<index>\d{5,})-of-(?P<count>\d{5,})-(?P<checksum>[0-9a-f]{16})\.parquet")
Messages = list[dict[str, str]]  # role and content of each turn
OURS = "llmdistill"  # the field of `metadata` with a row's provenance; all others are the user's
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _are_integers(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) and pa.types.is_integer(kind.value_type))


def _are_floats(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) and pa.types.is_floating(kind.value_type))


_COLUMNS: dict[str, Callable[[pa.DataType], bool]] = {
    "id": pa.types.is_string,
    "prompt": pa.types.is_list,
    "completion": pa.types.is_list,
    "input_ids": _are_integers,
    "completion_start": pa.types.is_integer,
    "finish_reason": pa.types.is_string,
    "metadata": pa.types.is_string,
    "token_logprobs": _are_floats,
}
"""The columns that every shard has, and whether a type is theirs."""
_OF_TEACHER = {"teacher_ids": _are_integers, "teacher_start": pa.types.is_integer, "target_places": _are_integers}
"""Further columns after `retokenize`."""


@dataclass(frozen=True)
class Row:
    """One sequence before it is stored; `targets` has one row per completion token, or is None for text only.

    `metadata` is what the user's file says beside the conversation, `provenance` what is known of how the row was made.
    """

    id: str
    prompt: Messages
    completion: Messages
    prompt_ids: Sequence[int] | targets.Array
    completion_ids: targets.Array
    finish_reason: str
    token_logprobs: targets.Array
    targets: targets.SoftTargets | None
    sampling_logprob: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """A finished shard, as described by its file name."""

    file: Path
    split: str
    index: int
    count: int
    checksum: str


def rows_to_table(rows: list[Row], vocab_size: int) -> pa.Table:
    """The rows as columns; see docs/dataset.md for each."""
    entries = sum(np.size(row.targets.ids_NK) if row.targets else len(row.completion_ids) for row in rows)
    if entries > _LIST_ENTRIES and len(rows) > 1:  # Arrow counts the entries of a list column in 32 bits
        half = len(rows) // 2
        return pa.concat_tables([rows_to_table(part, vocab_size) for part in (rows[:half], rows[half:])])
    starts = np.array([len(row.prompt_ids) for row in rows])
    lengths = np.array([len(row.completion_ids) for row in rows])
    ids = [np.concatenate([np.asarray(row.prompt_ids), row.completion_ids]) for row in rows]
    mask = [np.arange(len(sequence)) >= start for sequence, start in zip(ids, starts, strict=True)]
    columns: dict[str, pa.Array] = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "prompt": pa.array([row.prompt for row in rows], MESSAGES),
        "completion": pa.array([row.completion for row in rows], MESSAGES),
        "input_ids": targets.list_array(np.concatenate(ids).astype(np.int32), starts + lengths),
        "completion_start": pa.array(starts.astype(np.int32)),
        # TRL's SFTTrainer reads this one: without it, it would train on the prompt as well.
        "completion_mask": targets.list_array(np.concatenate(mask).astype(np.int8), starts + lengths),
        "finish_reason": pa.array([row.finish_reason for row in rows], pa.string()),
        "metadata": pa.array([_metadata(row) for row in rows], pa.string()),
        "token_logprobs": targets.list_array(np.concatenate([row.token_logprobs for row in rows]).astype(np.float32), lengths),
    }
    if rows[0].sampling_logprob is not None:
        columns["sampling_logprob"] = pa.array([row.sampling_logprob for row in rows], pa.float32())
    soft = [row.targets for row in rows if row.targets is not None]
    if soft:
        columns |= type(soft[0]).encode(soft, vocab_size)
    return pa.table(columns)


def with_failed(table: pa.Table, failed: Mapping[str, int]) -> pa.Table:
    """The rows of a shard, and in the file's metadata how many others were given up for which reason."""
    if not failed:
        return table
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _FAILED: json.dumps(dict(failed)).encode()})


def with_bill(table: pa.Table, bill: Mapping[str, Any]) -> pa.Table:
    """The rows of a shard, and in the file's metadata what an endpoint billed for them."""
    if not bill:
        return table
    return table.replace_schema_metadata({**(table.schema.metadata or {}), _BILL: json.dumps(dict(bill)).encode()})


def billed(shards: "Iterable[Shard]") -> list[dict[str, Any]]:
    """What an endpoint billed for shards, as far as recorded."""
    found = (json.loads((pq.read_schema(shard.file).metadata or {}).get(_BILL, b"null")) for shard in shards)
    return [entry for entry in found if entry]


def failed_rows(shards: "Iterable[Shard]") -> dict[str, int]:
    """Number of rows given up while making shards, by reason."""
    total: Counter[str] = Counter()
    for shard in shards:
        total.update(json.loads((pq.read_schema(shard.file).metadata or {}).get(_FAILED, b"{}")))
    return dict(sorted(total.items()))


def metadata_and_provenance(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of the column `metadata`: the fields of the user's file, and how the row was made."""
    fields: dict[str, Any] = json.loads(text)
    return fields, fields.pop(OURS, {})


def whole_conversation(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages of a stored row before reduction to roles and contents, and the tools offered.

    Args:
        row: with `prompt`, `completion` and `metadata`.
    """
    _, provenance = metadata_and_provenance(row["metadata"])
    return provenance.get("messages") or [*row["prompt"], *row["completion"]], provenance.get("tools")


def _metadata(row: Row) -> str:
    if OURS in row.metadata:
        raise InputError(f"row {row.id}: has a field {OURS}, which is reserved; give it another name")
    return to_json({**row.metadata, OURS: row.provenance} if row.provenance else row.metadata)


def to_json(content: Any) -> str:
    """JSON whose keys keep their order; dates and the like become text, and non-finite numbers null."""
    try:
        text = json.dumps(content, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(content), ensure_ascii=False, default=str)
    return storable(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(other) for key, other in value.items()}
    return [_finite(other) for other in value] if isinstance(value, list | tuple) else value


def storable(text: str) -> str:
    """The text in a form that can be stored: lone surrogates, which a model may write, become `?`."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def check_logprobs(row: Row, unknown: bool = False) -> None:
    """Refuse invalid log-probabilities of a teacher before they are stored.

    Args:
        row: to be stored.
        unknown: whether that of a token may be NaN, which says that it is not known.

    Raises:
        NonFiniteError: one of a token or of the soft targets is not a number, or above zero.
    """
    written = np.nan_to_num(row.token_logprobs, nan=0.0) if unknown else row.token_logprobs
    stored = [written] if row.targets is None else [written, row.targets.told()]
    for values in map(np.asarray, stored):
        if np.isnan(values).any() or (values > 1e-3).any():
            raise NonFiniteError(
                f"row {row.id}: the teacher's log-probabilities are not negative numbers; some models overflow in float16: "
                "set teacher.dtype to bfloat16 or float32"
            )


class ShardWriter:
    """Streams one shard to disk; it appears by an atomic rename, under a name that contains its checksum.

    What has been written goes away again if the writing fails, for instance on a full disk.
    """

    def __init__(self, directory: Path, split: Split, index: int, schema: pa.Schema) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.split, self.index = directory, split, index
        self.unfinished = directory / f".{split}-{index:05d}.{writer_name()}.unfinished"
        self.rows = 0
        self._mark = lock.begin(self.unfinished)
        self._stream = pa.OSFile(str(self.unfinished), "wb")
        with self._removed_on_error():
            self._writer = pq.ParquetWriter(self._stream, schema, write_page_checksum=True, **parquet_encoding(schema))

    def write(self, table: pa.Table) -> None:
        """Add rows, in groups of at most `ROW_GROUP`."""
        with self._removed_on_error():
            self._writer.write_table(table, row_group_size=ROW_GROUP)
        self.rows += len(table)

    @property
    def bytes(self) -> int:
        """Number of bytes written so far."""
        return int(self._stream.tell())

    def close(self) -> None:
        """Write the footer and flush to disk; the shard is complete, but not visible yet."""
        with self._removed_on_error():
            self._writer.close()
            self._stream.close()
            with self.unfinished.open("rb+") as stream:
                os.fsync(stream.fileno())

    def __del__(self) -> None:
        if (mark := getattr(self, "_mark", None)) is not None:
            os.close(mark)

    def publish(self, count: int) -> Shard:
        """Publish the shard as one of `count`; if another worker has made it meanwhile, that one is kept."""
        checksum = sha256(self.unfinished)[:16]
        there = next((shard for shard in finished_shards(self.directory, self.split) if shard.index == self.index), None)
        if there:
            self.unfinished.unlink()
            return there
        file = self.directory / f"{self.split}-{self.index:05d}-of-{count:05d}-{checksum}.parquet"
        self.unfinished.replace(file)
        fsync_directory(self.directory)
        return Shard(file, self.split, self.index, count, checksum)

    @contextmanager
    def _removed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with suppress(OSError):
                self._stream.close()
            self.unfinished.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self.unfinished)) from None
            raise


def write_shard(directory: Path, split: Split, index: int, count: int, table: pa.Table) -> Shard:
    """Write one complete shard."""
    writer = ShardWriter(directory, split, index, table.schema)
    writer.write(table)
    writer.close()
    return writer.publish(count)


def parquet_encoding(schema: pa.Schema) -> dict[str, Any]:
    """Encoding of a shard's columns: options of `pyarrow.parquet.write_table`.

    The high bytes of ids and log-probabilities repeat more than the low ones; stored apart, they compress by a tenth more.
    """
    lists = [column for column in schema if pa.types.is_list(column.type) and column.name.startswith(("target_", "token_"))]
    split = [column.name for column in lists if column.type.value_type.bit_width > 8]
    return {
        "compression": "zstd",
        "compression_level": 15,
        "use_dictionary": ["finish_reason"],
        "column_encoding": {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in split},
        "write_statistics": False,
    }


def finished_shards(directory: Path, split: Split) -> list[Shard]:
    """The existing shards, one per index; if two workers made the same one, the first by name counts."""
    found: dict[int, Shard] = {}
    for file in sorted(directory.glob(f"{split}-*.parquet")):
        match = SHARD_NAME.fullmatch(file.name)
        if match is None:
            raise InputError(f"{file}: not a shard of this dataset")
        shard = Shard(file, split, int(match["index"]), int(match["count"]), match["checksum"])
        found.setdefault(shard.index, shard)
    return [found[index] for index in sorted(found)]


class SplitWriter:
    """Streams a split into shards of about this many bytes; none is visible before all are complete."""

    def __init__(self, directory: Path, split: Split, shard_bytes: int) -> None:
        self.directory, self.split, self.shard_bytes = directory, split, shard_bytes
        self.rows = 0
        self._shards: list[ShardWriter] = []
        self._open: ShardWriter | None = None
        self._waiting: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Add rows; they are written once there are enough for a row group."""
        self.rows += len(table)
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= ROW_GROUP:
            self._flush()

    def publish(self) -> list[Shard]:
        """Finish the last shard, and publish all of them."""
        self._flush()
        self._close()
        return [writer.publish(len(self._shards)) for writer in self._shards]

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting) if self._waiting else None
        self._waiting = []
        if table is None or not len(table):
            return
        if self._open is None:
            self._open = ShardWriter(self.directory, self.split, len(self._shards), table.schema)
            self._shards.append(self._open)
        self._open.write(table)
        if self._open.bytes >= self.shard_bytes:
            self._close()

    def _close(self) -> None:
        if self._open:
            self._open.close()
            self._open = None


def is_damaged(shard: Shard) -> bool:
    """Whether its bytes do not match the checksum in its name."""
    return sha256(shard.file)[:16] != shard.checksum


def remove_leftovers(directory: Path) -> None:
    """Delete what killed writers left behind; files of running ones are kept, wherever they run."""
    for file in directory.glob(".*.unfinished"):
        if lock.is_abandoned(file):
            file.unlink(missing_ok=True)


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


def shard_files(directory: Path, split: Split) -> list[Path]:
    """The shards of one split, checked against the checksums in their names, and their rows for consistency.

    Raises:
        InputError: names the file whose bytes are not what they were, or whose rows no teacher can have written.
    """
    manifest = read_manifest(directory)
    several = manifest.get("teachers", {})
    by_teacher = {name: one["tokenizer"]["vocab_size"] for name, one in several.items() if "tokenizer" in one}
    sizes, their_sizes = {"": manifest["tokenizer"]["vocab_size"]}, None
    if "alignment" in manifest:
        their_sizes = by_teacher or {"": manifest["teacher_tokenizer"]["vocab_size"]}
    elif by_teacher:
        sizes = by_teacher
    files = [directory / entry["file"] for entry in manifest["shards"] if entry["split"] == split]
    for file in files:
        match = SHARD_NAME.fullmatch(file.name)
        if match is None or sha256(file)[:16] != match["checksum"]:
            raise InputError(
                f"{file}: the checksum does not match; the file was damaged or changed. Delete it and generate it again"
            )
        _check_rows(file, sizes, targets.KINDS[manifest["targets"]["kind"]], their_sizes)
    return files


def _check_rows(
    file: Path,
    sizes: Mapping[str, int],
    kind: type[targets.SoftTargets] = targets.TextOnly,
    their_sizes: Mapping[str, int] | None = None,
) -> None:
    """Refuse a shard without rows or columns, or with impossible values.

    Args:
        file: the shard.
        sizes: of the vocabularies of `input_ids` by the teachers' names; of a single one the name is empty.
        kind: of its soft targets.
        their_sizes: of those of `teacher_ids`, after `retokenize`.

    Raises:
        InputError: names the file and the row.
    """
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a Parquet file: {error}") from None
    wanted = _COLUMNS | (_OF_TEACHER if their_sizes is not None else {})
    for name, is_it in wanted.items():
        if name not in schema.names:
            raise InputError(f"{file}: has no column {name}")
        _check_type(file, schema.field(name), is_it)
    for name in kind.columns:
        if name not in schema.names:
            raise InputError(f"{file}: has no column {name}, which targets of kind {kind.name} have")
        _check_type(file, schema.field(name), lambda of: _are_integers(of) or _are_floats(of))
    first, named = 0, [name for name in ("teacher",) if name in schema.names]
    for rows in read_batches([file], [*wanted, *named, *kind.columns], rows_at_once(file)):
        _check_text(file, rows, first)
        positions_R, limit_R = _check_ids(file, rows, first, ("input_ids", "completion_start"), sizes)
        written = pc.fill_null(pc.list_value_length(rows["token_logprobs"]), -1).to_numpy()
        if (wrong := np.flatnonzero(written != positions_R)).size:
            raise InputError(f"{file}: row {first + wrong[0]}: token_logprobs does not have one value per completion token")
        if their_sizes is not None:
            of_teacher_R, their_limit_R = _check_ids(file, rows, first, ("teacher_ids", "teacher_start"), their_sizes)
            _check_places(file, rows, first, positions_R, of_teacher_R)
            if not kind.of_text:
                positions_R, limit_R = of_teacher_R, their_limit_R
        if kind.columns:
            _check_targets(file, rows, first, kind, positions_R, limit_R)
        first += len(rows)
    if not first:
        raise InputError(f"{file}: has no rows")


def _check_type(file: Path, column: pa.Field, is_it: Callable[[pa.DataType], bool]) -> None:
    """Refuse a column of a wrong type.

    Raises:
        InputError: names the file and the column.
    """
    if not is_it(column.type):
        raise InputError(f"{file}: the column {column.name} cannot be of the type {column.type}")


def _check_ids(
    file: Path, rows: pa.Table, first: int, names: tuple[str, str], sizes: Mapping[str, int]
) -> tuple[targets.Array, targets.Array]:
    """The number of completion tokens of each row, and the size of its vocabulary.

    Args:
        file: the shard.
        rows: some of its rows.
        first: the number of the first of them.
        names: the columns with the ids and with the place of the first completion token.
        sizes: of the vocabularies, by the teachers' names.

    Raises:
        InputError: that place or an id is out of range; naming the file and the row.
    """
    starts = pc.fill_null(rows[names[1]], -1).to_numpy()
    lengths = pc.fill_null(pc.list_value_length(rows[names[0]]), -1).to_numpy()
    if (wrong := np.flatnonzero((starts < 1) | (starts > lengths))).size:  # nothing predicts the first token
        raise InputError(f"{file}: row {first + wrong[0]}: {names[1]} is not a position in {names[0]} after the first")
    ids = pc.list_flatten(rows[names[0]]).fill_null(-1).to_numpy()
    limit_R = np.full(len(rows), sizes[""]) if "" in sizes else _limits(file, rows, first, sizes)
    if (wrong := np.flatnonzero((ids < 0) | (ids >= np.repeat(limit_R, lengths)))).size:
        row = first + targets.row_of(lengths, wrong[0])
        raise InputError(f"{file}: row {row}: the token id {ids[wrong[0]]} is outside the vocabulary ({names[0]})")
    return lengths - starts, limit_R


def _check_places(file: Path, rows: pa.Table, first: int, positions_R: targets.Array, of_teacher_R: targets.Array) -> None:
    """Refuse `target_places` that are out of range, or not one per completion token.

    Raises:
        InputError: names the file and the row.
    """
    lengths = pc.fill_null(pc.list_value_length(rows["target_places"]), -1).to_numpy()
    if (wrong := np.flatnonzero(lengths != positions_R)).size:
        raise InputError(f"{file}: row {first + wrong[0]}: target_places does not have one value per completion token")
    places = pc.list_flatten(rows["target_places"]).fill_null(-2).to_numpy()
    if (wrong := np.flatnonzero((places < -1) | (places >= np.repeat(of_teacher_R, lengths)))).size:
        row = targets.row_of(lengths, wrong[0])
        raise InputError(
            f"{file}: row {first + row}: target_places has {places[wrong[0]]}, must be from -1 to {of_teacher_R[row] - 1}"
        )


def _check_text(file: Path, rows: pa.Table, first: int) -> None:
    """Refuse nulls, a completion that is not one message, metadata that is not a JSON object, and invalid log-probabilities.

    Raises:
        InputError: names the file, and the row or the column.
    """
    for name in ("prompt", "completion"):
        messages = pc.list_flatten(rows[name])
        _check_nulls(file, name, first, rows[name], messages, *(pc.struct_field(messages, part) for part in ("role", "content")))
    answers = pc.list_value_length(rows["completion"]).to_numpy()
    if (wrong := np.flatnonzero(answers != 1)).size:
        raise InputError(f"{file}: row {first + wrong[0]}: completion has {answers[wrong[0]]} messages, but must have one")
    for name in ("id", "finish_reason"):
        _check_nulls(file, name, first, rows[name])
    for number, text in enumerate(rows["metadata"].to_pylist(), first):
        try:
            fields = json.loads(text)
        except (TypeError, ValueError, RecursionError):
            fields = None
        if not (isinstance(fields, dict) and isinstance(fields.get(OURS, {}), dict)):
            raise InputError(f"{file}: row {number}: metadata is not a JSON object")
    logprobs = pc.list_flatten(rows["token_logprobs"])
    if logprobs.null_count or (logprobs.to_numpy() > targets.ROUNDED_UP).any():
        raise InputError(f"{file}: token_logprobs has an invalid log-probability in a row from {first}")


def _check_nulls(file: Path, name: str, first: int, *values: Any) -> None:
    """Refuse a column with nulls among its values or parts of them.

    Raises:
        InputError: names the file and the column.
    """
    if any(part.null_count for part in values):
        raise InputError(f"{file}: the column {name} has a null in a row from {first}")


def _check_targets(
    file: Path, rows: pa.Table, first: int, kind: type[targets.SoftTargets], counts_R: targets.Array, limit_R: targets.Array
) -> None:
    """Refuse impossible soft targets.

    Raises:
        InputError: names the file and the row.
    """
    flat, lengths = {}, {}
    for name in kind.columns:
        values = pc.list_flatten(rows[name])
        _check_nulls(file, name, first, rows[name], values)
        flat[name], lengths[name] = values.to_numpy(), pc.list_value_length(rows[name]).to_numpy()
    if (wrong := targets.wrong_row(kind, flat, lengths, counts_R, limit_R)) is not None:
        raise InputError(f"{file}: row {first + wrong[0]}: {wrong[1]}")


def _limits(file: Path, rows: pa.Table, first: int, sizes: Mapping[str, float]) -> targets.Array:
    """The size of the vocabulary of each row's teacher.

    Raises:
        InputError: a row names none of them.
    """
    names = rows["teacher"].to_pylist() if "teacher" in rows.column_names else teacher_names(rows)
    for number, name in enumerate(names, first):
        if name not in sizes:
            raise InputError(f"{file}: row {number}: is of the teacher {name!r}, but the dataset has {', '.join(sizes)}")
    return np.array([sizes[name] for name in names])


def teacher_names(rows: pa.Table) -> list[str]:
    """The name of each row's teacher, from `metadata`; empty if not named."""
    return [str(metadata_and_provenance(text)[1].get("teacher", "")) for text in rows["metadata"].to_pylist()]


def load_dataset(directory: str | Path, split: Split = "train") -> "datasets.Dataset":
    """Load one split as a `datasets.Dataset` whose rows are dictionaries of numpy arrays. Shards are memory-mapped.

    Raises:
        InputError: the directory has no complete dataset of this schema version, or a shard is damaged.
    """
    import datasets

    directory = Path(directory)
    files = shard_files(directory, split)
    if not files:
        raise InputError(f"{directory}: has no rows in the split {split}")
    datasets.utils.logging.disable_progress_bar()
    dataset = datasets.Dataset.from_parquet([str(file) for file in files])
    return dataset.with_format("numpy")


def rows_at_once(file: Path) -> int:
    """Number of rows of a Parquet file that have about `TOKENS_AT_ONCE` tokens, from the mean length of its `input_ids`.

    Raises:
        InputError: it is no Parquet.
    """
    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read as Parquet: {error}") from None
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(metadata.num_columns)]
    tokens = sum(column.num_values for column in columns if column.path_in_schema.split(".")[0] == "input_ids")
    return int(np.clip(TOKENS_AT_ONCE * metadata.num_rows // max(tokens, 1), 1, ROW_GROUP))


def read_batches(files: Sequence[Path], columns: list[str] | None = None, rows: int = ROW_GROUP) -> Iterator[pa.Table]:
    """The rows of Parquet files, up to a number at a time; a part does not extend beyond the end of a file.

    Raises:
        InputError: names the file that is no Parquet, or of which a page does not match its own checksum.
    """
    for file in files:
        try:
            # Without pre_buffer=False it would hold what it has read up to the end of the file.
            with pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as parquet:
                for batch in parquet.iter_batches(batch_size=rows, columns=columns):
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: cannot be read, the file was damaged or changed: {error}") from None


def conversation_keys(rows: pa.Table) -> list[str]:
    """The subject of each row, from `prompt`, `completion` and `metadata`: rows with the same one are not independent.

    It is the prompt, whose case, white space and system message do not matter; of text without a prompt, the text; and where
    several turns of one conversation are rows, that conversation.
    """
    keys: list[str] = []
    for prompt, metadata in zip(prompt_keys(rows), rows["metadata"].to_pylist(), strict=True):
        whole = json.loads(metadata).get(OURS, {}).get("conversation") if '"conversation"' in metadata else None
        keys.append(json.dumps(whole) if whole else prompt)
    return keys


def prompt_keys(rows: pa.Table) -> list[str]:
    """`conversation_of` for each row's prompt, from `prompt` and `completion`; for text without a prompt, for the text."""
    columns = (rows[name].to_pylist() for name in ("prompt", "completion"))
    return [conversation_of(prompt or completion) for prompt, completion in zip(*columns, strict=True)]


def conversation_of(prompt: Sequence[Mapping[str, str]]) -> str:
    """`conversation_keys` for a prompt."""
    turns = [turn for turn in prompt if turn["role"] != "system"] or prompt
    return json.dumps([[turn["role"], normalised(turn["content"])] for turn in turns])


def is_held_out(conversation: str, salt: Any, share: float) -> bool:
    """Whether a conversation is held out, by the hash of its key; independent of the size of the dataset."""
    digest = hashlib.sha256(f"{salt} {conversation}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < share


def bytes_per_position(shards: Sequence[dict[str, Any]]) -> float:
    """Compressed bytes of the target columns per completion token, from the entries of `dataset.json`."""
    return sum(entry["target_bytes"] for entry in shards) / max(sum(entry["tokens"] for entry in shards), 1)


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
