"""The `curate` list of the experiment: a section a step."""

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
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


class FinishReason(Section):
    """Keep rows that ended for one of these reasons."""

    keep: list[str] = ["stop"]
    """`stop`: the teacher ended by itself; `length`: it was cut at `max_tokens`."""


class Length(Section):
    """Keep rows whose completion has a length in this range."""

    min_tokens: int = Field(default=1, ge=0)
    """Fewest completion tokens."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most completion tokens."""


class Language(Section):
    """Keep rows whose answer is in one of these languages, told by lingua from its prose."""

    keep: list[str] = Field(min_length=1)
    """ISO 639-1 codes: `[en, de]`. A language that the prompt names stays too, and less than 120 letters, which tell little."""


class Repetition(Section):
    """Keep rows that do not repeat themselves."""

    ngram: int = Field(default=4, ge=1)
    """Length of the token n-grams compared."""
    max_share: float = Field(default=0.5, ge=0, le=1)
    """Largest share of n-grams that may be repeats of an earlier one."""
    max_line_share: float = Field(default=0.5, ge=0, le=1)
    """Largest share of the text that may stand in lines that were there before; their numbers and bullets do not count."""


class Refusals(Section):
    """Reject answers that refuse, or in which the model speaks of itself by name, by maker or as a model (English)."""

    patterns: list[str] = []
    """Further regular expressions, looked for anywhere in the answer in whatever case."""

    _patterns_compile = field_validator("patterns")(lambda patterns: [_compiles(pattern) for pattern in patterns])


class Malformed(Section):
    """Reject answers that are empty, hold special tokens or role markers, or leave a code fence or <think> open."""


class Math(Section):
    """Keep rows whose final answer equals the expected one, told by math-verify."""

    answer: str = "answer"
    """The field of the row's metadata that holds it."""
    without: Literal["fail", "keep"] = "fail"
    """What becomes of rows that have no such field."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds for one row, after which it has failed."""


class Python(Section):
    """Keep rows whose Python code parses; it is never run."""

    unfenced: Literal["keep", "parse"] = "keep"
    """An answer without a fenced block of Python: `keep` it, or `parse` it as a whole."""
    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds for one row, after which it has failed."""


class JsonSchema(Section):
    """Keep rows whose answer, or the one fenced block in it, is JSON of this schema."""

    file: str
    """The JSON schema."""


class Regex(Section):
    """Keep rows by a regular expression."""

    pattern: str
    """Looked for anywhere in the answer; `^` and `$` are its ends, `(?s)` lets `.` match a line's end."""
    keep: Literal["matching", "others"] = "matching"
    """The rows that stay."""

    _pattern_compiles = field_validator("pattern")(_compiles)


class Judge(Section):
    """Keep rows that a teacher scores high: the mean of its distribution over the digits of the scale."""

    teacher: Teacher
    """The judge."""
    template: str = "prompts/judge.yaml"
    """Its rubric: a template with the variables `prompt` and `answer` that asks for one digit."""
    scale: list[int] = Field(default=[1, 5], min_length=2, max_length=2)
    """The lowest and the highest digit."""
    min_score: float = 3.0
    """Lowest mean score that stays."""
    min_mass: float = Field(default=0.5, gt=0, le=1)
    """Least probability that the judge gives the digits of the scale together; with less, the row has failed."""

    @model_validator(mode="after")
    def _is_a_scale(self) -> "Judge":
        low, high = self.scale
        if not 0 <= low < high <= 9:
            raise ValueError(f"scale is {low} to {high}, it must be two digits, the lower first")
        if not low <= self.min_score <= high:
            raise ValueError(f"min_score is {self.min_score:g}, outside the scale of {low} to {high}")
        return self


class BestOf(Section):
    """Keep the best of the answers to a prompt; the others are losers, for preference training."""

    keep: int = Field(default=1, ge=1)
    """How many of a prompt's answers stay."""
    judge: Judge | None = None
    """Who scores them; without one it is the teacher itself, by the mean log-probability of the answer's tokens."""


class Duplicates(Section):
    """Keep the first of rows that have the same text after lower-casing and joining white space."""

    of: Of = "completion"
    """What is compared: the `completion`, or the `conversation`, prompt and completion together."""


class NearDuplicates(Section):
    """Keep the first of rows whose texts share most of their word n-grams (MinHash, then the true Jaccard similarity)."""

    threshold: float = Field(default=0.8, ge=0.3, le=1)
    """Least Jaccard similarity of two near-duplicates."""
    ngram: int = Field(default=3, ge=1)
    """Words in an n-gram."""
    of: Of = "completion"
    """What is compared: the `completion`, or the `conversation`, prompt and completion together."""
    boilerplate: float = Field(default=0.05, gt=0, le=1)
    """n-grams that stand in more than this share of the rows, and in more than ten, do not count: they are a template's."""
    max_cluster: int = Field(default=100, ge=1)
    """Most rows that one kept row may reject; those beyond stay, and are counted."""


class Contamination(Section):
    """Reject rows that share an n-gram of words with what the student will be tested on."""

    against: list[str] = Field(min_length=1)
    """JSON, JSONL, YAML or text files; every string in them is looked for."""
    ngram: int = Field(default=13, ge=2)
    """Words in an n-gram. A shorter string is looked for as a whole; with fewer than eight words, as a whole prompt."""


PersonalKind = Literal["email", "phone", "credit_card", "iban", "ip_address", "us_ssn"]


class PersonalData(Section):
    """Reject rows that hold what looks like personal data, told by the patterns of presidio."""

    kinds: list[PersonalKind] = ["email", "phone", "credit_card", "iban", "us_ssn"]
    """What is looked for. Addresses and numbers that are reserved for examples do not count."""


class Balance(Section):
    """Keep the first rows of each value of a field."""

    by: str = "topic"
    """The field of the row's metadata; rows without it are a value of their own."""
    max_rows: int = Field(ge=1)
    """Most rows of one value."""


class CurateStep(Step):
    """One step of the `curate` list; exactly one key."""

    finish_reason: FinishReason | None = None
    """By the reason for which a completion ended."""
    length: Length | None = None
    """By the length of the completion."""
    language: Language | None = None
    """By its language."""
    repetition: Repetition | None = None
    """By repeated n-grams and lines."""
    refusals: Refusals | None = None
    """By what a model says of itself and will not do."""
    malformed: Malformed | None = None
    """By the marks of a broken chat."""
    math: Math | None = None
    """By an expected answer."""
    python: Python | None = None
    """By code that parses."""
    json_schema: JsonSchema | None = None
    """By a JSON schema."""
    regex: Regex | None = None
    """By a regular expression."""
    judge: Judge | None = None
    """By a teacher's score."""
    best_of: BestOf | None = None
    """By rank among the answers to a prompt."""
    duplicates: Duplicates | None = None
    """By equal texts."""
    near_duplicates: NearDuplicates | None = None
    """By similar texts."""
    contamination: Contamination | None = None
    """By the texts of tests."""
    personal_data: PersonalData | None = None
    """By personal data."""
    balance: Balance | None = None
    """By how many there are of a kind."""
