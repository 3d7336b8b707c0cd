"""Reading a model's answer: its one fenced block, JSON, a canonical form of JSON, and the check against a schema."""

import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import regex

from llmdistill.data.rows import storable
from llmdistill.errors import InputError

_FENCE = re.compile(r"^(```+|~~~+)(.*)\n?", re.MULTILINE)
_DEPTH = 100
_SECONDS = 1.0  # for a pattern of a schema on one text
_RANGES = (  # keywords of JSON schema between which no value may be left
    ("minimum", "maximum"),
    ("exclusiveMinimum", "maximum"),
    ("minimum", "exclusiveMaximum"),
    ("exclusiveMinimum", "exclusiveMaximum"),
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
)


def unfenced(answer: str) -> str:
    """The content of the one fenced block in an answer, or else the answer itself."""
    blocks, marks, start = [], "", 0
    for match in _FENCE.finditer(answer):
        if not marks:
            marks, start = match[1], match.end()
        elif match[1].startswith(marks) and not match[2].strip("`~ \t\r\f\v"):
            blocks.append(answer[start : match.start()])
            marks = ""
    return blocks[0] if len(blocks) == 1 else answer


def read_answer(answer: str) -> Any:
    """The answer as JSON, or the content of its one fenced block.

    Raises:
        ValueError: if it is not JSON, has a number that is not finite, or is nested more than 100 deep.
    """
    try:
        value = json.loads(unfenced(answer), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"nested more than {_DEPTH} deep") from None
    level, depth = [value], 0
    while level := [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]:
        if (depth := depth + 1) > _DEPTH:
            raise ValueError(f"nested more than {_DEPTH} deep")
    return value


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large")
    return number


def canonical(value: Any) -> str:
    """JSON in one form: equal text for equal values, whatever the order of keys; 1.0 is 1, as in JSON schema."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def validator_of(schema: Any, file: str | Path) -> Any:
    """A validator of JSON against a schema; references in the schema are not fetched.

    Args:
        schema: as read from JSON.
        file: and key where it stands, for errors.

    Raises:
        InputError: it is no valid JSON schema.
    """
    import jsonschema
    from referencing import Registry

    if not isinstance(schema, dict | bool):
        raise InputError(f"{file}: not a JSON schema: it must be an object")
    if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
        raise InputError(f"{file}: not a valid JSON schema: $schema must be text")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(f"{file}: not a valid JSON schema: {error.message}") from None
    return bounded(kind)(schema, registry=Registry())


@cache
def bounded(kind: Any) -> Any:
    """A class of validators whose patterns have a time limit of one second, and whose `multipleOf` is exact."""
    import jsonschema

    own = {"pattern": _pattern, "patternProperties": _pattern_properties, "additionalProperties": _additional_properties}
    own |= dict.fromkeys(("multipleOf", "divisibleBy"), _multiple_of)
    return jsonschema.validators.extend(kind, {name: check for name, check in own.items() if name in kind.VALIDATORS})


def _matches(pattern: str, text: str) -> bool:
    """Whether a text, which a model may have written, matches a pattern.

    Raises:
        TimeoutError: if that takes more than a second.
        ValueError: the pattern is none.
    """
    try:
        return regex.search(pattern, text, timeout=_SECONDS) is not None
    except regex.error as error:
        raise ValueError(f"{pattern} is not a valid regular expression: {error}") from None


def _pattern(validator: Any, pattern: Any, value: Any, schema: Any) -> Iterator[Any]:
    import jsonschema

    if validator.is_type(value, "string") and not _matches(pattern, value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, value: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(value, "object"):
        for pattern, inner in patterns.items():
            for name in [name for name in value if _matches(pattern, name)]:
                yield from validator.descend(value[name], inner, path=name, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, value: Any, schema: Any) -> Iterator[Any]:
    import jsonschema

    if not validator.is_type(value, "object"):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    more = [name for name in value if name not in known and not any(_matches(pattern, name) for pattern in patterns)]
    if validator.is_type(allowed, "object"):
        for name in more:
            yield from validator.descend(value[name], allowed, path=name)
    elif not allowed and more:
        yield jsonschema.ValidationError(f"additional properties are not allowed: {', '.join(map(repr, more))}")


def _multiple_of(validator: Any, divisor: Any, value: Any, schema: Any) -> Iterator[Any]:
    """`multipleOf` of numbers as they are written: 19.99 is a multiple of 0.01, as it is not in floating point."""
    import jsonschema

    if validator.is_type(value, "number") and _written(value) % _written(divisor):
        yield jsonschema.ValidationError(f"{str(value)[:40]} is not a multiple of {divisor}")


def _written(number: int | float) -> Fraction:
    return Fraction(number) if isinstance(number, int) else Fraction(repr(number))


def problem(validator: Any, value: Any, file: str | Path) -> str | None:
    """Where and how a value violates the schema; None if it does not.

    Raises:
        InputError: the schema refers to what is not in its file, or to what is no schema.
    """
    from referencing.exceptions import Unresolvable

    try:
        error = next(validator.iter_errors(value), None)
    except Unresolvable as unresolved:
        raise InputError(f"{file}: refers to {unresolved.ref}, which is not in the file; references are not fetched") from None
    except RecursionError:
        return "$: nested too deep for the schema"
    except TimeoutError:
        return f"$: a pattern of the schema took more than {_SECONDS:g} s"
    except (ValueError, TypeError, AttributeError, ArithmeticError) as reason:
        # What a reference leads to has not been checked to be a schema.
        raise InputError(f"{file}: cannot be used as a JSON schema: {reason}") from None
    return storable(f"{error.json_path}: {error.message}") if error else None


def contradiction(schema: Any, path: str = "$") -> str | None:
    """Find obvious contradictions in a schema: empty ranges, and required properties that are not allowed.

    Properties, items and `allOf` are looked into; alternatives and references are not.
    """
    if schema is False and path == "$":
        return "$: false allows nothing"
    if not isinstance(schema, dict):
        return None
    for low, high in _RANGES:
        if low not in schema or high not in schema or isinstance(schema[low], bool) or isinstance(schema[high], bool):
            continue  # of draft 4, where `exclusiveMinimum` is true or false
        strict = low.startswith("exclusive") or high.startswith("exclusive")
        if schema[low] > schema[high] or (strict and schema[low] == schema[high]):
            return f"{path}: {low} is {schema[low]}, {'not less' if strict else 'more'} than {high}, {schema[high]}"
    if schema.get("enum") == []:
        return f"{path}: enum is empty"
    if "const" in schema and schema["const"] not in schema.get("enum", [schema["const"]]):
        return f"{path}: const is not in enum"
    properties, required = schema.get("properties", {}), schema.get("required", [])
    for name in required if isinstance(required, list) else []:  # a boolean in draft 3
        if properties.get(name) is False or (
            schema.get("additionalProperties") is False and name not in properties and "patternProperties" not in schema
        ):
            return f"{path}: {name} is required, but not allowed"
    parts = [(f"{path}.{name}", inner) for name, inner in properties.items()] + [(f"{path}[]", schema.get("items"))]
    parts += [(path, inner) for inner in schema.get("allOf", [])]
    return next((found for where, inner in parts if (found := contradiction(inner, where))), None)
