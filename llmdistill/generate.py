"""`llmdistill generate`: the teacher continues the prompts; text and soft targets are stored in one pass."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmdistill import stage
from llmdistill.config import Experiment
from llmdistill.dataset import (
    Row,
    bytes_per_position,
    finished_shards,
    remove_leftovers,
    rows_to_table,
    write_manifest,
    write_shard,
)
from llmdistill.errors import InputError
from llmdistill.models import check_model_exists, context_length, end_token_ids_of, load_config, load_tokenizer, vocabulary_hash
from llmdistill.progress import StageBar, console, say
from llmdistill.prompts import Prompt, load_prompts
from llmdistill.teachers import Completion, Request, check_engine, open_engine, row_id, row_seed

# Bytes that one kept token takes in Parquet with zstd, for estimates.
_BYTES_PER_ENTRY = {"sampled": 2.2, "topk": 2.6, "none": 0}
_DETERMINISM = {
    "transformers": "bit-exact: the same configuration on the same machine and versions gives the same bytes",
    "vllm": "rows and ids are the same on every run; text and last bits of the numbers depend on how requests were batched",
}


def generate(experiment: Experiment, dry_run: bool = False) -> None:
    """Write the dataset `OUTPUT/data`, going on where an interrupted run stopped.

    Raises:
        InputError: the prompts, the teacher or the output directory are not usable; nothing was written.
    """
    if experiment.prompts is None:
        raise InputError("the key prompts is missing: `generate` needs prompts.source")
    directory, teacher = experiment.directory("data"), experiment.teacher
    prompts = load_prompts(experiment.prompts)
    check_model_exists(teacher.model, "teacher.model")
    settings = experiment.model_dump(mode="json", include={"seed", "teacher", "prompts", "generate", "targets"})
    fingerprint = stage.model_fingerprint(teacher.model, teacher.revision)
    files = [path for path in (experiment.prompts.source, experiment.prompts.template) if path]
    inputs = {path: stage.sha256(Path(path)) for path in files} | {teacher.model: fingerprint}
    state = stage.claim(directory, "generate", settings, inputs)

    rows = len(prompts) * experiment.generate.samples
    count = -(-rows // experiment.generate.rows_per_shard)
    there = len(finished_shards(directory, "train")) if directory.is_dir() else 0
    if dry_run:
        _say_plan(experiment, len(prompts), rows, count, there)
    elif state == "done" and there == count:
        say("generate", f"{directory} is finished ({rows:,} rows)")
    else:
        work = _Work(experiment, prompts, fingerprint)
        stage.begin(directory, "generate", settings, inputs, experiment.seed)
        work.make_missing_shards(directory, count)
        write_manifest(directory, finished_shards(directory, "train"), work.description() | {"source": inputs})
        stage.finish(directory, {"rows": rows})


class _Work:
    """The rows to make: prompts as the teacher's token ids, their ids and requests. Loads no weights by itself."""

    def __init__(self, experiment: Experiment, prompts: list[Prompt], fingerprint: str) -> None:
        teacher, sampling = experiment.teacher, experiment.generate
        check_engine(teacher)
        self.experiment = experiment
        self.prompts = prompts
        self.fingerprint = fingerprint
        self.config = load_config(teacher.model, teacher.revision, teacher.trust_remote_code)
        self.tokenizer = load_tokenizer(teacher.model, teacher.revision, teacher.trust_remote_code)
        self.vocab_size = self.config.get_text_config().vocab_size
        kept = experiment.targets
        if kept.kept > self.vocab_size:
            key = "n" if kept.kind == "sampled" else "k"
            raise InputError(
                f"targets.{key} is {kept.kept:,}, but the vocabulary of {teacher.model} has {self.vocab_size:,} tokens"
            )
        self.prompt_ids = [_chat_ids(self.tokenizer, prompt) for prompt in prompts]
        self.max_model_len = _check_lengths(experiment, self.config, prompts, self.prompt_ids)
        self.ids = [row_id(prompt.messages, fingerprint, sampling, n) for prompt in prompts for n in range(sampling.samples)]
        self.requests = [
            Request(index, self.prompt_ids[index // sampling.samples], row_seed(identity, experiment.seed))
            for index, identity in enumerate(self.ids)
        ]

    def make_missing_shards(self, directory: Path, count: int) -> None:
        """Generate the shards that are not there yet; each is stored as soon as its last row is."""
        remove_leftovers(directory)
        size = self.experiment.generate.rows_per_shard
        done = {shard.index for shard in finished_shards(directory, "train")}
        missing = [index for index in range(count) if index not in done]
        shards = [self.requests[index * size : (index + 1) * size] for index in missing]
        if not shards:
            return

        def store(number: int, completions: list[Completion]) -> None:
            table = rows_to_table([self._row(completion) for completion in completions], self.vocab_size)
            write_shard(directory, "train", missing[number], count, table)

        with console.status("starting the teacher"):
            engine = open_engine(
                self.experiment.teacher,
                self.experiment.generate,
                self.experiment.targets,
                self.max_model_len,
                self.experiment.seed,
            )
        with StageBar("generate", len(self.requests), len(self.requests) - sum(map(len, shards))) as bar:
            tokens = 0
            for completion in _by_shard(engine.generate(shards), shards, store):
                tokens += len(completion.ids)
                bar.advance(tokens=len(completion.ids), facts=[f"{tokens:,} tokens"])
            stored = bytes_per_position([shard.file for shard in finished_shards(directory, "train")])
            bar.advance(0, facts=[f"{tokens:,} tokens"] + ([f"{stored:.0f} B/position"] if stored else []))

    def description(self) -> dict[str, Any]:
        """What `dataset.json` says of how the rows were made."""
        teacher = self.experiment.teacher
        return {
            "teacher": {
                "model": teacher.model,
                "revision": teacher.revision,
                "commit": getattr(self.config, "_commit_hash", None),
                "fingerprint": self.fingerprint,
                "engine": teacher.engine,
            },
            "tokenizer": {
                "vocab_size": self.vocab_size,
                "vocabulary_hash": vocabulary_hash(self.tokenizer),
                "end_token_ids": end_token_ids_of(teacher.model, teacher.revision, self.config, self.tokenizer),
                "chat_template": self.tokenizer.chat_template,
            },
            "sampling": self.experiment.generate.model_dump(exclude={"rows_per_shard"}),
            "targets": self.experiment.targets.described,
            "seed": self.experiment.seed,
            "determinism": _DETERMINISM[teacher.engine],
            "versions": stage.versions(),
        }

    def _row(self, completion: Completion) -> Row:
        number = completion.index // self.experiment.generate.samples
        text = self.tokenizer.decode(completion.ids, skip_special_tokens=True)
        return Row(
            self.ids[completion.index],
            self.prompts[number].messages,
            [{"role": "assistant", "content": text}],
            self.prompt_ids[number],
            completion.ids,
            completion.finish_reason,
            completion.token_logprobs,
            completion.targets,
        )


def _by_shard(completions: Iterator[Completion], shards: list[list[Request]], store: Any) -> Iterator[Completion]:
    """Pass completions on; store a shard as soon as its last row is there, in the order of its requests."""
    number_of = {request.index: number for number, shard in enumerate(shards) for request in shard}
    pending: dict[int, list[Completion]] = {}
    for completion in completions:
        number = number_of[completion.index]
        rows = pending.setdefault(number, [])
        rows.append(completion)
        if len(rows) == len(shards[number]):
            store(number, sorted(pending.pop(number), key=lambda row: row.index))
        yield completion


def _chat_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt as the teacher sees it: through its own chat template, up to where its turn begins."""
    if tokenizer.chat_template is None:
        raise InputError("teacher.model: its tokenizer has no chat template; use an instruction-tuned teacher")
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    except Exception as error:  # templates raise whatever they like
        raise InputError(f"{prompt.origin}: the teacher's chat template refuses it: {error}") from None
    return ids


def _check_lengths(experiment: Experiment, config: Any, prompts: Sequence[Prompt], prompt_ids: Sequence[list[int]]) -> int:
    """The context to reserve: what was asked for, else what the longest prompt needs; never more than the model has."""
    limit = context_length(config)
    asked = experiment.teacher.max_model_len
    if asked and limit and asked > limit:
        raise InputError(f"teacher.max_model_len is {asked:,}, but {experiment.teacher.model} has a context of {limit:,} tokens")
    longest, prompt = max(zip(map(len, prompt_ids), prompts, strict=True), key=lambda pair: pair[0])
    needed = longest + experiment.generate.max_tokens
    allowed = asked or limit
    if allowed and needed > allowed:
        raise InputError(
            f"{prompt.origin}: {longest:,} prompt tokens and generate.max_tokens {experiment.generate.max_tokens:,} are "
            f"{needed:,}, more than the context of {allowed:,} tokens"
        )
    return asked or needed


def _say_plan(experiment: Experiment, prompts: int, rows: int, count: int, there: int) -> None:
    tokens = rows * experiment.generate.max_tokens
    per_position = _BYTES_PER_ENTRY[experiment.targets.kind] * experiment.targets.kept
    size = tokens * (per_position + 3)
    directory = experiment.directory("data")
    samples = f" × {experiment.generate.samples} samples" if experiment.generate.samples > 1 else ""
    console.print(
        f"{prompts:,} prompts{samples} = {rows:,} rows, up to {_human(tokens)} tokens, "
        f"at most about {_human_bytes(size)} ({per_position:.0f} B/position) in {count:,} shards\n"
        f"would write {directory}  ({there:,} of {count:,} shards are there)",
        markup=False,
    )


def _human(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:,.0f}"


def _human_bytes(number: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"
