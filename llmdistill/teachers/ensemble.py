"""Several teachers loaded in turn: the first generates, all score, and the results are averaged at the end.

An engine without full distributions cannot average them. But each member can keep some tokens from its own distribution, and
return its log-probabilities of those that the others kept; these determine the targets of the mean (`SoftTargets.mix`). For M
members that takes 2M − 1 passes: each generates or scores, keeps tokens, and is asked about those of earlier members; then
each but the last is asked about those of later members. The results of a pass for a shard are a file, so that a killed run
continues with the pass and shard where it was.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill.config import Targets, Teacher
from llmdistill.data.ids import row_seed, stable_id
from llmdistill.data.targets import Array, MemberTokens, list_column
from llmdistill.errors import InputError
from llmdistill.models.loading import context_length, load_config
from llmdistill.runs import lock
from llmdistill.runs.progress import counted, say, working
from llmdistill.teachers import Completion, Engine, EngineSpec, Request, Said, open_engine

_GROUP = 32  # shards that go through all passes together; a trade-off between disk space for staging and loading models
_ROWS = 32  # rows of a staged file at a time


@dataclass(frozen=True)
class _Pass:
    """A pass of one member, generating or scoring: whether it keeps its own tokens, and about whose tokens it is asked."""

    member: int
    keeps: bool
    asked: range


class EnsembleEngine(Engine):
    """Takes groups of shards through all passes; see the module docstring."""

    def __init__(self, spec: EngineSpec) -> None:
        if spec.staging is None:
            raise InputError(f"teacher.ensemble: engine {spec.teacher.engine} averages teachers in `generate` and `score` only")
        self.spec, self.staging = spec, spec.staging
        teacher = spec.teacher
        also = [{"model": more.model, "revision": more.revision} for more in teacher.ensemble]
        self.members = [teacher.model_copy(update={"ensemble": [], **update}) for update in ({}, *also)]
        weights = np.array([teacher.weight, *(more.weight for more in teacher.ensemble)], dtype=np.float64)
        self.log_weights_M = np.log(weights / weights.sum())
        # Generated text is scored with the extra token that vLLM insists on.
        self.length = spec.max_model_len + (spec.reads_with is None)
        self.sizes = [_check_length(member, self.length, number) for number, member in enumerate(self.members)]
        self.common = min([*self.sizes, *([spec.known_ids] if spec.known_ids else [])])  # the ids that all members have
        kind = spec.kept.stored
        self.kept = min(kind.of_member(spec.kept.kept), self.common - 1) if kind.size else 0
        last = len(self.members) - 1
        self.passes = [_Pass(number, True, range(number)) for number in range(last + 1)]
        if self.kept:
            self.passes += [_Pass(number, False, range(number + 1, last + 1)) for number in reversed(range(last))]
        self.tokens = 0

    def generate(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Let the first member continue every request."""
        return self._run(batches, writes=True)

    def score(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Let all members score."""
        return self._run(batches, writes=False)

    def close(self) -> None:
        """Nothing is held between passes."""

    def _run(self, batches: Iterable[Sequence[Request]], writes: bool) -> Iterator[Completion]:
        waiting = iter(batches)
        while group := list(islice(waiting, _GROUP)):
            for number in range(len(self.passes)):
                self._make(number, group, writes and number == 0)
            for batch in group:
                yield from self._mixed(batch)
                for number in range(len(self.passes)):  # the shard is stored
                    self._file(number, batch).unlink(missing_ok=True)

    def _file(self, number: int, batch: Sequence[Request]) -> Path:
        """The file with the results of a pass for a shard."""
        return self.staging / f"{stable_id([[request.index, request.seed] for request in batch])}-{number}.parquet"

    def _make(self, number: int, group: list[Sequence[Request]], writes: bool) -> None:
        """Let the member of a pass generate or score the missing shards of a group."""
        step, missing = self.passes[number], [batch for batch in group if not self._file(number, batch).is_file()]
        if not missing:
            return
        self.staging.mkdir(parents=True, exist_ok=True)
        member = self.members[step.member]
        does = f"{'generates' if writes else 'scores'} {counted(len(missing), 'shard')}"
        say("ensemble", f"{member.model} {does} (pass {number + 1} of {len(self.passes)})")
        with working("ensemble", f"starting {member.model}"):
            engine = open_engine(self._spec_of(number, writes))
        with closing(engine):
            batches = missing if writes else (self._texts(number, batch) for batch in missing)
            batch_of = {request.index: batch for batch in missing for request in batch}
            pending: dict[int, list[Completion]] = {}
            before = self.tokens
            for completion in engine.generate(batches) if writes else engine.score(batches):
                self.tokens = before + engine.tokens if number == 0 else before
                batch = batch_of[completion.index]
                rows = pending.setdefault(batch[0].index, [])
                rows.append(completion)
                if len(rows) == len(batch):
                    done = sorted(pending.pop(batch[0].index), key=lambda row: row.index)
                    _write(self._file(number, batch), done)

    def _spec_of(self, number: int, writes: bool) -> EngineSpec:
        """The specification for the engine of a pass."""
        step, size, spec = self.passes[number], self.sizes[self.passes[number].member], self.spec
        kind = spec.kept.stored
        keeps = step.keeps and kind.size
        return replace(
            spec,
            teacher=self.members[step.member],
            kept=Targets.model_validate({"kind": kind.name, kind.size: self.kept}) if keeps else Targets(kind="none"),
            max_model_len=spec.max_model_len if writes else self.length,
            seed=spec.seed + number,
            reads_with=None if writes else size,
            known_ids=self.common if self.common < size else None,
            vocab_size=size,
            staging=None,
            asked=len(step.asked) * self.kept,
        )

    def _texts(self, number: int, batch: Sequence[Request]) -> Sequence[Request]:
        """The requests for scoring a shard in a pass: the text of the first member, and the tokens to ask about."""
        step = self.passes[number]
        if number == 0:
            return batch
        texts = []
        for request, said in zip(batch, self._said(batch, sorted({0, *step.asked})), strict=True):
            asked = [said[member].said.ids_NK for member in step.asked] if self.kept else []
            seed = row_seed(f"member {step.member}", request.seed)
            asked_NJ = np.concatenate(asked, axis=1) if asked else None
            texts.append(replace(request, completion_ids=said[0].ids.tolist(), asked_NJ=asked_NJ, seed=seed))
        return texts

    def _said(self, batch: Sequence[Request], numbers: Sequence[int]) -> Iterator[dict[int, Any]]:
        """The results of some passes for each row of a shard, by the number of the pass."""
        for rows in zip(*(_read(self._file(number, batch)) for number in numbers), strict=True):
            yield dict(zip(numbers, rows, strict=True))

    def _mixed(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """The rows of a shard with the targets of the mean."""
        kind, members = self.spec.kept.stored, range(len(self.members))
        numbers = range(len(self.passes))
        for request, said in zip(batch, self._said(batch, numbers), strict=True):
            first = said[0]
            each_MN = np.stack([said[number].token_logprobs for number in members]).astype(np.float64)
            mean_N = np.logaddexp.reduce(each_MN + self.log_weights_M[:, None], axis=0).astype(np.float32)
            targets = None
            if self.kept:
                own = np.stack([said[number].said.ids_NK for number in members])
                by_pass = {number: said[number].said for number in numbers}
                tokens = MemberTokens(own, self._known(by_pass), self.log_weights_M)
                stream = np.random.Generator(np.random.Philox(key=np.array([request.seed, 2], dtype=np.uint64)))
                uniform_NU = stream.random((len(mean_N), kind.uniforms(self.spec.kept.kept)))
                targets = kind.mix(tokens, self.spec.kept.kept, uniform_NU)
            yield replace(first, token_logprobs=mean_N, targets=targets, said=None)

    def _known(self, said: dict[int, Said]) -> Array:
        """Each member's log-probability of every token that any of them kept, (M, M, N, K)."""
        known = [[said[member].logprobs_NK for member in range(len(self.members))] for _ in self.members]
        for number, step in enumerate(self.passes):
            for place, member in enumerate(step.asked):
                known[step.member][member] = said[number].asked_NJ[:, place * self.kept : (place + 1) * self.kept]
        return np.array(known)


def _check_length(member: Teacher, length: int, number: int) -> int:
    """The size of a member's output layer.

    Raises:
        InputError: if its context is too short for the longest sequence.
    """
    config = load_config(member.model, member.revision, member.trust_remote_code)
    limit = context_length(config)
    if limit and length > limit:
        key = f"teacher.ensemble.{number - 1}.model" if number else "teacher.model"
        raise InputError(f"{key}: {member.model} has a context of {limit:,} tokens, but {length:,} are needed")
    size: int = config.get_text_config().vocab_size
    return size


def _write(file: Path, rows: list[Completion]) -> None:
    """Write the results of a pass for a shard atomically."""
    said = [row.said for row in rows]
    assert all(part is not None for part in said)
    told = [part for part in said if part]
    table = pa.table(
        {
            "index": pa.array([row.index for row in rows], pa.int64()),
            "finish_reason": pa.array([row.finish_reason for row in rows], pa.string()),
            "sampling_logprob": pa.array([row.sampling_logprob for row in rows], pa.float64()),
            "ids": list_column([row.ids for row in rows], np.int32),
            "token_logprobs": list_column([row.token_logprobs for row in rows], np.float32),
            "kept_ids": list_column([part.ids_NK.ravel() for part in told], np.int32),
            "kept_logprobs": list_column([part.logprobs_NK.ravel() for part in told], np.float32),
            "asked": list_column([part.asked_NJ.ravel() for part in told], np.float32),
        }
    )
    with lock.written(file) as unfinished:
        pq.write_table(table, unfinished, compression="zstd", row_group_size=_ROWS, write_page_checksum=True)


def _read(file: Path) -> Iterator[Completion]:
    """The rows of such a file, in the order of the requests."""
    try:
        with pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True) as parquet:
            for batch in parquet.iter_batches(batch_size=_ROWS):
                for number in range(len(batch)):
                    yield _completion({name: batch[name][number] for name in batch.schema.names})
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file}: cannot be read, the file was damaged or changed; remove it to make it again: {error}"
        ) from None


def _completion(row: dict[str, Any]) -> Completion:
    names = ("ids", "token_logprobs", "kept_ids", "kept_logprobs", "asked")
    ids, token_logprobs, *said = (row[name].values.to_numpy() for name in names)
    kept_ids, kept_logprobs, asked = (values.reshape(len(ids), len(values) // len(ids)) for values in said)
    index, reason, sampled = (row[name].as_py() for name in ("index", "finish_reason", "sampling_logprob"))
    return Completion(
        index,
        ids.astype(np.int64),
        reason,
        token_logprobs,
        None,
        sampled,
        said=Said(kept_ids.astype(np.int64), kept_logprobs, asked),
    )
