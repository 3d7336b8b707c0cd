"""Layout of the report's figures: numbers in, SVG coordinates out. The template draws them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[float, float]

# Both figures fit half a page on a desktop and a whole one on a phone, so their text is legible on either.
WIDTH = 480
_LOSS_HEIGHT = 270
_LOSS_LEFT = 44
_LOSS_BOTTOM = 44
_ROW = 58
_LABEL = 20.0  # between the baselines of two labels, in the larger type of a narrow screen
_LOG_FROM_RATIO = 3.0
_MOST_POINTS = 200
_ENDS = ("mean", "low", "high")


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """The pixel position of a value."""
        low, high, at = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return round(self.start + (self.end - self.start) * (at - low) / (high - low), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Pixel position and label of at most about six round values."""
        values = _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)
        return [(self.place(value), f"{value:,.10g}".replace("-", "−")) for value in values]


def fit_axis(values: Sequence[float], start: float, end: float, margin: float = 0.06) -> Axis:
    """A scale for the values, with some margin; logarithmic if the largest is many times the smallest."""
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM_RATIO:
        factor = (high / low) ** margin
        return Axis(low / factor, high * factor, start, end, log=True)
    room = margin * (high - low) or abs(low) / 2 or 1.0
    return Axis(low - room, high + room, start, end)


def interval_plot(rows: Iterable[tuple[str, dict[str, float]]], with_zero: bool = False) -> dict[str, Any] | None:
    """A dot with 95% whiskers per row; None if no row has finite numbers.

    Args:
        rows: names and estimates.
        with_zero: whether they are differences, so that the figure must include zero.
    """
    drawn = [(name, estimate) for name, estimate in rows if all(math.isfinite(estimate[key]) for key in _ENDS)]
    if not drawn:
        return None
    axis = fit_axis([estimate[key] for _, estimate in drawn for key in _ENDS] + [0.0] * with_zero, 2, WIDTH - 2)
    rows_xy = [
        {
            "name": name,
            "y": 38 + _ROW * number,
            "estimate": estimate,
            **{key: axis.place(estimate[key]) for key in ("mean", "low", "high")},
        }
        for number, (name, estimate) in enumerate(drawn)
    ]
    bottom = _ROW * len(drawn) + 2
    return {
        "width": WIDTH,
        "height": bottom + 46,
        "bottom": bottom,
        "rows": rows_xy,
        "ticks": axis.ticks(),
        "log": axis.log,
        "zero": axis.place(0.0) if with_zero else None,
    }


def group_plot(curves: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> dict[str, Any] | None:
    """Means with 95% whiskers in groups side by side; None if there is nothing to draw.

    Args:
        curves: the groups of each model: `group`, an index into `names`, `mean`, `low` and `high`.
        names: names of the groups, from left to right.
    """
    drawn = {name: groups for name, groups in curves.items() if groups}
    values = [group[key] for groups in drawn.values() for group in groups for key in ("mean", "low", "high")]
    if not values or not all(math.isfinite(value) for value in values):
        return None
    bottom = _LOSS_HEIGHT - _LOSS_BOTTOM
    up = fit_axis([max(value, 1e-6) for value in values], bottom, 10)
    wide = (WIDTH - 10 - _LOSS_LEFT) / len(names)
    lines = []
    for number, (name, groups) in enumerate(drawn.items()):
        aside = (number - (len(drawn) - 1) / 2) * min(8.0, wide / (len(drawn) + 1))  # keeps whiskers from overlapping
        points = [
            {
                "x": round(_LOSS_LEFT + wide * (group["group"] + 0.5) + aside, 1),
                **{key: up.place(max(group[key], 1e-6)) for key in ("mean", "low", "high")},
            }
            for group in groups
        ]
        lines.append({"name": name, "points": points, "line": "M" + "L".join(f"{p['x']} {p['mean']}" for p in points)})
    middles = [(round(_LOSS_LEFT + wide * (number + 0.5), 1), name) for number, name in enumerate(names)]
    return {"lines": lines, **_frame(middles, up)}


def size_plot(points: Iterable[tuple[str, float, dict[str, float]]]) -> dict[str, Any] | None:
    """Megabytes against an estimate with its 95% interval; None if fewer than two models have both."""
    drawn = [(name, size, estimate) for name, size, estimate in points if size and all(map(math.isfinite, estimate.values()))]
    if len(drawn) < 2:
        return None
    bottom = _LOSS_HEIGHT - _LOSS_BOTTOM
    across = fit_axis_linear([size for _, size, _ in drawn], _LOSS_LEFT, WIDTH - 30)
    highest = max(value for _, _, estimate in drawn for value in estimate.values())
    up = Axis(0.0, highest * 1.05, bottom, 10)
    dots: list[dict[str, Any]] = [
        {"name": name, "x": across.place(size), **{key: up.place(estimate[key]) for key in ("mean", "low", "high")}}
        for name, size, estimate in drawn
    ]
    dots.sort(key=lambda dot: dot["mean"])
    labels = spread([dot["mean"] for dot in dots], _LABEL, 12, bottom - 6)
    return {"dots": [{**dot, "label": label} for dot, label in zip(dots, labels, strict=True)], **_frame(across.ticks(), up)}


def share_plot(curves: dict[str, list[Point]], marks: Sequence[tuple[float, str]]) -> dict[str, Any]:
    """Percentages against a percentage, as lines.

    Args:
        curves: the points of each line, by its name.
        marks: percentages on the horizontal axis to mark, with their labels.
    """
    bottom = _LOSS_HEIGHT - _LOSS_BOTTOM
    across = Axis(0.0, 100.0, _LOSS_LEFT, WIDTH - 10)
    lowest = min(y for points in curves.values() for _, y in points)
    up = Axis(max(0.0, lowest - max(0.06 * (100 - lowest), 0.5)), 100.0, bottom, 10)
    lines = [
        {"name": name, "line": "M" + "L".join(f"{across.place(x)} {up.place(y)}" for x, y in points)}
        for name, points in curves.items()
    ]
    return {"lines": lines, "marks": [(across.place(x), text) for x, text in marks], **_frame(across.ticks(), up)}


def spread(places: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """The positions in ascending order, moved just enough to be `apart` from each other, between `low` and `high`."""
    groups: list[tuple[float, int]] = []  # the centre and number of touching neighbours
    for place in places:
        middle, count = place, 1
        while groups and middle - groups[-1][0] < apart * (count + groups[-1][1]) / 2:
            other, others = groups.pop()
            middle, count = (middle * count + other * others) / (count + others), count + others
        groups.append((middle, count))
    found = [middle + apart * (number - (count - 1) / 2) for middle, count in groups for number in range(count)]
    for number, place in enumerate(found):
        found[number] = max(place, low, found[number - 1] + apart if number else low)
    for number in reversed(range(len(found))):
        found[number] = min(found[number], high, found[number + 1] - apart if number + 1 < len(found) else high)
    return [round(place, 1) for place in found]


def loss_plot(curves: dict[str, list[Point]]) -> dict[str, Any] | None:
    """Smoothed lines over raw points, in steps and nats; None if there is nothing to draw."""
    drawn = {name: thin(points) for name, points in curves.items() if points}
    if not drawn:
        return None
    steps = [step for points in drawn.values() for step, _ in points]
    bottom = _LOSS_HEIGHT - _LOSS_BOTTOM
    across = fit_axis_linear(steps, _LOSS_LEFT, WIDTH - 10)
    up = fit_axis([value for points in drawn.values() for _, value in points], bottom, 10)
    lines = [
        {
            "name": name,
            "points": "".join(f"M{across.place(x)} {up.place(y)}h0" for x, y in points),
            "line": "M" + "L".join(f"{across.place(x)} {up.place(y)}" for x, y in smooth(points)),
        }
        for name, points in drawn.items()
    ]
    return {"lines": lines, **_frame(across.ticks(), up)}


def _frame(x_ticks: list[tuple[float, str]], up: Axis) -> dict[str, Any]:
    """The frame of a figure with two axes."""
    size = {"width": WIDTH, "height": _LOSS_HEIGHT, "left": _LOSS_LEFT, "bottom": up.start}
    return {**size, "x_ticks": x_ticks, "y_ticks": up.ticks(), "log": up.log}


def fit_axis_linear(values: Sequence[float], start: float, end: float) -> Axis:
    """A scale that begins at 0 and ends at the largest value."""
    return Axis(0.0, max(*values, 1.0), start, end)


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """Means of neighbours, so that the file of a long run is no larger than that of a short one."""
    size = -(-len(points) // most)
    return [_mean_point(points[at : at + size]) for at in range(0, len(points), size)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Each value replaced by the mean of its neighbours, about a tenth of the curve; the window shrinks at the ends."""
    reach = max(1, len(points) // 20)
    smoothed = []
    for at, (step, _) in enumerate(points):
        near = min(reach, at, len(points) - 1 - at)
        smoothed.append((step, _mean_point(points[at - near : at + near + 1])[1]))
    return smoothed


def _mean_point(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in (1, 2, 5, 10) if nice * power >= rough)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) <= 6:
            return found
    return [10.0**power for power in powers if low <= 10.0**power <= high]
