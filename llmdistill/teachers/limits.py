"""What workers must not do too much of together: requests and tokens a minute, and money.

All workers of a dataset share one file, which is read and written under `flock`: what the endpoint says is left, from the
headers of its answers, until when nothing may be sent, and what was spent. Without such headers nothing is waited for.
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from llmdistill.config import Price
from llmdistill.teachers import Usage

_SIZE = 4096  # bytes of the file; one write of a page is there as a whole or not at all
_LONGEST = 3600.0  # seconds that any header may make a worker wait
_KINDS = ("requests", "tokens")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_HEADERS = ("x-ratelimit-{what}-{kind}", "anthropic-ratelimit-{kind}-{what}")


class Limits:
    """The share of one worker in what all of them may send.

    Args:
        file: that they share; None where there is one worker and nothing is to be remembered.
        price: of the tokens, if it is known.
    """

    def __init__(self, file: Path | None, price: Price | None) -> None:
        self.file, self.price = file, price
        self._alone: dict[str, Any] = {}
        self._limited = False  # whether the endpoint tells limits, to this worker or, as the file says, to another

    def pause(self, tokens: int) -> float:
        """Take part in what is left for one request; or the seconds to wait before asking again.

        Args:
            tokens: of the prompt, and of the longest answer.
        """
        with self._state() as state:
            now = time.time()
            _forget_other_clocks(state, now)
            wait = max(state.get("until", 0.0) - now, 0.0)
            for kind, needed in zip(_KINDS, (1, tokens), strict=True):
                left, resets = state.get(kind, (None, 0.0))
                if left is not None and resets > now and left < needed:
                    wait = max(wait, resets - now)
            if not wait:
                for kind, needed in zip(_KINDS, (1, tokens), strict=True):
                    left, resets = state.get(kind, (None, 0.0))
                    if left is not None and resets > now:
                        state[kind] = (left - needed, resets)
            return min(wait, _LONGEST)

    def learn(self, headers: Mapping[str, str], status: int) -> float | None:
        """Take over what an answer's headers say; the seconds to wait before the next try, if they say so."""
        now = time.time()
        asked = _seconds(headers.get("retry-after"), now) if status >= 400 else None
        found = {kind: left for kind in _KINDS if (left := _left(headers, kind, now)) is not None}
        if asked is None and not found:
            return None
        with self._state() as state:
            state.update(found)
            if asked is not None and status == 429:
                state["until"] = max(state.get("until", 0.0), now + asked)
        return asked

    def spend(self, usage: Usage) -> None:
        """Remember what an answer cost, whatever becomes of it."""
        cost = usage.cost(self.price)
        if cost:
            with self._state() as state:
                state["spent"] = state.get("spent", 0.0) + cost

    @contextmanager
    def _state(self) -> Iterator[dict[str, Any]]:
        if self.file is None:
            yield self._alone
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # a disk without locks: the endpoint itself still says when it is too much
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            state = _parsed(os.pread(descriptor, _SIZE, 0))
            before = json.dumps(state)
            yield state
            if (after := json.dumps(state)) != before:
                os.pwrite(descriptor, after.encode().ljust(_SIZE), 0)
        finally:
            os.close(descriptor)


def _forget_other_clocks(state: dict[str, Any], now: float) -> None:
    """Drop times that no header can have asked for: a worker whose clock is ahead has written them."""
    if state.get("until", 0.0) > now + _LONGEST:
        del state["until"]
    for kind in _KINDS:
        if state.get(kind, (None, 0.0))[1] > now + _LONGEST:
            del state[kind]


def spent(file: Path) -> float:
    """What the workers that share a file have paid so far, answers that are not stored included."""
    try:
        return float(_parsed(file.read_bytes()).get("spent", 0.0))
    except OSError:
        return 0.0


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _left(headers: Mapping[str, str], kind: str, now: float) -> tuple[int, float] | None:
    """How much of a kind is left, and until when that holds."""
    for form in _HEADERS:
        left, resets = (headers.get(form.format(what=what, kind=kind)) for what in ("remaining", "reset"))
        seconds = _seconds(resets, now)
        if left is not None and left.strip().isdecimal() and seconds is not None:
            return int(left), now + seconds
    return None


def _seconds(text: str | None, now: float) -> float | None:
    """From `20`, `6m0s`, `20ms`, a date of HTTP, or one of ISO 8601, how long from now; None if it is none of them."""
    if not text:
        return None
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return min(float(text), _LONGEST)
    if re.fullmatch(r"(\d+(\.\d+)?(ms|[smhd]))+", text):
        return min(sum(float(value) * _UNITS[unit] for value, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|[smhd])", text)), _LONGEST)
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        with suppress(ValueError, TypeError):
            when = parse(text)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            return min(max(when.timestamp() - now, 0.0), _LONGEST)
    return None
