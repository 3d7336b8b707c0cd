"""`llmdistill generate`: the teacher continues the prompts; text and soft targets are stored in one pass."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmdistill import stage
from llmdistill.config import Experiment
from llmdistill.dataset import Row
from llmdistill.errors import InputError
from llmdistill.models import check_model_exists
from llmdistill.progress import console, say
from llmdistill.prompts import Prompt, load_prompts
from llmdistill.shards import EVERYTHING, Share, count_finished, count_shards, make_dataset
from llmdistill.teachers import Completion, Engine, Request, row_id, row_seed
from llmdistill.teachers.chat import Chat

# Bytes that one kept token takes in Parquet with zstd, for estimates.
_BYTES_PER_ENTRY = {"sampled": 2.2, "multinomial": 0.8, "topk": 2.6, "none": 0}


def generate(experiment: Experiment, dry_run: bool = False, share: Share = EVERYTHING) -> None:
    """Write the dataset `OUTPUT/data`, going on where an interrupted run stopped.

    Args:
        experiment: the configuration.
        dry_run: only say what would be done.
        share: the part of the shards that this worker makes.

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
    if dry_run:
        _say_plan(experiment, len(prompts), rows)
    elif state == "done" and count_finished(directory) == count_shards(experiment, rows):
        say("generate", f"{directory} is finished ({rows:,} rows)")
    else:
        make_dataset("generate", directory, _Prompts(Chat(experiment, fingerprint), prompts), settings, inputs, share)


class _Prompts:
    """The rows to make: prompts as the teacher's token ids, as often as they are to be answered."""

    def __init__(self, chat: Chat, prompts: list[Prompt]) -> None:
        self.chat = chat
        self.prompts = prompts
        self.sampling = chat.experiment.generate
        self.prompt_ids = [chat.prompt_ids(prompt.messages, prompt.origin) for prompt in prompts]
        longest, origin = max((len(ids), prompt.origin) for ids, prompt in zip(self.prompt_ids, prompts, strict=True))
        what = f"{longest:,} prompt tokens and generate.max_tokens {self.sampling.max_tokens:,}"
        self.max_model_len = chat.check_length(longest + self.sampling.max_tokens, what, origin)
        samples = range(self.sampling.samples)
        self.ids = [row_id(prompt.messages, chat.fingerprint, self.sampling, n) for prompt in prompts for n in samples]
        self.requests = [
            Request(index, self.prompt_ids[index // len(samples)], row_seed(identity, chat.experiment.seed))
            for index, identity in enumerate(self.ids)
        ]

    def run(self, engine: Engine, shards: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        return engine.generate(shards)

    def row(self, completion: Completion) -> Row:
        number = completion.index // self.sampling.samples
        text = self.chat.tokenizer.decode(completion.ids, skip_special_tokens=True)
        return Row(
            self.ids[completion.index],
            self.prompts[number].messages,
            [{"role": "assistant", "content": text}],
            self.prompt_ids[number],
            completion.ids,
            completion.finish_reason,
            completion.token_logprobs,
            completion.targets,
            completion.sampling_logprob,
            self.prompts[number].metadata,
        )

    def description(self) -> dict[str, Any]:
        return {"sampling": self.sampling.model_dump(exclude={"rows_per_shard"})}


def _say_plan(experiment: Experiment, prompts: int, rows: int) -> None:
    count, there = count_shards(experiment, rows), count_finished(experiment.directory("data"))
    tokens = rows * experiment.generate.max_tokens
    per_position = _BYTES_PER_ENTRY[experiment.targets.stored] * experiment.targets.kept
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
