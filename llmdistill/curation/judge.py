"""The step of `curate` that lets a teacher score every answer by a rubric.

The judge writes nothing: its score is the mean of its distribution over the digits of the scale at the first token, so it
is one number for a row whatever was drawn, and costs one prefill. Scores are kept in `OUTPUT/judge`; who curates again,
after an interruption or with another `min_score`, does not pay for them twice.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmdistill.config import Experiment, Generate, Targets, Teacher
from llmdistill.config.curate import Judge
from llmdistill.curation.steps import Check, CurationStep, Failed, StepContext, final_answers
from llmdistill.data.ids import stable_id
from llmdistill.data.rows import Messages
from llmdistill.data.targets import TopK
from llmdistill.errors import InputError, UnusableError
from llmdistill.prompting.template import PromptTemplate
from llmdistill.runs.files import write_parquet
from llmdistill.runs.inputs import file_input
from llmdistill.runs.progress import working
from llmdistill.teachers import Completion, Engine, EngineSpec, Request, fingerprints, open_engine
from llmdistill.teachers.prompt_encoding import PromptEncoder

_VARIABLES = ("prompt", "answer")  # of the rubric
_K = 64  # of the judge's most likely first tokens; the digits are among them, or it has not answered
_CONTEXT = 8192  # tokens reserved for a question if teacher.max_model_len does not say
_SCHEMA = pa.schema({"question": pa.string(), "id": pa.string(), "score": pa.float64(), "mass": pa.float64()})
Score = tuple[float, float]  # the mean digit, and the probability of all digits together


def inputs(settings: Judge, key: str) -> dict[str, str]:
    """The rubric, and the judge's models.

    Raises:
        InputError: one is missing, or the rubric cannot be used.
    """
    read_template(settings.template, _VARIABLES, f"{key}.template")
    return {
        **file_input(settings.template, f"{key}.template"),
        **fingerprints(settings.teacher, f"{key}.teacher")[0],
    }


def judge(settings: Judge, context: StepContext) -> Check:
    """By the judge's mean score."""
    scores = scores_of(settings, context, context.key)

    def check(rows: pa.Table) -> Iterator[str | None]:
        for score in scores(rows):
            if isinstance(score, Failed):
                yield score
            else:
                yield None if score >= settings.min_score else f"score {score:.2f}"

    return check


def scores_of(settings: Judge, context: StepContext, key: str) -> Callable[[pa.Table], Iterator[float | Failed]]:
    """Computes the judge's mean score of every row.

    Args:
        settings: the judge.
        context: of the step.
        key: where the judge stands in the configuration, for errors.

    Raises:
        InputError: there is no such judge, or it cannot be asked with this template.
    """
    try:
        asked = _Asked(settings, context.experiment, key)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None

    def scores(rows: pa.Table) -> Iterator[float | Failed]:
        for score in asked.scores(rows):
            if isinstance(score, Failed):
                yield score
            elif score[1] < settings.min_mass:
                yield Failed(f"the judge assigns the digits a probability of {score[1]:.2f}")
            else:
                yield score[0]

    return scores


class DigitReader:
    """Asks a teacher for one digit of a scale, and reads its distribution over them at the first token.

    Raises:
        InputError: there is no such teacher, or a digit is no token of it.
    """

    def __init__(self, experiment: Experiment, teacher: Teacher, scale: list[int]) -> None:
        if teacher.in_turn:
            raise InputError(f"a judge that is an ensemble needs engine transformers, not {teacher.engine}")
        _, self.fingerprint = fingerprints(teacher)
        if teacher.abilities.api and teacher.tokenizer is None:
            raise InputError(f"teacher.tokenizer is missing: {teacher.model} judges by the log-probabilities of digits")
        self.kept = Targets(kind="topk", k=_K)
        self.chat = PromptEncoder(experiment.model_copy(update={"teacher": teacher, "targets": self.kept}), self.fingerprint)
        self.digits = digit_ids(self.chat.tokenizer, scale)
        self.context = teacher.max_model_len or min(self.chat.context or _CONTEXT, _CONTEXT)
        self._engine: Engine | None = None

    def read(self, questions: Sequence[tuple[Messages, str]]) -> Iterator[tuple[int, Completion | Failed]]:
        """The index of every question, with the first token of the answer or why there is none, in any order.

        Args:
            questions: each with where it comes from, for errors.
        """
        requests = []
        for place, (question, origin) in enumerate(questions):
            try:
                tokens = self.chat.told_ids(question, origin)
            except UnusableError as error:
                yield place, Failed(f"the judge cannot be asked: {error.reason}")
                continue
            if len(tokens) < self.context:
                requests.append(Request(place, tokens, 0, messages=self.chat.told(question)))
            else:
                yield place, Failed(f"{len(tokens):,} tokens are too long for the judge")
        for done in self._ask(requests) if requests else ():
            yield done.index, Failed(f"the judge gave no answer: {done.failed}") if done.failed else done

    def _ask(self, requests: list[Request]) -> Iterable[Completion]:
        if self._engine is None:
            teacher, end_ids, seed = self.chat.experiment.teacher, self.chat.end_ids, self.chat.experiment.seed
            with working("judge", "starting the judge"):
                sampling = Generate(temperature=0, max_tokens=1)
                self._engine = open_engine(
                    EngineSpec(
                        teacher,
                        sampling,
                        self.kept,
                        end_ids,
                        self.context,
                        seed,
                        known_ids=self.chat.known_ids,
                        template=self.chat.template,
                    )
                )
        return self._engine.generate([requests])

    def probabilities(self, completion: Completion) -> dict[int, float]:
        """For each digit, the total over its tokens."""
        assert isinstance(completion.targets, TopK)
        found = dict.fromkeys(sorted(set(self.digits.values())), 0.0)
        p = np.exp(completion.targets.logprobs_NK[0].astype(np.float64))
        for token, value in zip(completion.targets.ids_NK[0].tolist(), p.tolist(), strict=True):
            if token in self.digits:
                found[self.digits[token]] += value
        return found


class _Asked:
    """Asks the judge only what it has not been asked before."""

    def __init__(self, settings: Judge, experiment: Experiment, key: str) -> None:
        teacher = settings.teacher
        self.template = read_template(settings.template, _VARIABLES, f"{key}.template")
        self.experiment = experiment
        self.reader = DigitReader(experiment, teacher, settings.scale)
        self.directory = experiment.directory("judge") / stable_id(
            self.reader.fingerprint, teacher.engine, teacher.dtype, settings.scale
        )
        self.known: dict[str, Score] = {}
        for file in sorted(self.directory.glob("*.parquet")):
            found = pq.read_table(file).to_pydict()
            self.known |= dict(zip(found["question"], zip(found["score"], found["mass"], strict=True), strict=True))

    def scores(self, rows: pa.Table) -> Iterator[Score | Failed]:
        """The score of every row."""
        ids = rows["id"].to_pylist()
        questions = [
            self.template.render({"prompt": as_text(prompt), "answer": answer}, f"row {identity}")
            for identity, prompt, answer in zip(
                ids, rows["prompt"].to_pylist(), final_answers(rows, self.experiment), strict=True
            )
        ]
        keys = [stable_id(question) for question in questions]
        new = [*{key: number for number, key in enumerate(keys) if key not in self.known}.items()]
        failed: dict[str, Failed] = {}
        scored: dict[str, tuple[str, Score]] = {}
        for place, found in self.reader.read([(questions[number], f"row {ids[number]}") for _, number in new]):
            key, number = new[place]
            if isinstance(found, Failed):
                failed[key] = found
            else:
                scored[key] = ids[number], self._score(found)
        if scored:
            self._store(scored)
        for key in keys:
            yield failed[key] if key in failed else self.known[key]

    def _score(self, completion: Completion) -> Score:
        p = self.reader.probabilities(completion)
        mass = sum(p.values())
        return (sum(digit * value for digit, value in p.items()) / mass if mass else 0.0), mass

    def _store(self, found: dict[str, tuple[str, Score]]) -> None:
        """Write the scores of a group to disk as one file."""
        self.known |= {key: score for key, (_, score) in found.items()}
        rows = [{"question": key, "id": row, "score": score, "mass": mass} for key, (row, (score, mass)) in sorted(found.items())]
        self.directory.mkdir(parents=True, exist_ok=True)
        write_parquet(self.directory / f"{stable_id(sorted(found))}.parquet", pa.Table.from_pylist(rows, _SCHEMA))


def read_template(file: str, variables: Sequence[str], key: str) -> PromptTemplate:
    """The judge's template, named by the key.

    Raises:
        InputError: it is missing, cannot be used, or needs other fields than a judge's gets.
    """
    template = PromptTemplate(Path(file), key)
    unknown = [name for name in template.head.variables if name not in variables]
    if unknown:
        gets = f"{', '.join(variables[:-1])} and {variables[-1]}"
        raise InputError(f"{file}: needs the field {unknown[0]}, a judge's template gets {gets}")
    return template


def as_text(prompt: Messages) -> str:
    """A conversation as one text: only the request, or each turn with its role."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def digit_ids(tokenizer: Any, scale: list[int]) -> dict[int, int]:
    """The tokens that are a digit of the scale, with or without a space before it, and which digit.

    Raises:
        InputError: there is a digit without a token.
    """
    wanted = {str(digit): digit for digit in range(scale[0], scale[1] + 1)}
    tokens = (
        number for token, number in tokenizer.get_vocab().items() if len(token) <= 4 and any(letter in wanted for letter in token)
    )
    texts = {number: tokenizer.decode([number]).strip() for number in tokens}
    found = {number: wanted[text] for number, text in texts.items() if text in wanted}
    missing = sorted(set(wanted.values()) - set(found.values()))
    if missing:
        raise InputError(f"scale: {missing[0]} is not a single token of the judge")
    return found


STEP = CurationStep(judge, inputs)
