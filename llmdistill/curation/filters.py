"""Steps of `curate` that look at one row at a time, and how many of its kind there were before."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex

from llmdistill.config.curate import Balance, FinishReason, JsonSchema, Language, Length, Regex, Repetition
from llmdistill.curation.steps import Array, Check, Failed, Work, answers, completion_ids, excerpt, metadata, questions
from llmdistill.errors import InputError
from llmdistill.runs.record import read_json

_TELLING = 120  # letters from which lingua looks at trigrams alone, and is sure
_SECONDS = 1.0  # for one regular expression on one row
_NO_PROSE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|https?://\S+", re.DOTALL)
_LIST_MARKER = re.compile(r"^\s*(?:[-*+•#>|]+|\(?\d+[.):])\s+")
_FENCED = re.compile(r"^(```+|~~~+)[^\n]*\n(.*?)^\1[`~]*\s*$", re.DOTALL | re.MULTILINE)


def finish_reason(settings: FinishReason, work: Work) -> Check:
    """By the reason for which a completion ended."""
    return lambda rows: (None if reason in settings.keep else str(reason) for reason in rows["finish_reason"].to_pylist())


def length(settings: Length, work: Work) -> Check:
    """By the number of completion tokens."""
    longest = settings.max_tokens or np.inf

    def check(rows: pa.Table) -> Iterator[str | None]:
        tokens = pc.subtract(pc.list_value_length(rows["input_ids"]), rows["completion_start"])
        for count in tokens.to_pylist():
            yield None if settings.min_tokens <= count <= longest else f"{count:,} tokens"

    return check


def language(settings: Language, work: Work) -> Check:
    """By the most likely language of the prose; one that the prompt asks for by name is right too."""
    import lingua

    codes = {language.iso_code_639_1.name.lower() for language in lingua.Language.all()}
    unknown = [code for code in settings.keep if code not in codes]
    if unknown:
        raise InputError(f"{work.key}.keep: {unknown[0]} is no language that lingua knows, which are {', '.join(sorted(codes))}")
    # In this mode only trigrams are read: for texts of this length it tells the same, in 70 MB instead of 900.
    detector = lingua.LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()

    def check(rows: pa.Table) -> Iterator[str | None]:
        texts = [_NO_PROSE.sub(" ", answer) for answer in answers(rows)]
        found = detector.detect_languages_in_parallel_of(texts)
        for text, language, question in zip(texts, found, questions(rows), strict=True):
            if language is None or sum(map(str.isalpha, text)) < _TELLING or language.name.lower() in question.lower():
                yield None
                continue
            code = language.iso_code_639_1.name.lower()
            yield None if code in settings.keep else code

    return check


def repetition(settings: Repetition, work: Work) -> Check:
    """By token n-grams and lines that stood earlier in the completion."""

    def check(rows: pa.Table) -> Iterator[str | None]:
        for ids, answer in zip(completion_ids(rows), answers(rows), strict=True):
            ngrams, lines = repeated_share(ids, settings.ngram), repeated_line_share(answer)
            if ngrams > settings.max_share:
                yield f"{ngrams:.0%} of its {settings.ngram}-grams are repeats"
            elif lines > settings.max_line_share:
                yield f"{lines:.0%} of it in repeated lines"
            else:
                yield None

    return check


def repeated_share(ids: Array, ngram: int) -> float:
    """The share of n-grams that stood earlier in the sequence; 0 if there are none."""
    if len(ids) < ngram:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(ids, ngram)
    return 1 - len(np.unique(windows, axis=0)) / len(windows)


def repeated_line_share(text: str) -> float:
    """The share of a text's characters in lines that stood earlier, up to case, spaces, bullets and numbers."""
    seen: set[str] = set()
    repeated = total = 0
    for line in text.splitlines():
        plain = " ".join(_LIST_MARKER.sub("", line).casefold().split())
        total += len(plain)
        repeated += len(plain) if plain in seen else 0
        seen.add(plain)
    return repeated / total if total else 0.0


def by_regex(settings: Regex, work: Work) -> Check:
    """By whether a regular expression is found in the answer; one that takes too long has failed."""
    pattern = regex.compile(settings.pattern)

    def check(rows: pa.Table) -> Iterator[str | None]:
        for answer in answers(rows):
            try:
                match = pattern.search(answer, timeout=_SECONDS)
            except TimeoutError:
                yield Failed(f"took more than {_SECONDS:g} s")
                continue
            if settings.keep == "matching":
                yield None if match else "no match"
            else:
                yield excerpt(match[0]) or "matches" if match else None

    return check


def json_schema(settings: JsonSchema, work: Work) -> Check:
    """By a JSON schema; nothing that the schema refers to is fetched."""
    import jsonschema
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    schema = read_json(Path(settings.file))
    if schema is None:
        raise InputError(f"{settings.file}: no such file ({work.key}.file)")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"{settings.file}: no JSON schema: {error.message}") from None
    validator = kind(schema, registry=Registry())

    def check(rows: pa.Table) -> Iterator[str | None]:
        for answer in answers(rows):
            try:
                error = next(validator.iter_errors(_read_json(answer)), None)
            except (ValueError, RecursionError) as problem:
                yield f"no JSON: {problem}"
                continue
            except Unresolvable as problem:
                raise InputError(f"{settings.file}: refers to {problem.ref}, which is not in it; nothing is fetched") from None
            yield excerpt(f"{error.json_path}: {error.message}", 200) if error else None

    return check


def _read_json(answer: str) -> Any:
    """The answer as JSON, or the content of its one fenced block."""
    blocks = _FENCED.findall(answer)
    return json.loads(blocks[0][1] if len(blocks) == 1 else answer, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def balance(settings: Balance, work: Work) -> Check:
    """By how many rows with the same value there were before."""
    seen: Counter[str] = Counter()

    def check(rows: pa.Table) -> Iterator[str | None]:
        for fields in metadata(rows):
            value = json.dumps(fields.get(settings.by), sort_keys=True, ensure_ascii=False)
            if seen[value] < settings.max_rows:
                seen[value] += 1
                yield None
            else:
                yield f"{settings.by} is {excerpt(value)}, of which there are {settings.max_rows:,}"

    return check
