"""Formatting of numbers, names and texts: the filters of the templates."""

import re
from datetime import datetime
from typing import Any

import jinja2

from llmdistill.data.budget import money
from llmdistill.evaluation.statistics import digits, interval_text

Json = dict[str, Any]


LABELS = {
    "student before": "student before training",
    "student, text only": "student trained on text only",
    "student, examples only": "student trained on the examples only",
}


def template_environment() -> jinja2.Environment:
    """Templates with autoescape, except Markdown, whose templates use the filters `cell` and `fenced`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmdistill.evaluation"),
        autoescape=jinja2.select_autoescape(default=True, disabled_extensions=("md.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        filter.__name__: filter
        for filter in (cell, estimate, fenced, interval, label, megabytes, moment, money, parameters, tokens_per_second, visible)
    }
    return environment


def percent(interval: Json) -> Json:
    """An interval of a share, in percent."""
    return {key: 100 * interval[key] for key in ("mean", "low", "high")}


def visible(token: str) -> str:
    """A token with its white space as symbols."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def parameters(count: int) -> str:
    """134515008 as 134.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def megabytes(size: int | None) -> str:
    """269060552 as 269 MB."""
    if size is None:
        return "–"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.{0 if size >= 1e7 else 1}f} MB"


def tokens_per_second(model: Json) -> str:
    """Three digits, or as many as there are before the decimal point."""
    rate = model["decode_tokens_per_s"]
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def estimate(interval: Json, factor: float = 1, least: int | None = None) -> tuple[str, str]:
    """The mean, and `low–high` with as many digits as the interval warrants; no interval if it has no width."""
    interval = {"low": interval["mean"], "high": interval["mean"], **interval}  # some have none
    low, high = factor * interval["low"], factor * interval["high"]
    decimals = digits(low, high, (2 if factor == 1 else 0) if least is None else least)
    mean, ends = interval_text(interval, f".{decimals}f", factor, " to " if low < 0 else "–")
    return mean.replace("-", "−"), "" if low == high else ends.replace("-", "−")


def interval(found: Json, factor: float = 1, least: int | None = None) -> str:
    """As `estimate`, as one text: `mean (low–high)`."""
    mean, ends = estimate(found, factor, least)
    return f"{mean} ({ends})" if ends else mean


def moment(stamp: str | None) -> str:
    """2026-11-23T18:28:49Z as 23 Nov 2026, 18:28."""
    if not stamp:
        return "–"
    when = datetime.fromisoformat(stamp)
    return f"{when.day} {when:%b %Y, %H:%M}"


def label(name: str) -> str:
    """The label of a model from the evaluation."""
    return LABELS.get(name, name)


def cell(text: object) -> str:
    """Escape text for a Markdown table cell: one line, no HTML, no mark-up."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~&$])", r"\\\1", " ".join(str(text).split()))


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
