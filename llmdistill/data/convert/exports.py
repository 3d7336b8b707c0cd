"""`llmdistill convert --to`: a dataset in the formats of other projects' trainers. See docs/formats.md.

Both foreign formats put the distribution of a token where a model predicts it: entry j of a sequence is the teacher's
distribution for `input_ids[j + 1]`. Soft-target row t of ours, that of `input_ids[completion_start + t]`, is their entry
`completion_start + t − 1`.

Everything goes through in parts of some 65,000 tokens, so memory does not grow with the dataset; of preference pairs, the
rejected answers are held.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from llmdistill import __version__
from llmdistill.data import targets
from llmdistill.data.batches import TOKENS_AT_ONCE, read_batches, rows_at_once
from llmdistill.data.convert import distillkit
from llmdistill.data.dataset import shard_files
from llmdistill.data.manifest import MANIFEST, has_several_tokenizers, read_manifest
from llmdistill.data.rows import whole_conversation
from llmdistill.data.shard_writer import SPLITS, Split
from llmdistill.data.targets import Array, SoftTargets
from llmdistill.errors import InputError
from llmdistill.runs.files import new_directory, write_text
from llmdistill.runs.inputs import sha256
from llmdistill.runs.progress import StageBar, console

KIND_KEY = b"llmdistill.data.targets.kind"  # in a Parquet file's metadata: what the targets in it are
_MOST_MASS = 1 - 2**-9  # of top-k targets in DistillKit's form: what rounding to float16 adds does not reach 1
_NO_LOGPROB = -30.0  # e⁻³⁰ is nothing, but finite: −∞ would make 0 · −∞ of a masked position or token


@dataclass(frozen=True)
class _Sequences:
    """Some rows of a dataset: T tokens, row after row, and the targets of their N completion tokens."""

    ids_T: Array
    lengths_B: Array
    completion_T: Array  # bool: is a completion token
    predicting_T: Array  # bool: predicts one; the N of them are in the order of the targets
    ids_NK: Array
    logprobs_NK: Array


@dataclass(frozen=True)
class _Written:
    """What was written, in words, and the part of the other project's configuration that reads it."""

    told: str
    settings: dict[str, Any] | None


_NOTES = {
    "distillkit": "Entry j of a row is the teacher's distribution for the token at j + 1. `labels` mark the positions that "
    "predict a completion token, since DistillKit counts an entry where its own label is set, but not those of which an "
    "endpoint has shown nothing. The part of its configuration that fits these files:",
    "axolotl": "Entry j of a row is the teacher's distribution for the token at j + 1; `target_mask` is 1 where that is a "
    "completion token. The rows are tokenised already: no `type` under `datasets`, `kd_temperature` 1, and no row longer than "
    "`sequence_len`. The part of its configuration that fits these files:",
    "jsonl": "One object per line, `prompt` and `completion`, each a list of messages: TRL's conversational form; for rows "
    "without a prompt the `text`.",
    "preferences": "One object per line, `prompt`, `chosen` and `rejected`, each a list of messages, as TRL's `DPOTrainer` "
    "reads them, and the scores of both answers. `chosen` is the best of the answers to the prompt, `rejected` a worse one.",
}


def export_dataset(directory: Path, out: Path, form: str, exact_k: int | None = None) -> None:
    """Write a finished dataset in another format, one file per split, with a README that describes it.

    Args:
        directory: the dataset.
        out: the directory to make.
        form: `distillkit`, `axolotl` or `jsonl`.
        exact_k: for distillkit: so many log-probabilities a position as they are, the others as a curve; None is all.

    Raises:
        InputError: there is no complete dataset, it cannot be said in that format, or `out` is not empty.
    """
    manifest = read_manifest(directory)
    kind = targets.KINDS[manifest["targets"]["kind"]]
    if form == "preferences" and not list(directory.glob("best_of-*.jsonl")):
        raise InputError(f"{directory}: no preference pairs; curate with the step best_of and several samples per prompt")
    if (not (kind.columns and kind.distinct) or kind.of_writer) and form not in ("jsonl", "preferences"):
        raise InputError(
            f"{directory}: {form} does not support targets of kind {kind.name}; use --to jsonl to export the text only"
        )
    if "alignment" in manifest and form not in ("jsonl", "preferences"):
        raise InputError(
            f"{directory}: its targets are in the tokens of {manifest['teacher']['model']}, its rows in those of another "
            f"tokenizer, which {form} does not support; export the dataset that it was made from"
        )
    if has_several_tokenizers(manifest) and form not in ("jsonl", "preferences"):
        raise InputError(
            f"{directory}: its rows are in the tokens of their own teachers, {', '.join(manifest['teachers'])}, which {form} "
            "does not support; use --to jsonl to export the text only"
        )
    if exact_k is not None and (form != "distillkit" or not kind.most_likely):
        raise InputError("--exact-k needs --to distillkit and targets of kind topk: only these follow a curve over their rank")
    files = {split: found for split in SPLITS if (found := shard_files(directory, split))}
    if form == "distillkit":
        k = manifest["targets"][kind.size]
        compression = distillkit.our_compression(manifest["tokenizer"]["vocab_size"], k, k if exact_k is None else exact_k)
    with new_directory(out) as unfinished, StageBar("convert", manifest["rows"]) as bar:
        if form == "jsonl":
            written = _write_jsonl(files, unfinished, bar)
        elif form == "preferences":
            written = _write_preferences(directory, files, unfinished, bar)
        elif form == "axolotl":
            written = _write_axolotl(files, unfinished, out, kind, bar)
        else:
            written = _write_distillkit(files, unfinished, out, kind, manifest, compression, bar)
        write_text(unfinished / "README.md", _readme(directory, manifest, form, written))
    console.print(f"{written.told}\n{out / 'README.md'} describes the format", markup=False)


def _parts(files: list[Path], columns: list[str], rows: int | None = None) -> Iterator[pa.Table]:
    """The rows of some shards, a number at a time, or about `TOKENS_AT_ONCE`."""
    for file in files:
        yield from read_batches([file], columns, rows or rows_at_once(file))


def _sequences(files: list[Path], kind: type[SoftTargets], rows: int | None = None) -> Iterator[_Sequences]:
    """The rows of some shards with their targets as log-probabilities, in descending order at each position."""
    for batch in _parts(files, ["input_ids", "completion_start", *kind.columns], rows):
        lengths_B = pc.list_value_length(batch["input_ids"]).to_numpy()
        starts_B = batch["completion_start"].to_numpy()
        place_T = np.arange(lengths_B.sum()) - np.repeat(lengths_B.cumsum() - lengths_B, lengths_B)
        from_start_T = place_T - np.repeat(starts_B, lengths_B)
        counts_B = lengths_B - starts_B
        soft = kind.of_rows(_columns(batch, kind), counts_B)
        logprobs_NK = soft.logweights()
        order_NK = np.argsort(-logprobs_NK, axis=1, kind="stable")
        yield _Sequences(
            pc.list_flatten(batch["input_ids"]).to_numpy().astype(np.int64),
            lengths_B,
            from_start_T >= 0,
            (from_start_T >= -1) & (place_T < np.repeat(lengths_B, lengths_B) - 1),
            np.take_along_axis(soft.ids_NK, order_NK, axis=1),
            np.take_along_axis(logprobs_NK, order_NK, axis=1),
        )


def _columns(batch: pa.Table, kind: type[SoftTargets]) -> list[Mapping[str, Any]]:
    """The columns of the targets of each row."""
    lists = {name: batch[name].combine_chunks() for name in kind.columns}
    return [{name: column[row].values.to_numpy() for name, column in lists.items()} for row in range(len(batch))]


def _write_jsonl(files: dict[Split, list[Path]], directory: Path, bar: StageBar) -> _Written:
    rows = cut = 0
    for split, shards in files.items():
        with (directory / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
            for batch in read_batches(shards, ["prompt", "completion", "metadata", "finish_reason"]):
                for row in batch.select(["prompt", "completion", "metadata"]).to_pylist():
                    stream.write(json.dumps(_conversation(row) if row["prompt"] else _text(row), ensure_ascii=False) + "\n")
                rows += batch.num_rows
                cut += pc.sum(pc.not_equal(batch["finish_reason"], "stop")).as_py()
                bar.advance(batch.num_rows)
    told = f"; {cut:,} of them were cut off at max_tokens; a trainer will treat them as complete" if cut else ""
    return _Written(f"{rows:,} rows of text{told}", None)


def _conversation(row: dict[str, Any]) -> dict[str, Any]:
    """Prompt and completion of a row before reduction to roles and contents, and the tools offered."""
    (*prompt, answer), tools = whole_conversation(row)
    return {"prompt": prompt, "completion": [answer], **({"tools": tools} if tools else {})}


def _text(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of text without turns, which has no prompt."""
    return {"text": row["completion"][0]["content"]}


def _write_preferences(source: Path, files: dict[Split, list[Path]], directory: Path, bar: StageBar) -> _Written:
    """Every loser of a `best_of` step with the row that it lost to, if that one has been kept."""
    losers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for log in sorted(source.glob("best_of-*.jsonl")):
        for line in log.read_text(encoding="utf-8").splitlines():
            pair = json.loads(line)
            losers[pair["chosen"]].append(pair)
    wanted = {pair["rejected"] for pairs in losers.values() for pair in pairs}
    texts: dict[str, Any] = {}
    for batch in read_batches([source / "rejected.parquet"], ["id", "prompt", "completion", "metadata"]):
        texts |= {row["id"]: _conversation(row)["completion"] for row in batch.to_pylist() if row["id"] in wanted}
    written = 0
    for split, shards in files.items():
        with (directory / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
            for batch in read_batches(shards, ["id", "prompt", "completion", "metadata"]):
                for row in batch.to_pylist():
                    for pair in losers.get(row["id"], []):
                        given = _conversation(row)
                        both = {"chosen": given.pop("completion"), "rejected": texts[pair["rejected"]]}
                        scores = {name: pair[name] for name in ("chosen_score", "rejected_score")}
                        stream.write(json.dumps({**given, **both, **scores}, ensure_ascii=False) + "\n")
                        written += 1
                bar.advance(batch.num_rows)
    return _Written(f"{written:,} pairs of a better and a worse answer", None)


def _write_axolotl(
    files: dict[Split, list[Path]], directory: Path, out: Path, kind: type[SoftTargets], bar: StageBar
) -> _Written:
    nested = pa.list_(pa.list_(pa.int32()))
    schema = pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "attention_mask": pa.list_(pa.int8()),
            "labels": pa.list_(pa.int32()),
            "target_token_ids": nested,
            "target_logprobs": pa.list_(pa.list_(pa.float32())),
            "target_mask": pa.list_(pa.list_(pa.int8())),
        },
        {KIND_KEY: kind.name.encode()},
    )
    tokens = longest = 0
    for split, shards in files.items():
        with _writer(directory / f"{split}.parquet", schema) as writer:
            for part in _sequences(shards, kind):
                k, size = part.ids_NK.shape[1], len(part.ids_T)
                ids_TK = np.zeros((size, k), dtype=np.int32)
                logprobs_TK = np.full((size, k), _NO_LOGPROB, dtype=np.float32)
                is_there_NK, mask_TK = np.isfinite(part.logprobs_NK), np.zeros((size, k), dtype=np.int8)
                ids_TK[part.predicting_T], mask_TK[part.predicting_T] = part.ids_NK, is_there_NK
                logprobs_TK[part.predicting_T] = np.where(is_there_NK, part.logprobs_NK, _NO_LOGPROB)
                columns = [
                    targets.list_array(part.ids_T.astype(np.int32), part.lengths_B),
                    targets.list_array(np.ones(size, dtype=np.int8), part.lengths_B),
                    targets.list_array(np.where(part.completion_T, part.ids_T, -100).astype(np.int32), part.lengths_B),
                    *(_nested(values.ravel(), k, part.lengths_B) for values in (ids_TK, logprobs_TK, mask_TK)),
                ]
                writer.write_table(pa.table(columns, schema=schema))
                tokens, longest = tokens + len(part.ids_NK), max(longest, int(part.lengths_B.max()))
                bar.advance(len(part.lengths_B), len(part.ids_NK))
    settings: dict[str, Any] = {
        "plugins": ["axolotl.integrations.kd.KDPlugin"],
        "kd_trainer": True,
        "kd_alpha": 0.9,
        "kd_ce_alpha": 0.1,
        "kd_beta": 0.0,
        "kd_temperature": 1.0,
        # Renormalising the student over a sample would undo what makes the sample unbiased.
        "kd_normalize_topk": not kind.unbiased,
        "sequence_len": longest,
    }
    for split in files:
        settings["datasets" if split == "train" else "test_datasets"] = [{"path": str(out), "split": split}]
    return _Written(f"{tokens:,} completion tokens with {k} targets each", settings)


def _write_distillkit(
    files: dict[Split, list[Path]],
    directory: Path,
    out: Path,
    kind: type[SoftTargets],
    manifest: dict[str, Any],
    compression: distillkit.Compression,
    bar: StageBar,
) -> _Written:
    """Rows of one length, since DistillKit's collator stacks them; labels mask everything outside the completions."""
    end = manifest["tokenizer"]["end_token_ids"]
    schema = pa.schema(
        {
            "input_ids": pa.list_(pa.uint64()),
            "attention_mask": pa.list_(pa.int8()),
            "labels": pa.list_(pa.int64()),
            "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
            "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
        },
        {KIND_KEY: kind.name.encode()},
    )
    every = [file for shards in files.values() for file in shards]
    length = max(pc.max(pc.list_value_length(batch[0])).as_py() for batch in read_batches(every, ["input_ids"]))
    pad = end[0] if end else 0
    loss = _Loss(compression.exact_k)
    for split, shards in files.items():
        with _writer(directory / f"{split}.parquet", schema) as writer:
            for part in _sequences(shards, kind, max(TOKENS_AT_ONCE // length, 1)):
                writer.write_table(
                    pa.table(_distillkit_columns(part, compression, length, pad, loss, kind.has_tail), schema=schema)
                )
                bar.advance(len(part.lengths_B), len(part.ids_NK))
    compressor = compression.model_dump(mode="json")
    write_text(directory / distillkit.CONFIG_FILE, yaml.safe_dump(compressor, sort_keys=False))
    datasets = {"train": "train_dataset", "test": "eval_dataset"}
    kl = {"function": "kl", "weight": 0.5, "temperature": 1.0}
    # What is left of top-k targets enters as one bucket; a sample has nothing left.
    kl["missing_probability_handling"] = "symmetric_uniform" if kind.has_tail else "zero"
    settings = {
        "sequence_length": length,
        "dataset": {datasets[split]: {"repo_id": str(out), "split": split} for split in files} | {"prepacked": True},
        "teacher": {"kind": "dataset", "logprob_compressor": compressor},
        "loss_functions": [{"function": "cross_entropy", "weight": 0.5}, kl],
        "training_args": {"remove_unused_columns": False},
    }
    return _Written(
        f"{loss.positions:,} completion tokens with {compression.k} targets each in "
        f"{compression.logprob_bytes + compression.index_bytes} bytes, rows of {length:,} tokens; {loss.told()}",
        settings,
    )


def _distillkit_columns(
    part: _Sequences, compression: distillkit.Compression, length: int, pad: int, loss: "_Loss", has_tail: bool
) -> list[pa.Array]:
    """One batch of rows, padded to `length`.

    DistillKit counts position j where `labels[j]` is not negative, without a shift. So the labels are on the positions
    that predict a completion token, not on those tokens, but for one of which an endpoint has shown nothing. Where there are
    no soft targets the entry says the next token of the row itself, which is harmless to a reader that counts it after all.
    """
    rows, k = len(part.lengths_B), compression.k
    known_N = np.isfinite(part.logprobs_NK).any(axis=1)
    predicting_T = part.predicting_T.copy()
    predicting_T[np.flatnonzero(part.predicting_T)[~known_N]] = False
    real_BL = np.arange(length) < part.lengths_B[:, None]
    ids_BL = np.full((rows, length), pad, dtype=np.int64)
    ids_BL[real_BL] = part.ids_T
    predicting_BL = np.zeros((rows, length), dtype=bool)
    predicting_BL[real_BL] = predicting_T

    next_BL = np.concatenate([ids_BL[:, 1:], np.full((rows, 1), pad)], axis=1)
    # All positions after a row's end are equal: they are encoded once, as the entry after the last.
    ids_TK = (np.append(next_BL[real_BL], pad)[:, None] + np.arange(k)) % compression.d
    logprobs_TK = np.where(np.arange(k) == 0, 0.0, np.full((len(ids_TK), 1), _NO_LOGPROB))
    soft_T = np.append(predicting_T, False)
    ids_TK[soft_T], logprobs_TK[soft_T] = _filled(part.ids_NK[known_N], part.logprobs_NK[known_N])
    encoded = distillkit.encode(ids_TK, logprobs_TK, compression)
    if has_tail:  # as float16, some sums reach 1, and DistillKit takes the logarithm of what is missing to it
        mass_T1 = np.exp(distillkit.decode(*encoded, compression)[1].astype(np.float64)).sum(axis=1, keepdims=True)
        encoded = distillkit.encode(ids_TK, logprobs_TK - np.log(np.maximum(mass_T1 / _MOST_MASS, 1)), compression)
    loss.add(logprobs_TK[soft_T], distillkit.decode(encoded[0][soft_T], encoded[1][soft_T], compression)[1])

    source_BL = np.full((rows, length), len(part.ids_T))
    source_BL[real_BL] = np.arange(len(part.ids_T))
    whole = np.full(rows, length)
    return [
        targets.list_array(ids_BL.astype(np.uint64).ravel(), whole),
        targets.list_array(real_BL.astype(np.int8).ravel(), whole),
        targets.list_array(np.where(predicting_BL, ids_BL, -100).ravel(), whole),
        *(_nested(values[source_BL].ravel(), values.shape[1], whole) for values in encoded),
    ]


def _filled(ids_NK: Array, logprobs_NK: Array) -> tuple[Array, Array]:
    """The same with weightless tokens in empty slots, since DistillKit sums over all of them."""
    is_there_NK, ids_NK = np.isfinite(logprobs_NK), ids_NK.copy()
    lacking_N = ~is_there_NK.all(axis=1)
    ids_NK[lacking_N] = _other_ids(ids_NK[lacking_N], is_there_NK[lacking_N])
    return ids_NK, np.where(is_there_NK, logprobs_NK, _NO_LOGPROB)


def _other_ids(ids_NK: Array, is_there_NK: Array) -> Array:
    """The ids of present tokens, and the lowest missing ids in the other slots."""
    k = ids_NK.shape[1]
    free_NC = np.ones((len(ids_NK), 2 * k + 1), dtype=bool)  # of the first 2k at least k are free; the last place is all others
    np.put_along_axis(free_NC, np.where(is_there_NK, np.minimum(ids_NK, 2 * k), 2 * k), False, axis=1)
    free_ids_NC = np.argsort(~free_NC, axis=1, kind="stable")
    number_NK = np.maximum(np.cumsum(~is_there_NK, axis=1) - 1, 0)
    return np.where(is_there_NK, ids_NK, np.take_along_axis(free_ids_NC, number_NK, axis=1))


class _Loss:
    """Effect of compression, in nats: the largest change of an exact value, mean and largest change on the curve."""

    def __init__(self, exact_k: int) -> None:
        self.exact_k = exact_k
        self.positions = self.values = 0
        self.exact = self.total = self.largest = 0.0

    def add(self, before_NK: Array, after_NK: Array) -> None:
        """Count a batch."""
        change_NK = np.abs(after_NK.astype(np.float64) - before_NK)
        curve_NT = change_NK[:, self.exact_k :]
        self.positions += len(change_NK)
        self.exact = float(np.maximum(self.exact, change_NK[:, : self.exact_k].max(initial=0)))  # NaN stays
        self.values += curve_NT.size
        self.total += curve_NT.sum()
        self.largest = float(np.maximum(self.largest, curve_NT.max(initial=0)))

    def told(self) -> str:
        """In words."""
        told = f"log-probabilities change by at most {self.exact:.4f} nats"
        if self.values:
            told += f", those on the curve by {self.total / self.values:.3f} on average and at most {self.largest:.3f}"
        return told


def _writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)


def _nested(values: Array, size: int, lengths: Array) -> pa.ListArray:
    """Lists of lists of `size` values each, from a flat buffer."""
    inner = targets.list_array(values, np.full(len(values) // size, size))
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)), inner)


def _readme(directory: Path, manifest: dict[str, Any], form: str, written: _Written) -> str:
    name = manifest["teacher"]["model"].rstrip("/").split("/")[-1]
    settings = f"\n```yaml\n{yaml.safe_dump(written.settings, sort_keys=False).strip()}\n```\n" if written.settings else ""
    return f"""---
tags: [llmdistill]
---

# Text of {name}, for {form}

{written.told[0].upper() + written.told[1:]}.

{_NOTES[form]}
{settings}
Exported by llmdistill {__version__} from a dataset whose `{MANIFEST}` has the SHA-256
`{sha256(directory / MANIFEST)}`.
"""
