"""The report as a single image to share: the verdict, the headline figures, and every model's KL with its interval."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from llmdistill.evaluation.statistics import nats_text

WIDTH, HEIGHT = 1200, 630  # the size of link previews
_SCALE = 2  # pixels per unit
_MARGIN = 60
_PAPER, _PANEL, _INK, _SOFT, _LINE = "#fcfbf8", "#f4f2ec", "#1c2126", "#59626b", "#dcd8ce"
_MARKS = {"student": "#0072b2", "student, text only": "#d55e00"}
_OTHER = "#767d85"
# Pillow's built-in font has little beyond ASCII, and no other font is available everywhere.
_PLAIN = str.maketrans({"×": "x", "→": "to", "−": "-", "–": "-", "’": "'", "‖": "||", "…": "..."})


def picture(view: Mapping[str, Any], labels: Mapping[str, str]) -> bytes:
    """A PNG of `WIDTH` × `HEIGHT` units at two pixels each.

    Args:
        view: the values that the report's templates show.
        labels: labels of models that differ from their names.
    """
    page = _Page()
    page.text(_MARGIN, 46, "Distillation report", 20, _SOFT)
    page.text(_MARGIN, 76, f"{view['teacher_name']}, distilled", 44, bold=True, most=WIDTH - 2 * _MARGIN)
    down = 146
    said = " ".join(verdict["text"] for verdict in view["task_verdicts"]) or view["verdict"] or view["headline"]
    for line in page.wrapped(said, 23, WIDTH - 2 * _MARGIN)[:3]:
        page.text(_MARGIN, down, line, 23)
        down += 32
    cards = view["cards"]
    wide = (WIDTH - 2 * _MARGIN - 20 * (len(cards) - 1)) / len(cards)
    for number, card in enumerate(cards):
        left = _MARGIN + number * (wide + 20)
        page.box(left, 256, wide, 168)
        page.text(left + 20, 274, card["figure"], 58, bold=True)
        for row, line in enumerate(page.wrapped(card["label"], 20, wide - 40)[:2]):
            page.text(left + 20, 342 + 25 * row, line, 20)
        page.text(left + 20, 394, card["note"], 17, _SOFT, most=wide - 40)
    if view["intervals"]:
        _intervals(page, view["intervals"], view["near"]["title"], labels)
    return page.png()


def _intervals(page: "_Page", plot: Mapping[str, Any], title: str, labels: Mapping[str, str]) -> None:
    """A dot with whiskers per model, on the scale of the report's figure."""
    start, end = 400, 910
    page.text(_MARGIN, 448, f"{title}, nats per token, with 95% intervals", 17, _SOFT)
    for number, row in enumerate(plot["rows"][:4]):
        middle = 492 + 33 * number
        color = _MARKS.get(row["name"], _OTHER)
        low, mean, high = (start + (end - start) * row[key] / plot["width"] for key in ("low", "mean", "high"))
        estimate = row["estimate"]
        page.text(_MARGIN, middle - 12, labels.get(row["name"], row["name"]), 20, bold=row["name"] == "student", most=start - 80)
        page.line((start, middle), (end, middle), _LINE, 1)
        page.line((low, middle), (high, middle), color, 3)
        for x in (low, high):
            page.line((x, middle - 7), (x, middle + 7), color, 3)
        page.dot(mean, middle, 6, color)
        text, ends = nats_text(estimate)
        page.text(end + 20, middle - 11, f"{text} ({ends})", 18, most=WIDTH - _MARGIN - end - 20)


class _Page:
    """A drawing in units of `_SCALE` pixels."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE), _PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def text(
        self, x: float, y: float, text: str, size: float, color: str = _INK, bold: bool = False, most: float | None = None
    ) -> None:
        """Draw a line of text from its upper left corner, smaller if it would be wider than `most`."""
        text = " ".join(text.translate(_PLAIN).split())
        if most is not None:
            size *= min(1.0, most / max(self._width(text, size), 1e-9))
        at, stroke = (x * _SCALE, y * _SCALE), size / 40 * _SCALE if bold else 0
        self._draw.text(at, text, font=_font(size), fill=color, stroke_width=stroke, stroke_fill=color)

    def wrapped(self, text: str, size: float, most: float) -> list[str]:
        """Wrap text to lines no wider than `most`."""
        lines: list[str] = []
        for word in text.translate(_PLAIN).split():
            longer = f"{lines[-1]} {word}" if lines else word
            if lines and self._width(longer, size) <= most:
                lines[-1] = longer
            else:
                lines.append(word)
        return lines

    def box(self, x: float, y: float, width: float, height: float) -> None:
        """Draw a panel with a coloured upper edge."""
        left, top, right = x * _SCALE, y * _SCALE, (x + width) * _SCALE
        self._draw.rectangle((left, top, right, (y + height) * _SCALE), fill=_PANEL)
        self._draw.rectangle((left, top, right, top + 3 * _SCALE), fill=_MARKS["student"])

    def line(self, start: tuple[float, float], end: tuple[float, float], color: str, width: int) -> None:
        """Draw a straight line."""
        self._draw.line([(x * _SCALE, y * _SCALE) for x, y in (start, end)], fill=color, width=width * _SCALE)

    def dot(self, x: float, y: float, radius: float, color: str) -> None:
        """Draw a filled circle."""
        ends = [(v - radius) * _SCALE for v in (x, y)] + [(v + radius) * _SCALE for v in (x, y)]
        self._draw.ellipse(ends, fill=color)

    def png(self) -> bytes:
        """The file's content."""
        stream = io.BytesIO()
        self._image.save(stream, format="PNG", optimize=True)
        return stream.getvalue()

    def _width(self, text: str, size: float) -> float:
        return float(self._draw.textlength(text, font=_font(size))) / _SCALE


def _font(size: float) -> Any:
    return ImageFont.load_default(size * _SCALE)
