"""The list `curate` of the experiment: one section per step."""

from typing import Literal

import regex
from pydantic import Field, field_validator, model_validator

from llmdistill.config.section import Section, Step
from llmdistill.config.teacher import Teacher

Of = Literal["completion", "conversation"]


def _compiles(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from None
    return pattern


class FinishReason(Section):
    """Keep rows whose completion ended for one of these reasons."""

    keep: list[str] = ["stop"]
    """`stop`: the teacher emitted its end token; `length`: cut off at `max_tokens`."""


class Length(Section):
    """Keep rows whose completion length is in this range."""

    min_tokens: int = Field(default=1, ge=0)
    """Minimum number of completion tokens."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Maximum number of completion tokens."""


class Language(Section):
    """Keep rows whose answer is in one of these languages, detected by lingua."""

    keep: list[str] = Field(min_length=1)
    """ISO 639-1 codes: `[en, de]`. Answers in a language named in the prompt, and answers under 120 letters, are also kept."""

    @field_validator("keep")
    @classmethod
    def _are_codes(cls, keep: list[str]) -> list[str]:
        for code in keep:
            if not regex.fullmatch("[a-z]{2}", code):
                raise ValueError(f"{code!r} is not an ISO 639-1 code of two lowercase letters: en, de, …")
        return keep


class Repetition(Section):
    """Reject rows with repeated text."""

    ngram: int = Field(default=4, ge=1)
    """Length of the token n-grams."""
    max_share: float = Field(default=0.5, ge=0, le=1)
    """Maximum share of n-grams that repeat an earlier one."""
    max_line_share: float = Field(default=0.5, ge=0, le=1)
    """Maximum share of the text in lines that repeat an earlier line, ignoring line numbers and bullets."""


class Refusals(Section):
    """Reject refusals, and answers in which the model mentions its name, its maker or that it is a model (English only)."""

    patterns: list[str] = []
    """Further regular expressions, searched for in the whole answer, ignoring case."""

    _patterns_compile = field_validator("patterns")(lambda patterns: [_compiles(pattern) for pattern in patterns])


class Malformed(Section):
    """Reject answers that are empty, contain special tokens or role markers, or leave a code fence or <think> open."""


class Math(Section):
    """Keep rows whose final answer equals the expected one, compared by math-verify."""

    answer: str = "answer"
    """Metadata field with the expected answer."""
    without: Literal["fail", "keep"] = "fail"
    """What to do with rows that lack the field."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Time limit per row in seconds; a row that exceeds it has failed."""


class Python(Section):
    """Keep rows whose Python code parses. The code is never run."""

    unfenced: Literal["keep", "parse"] = "keep"
    """What to do with an answer without a fenced Python block: `keep` it, or `parse` the whole answer."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Time limit per row in seconds; a row that exceeds it has failed."""


class JsonSchema(Section):
    """Keep rows whose answer, or the one fenced block in it, is JSON that matches a schema."""

    file: str
    """Path of the JSON schema."""


class Task(Section):
    """Keep rows with valid answers for one of your own tasks: JSON of its schema, a label, a query that runs, a valid call."""

    file: str
    """YAML file of the task."""


class Regex(Section):
    """Keep rows by a regular expression."""

    pattern: str
    """Searched for in the whole answer; `^` and `$` match its start and end, `(?s)` lets `.` match newlines."""
    keep: Literal["matching", "others"] = "matching"
    """Whether to keep the rows that match, or the others."""

    _pattern_compiles = field_validator("pattern")(_compiles)


class Judge(Section):
    """Keep rows that a judge scores highly: the score is the mean of its distribution over the digits of the scale."""

    teacher: Teacher
    """The judge model."""
    template: str = "prompts/judge.yaml"
    """Template with the rubric; it has the variables `prompt` and `answer` and asks for one digit."""
    scale: list[int] = Field(default=[1, 5], min_length=2, max_length=2)
    """Lowest and highest digit."""
    min_score: float = 3.0
    """Minimum score to keep a row."""
    min_mass: float = Field(default=0.5, gt=0, le=1)
    """Minimum total probability that the judge must assign to the digits of the scale; below it, the row fails."""

    @model_validator(mode="after")
    def _is_a_scale(self) -> "Judge":
        low, high = self.scale
        if not 0 <= low < high <= 9:
            raise ValueError(f"scale is {low} to {high}, but must be two digits, the lower first")
        if not low <= self.min_score <= high:
            raise ValueError(f"min_score is {self.min_score:g}, outside the scale of {low} to {high}")
        return self


class BestOf(Section):
    """Keep the best answers to each prompt. The others can be used for preference training."""

    keep: int = Field(default=1, ge=1)
    """Number of answers to keep per prompt."""
    judge: Judge | None = None
    """Judge that scores the answers. Without it, the score is the teacher's mean log-probability of the answer's tokens."""


class Duplicates(Section):
    """Keep the first of several rows with the same text, ignoring case and white space."""

    of: Of = "completion"
    """Text to compare: the `completion`, or the `conversation`, which is prompt and completion together."""


class NearDuplicates(Section):
    """Keep the first of several rows whose texts share most word n-grams (MinHash candidates, exact Jaccard similarity)."""

    threshold: float = Field(default=0.8, ge=0.3, le=1)
    """Minimum Jaccard similarity of near-duplicates."""
    ngram: int = Field(default=3, ge=1)
    """Words per n-gram."""
    of: Of = "completion"
    """Text to compare: the `completion`, or the `conversation`, which is prompt and completion together."""
    boilerplate: float = Field(default=0.05, gt=0, le=1)
    """Ignore n-grams that occur in more than this share of the rows, and in more than ten rows."""
    max_cluster: int = Field(default=100, ge=1)
    """Maximum number of rows that one kept row may reject; further ones are kept and counted."""


class Contamination(Section):
    """Reject rows that share a word n-gram with test data."""

    against: list[str] = Field(min_length=1)
    """JSON, JSONL, YAML or text files. Every string in them is searched for."""
    fields: list[str] | None = Field(default=None, min_length=1)
    """Search only for the strings in these fields of the rows, such as `[input]` for a task's examples, whose outputs may be
    common."""
    ngram: int = Field(default=13, ge=2)
    """Words per n-gram. Shorter strings are searched for as a whole; those under eight words must be the whole prompt. A prompt
    that equals one of the strings, ignoring case and punctuation, is always found."""


PersonalKind = Literal["email", "phone", "credit_card", "iban", "ip_address", "us_ssn"]


class PersonalData(Section):
    """Reject rows with personal data, detected by the patterns of presidio."""

    kinds: list[PersonalKind] = ["email", "phone", "credit_card", "iban", "us_ssn"]
    """Types of data to search for. Addresses and numbers reserved for examples are ignored."""


class Balance(Section):
    """Limit the number of rows per value of a metadata field."""

    by: str = "topic"
    """Metadata field; rows without it form one group."""
    max_rows: int = Field(ge=1)
    """Maximum number of rows per value."""


class CurateStep(Step):
    """One step of the `curate` list; exactly one key."""

    finish_reason: FinishReason | None = None
    """Filter by finish reason."""
    length: Length | None = None
    """Filter by completion length."""
    language: Language | None = None
    """Filter by language."""
    repetition: Repetition | None = None
    """Reject repeated text."""
    refusals: Refusals | None = None
    """Reject refusals."""
    malformed: Malformed | None = None
    """Reject malformed answers."""
    math: Math | None = None
    """Check the final answer."""
    python: Python | None = None
    """Check that Python code parses."""
    json_schema: JsonSchema | None = None
    """Check against a JSON schema."""
    task: Task | None = None
    """Check against one of your own tasks."""
    regex: Regex | None = None
    """Filter by regular expression."""
    judge: Judge | None = None
    """Filter by a judge's score."""
    best_of: BestOf | None = None
    """Keep the best answers to each prompt."""
    duplicates: Duplicates | None = None
    """Remove exact duplicates."""
    near_duplicates: NearDuplicates | None = None
    """Remove near-duplicates."""
    contamination: Contamination | None = None
    """Remove overlap with test data."""
    personal_data: PersonalData | None = None
    """Reject personal data."""
    balance: Balance | None = None
    """Limit rows per metadata value."""
