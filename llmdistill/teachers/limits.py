"""Limits shared by workers: requests and tokens per minute, and money.

All workers of a dataset share one file, read and written under `flock`: the remaining limits from the headers of the
endpoint's answers, the time before which nothing may be sent, and the spending. Without such headers nothing is delayed.
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

_SIZE = 4096  # bytes of the file; a write of one page is atomic
_LONGEST = 3600.0  # maximum number of seconds that a header may make a worker wait
_KINDS = ("requests", "tokens")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_HEADERS = ("x-ratelimit-{what}-{kind}", "anthropic-ratelimit-{kind}-{what}")


class Limits:
    """One worker's share of what all of them may send.

    Args:
        file: the shared file; None if there is one worker and nothing to remember.
        price: price of the tokens, if known.
    """

    def __init__(self, file: Path | None, price: Price | None) -> None:
        self.file, self.price = file, price
        self._alone: dict[str, Any] = {}
        self._limited = False  # whether the endpoint reports limits, to this worker or, by the file, to another

    def pause(self, tokens: int) -> float:
        """Reserve one request from the remaining limits, or return the seconds to wait before asking again.

        Args:
            tokens: tokens of the prompt and of the longest answer.
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
        """Record the limits in an answer's headers; returns the seconds to wait before the next attempt, if they say so."""
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
        """Record what an answer cost, whether or not it is used."""
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
            with suppress(OSError):  # a disk without locks: the endpoint still enforces its limits
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            state = _parsed(os.pread(descriptor, _SIZE, 0))
            before = json.dumps(state)
            yield state
            if (after := json.dumps(state)) != before:
                os.pwrite(descriptor, after.encode().ljust(_SIZE), 0)
        finally:
            os.close(descriptor)


def _forget_other_clocks(state: dict[str, Any], now: float) -> None:
    """Drop times that no header can have asked for: a worker whose clock is fast has written them."""
    if state.get("until", 0.0) > now + _LONGEST:
        del state["until"]
    for kind in _KINDS:
        if state.get(kind, (None, 0.0))[1] > now + _LONGEST:
            del state[kind]


def spent(file: Path) -> float:
    """Spending so far of the workers that share a file, including answers that are not stored."""
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
    """The remainder of a limit, and until when it holds."""
    for form in _HEADERS:
        left, resets = (headers.get(form.format(what=what, kind=kind)) for what in ("remaining", "reset"))
        seconds = _seconds(resets, now)
        if left is not None and left.strip().isdecimal() and seconds is not None:
            return int(left), now + seconds
    return None


def _seconds(text: str | None, now: float) -> float | None:
    """Time from now given by `20`, `6m0s`, `20ms`, an HTTP date or an ISO 8601 date; None if it is none of them."""
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
