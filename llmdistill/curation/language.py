"""The step of `curate` that detects the language of an answer, with lingua."""

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from llmdistill.config.curate import Language
from llmdistill.curation.steps import Check, CurationStep, StepContext, final_answers, questions
from llmdistill.errors import InputError

_ENOUGH = 80  # characters of a part
_TELLING = 120  # letters from which lingua looks at trigrams alone, and is sure
_NO_PROSE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|https?://\S+", re.DOTALL)


def language(settings: Language, context: StepContext) -> Check:
    """By the most likely language of the prose; a language that the prompt names is also accepted."""
    import lingua

    codes = {language.iso_code_639_1.name.lower() for language in lingua.Language.all()}
    unknown = [code for code in settings.keep if code not in codes]
    if unknown:
        raise InputError(
            f"{context.key}.keep: {unknown[0]} is not a language that lingua knows; it knows {', '.join(sorted(codes))}"
        )
    # This mode only uses trigrams: for texts of this length the result is the same, in 70 MB instead of 900.
    detector = lingua.LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()

    def check(rows: pa.Table) -> Iterator[str | None]:
        texts = [_NO_PROSE.sub(" ", answer) for answer in final_answers(rows, context.experiment)]
        found = detector.detect_languages_in_parallel_of([_excerpt(text) for text in texts])
        # What a part of the text does not tell, all of it has to.
        unsure = [n for n, language in enumerate(found) if language is None or _code(language) not in settings.keep]
        for n, language in zip(unsure, detector.detect_languages_in_parallel_of([texts[n] for n in unsure]), strict=True):
            found[n] = language
        for text, language, question in zip(texts, found, questions(rows), strict=True):
            if language is None or sum(map(str.isalpha, text)) < _TELLING or language.name.lower() in question.lower():
                yield None
                continue
            code = _code(language)
            yield None if code in settings.keep else code

    return check


def _code(language: Any) -> str:
    return str(language.iso_code_639_1.name.lower())


def _excerpt(text: str) -> str:
    """The beginning and middle of a long text, which may be in different languages."""
    half = len(text) // 2
    return text if len(text) <= 2 * _ENOUGH else f"{text[:_ENOUGH]} {text[half : half + _ENOUGH]}"


STEP = CurationStep(language, libraries={"lingua": "curate"})
