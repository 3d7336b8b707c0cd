"""Teachers: models that continue prompts or score finished text, and give their distribution at every token.

All engines take the same requests and return the same completions; `transformers` is the exact reference, `vllm` is fast,
`server` is a vLLM that runs elsewhere. They agree on the distribution for the same token ids within the precision of the
weights. `openai` and `anthropic` send conversations to an endpoint and store what it returns.
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
from llmdistill.errors import not_installed
from llmdistill.models.chat_template import ChatTemplate, Conversation
from llmdistill.models.loading import check_model_exists, check_tokenizer_exists, model_precision
from llmdistill.runs.inputs import model_fingerprint

_IN_TURN = "llmdistill.teachers.ensemble:EnsembleEngine"


@dataclass(frozen=True)
class Request:
    """A prompt to continue, or with `completion_ids` a text to score; `seed` alone determines its random numbers.

    `messages` is the prompt as a conversation, with `tools` if it offers any; engines that take token ids do not need them.
    `asked_NJ` are token ids for each token of the text whose log-probabilities are also requested.
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
    """The tokens that an endpoint bills; `cached` are those of the input that were in its cache."""

    input: int = 0
    output: int = 0
    cached: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.input + other.input, self.output + other.output, self.cached + other.cached)

    def cost(self, price: Price | None, batch: bool = False) -> float | None:
        """Cost, in the currency of the price."""
        if price is None:
            return None
        cached = price.input if price.cached_input is None else price.cached_input
        whole = price.input * (self.input - self.cached) + cached * self.cached + price.output * self.output
        return whole * (price.batch_share if batch else 1) / 1e6


@dataclass(frozen=True)
class Completion:
    """What the teacher generated or scored for the request of the same index, including its end token if it was emitted.

    `sampling_logprob` is the log-probability of having generated exactly this text, at the sampling temperature. `failed` is
    the reason why there is no completion. `trace` is the reasoning trace, if an endpoint returns it separately from the answer.
    `usage` is what an endpoint bills. For a member of an ensemble, and for the scoring of a sample that another model has
    drawn, `said` is what the targets are computed from.
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
    """Result of a member of an ensemble, or of scoring another model's sample, at N tokens.

    Attributes:
        ids_NK: the tokens that it kept.
        logprobs_NK: their log-probabilities.
        asked_NJ: the log-probabilities of the requested tokens.
    """

    ids_NK: Array
    logprobs_NK: Array
    asked_NJ: Array

    @classmethod
    def of(cls, ids_NK: Array, logprobs_NK: Array, kept: int) -> "Said":
        """Build from the kept tokens followed by the requested ones."""
        return cls(ids_NK[:, :kept], logprobs_NK[:, :kept], logprobs_NK[:, kept:])


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is created from.

    Attributes:
        teacher: the models and the engine.
        sampling: the sampling parameters.
        kept: the targets to keep.
        end_ids: the tokens that end a completion.
        max_model_len: length of the longest sequence in tokens.
        seed: seed of draws that are not seeded by the row.
        reads_with: size of its vocabulary if it is to score finished text.
        known_ids: number of token ids that the tokenizer knows, if the output layer is padded beyond them: the padding is never
            generated or kept, and has no part in the distribution.
        vocab_size: size of its output layer, if answers come from outside and are checked.
        template: the chat template that encodes an endpoint's text.
        shared: the file in which the workers of a dataset share an endpoint's limits and spending.
        staging: a directory for the results of the members of an ensemble that are loaded in turn.
        asked: if its requests ask for log-probabilities of given tokens, how many at every token; else None. The engine then
            returns `said` instead of targets.
        beside_training: name of the model if it stays in memory while the student trains (`teachers.resident`); else None.
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
    """Completion tokens generated or scored so far, including those of unfinished completions where known."""
    gives: dict[str, Any] | None = None
    """What a probe has found that an endpoint returns, for `dataset.json`."""

    def generate(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Continue every request; completions come in any order, each as soon as it is finished."""
        ...

    def score(self, batches: Iterable[Sequence[Request]]) -> Iterator[Completion]:
        """Score every request's own completion: return it with the teacher's distribution at each of its tokens."""
        ...

    def close(self) -> None:
        """Release its memory; called only for ensemble members and micro-rounds."""
        ...

    def rest(self) -> None:
        """Until `wake`, release the accelerator's memory where possible; the student's weights may be dropped."""
        return

    def wake(self, weights: Iterable[tuple[str, Any]] | None = None) -> None:
        """Continue after `rest`, with new weights if given, by their names in the checkpoint."""
        return


def longest_answer(teacher: Teacher, sampling: Generate) -> int:
    """Maximum number of tokens that an endpoint may generate and bill for a request, including hidden reasoning."""
    longest: int = teacher.request_args.get("max_completion_tokens") or sampling.max_tokens
    return longest


def most_billed(request: Request, teacher: Teacher, sampling: Generate) -> Usage:
    """Maximum number of tokens billed for a request, as its prompt is encoded here; for given text, plus one."""
    given = len(request.completion_ids)
    return Usage(len(request.prompt_ids) + given, 1 if given else longest_answer(teacher, sampling))


def check_engine(teacher: Teacher) -> None:
    """Refuse an engine that is not installed.

    Raises:
        InputError: names what to install.
    """
    package = teacher.abilities.package
    if package and importlib.util.find_spec(package) is None:
        instead = None if teacher.abilities.api else "set it to transformers"
        raise not_installed(f"teacher.engine {teacher.engine}", package, teacher.abilities.extra, instead=instead)


def all_fingerprints(experiment: Experiment) -> tuple[dict[str, str], dict[str, str]]:
    """Identify each model of all teachers by its path or name, and each teacher as a whole by its own name.

    Raises:
        InputError: if one of the models is missing.
    """
    models: dict[str, str] = {}
    wholes: dict[str, str] = {}
    for name, teacher in experiment.routed.items():
        found, wholes[name] = fingerprints(teacher, f"teachers.{name}" if name else "teacher")
        models |= found
    if experiment.teacher.abilities.api:  # its tokenizer is separate
        tokenizer, revision, key = experiment.tokenizer
        check_tokenizer_exists(tokenizer, key)
        models |= {tokenizer: model_fingerprint(tokenizer, revision)}
    return models, wholes


def fingerprints(teacher: Teacher, key: str = "teacher") -> tuple[dict[str, str], str]:
    """Identify each model of the teacher by its path or name, and the teacher as a whole.

    Args:
        teacher: the models.
        key: key of the teacher in the configuration, for the error.

    Raises:
        InputError: if one of the models is missing.
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
    """Identify by names only; where the model is served, and how requests are sent, may change between attempts."""
    found = f"{teacher.model}@{teacher.engine}"
    how = [teacher.system, teacher.template_args, teacher.request_args]
    return {teacher.model: found}, stable_id(found, *how) if any(how) else found


def teacher_precision(teacher: Teacher) -> Precision:
    """The precision in which a teacher computes."""
    if teacher.abilities.remote:
        return Precision("auto", "as the server was started")
    return model_precision(
        teacher.model, teacher.revision, teacher.dtype, teacher.trust_remote_code, "teacher.model", teacher.abilities.runtime
    )


def open_engine(spec: EngineSpec) -> Engine:
    """Load the teacher into the configured engine, or prepare to load its members in turn."""
    teacher = spec.teacher.model_copy(update={"dtype": teacher_precision(spec.teacher).dtype})
    engine: type[Engine] = pkgutil.resolve_name(_IN_TURN if teacher.in_turn else teacher.abilities.implementation)
    return engine(replace(spec, teacher=teacher))


def shared_file(directory: Path) -> Path:
    """The file in which the workers of the dataset in a directory share an endpoint's limits and spending."""
    return directory.parent / f".{directory.name}.endpoint"
