"""A process that checks one answer after another, so that it can be killed: see verify.py.

It reads a JSON object a line, `{"check": "math" | "python" | "sql", …}`, and answers each with a line: `null`, or
`{"rejected": why}`, or `{"failed": why it cannot be decided}`.
"""

import ast
import json
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

from llmdistill.tasks.queries import check_query

# The library takes a number behind this word for the result, and not the last one; only where it says so is it right.
_ANSWER = re.compile(r"answer(?!\W*(?:is\b|[:=]))", re.IGNORECASE)
_MEMORY = 4 << 30  # bytes of address space: a formula like 9**9**9 ends here, and not the machine


def main() -> None:
    """Answer until the input ends; if nobody is left to kill it, an endless check is ended by an alarm."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    warnings.simplefilter("ignore")  # of escapes in strings
    checks: dict[str, Callable[..., str | None]] = {"math": check_math, "python": check_python, "sql": check_query}
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        signal.alarm(int(sys.argv[1]))
        try:
            reason = checks[request.pop("check")](**request)
            verdict = None if reason is None else {"rejected": reason}
        except (Exception, RecursionError, MemoryError) as error:  # libraries raise whatever they like
            verdict = {"failed": f"{type(error).__name__}: {error}"}
        signal.alarm(0)
        answers.write(json.dumps(verdict) + "\n")
        answers.flush()


def check_math(expected: str, text: str) -> str | None:
    """Why the last formula or number of a text does not equal the expected one."""
    from math_verify import parse, verify

    def read(formula: str) -> list[Any]:
        formula = re.sub(r"\\\$(?=\s*[\d.])", "", formula)  # an amount of money, as Markdown escapes it
        formula = formula.replace("\N{MINUS SIGN}", "-")
        return parse(formula, parsing_timeout=None, raise_on_error=True)

    gold = read(expected) if "$" in expected or "boxed" in expected else read(f"${expected}$") or read(expected)
    if not gold:
        raise ValueError(f"the expected answer {expected!r} is not a formula")
    found = read(_ANSWER.sub("result", text))
    if not found:
        return f"no formula or number, expected {expected}"
    return None if verify(gold, found, timeout_seconds=None, raise_on_error=True) else f"{found[-1]} is not {expected}"


def check_python(code: str) -> str | None:
    """Why code does not parse; it is not run."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError) as error:
        return f"line {getattr(error, 'lineno', 0)}: {getattr(error, 'msg', error)}"
    return None


if __name__ == "__main__":
    main()
