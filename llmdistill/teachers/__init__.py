"""Teachers: a model that continues prompts, or reads finished text, and gives its distribution at every token.

All engines take the same requests and give the same completions; `transformers` is the exact reference, `vllm` is
fast, `server` is a vLLM that runs elsewhere. They agree on the distribution for the same token ids within the precision
of the weights. `openai` and `anthropic` send conversations to whatever is behind an address, and store what it gives.
"""

import importlib.util
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from llmdistill.config import Experiment, Generate, Price, Targets, Teacher
from llmdistill.config.machine import Precision
from llmdistill.data.ids import stable_id
from llmdistill.data.targets import Array, SoftTargets
from llmdistill.errors import InputError
from llmdistill.models.chat_template import ChatTemplate, Conversation
from llmdistill.models.loading import check_model_exists, check_tokenizer_exists, model_precision
from llmdistill.runs.record import model_fingerprint

_IN_TURN = "llmdistill.teachers.ensemble:EnsembleEngine"


@dataclass(frozen=True)
class Request:
    """A prompt to continue, or with `completion_ids` a text to score; `seed` alone decides its random numbers.

    `messages` are the prompt as a conversation, with `tools` if it offers some; engines that take token ids need none.
    `asked_NJ` are token ids for each token of the text, whose log-probabilities are wanted too.
    """

    index: int
    prompt_ids: Sequence[int]
    seed: int
    completion_ids: Sequence[int] = ()
    asked_NJ: Array | None = None
    messages: Conversation | None = None
    tools: Sequence[Any] | None = None


@dataclass(frozen=True)
class Usage:
    """The tokens that an endpoint bills; `cached` are those of the input that it had in its cache."""

    input: int = 0
    output: int = 0
    cached: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.input + other.input, self.output + other.output, self.cached + other.cached)

    def cost(self, price: Price | None, batch: bool = False) -> float | None:
        """What it costs, in the currency of the price."""
        if price is None:
            return None
        cached = price.input if price.cached_input is None else price.cached_input
        whole = price.input * (self.input - self.cached) + cached * self.cached + price.output * self.output
        return whole * (price.batch_share if batch else 1) / 1e6


@dataclass(frozen=True)
class Completion:
    """What the teacher wrote, or read, for the request of the same index; its end token included if it was emitted.

    `sampling_logprob` is the logarithm of the probability with which it wrote just this, at the sampling temperature.
    `failed` says why there is nothing, of a request that was given up. `trace` is the reasoning trace, where an endpoint gives it
    apart from the answer. `usage` is what an endpoint bills for it. Of a member of
    an ensemble, and of the reader of a sample that another model has drawn, `said` is what the targets are made of.
    """

    index: int
    ids: Array
    finish_reason: str
    token_logprobs: Array
    targets: SoftTargets | None
    sampling_logprob: float | None = None
    failed: str | None = None
    trace: str | None = None
    usage: Usage | None = None
    said: "Said | None" = None

    def behind(self, start: int) -> "Completion":
        """The same without its first `start` tokens."""
        kept = self.targets and self.targets.after(start)
        return replace(self, ids=self.ids[start:], token_logprobs=self.token_logprobs[start:], targets=kept)


@dataclass(frozen=True)
class Said:
    """What a member of an ensemble, or the reader of another model's sample, says at N tokens.

    Attributes:
        ids_NK: the tokens that it kept.
        logprobs_NK: their log-probabilities.
        asked_NJ: the log-probabilities of the tokens that it was asked for.
    """

    ids_NK: Array
    logprobs_NK: Array
    asked_NJ: Array

    @classmethod
    def of(cls, ids_NK: Array, logprobs_NK: Array, kept: int) -> "Said":
        """From the kept tokens and behind them those that were asked for."""
        return cls(ids_NK[:, :kept], logprobs_NK[:, :kept], logprobs_NK[:, kept:])


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is made from.

    Attributes:
        teacher: the models and the engine.
        sampling: how it is to write.
        kept: the targets to keep.
        end_ids: the tokens that end a completion.
        max_model_len: tokens of the longest sequence.
        seed: of draws that are not seeded by the row.
        reads_with: the size of its vocabulary, if it is to read finished text.
        known_ids: how many token ids the tokenizer knows, where the output layer is padded with more: those are never written
            nor kept, and have no part in the distribution.
        vocab_size: of its output layer, where answers come from outside and are checked.
        template: what an endpoint's text is encoded by.
        shared: the file in which the workers of one dataset share an endpoint's limits and what was spent.
        staging: a directory for what the members of an ensemble say, where they are loaded one after the other.
        asked: where its requests ask for the log-probabilities of tokens of their own, how many at every token; else None. It
            then gives what it `said`, and no targets.
        beside_training: which model it is, where it stays in memory while the student trains (`teachers.resident`); else None.
    """

    teacher: Teacher
    sampling: Generate
    kept: Targets
    end_ids: Sequence[int]
    max_model_len: int
    seed: int = 0
    reads_with: int | None = None
    known_ids: int | None = None
    vocab_size: int | None = None
    template: ChatTemplate | None = None
    shared: Path | None = None
    staging: Path | None = None
    asked: int | None = None
    beside_training: Literal["teacher", "student"] | None = None


class Engine(Protocol):
    """A loaded teacher."""

    def __init__(self, spec: EngineSpec) -> None: ...

    tokens: int
    """Completion tokens that it has written or read so far, those of unfinished completions included where it knows them."""
    gives: dict[str, Any] | None = None
    """What a probe has found that an endpoint gives, for `dataset.json`."""

    def generate(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Continue every request; completions come in any order, each as soon as it is there."""
        ...

    def score(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Give every request's own completion back, with the teacher's distribution at each of its tokens."""
        ...

    def close(self) -> None:
        """Give its memory back; only the engines of an ensemble's members and of micro-rounds are asked for it."""
        ...

    def rest(self) -> None:
        """Until `wake`, leave the accelerator's memory to others where it can; the student's weights may go."""
        return

    def wake(self, weights: Iterable[tuple[str, Any]] | None = None) -> None:
        """Go on after `rest`, with other weights if some are given, by the names that they have in the checkpoint."""
        return


def longest_answer(teacher: Teacher, sampling: Generate) -> int:
    """The most tokens that an endpoint may write, and bill, for a request, its hidden reasoning included."""
    longest: int = teacher.request_args.get("max_completion_tokens") or sampling.max_tokens
    return longest


def most_billed(request: Request, teacher: Teacher, sampling: Generate) -> Usage:
    """The most tokens that an endpoint may bill for a request, as its prompt is encoded here: for given text, one behind it."""
    given = len(request.completion_ids)
    return Usage(len(request.prompt_ids) + given, 1 if given else longest_answer(teacher, sampling))


def check_engine(teacher: Teacher) -> None:
    """Refuse an engine that is not installed.

    Raises:
        InputError: naming what to install.
    """
    package = teacher.abilities.package
    if package and importlib.util.find_spec(package) is None:
        raise InputError(
            f"teacher.engine is {teacher.engine}, which is not installed: install the extra `{teacher.abilities.extra}`"
            + ("" if teacher.abilities.api else ", or use transformers")
        )


def all_fingerprints(experiment: Experiment) -> tuple[dict[str, str], dict[str, str]]:
    """What identifies each model of all teachers by its path or name, and each teacher as a whole by its own name.

    Raises:
        InputError: one of the models is not there.
    """
    models: dict[str, str] = {}
    wholes: dict[str, str] = {}
    for name, teacher in experiment.routed.items():
        found, wholes[name] = fingerprints(teacher, f"teachers.{name}" if name else "teacher")
        models |= found
    if experiment.teacher.abilities.api:  # its tokenizer is apart from it
        tokenizer, revision, key = experiment.tokenizer
        check_tokenizer_exists(tokenizer, key)
        models |= {tokenizer: model_fingerprint(tokenizer, revision)}
    return models, wholes


def fingerprints(teacher: Teacher, key: str = "teacher") -> tuple[dict[str, str], str]:
    """What identifies each model of the teacher by its path or name, and the teacher as a whole.

    Args:
        teacher: the models.
        key: where the teacher stands in the configuration, for the error.

    Raises:
        InputError: one of the models is not there.
    """
    if teacher.abilities.api:
        return _endpoint_fingerprints(teacher)
    check_model_exists(teacher.model, f"{key}.model")
    for number, more in enumerate(teacher.ensemble):
        check_model_exists(more.model, f"{key}.ensemble.{number}.model")
    members = [(teacher.model, teacher.revision, teacher.weight)]
    members += [(more.model, more.revision, more.weight) for more in teacher.ensemble]
    each = [model_fingerprint(model, revision) for model, revision, _ in members]
    found: dict[str, str] = {}
    for (model, revision, _), fingerprint in zip(members, each, strict=True):
        found[model if found.get(model, fingerprint) == fingerprint else f"{model}@{revision or 'main'}"] = fingerprint
    alone = not teacher.ensemble and teacher.system is None and not teacher.template_args
    whole = [[fingerprint, weight] for fingerprint, (_, _, weight) in zip(each, members, strict=True)]
    how = [teacher.system, teacher.template_args] if teacher.template_args else [teacher.system]
    return found, found[teacher.model] if alone else stable_id(whole, *how)


def _endpoint_fingerprints(teacher: Teacher) -> tuple[dict[str, str], str]:
    """By the names alone; where it is served, and how the requests are sent, may change between two tries."""
    found = f"{teacher.model}@{teacher.engine}"
    how = [teacher.system, teacher.template_args, teacher.request_args]
    return {teacher.model: found}, stable_id(found, *how) if any(how) else found


def teacher_precision(teacher: Teacher) -> Precision:
    """What a teacher computes in."""
    if teacher.abilities.remote:
        return Precision("auto", "what the server was started with")
    return model_precision(
        teacher.model, teacher.revision, teacher.dtype, teacher.trust_remote_code, "teacher.model", teacher.abilities.runtime
    )


def open_engine(spec: EngineSpec) -> Engine:
    """Load the teacher into the engine that the configuration names, or make ready to load its members in turn."""
    teacher = spec.teacher.model_copy(update={"dtype": teacher_precision(spec.teacher).dtype})
    engine: type[Engine] = pkgutil.resolve_name(_IN_TURN if teacher.in_turn else teacher.abilities.implementation)
    return engine(replace(spec, teacher=teacher))


def shared_file(directory: Path) -> Path:
    """Where the workers of the dataset in a directory share an endpoint's limits and what was spent."""
    return directory.parent / f".{directory.name}.endpoint"
