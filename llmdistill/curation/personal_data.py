"""The step of `curate` that rejects rows with personal data, by the patterns and checksums of presidio.

Its recognisers of names and places need language models of spaCy; they are not used. Nor is the network.
"""

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from llmdistill.config.curate import PersonalData
from llmdistill.curation.steps import Check, CurationStep, StepContext, whole_texts

_SURE = 0.4  # presidio's score from which a match counts; bare digits in the form of a social security number have 0.05
_NUMBER_BEFORE = re.compile(r"\d[.,]?\Z")
_VERSION_BEFORE = re.compile(r"(?:\b(?:v|version|release|section|chapter)\.?|§)\s*\Z", re.IGNORECASE)
_LOOK_BACK = 40  # characters
_PHONE_WORDS = "phone|telephone|tel|mobile|cell|fax|call|whatsapp|text|hotline|contact"
_PHONE_WORD = re.compile(rf"\b(?:{_PHONE_WORDS})\b[^\n]{{0,20}}\Z", re.IGNORECASE)
_AFTER = (
    r"\W{1,3}(?:(?:please|to)\W{1,3})?(?:(?:call|text|phone|whatsapp)\s(?:me|us|him|her)"
    r"|is\s(?:my|our|his|her)\s(?:(?:phone|mobile|cell)\s)?(?:number|phone|mobile|cell))\b"
)
_PHONE_WORD_AFTER = re.compile(_AFTER, re.IGNORECASE)
_GROUPS = re.compile(r"\(?\d{2,5}\)?(?:[ ./-]\(?\d{2,5}\)?){1,5}")  # a dash with spaces around it is a minus
_ABROAD = re.compile(r"00[ ./-]?[1-9][\d ()./-]{7,}")
_PAIRS = re.compile(r"\d\d(?:[ ./-]\d\d)+")  # a telephone's begin with one zero, as in France
_BRACKET = re.compile(r"\([1-9]")  # an area code, behind which a number ends in four digits
_FOUR = re.compile(r"\b\d{4}\Z")
_DATE = re.compile(r"\d{4}([-./])\d{1,2}\1\d{1,2}|\d{1,2}([-./])\d{1,2}\2\d{4}|(?:1[5-9]|20)\d\d[-–/](?:1[5-9]|20)\d\d")
_EXAMPLE_DOMAIN = re.compile(r"(?:^|[@.])(?:example(?:\.(?:com|net|org|edu))?|test|invalid|localhost)$", re.IGNORECASE)
_EXAMPLE_PHONE = re.compile(r"55501\d\d$")  # 555-0100 to 555-0199 of any area in North America
# What there is none of the kind without. Most texts have nothing of it, and need no closer look, which takes far longer.
_SIGNS = {
    "email": re.compile("@"),
    "phone": re.compile(
        r"\+[^\w\n]{0,3}\d(?:[^\w\n]{0,4}\d){6}|\(?\d{2,5}\)?(?:[ ./-]\(?\d{2,5}\)?){1,5}"
        rf"|\b(?:{_PHONE_WORDS})\b[^\n]{{0,20}}\d(?:[^\w\n]{{0,4}}\d){{6}}|\d{{7,15}}{_AFTER}",
        re.IGNORECASE,
    ),
    "credit_card": re.compile(r"\d(?:[^\w\n]{0,4}\d){11}"),
    "iban": re.compile(r"[A-Za-z]{2}[ -]?\d[ -]?\d"),
    "ip_address": re.compile(r"\d\.\d|:[0-9A-Fa-f]{0,4}:"),
    "us_ssn": re.compile(r"\d(?:[^\w\n]{0,4}\d){8}"),
}


def personal_data(settings: PersonalData, context: StepContext) -> Check:
    """By e-mail addresses, phone, card, account and identity numbers, and internet addresses."""
    recognisers = _recognisers()

    def check(rows: pa.Table) -> Iterator[str | None]:
        for text in whole_texts(rows):
            kinds = [kind for kind in settings.kinds if _SIGNS[kind].search(text)]
            found = ((kind, place) for kind in kinds for place in _places(recognisers[kind], kind, text))
            kind, place = next(found, ("", 0))
            yield f"{kind.replace('_', ' ')} at character {place:,}" if kind else None  # not what it is

    return check


def _places(recogniser: Any, kind: str, text: str) -> Iterator[int]:
    """The position in the text of an item of a kind that is not an example or part of a longer number."""
    for first, last in _windows(kind, text):
        for result in recogniser.analyze(text[first:last], recogniser.supported_entities):
            start, end = first + result.start, first + result.end
            before = text[max(start - _LOOK_BACK, 0) : start]
            is_part = _NUMBER_BEFORE.search(before) or text[end : end + 1].isdigit()
            found = text[start:end]
            if result.score < _SURE or is_part or is_example(kind, found):
                continue
            if kind == "ip_address" and _VERSION_BEFORE.search(before):
                continue
            if kind != "phone" or is_phone(found, before, text[end : end + _LOOK_BACK]):
                yield int(start)


def _windows(kind: str, text: str) -> Iterator[tuple[int, int]]:
    """The parts of a text to search: for phone numbers, which take most of the time, only the surroundings of a sign of one."""
    if kind != "phone":
        yield 0, len(text)
        return
    first = last = 0
    for match in _SIGNS["phone"].finditer(text):
        if match.start() - _LOOK_BACK > last and last:
            yield first, last
            first = last = 0
        first, last = (first if last else max(match.start() - _LOOK_BACK, 0)), match.end() + _LOOK_BACK
    if last:
        yield first, last


def is_phone(found: str, before: str, after: str = "") -> bool:
    """Whether digits are a phone number and not a quantity, a year, a date or an address, by their format.

    Args:
        found: what may be one.
        before: the text that it stands behind.
        after: the text that it stands before.
    """
    digits, number = sum(character.isdigit() for character in found), found.strip()
    if not 7 <= digits <= 15 or _DATE.fullmatch(number) or _is_address(number):
        return False
    if "+" in found:
        return True
    if before.endswith(("#", ".", "$", "€", "£")):
        return False
    if _PHONE_WORD.search(before) or _PHONE_WORD_AFTER.match(after):
        return True
    if _PAIRS.fullmatch(number):
        return number[0] == "0" != number[1]
    if _BRACKET.match(number) and not _FOUR.search(number):
        return False
    return bool(_GROUPS.fullmatch(number) or _ABROAD.fullmatch(number))


def _is_address(found: str) -> bool:
    """Whether it is a valid internet address."""
    try:
        return bool(ipaddress.IPv4Address(found))
    except ValueError:
        return False


def is_example(kind: str, found: str) -> bool:
    """Whether it is reserved for examples, or not reachable."""
    if kind == "email":
        return bool(_EXAMPLE_DOMAIN.search(found))
    if kind == "phone":
        return bool(_EXAMPLE_PHONE.search(re.sub(r"\D", "", found)))
    if kind == "ip_address":
        if ":" in found and "." not in found and len([group for group in found.split(":") if group]) < 3:
            return True  # a slice such as x[1::2], or a name such as Face::Add
        try:
            return not ipaddress.ip_interface(found).ip.is_global
        except ValueError:
            return True
    return False


def _recognisers() -> dict[str, Any]:
    import tldextract
    from presidio_analyzer import predefined_recognizers as presidio

    suffixes = tldextract.TLDExtract(cache_dir=None, suffix_list_urls=())  # those that came with it: no download

    class EmailRecognizer(presidio.EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return bool(suffixes(pattern_text).suffix)

    return {
        "email": EmailRecognizer(),
        "phone": presidio.PhoneRecognizer(),
        "credit_card": presidio.CreditCardRecognizer(),
        "iban": presidio.IbanRecognizer(),
        "ip_address": presidio.IpRecognizer(),
        "us_ssn": presidio.UsSsnRecognizer(),
    }


STEP = CurationStep(personal_data, libraries={"presidio_analyzer": "personal-data"})
