"""`llmdistill convert --from`: a dataset from other projects' files. See docs/formats.md.

Entry j of a foreign row is the teacher's distribution for `input_ids[j + 1]`. Every run of entries that count becomes one
sequence: the tokens they predict are its completion, all before them its prompt.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmdistill.config.shipped import page
from llmdistill.data import targets
from llmdistill.data.batches import read_batches, rows_at_once
from llmdistill.data.conversations import as_columns, learned_turns, metadata
from llmdistill.data.convert import distillkit
from llmdistill.data.convert.exports import KIND_KEY
from llmdistill.data.jsonl import ending_of, read_json_rows, without_descriptions
from llmdistill.data.left_out import LeftOut
from llmdistill.data.manifest import write_manifest
from llmdistill.data.row_formats import read_row
from llmdistill.data.rows import Row, rows_to_table
from llmdistill.data.shard_writer import ROW_GROUP, Shard, Split, write_shard
from llmdistill.data.tables import is_hidden
from llmdistill.data.targets import Array
from llmdistill.data.targets.columns import repeats
from llmdistill.errors import InputError, UnreadableError, UnusableError
from llmdistill.models.chat_template import ChatTemplate
from llmdistill.models.loading import (
    end_token_ids,
    load_config,
    load_tokenizer,
    special_token_ids,
    vocabulary_hash,
)
from llmdistill.runs import record
from llmdistill.runs.files import new_directory
from llmdistill.runs.inputs import model_fingerprint, sha256
from llmdistill.runs.progress import StageBar, console

_OF_TEST = re.compile(r"(test|validation|eval)(?![a-z])")  # names of files
_IMPOSSIBLE = -1e4  # a probability of zero that float16 can hold
_MOST_MASS = 2.0  # sum of the probabilities of a position: a curve through their logarithms may exceed 1
_FEW = 50  # written tokens that must have been looked for before their absence says anything


@dataclass(frozen=True)
class _Entries:
    """Imported rows: their T tokens, row after row, and the targets of the N entries that count."""

    ids_T: Array
    begins_B: Array  # where each row begins in ids_T
    texts_T: Array  # a number that changes where another text begins
    counted_T: Array  # bool: the entry at this token counts
    ids_NK: Array
    logprobs_NK: Array  # −∞: no target


class _Teacher:
    """The model whose ids the files use: its tokenizer and configuration, without its weights."""

    def __init__(self, model: str) -> None:
        config = load_config(model, None, key="--teacher")
        self.model = model
        self.tokenizer = load_tokenizer(model, None, key="--teacher")
        self.vocab_size: int = config.get_text_config().vocab_size
        self.end_token_ids = end_token_ids(model, None, config, self.tokenizer)
        self.chat = ChatTemplate(self.tokenizer, self.end_token_ids)
        self.described = {
            "teacher": {
                "model": model,
                "revision": None,
                "commit": getattr(config, "_commit_hash", None),
                "fingerprint": model_fingerprint(model, None),
                "engine": "unknown",
            },
            "tokenizer": {
                "vocab_size": self.vocab_size,
                "vocabulary_hash": vocabulary_hash(self.tokenizer),
                "end_token_ids": self.end_token_ids,
                "special_token_ids": special_token_ids(self.tokenizer),
                "chat_template": self.tokenizer.chat_template,
            },
        }


def import_dataset(source: Path, out: Path, form: str, teacher: str, k: int | None = None) -> None:
    """Make a dataset from other projects' files.

    Args:
        source: a file, or a directory of them; a name that begins with `test`, `validation` or `eval` makes a held-out one.
        out: the directory to make.
        form: `distillkit`, `axolotl` or `jsonl`.
        teacher: the model that the targets, or the text, are from; its tokenizer must be the one of the files.
        k: keep the so many most likely targets of each position; None is all, which must then be as many everywhere.

    Raises:
        InputError: names the file and the row or line that cannot be used, or `out` is not empty.
    """
    if k is not None and (form == "jsonl" or k < 1):
        raise InputError("--k: text has no targets" if form == "jsonl" else f"--k {k}: must be at least 1")
    files = _files(source, (".jsonl", ".json") if form == "jsonl" else (".parquet",))
    model = _Teacher(teacher)
    with_targets = _TargetsReader(model, k)
    left_out = LeftOut()
    read: Callable[[Path, str], Iterator[list[Row]]]
    if form == "jsonl":
        read = partial(_read_text, teacher=model, left_out=left_out)
    elif form == "axolotl":
        read = partial(with_targets.read, entries_of=_axolotl_entries)
    else:
        config = distillkit.read_compression((source if source.is_dir() else source.parent) / distillkit.CONFIG_FILE)
        read = partial(with_targets.read, entries_of=partial(_distillkit_entries, config=config))
    sources = {file: sha256(file) for members in files.values() for file in members}
    names = {file: _name(digest, file, source) for file, digest in sources.items()}
    with new_directory(out) as unfinished:
        shards = _write_shards(unfinished, files, lambda file: read(file, names[file]), model.vocab_size)
        left_out.close("convert", sum(pq.read_metadata(shard.file).num_rows for shard in shards))
        left_out.write(unfinished / "rejected.parquet")
        if not shards:
            raise InputError(f"{source}: contains no completions" + ("" if form == "jsonl" else " with targets"))
        description = {
            **model.described,
            "sampling": {},
            "targets": {"kind": targets.TextOnly.name} if form == "jsonl" else {"kind": targets.TopK.name, "k": with_targets.k},
            "seed": None,
            "determinism": f"imported from {form}: the same files and tokenizer give the same rows",
            "source": {str(file): digest for file, digest in sources.items()},
            "versions": record.versions(),
            **left_out.described,
        }
        write_manifest(unfinished, shards, description)
    console.print(f"{out} is a dataset; `llmdistill inspect` shows its contents", markup=False)


def _files(source: Path, endings: tuple[str, ...]) -> dict[Split, list[Path]]:
    """The files to read, by split and name; a single file is for training, whatever its name."""
    if not source.exists():
        raise InputError(f"{source}: no such file or directory")
    if source.is_file():
        if ending_of(source) not in endings:
            raise InputError(f"{source}: must be a {' or '.join(endings)} file")
        return {"train": [source], "test": []}
    found = [file for file in sorted(source.rglob("*")) if ending_of(file) in endings and file.is_file()]
    found = [file for file in found if not is_hidden(file.relative_to(source))]
    found = without_descriptions(found)
    if not found:
        raise InputError(f"{source}: contains no {endings[0]} files")
    test = [file for file in found if _OF_TEST.match(file.name)]
    return {"train": [file for file in found if file not in test], "test": test}


def _write_shards(
    directory: Path, files: dict[Split, list[Path]], read: Callable[[Path], Iterator[list[Row]]], vocab_size: int
) -> list[Shard]:
    """One shard per part in which a file is read; none for a part without rows."""
    parts = {file: _count_parts(file) for members in files.values() for file in members}
    shards = []
    with StageBar("convert", sum(parts.values())) as bar:
        for split, members in files.items():
            count = sum(parts[file] for file in members)
            for index, rows in enumerate(rows for file in members for rows in read(file)):
                if rows:
                    shards.append(write_shard(directory, split, index, count, rows_to_table(rows, vocab_size)))
                bar.advance(tokens=sum(len(row.completion_ids) for row in rows))
    return shards


def _count_parts(file: Path) -> int:
    if ending_of(file) in (".jsonl", ".json"):
        return -(-sum(1 for _ in read_json_rows(file, "SRC")) // ROW_GROUP)
    rows = rows_at_once(file)
    return -(-pq.read_metadata(file).num_rows // rows)


def _read_text(file: Path, name: str, teacher: _Teacher, left_out: LeftOut) -> Iterator[list[Row]]:
    """Text, in the ids of the teacher's chat template; the log-probabilities of its tokens are not known.

    There are as many parts as `_count_parts` says; a row that cannot be used is missing in its part.
    """
    lines = read_json_rows(file, "SRC")
    while part := list(islice(lines, ROW_GROUP)):
        rows: list[Row] = []
        for number, fields in part:
            origin = f"{file} line {number}"
            try:
                if isinstance(fields, UnreadableError):
                    raise fields
                found, _ = read_row(fields, left_out.settings, origin)
                rows.append(_text_row(found, origin, _row_id(name, number), teacher.chat))
            except UnusableError as error:
                left_out.add(error.at(origin), fields if isinstance(fields, dict) else None)
        yield rows


def _text_row(fields: dict[str, Any], origin: str, identity: str, chat: ChatTemplate) -> Row:
    turn = next(learned_turns(fields, origin, every=False, tool_calls=True))
    prompt_ids, completion_ids = turn.token_ids(chat)
    return Row(
        identity,
        as_columns(turn.prompt),
        as_columns(turn.completion),
        prompt_ids,
        np.array(completion_ids, dtype=np.int64),
        "stop" if completion_ids[-1] in chat.end_ids else "length",
        np.full(len(completion_ids), np.nan, dtype=np.float32),
        None,
        metadata=metadata(fields, turn.fields),
        provenance=turn.provenance,
    )


class _TargetsReader:
    """Reads rows with targets; knows the number of targets per position, and checks that they fit their tokens."""

    def __init__(self, teacher: _Teacher, k: int | None) -> None:
        self.teacher = teacher
        self.asked = k
        self.k = k or 0
        self.looked = self.found = self.found_late = 0

    def read(self, file: Path, name: str, entries_of: Callable[[pa.Table, str], _Entries]) -> Iterator[list[Row]]:
        """The rows of a file in parts, in its order."""
        kind = targets.KINDS.get((pq.read_schema(file).metadata or {}).get(KIND_KEY, b"").decode())
        if kind is not None and not kind.most_likely:
            raise InputError(
                f"{file}: contains an unbiased sample, not the most likely tokens; use the dataset it was exported from"
            )
        first = 0
        for batch in read_batches([file], rows=rows_at_once(file)):
            origin = f"{file} rows {first:,} to {first + batch.num_rows - 1:,}"
            entries = entries_of(batch, origin)
            yield self._rows(entries, origin, name, first)
            first += batch.num_rows

    def _rows(self, entries: _Entries, origin: str, name: str, first: int) -> list[Row]:
        """One row for every run of entries that count within a text."""
        ids_T, texts_T = entries.ids_T, entries.texts_T
        if not len(entries.ids_NK):
            return []
        ids_NK, logprobs_NK = self._most_likely(entries, origin)
        at_N = np.flatnonzero(entries.counted_T)
        written_N = ids_T[at_N + 1]
        is_written_NK = ids_NK == written_N[:, None]
        self._check_alignment(is_written_NK, ids_NK == ids_T[at_N][:, None], origin)
        token_logprobs_N = np.where(is_written_NK, logprobs_NK, -np.inf).max(axis=1)
        token_logprobs_N = np.where(is_written_NK.any(axis=1), token_logprobs_N, np.nan)

        starts = np.flatnonzero(np.diff(at_N, prepend=at_N[0] - 2) > 1)
        ends = np.append(starts[1:], len(at_N))
        begins = np.searchsorted(texts_T, texts_T[at_N[starts]])
        numbers = np.searchsorted(entries.begins_B, at_N[starts], side="right") - 1
        prompts = [ids_T[begin : at_N[start] + 1] for begin, start in zip(begins, starts, strict=True)]
        decode = self.teacher.tokenizer.batch_decode
        completions = [written_N[start:end] for start, end in zip(starts, ends, strict=True)]
        texts = zip(decode(prompts), decode(completions, skip_special_tokens=True), strict=True)
        return [
            Row(
                _row_id(name, first + int(numbers[run]), int(at_N[start] - entries.begins_B[numbers[run]])),
                [{"role": "user", "content": prompt}],
                [{"role": "assistant", "content": completion}],
                prompts[run],
                completions[run],
                "stop" if written_N[end - 1] in self.teacher.end_token_ids else "length",
                token_logprobs_N[start:end],
                targets.TopK.from_kept(ids_NK[start:end], logprobs_NK[start:end]),
            )
            for run, (start, end, (prompt, completion)) in enumerate(zip(starts, ends, texts, strict=True))
        ]

    def _most_likely(self, entries: _Entries, origin: str) -> tuple[Array, Array]:
        """The k most likely targets of each entry, most likely first; k is fixed by the first one."""
        ids_NK, logprobs_NK = entries.ids_NK, entries.logprobs_NK
        # A curve through log-probabilities may rise above zero here and there, logits do almost everywhere.
        if np.isnan(logprobs_NK).any() or np.isposinf(logprobs_NK).any() or np.median(logprobs_NK.max(axis=1)) > 0.1:
            raise InputError(f"{origin}: contains values that are not log-probabilities (NaN, infinite, or above zero)")
        there_N = (logprobs_NK > -np.inf).sum(axis=1)
        fewest, most = int(there_N.min()), int(there_N.max())
        self.k = self.k or most
        if fewest < self.k or (self.asked is None and most > self.k):
            raise InputError(
                f"{origin}: has from {fewest} to {most} targets per position, not {self.k}; --k {fewest} keeps that many"
            )
        if min(ids_NK.min(), entries.ids_T.min()) < 0:
            raise InputError(f"{origin}: contains a negative token id")
        if repeats(ids_NK, logprobs_NK > -np.inf).any():
            raise InputError(f"{origin}: has the same token twice among the targets of a position")
        highest = int(max(ids_NK.max(), entries.ids_T.max()))
        if highest >= self.teacher.vocab_size:
            raise InputError(
                f"{origin}: contains the token {highest:,}, but {self.teacher.model} has {self.teacher.vocab_size:,}; "
                "--teacher must be the model whose tokenizer the file was made with"
            )
        order_NK = np.argsort(-logprobs_NK, axis=1, kind="stable")[:, : self.k]
        logprobs_NK = np.clip(np.take_along_axis(logprobs_NK, order_NK, axis=1), _IMPOSSIBLE, 0)
        mass_N1 = np.exp(logprobs_NK.astype(np.float64)).sum(axis=1, keepdims=True)
        if mass_N1.max() > _MOST_MASS:
            raise InputError(f"{origin}: the probabilities of a position add up to {mass_N1.max():.3g}")
        logprobs_NK = (logprobs_NK - np.log(np.maximum(mass_N1, 1))).astype(np.float32)
        return np.take_along_axis(ids_NK, order_NK, axis=1), logprobs_NK

    def _check_alignment(self, is_written_NK: Array, is_current_NK: Array, origin: str) -> None:
        """Refuse targets that fit the tokens they are at instead of the next ones, a common error."""
        self.looked += len(is_written_NK)
        self.found += int(is_written_NK.any(axis=1).sum())
        self.found_late += int(is_current_NK.any(axis=1).sum())
        if self.looked >= _FEW and self.found_late > max(2 * self.found, self.looked / 4):
            raise InputError(
                f"{origin}: the targets are one position late: {self.found_late / self.looked:.0%} of them have the token that "
                f"they are at, and {self.found / self.looked:.0%} the one after it, which they should predict"
            )


def _axolotl_entries(batch: pa.Table, origin: str) -> _Entries:
    """The columns of axolotl's trainer: one entry per token, `target_mask` 1 where it counts."""
    _need(batch, {"input_ids": 1, "target_token_ids": 2, "target_logprobs": 2, "target_mask": 2}, origin)
    ids_T, lengths_B = _flat(batch["input_ids"])
    ids, outer_B, inner_T = _flat_twice(batch["target_token_ids"])
    logprobs, *shape = _flat_twice(batch["target_logprobs"])
    mask, *mask_shape = _flat_twice(batch["target_mask"])
    same = all(np.array_equal(a, b) for a, b in zip([outer_B, inner_T] * 2, [*shape, *mask_shape], strict=True))
    if not same or not np.array_equal(outer_B, lengths_B):
        raise InputError(f"{origin}: the target columns do not have one entry per token, all of the same length")
    width = int(inner_T.max(initial=0))
    is_there_TK = np.arange(width) < inner_T[:, None]
    ids_TK = np.zeros(is_there_TK.shape, dtype=np.int64)
    logprobs_TK = np.full(is_there_TK.shape, -np.inf, dtype=np.float32)
    ids_TK[is_there_TK] = ids
    logprobs_TK[is_there_TK] = np.where(mask != 0, logprobs, -np.inf)
    begins_B, texts_T, last_T = _texts(batch, lengths_B, origin)
    counted_T = ~last_T & (logprobs_TK != -np.inf).any(axis=1)
    return _Entries(ids_T, begins_B, texts_T, counted_T, ids_TK[counted_T], logprobs_TK[counted_T])


def _distillkit_entries(batch: pa.Table, origin: str, config: distillkit.Compression) -> _Entries:
    """A capture, packed or not: an entry counts if its own label is set, as in DistillKit's trainer."""
    _need(batch, {"input_ids": 1, "compressed_logprobs": 2, "bytepacked_indices": 2}, origin)
    ids_T, lengths_B = _flat(batch["input_ids"])
    stored, entries_B, width_E = _flat_twice(batch["compressed_logprobs"])
    packed, same_B, packed_width_E = _flat_twice(batch["bytepacked_indices"])
    if not np.array_equal(entries_B, same_B) or (entries_B > lengths_B).any():
        raise InputError(f"{origin}: the two target columns have different numbers of entries, or more than there are tokens")
    if (width_E != config.logprob_bytes).any() or (packed_width_E != config.index_bytes).any():
        raise InputError(
            f"{origin}: entries of {width_E.max()} and {packed_width_E.max()} bytes, but {distillkit.CONFIG_FILE} means "
            f"{config.logprob_bytes} and {config.index_bytes}; it must be the configuration of the capture"
        )
    # DistillKit's sampler writes no entry for the last token, which the entry before it predicts.
    place_T = np.arange(len(ids_T)) - np.repeat(lengths_B.cumsum() - lengths_B, lengths_B)
    entries_T = np.repeat(entries_B, lengths_B)
    kept_T = place_T <= entries_T
    begins_B, texts_T, last_T = _texts(batch, lengths_B, origin, kept_T)
    has_entry_T = (place_T < entries_T)[kept_T]
    counted_T = ~last_T & has_entry_T
    if "labels" in batch.schema.names:
        counted_T &= _one_a_token(batch, "labels", lengths_B, origin)[kept_T] >= 0
    taken_E = counted_T[has_entry_T]
    logprob_bytes = stored.astype(np.uint8).reshape(len(taken_E), config.logprob_bytes)[taken_E]
    index_bytes = packed.astype(np.uint8).reshape(len(taken_E), config.index_bytes)[taken_E]
    ids_NK, logprobs_NK = distillkit.decode(logprob_bytes, index_bytes, config)
    return _Entries(ids_T[kept_T], begins_B, texts_T, counted_T, ids_NK, logprobs_NK)


def _texts(batch: pa.Table, lengths_B: Array, origin: str, kept_T: Array | None = None) -> tuple[Array, Array, Array]:
    """Where rows begin, a number for each text in them, and which tokens are the last of a text.

    Packed rows number their texts in `attention_mask`; 0 is padding.
    """
    rows_T = np.repeat(np.arange(len(lengths_B)), lengths_B)
    mask_T = np.ones(len(rows_T), dtype=np.int64)
    if "attention_mask" in batch.schema.names:
        mask_T = _one_a_token(batch, "attention_mask", lengths_B, origin)
    if kept_T is not None:
        rows_T, mask_T = rows_T[kept_T], mask_T[kept_T]
    other_T = np.ones(len(rows_T) + 1, dtype=bool)
    other_T[1:-1] = (np.diff(rows_T) != 0) | (np.diff(mask_T) != 0)
    return np.searchsorted(rows_T, np.arange(len(lengths_B))), other_T[:-1].cumsum(), other_T[1:] | (mask_T == 0)


def _one_a_token(batch: pa.Table, name: str, lengths_B: Array, origin: str) -> Array:
    _need(batch, {name: 1}, origin)
    values_T, its_lengths_B = _flat(batch[name])
    if not np.array_equal(its_lengths_B, lengths_B):
        raise InputError(f"{origin}: `{name}` does not have one value a token of `input_ids`")
    return values_T.astype(np.int64)


def _need(batch: pa.Table, columns: Mapping[str, int], origin: str) -> None:
    """Refuse columns that are missing, or are not lists of numbers without nulls; the nesting depth is given by name."""
    for name, depth in columns.items():
        if name not in batch.schema.names:
            raise InputError(f"{origin}: has no column `{name}`, only {', '.join(batch.schema.names)}; see {page('formats')}")
        inner = found = batch.schema.field(name).type
        for _ in range(depth):
            inner = inner.value_type if _is_list(inner) else None
        whole = name.endswith("ids")
        if inner is None or not (_is_whole(inner) or (not whole and pa.types.is_floating(inner))):
            wanted = f"{'lists of ' * depth}{'whole numbers' if whole else 'numbers'}"
            raise InputError(f"{origin}: the column `{name}` holds {found}, not {wanted}; see {page('formats')}")
        values = batch[name]
        for _ in range(depth):
            values = pc.list_flatten(values)
        if values.null_count:
            raise InputError(f"{origin}: the column `{name}` has a null among its numbers")


def _is_list(of: pa.DataType | None) -> bool:
    return of is not None and any(test(of) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _is_whole(of: pa.DataType) -> bool:
    return bool(pa.types.is_integer(of) or pa.types.is_boolean(of))


def _flat(column: pa.ChunkedArray) -> tuple[Array, Array]:
    """The values of a column of lists, concatenated, and the length of each."""
    return pc.list_flatten(column).to_numpy(), pc.fill_null(pc.list_value_length(column), 0).to_numpy()


def _flat_twice(column: pa.ChunkedArray) -> tuple[Array, Array, Array]:
    """The same for lists of lists: the values, the lengths of the outer lists, and those of the inner ones."""
    values, inner = _flat(pc.list_flatten(column))
    return values, pc.fill_null(pc.list_value_length(column), 0).to_numpy(), inner


def _name(digest: str, file: Path, source: Path) -> str:
    """A file's content, and its path within a directory: two files may have the same content."""
    return digest if file == source else f"{digest} {file.relative_to(source).as_posix()}"


def _row_id(name: str, number: int, place: int = 0) -> str:
    """Stable id of an imported row: its position in its file, by `_name`."""
    return hashlib.sha256(f"{name} {number} {place}".encode(errors="surrogateescape")).hexdigest()[:32]
