"""Plots as inline SVG: lines, ranges, bars, a heat map and a scale of marks. Colours come from the page's style sheet.

Built as an XML tree, so that whatever text a run directory holds is escaped. Every mark has a title that the browser
shows on hover; nothing needs a script. Left out on purpose: a plotting library, for seven kilobytes of SVG per page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree as ET

from markupsafe import Markup

Point = tuple[float, float]
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 36  # pixels around the plotting area
CHARACTER = 7.5  # pixels of a digit of a tick label, at most
MOST_POINTS = 400  # per line; longer ones are thinned out


@dataclass(frozen=True)
class Series:
    """One line of a plot: `kind` names its colour in the style sheet, `shade` in [0, 1] is its opacity."""

    name: str
    points: Sequence[Point]
    kind: str
    marks: bool = False
    shade: float = 1.0


@dataclass(frozen=True)
class Axis:
    """Data between `low` and `high` on pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 2)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values that divide the axis."""
        return _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)


def lines(
    series: Sequence[Series], *, x_label: str, y_label: str, log: bool = False, width: int = 520, height: int = 260
) -> Markup | None:
    """Lines over a common x axis that counts something; None when there is nothing to draw."""
    series = [replace(one, points=_drawable(one.points, log)) for one in series]
    points = [point for one in series for point in one.points]
    if not points:
        return None
    x, y = _axes([p[0] for p in points], [p[1] for p in points], width, height, log=log)
    svg = _frame(x, y, width, height, x_label, y_label)
    for one in series:
        pixels = [(x(a), y(b)) for a, b in _thinned(one.points)]
        shade = f"{one.shade:.2f}"
        if len(pixels) > 1:
            path = " ".join(f"{a},{b}" for a, b in pixels)
            line = ET.SubElement(svg, "polyline", {"class": f"line {one.kind}", "opacity": shade, "points": path})
            _titled(line, one.name)
        if one.marks or len(pixels) == 1:
            for (a, b), (at, value) in zip(pixels, _thinned(one.points), strict=True):
                _mark(svg, a, b, 3, one.kind, f"{one.name}, {at:g}: {value:.4g}").set("opacity", shade)
    return _markup(svg)


def ranges(
    rows: Sequence[tuple[int, float, float]], *, x_label: str, y_label: str, width: int = 520, height: int = 260
) -> Markup | None:
    """Per x a value before and one after, joined, on a log scale: rows of (x, before, after)."""
    rows = [row for row in rows if len(_drawable([(row[0], row[1]), (row[0], row[2])], True)) == 2]
    if not rows:
        return None
    x, y = _axes([r[0] for r in rows], [v for r in rows for v in r[1:]], width, height, log=True, pad_x=0.6)
    svg = _frame(x, y, width, height, x_label, y_label)
    for at, before, after in rows:
        _line(svg, "span", x(at), y(before), x(at), y(after))
        for kind, value in (("before", before), ("after", after)):
            _mark(svg, x(at), y(value), 3.5, kind, f"block {at}, {kind} training: {value:.4g}")
    return _markup(svg)


def bars(
    rows: Sequence[Point], *, x_label: str, y_label: str, title: Callable[[float, float], str], width: int = 520
) -> Markup | None:
    """One bar per x, from zero."""
    rows = _drawable(rows, False)
    if not rows or max(value for _, value in rows) <= 0:
        return None
    height = 200
    x, y = _axes([r[0] for r in rows], [0.0, *(r[1] for r in rows)], width, height, log=False, pad_x=0.6)
    svg = _frame(x, y, width, height, x_label, y_label)
    thick = min(28.0, 0.7 * (x(1) - x(0)))
    for at, value in rows:
        box = {"x": x(at) - thick / 2, "y": y(value), "width": thick, "height": y(0) - y(value)}
        bar = ET.SubElement(svg, "rect", {"class": "bar", "rx": "1.5", **{k: f"{v:.2f}" for k, v in box.items()}})
        _titled(bar, title(at, value))
    return _markup(svg)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[int],
    values: dict[tuple[str, int], float],
    *,
    x_label: str,
    span: tuple[float, float],
) -> Markup | None:
    """Cells shaded from the smallest value of `span` to the largest; None when there are none."""
    if not values:
        return None
    low, high = span
    left = 16 + 6.8 * max(len(row) for row in rows)
    cell = max(13.0, min(40.0, (1040 - left) / len(columns)))
    tall = 20.0
    width, height = left + cell * len(columns) + 4, tall * len(rows) + 34
    svg = _svg(width, height)
    for i, row in enumerate(rows):
        _text(svg, left - 8, tall * i + 14, row, "end")
        for j, column in enumerate(columns):
            if (row, column) not in values:
                continue
            value = values[row, column]
            share = (value - low) / (high - low) if high > low else 1.0
            box = {"x": left + cell * j + 0.5, "y": tall * i + 0.5, "width": cell - 1, "height": tall - 1}
            style = {"class": "cell", "rx": "1.5", "fill-opacity": f"{0.06 + 0.94 * share:.3f}"}
            rect = ET.SubElement(svg, "rect", {**style, **{k: f"{v:.2f}" for k, v in box.items()}})
            _titled(rect, f"{row}, block {column}: {value:.4g}")
    step = max(1, math.ceil(22 / cell)) if len(columns) > 1 else 1
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 10**9) if s >= step)
    for j, column in enumerate(columns):
        if j % step == 0:
            _text(svg, left + cell * (j + 0.5), tall * len(rows) + 14, str(column), "middle")
    _text(svg, left + cell * len(columns) / 2, tall * len(rows) + 29, x_label, "middle")
    svg.set("style", f"max-width:{width:.0f}px")
    return _markup(svg)


def scale(rows: Sequence[tuple[str, str, float]], *, width: int = 520) -> Markup | None:
    """One mark per row of (label, kind, value) on a common log axis: how far apart models are."""
    rows = [row for row in rows if _drawable([(0, row[2])], True)]
    if len(rows) < 2:
        return None
    left, tall = 132, 26
    height = tall * len(rows) + 30
    low, high = min(r[2] for r in rows), max(r[2] for r in rows)
    x = Axis(low / 1.08, high * 1.08, left + 6, width - 66, log=True)
    svg = _svg(width, height)
    free = 0.0  # where the last label ends
    for tick in x.ticks(5):
        _line(svg, "grid", x(tick), 4, x(tick), height - 26)
        half = CHARACTER * len(_tick(tick)) / 2
        if x(tick) - half >= free:
            _text(svg, x(tick), height - 10, _tick(tick), "middle")
            free = x(tick) + half + CHARACTER
    for i, (label, kind, value) in enumerate(rows):
        at = tall * i + 17
        _text(svg, left - 8, at + 4, label, "end", "label")
        _line(svg, "stem", left, at, x(value), at)
        _mark(svg, x(value), at, 5, kind, f"{label}: {value:.6g}")
        _text(svg, x(value) + 10, at + 4, number(value), "start", "value")
    return _markup(svg)


def sparkline(values: Sequence[float]) -> Markup | None:
    """A line of a few values without axes, on a log scale."""
    points = _drawable(list(enumerate(values)), True)
    if len(points) < 2:
        return None
    low, high = min(v for _, v in points), max(v for _, v in points)
    y = Axis(low, high if high > low else low * 1.01, 17, 3, log=True)
    x = Axis(points[0][0], points[-1][0], 3, 69)
    svg = _svg(72, 20)
    svg.set("class", "sparkline")
    path = " ".join(f"{x(a)},{y(b)}" for a, b in points)
    line = ET.SubElement(svg, "polyline", {"class": "line", "points": path})
    _titled(line, ", ".join(f"{value:.3g}" for value in values))
    _mark(svg, x(points[-1][0]), y(points[-1][1]), 2.2, "last", f"{points[-1][1]:.3g}")
    return _markup(svg)


def number(value: float) -> str:
    """A figure at a glance: 24.93, 124.2, 820,111, 0.0123, 3.1e-06."""
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-4:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if size else "0"


def _axes(
    xs: Sequence[float], ys: Sequence[float], width: int, height: int, *, log: bool, pad_x: float = 0.0
) -> tuple[Axis, Axis]:
    low, high = min(ys), max(ys)
    if log:
        grow = max(1.05, (high / low) ** 0.06)
        low, high = low / grow, high * grow
    else:
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = (0.0 if low == 0 else low - room), high + room
    left, right = min(xs) - pad_x, max(xs) + pad_x
    if left == right:
        left, right = left - 1, right + 1
    return Axis(left, right, LEFT, width - RIGHT), Axis(low, high, height - BOTTOM, TOP, log=log)


def _frame(x: Axis, y: Axis, width: int, height: int, x_label: str, y_label: str) -> ET.Element:
    """An SVG with grid, tick labels and the names of both axes; x counts things, so its ticks are whole."""
    svg = _svg(width, height)
    for tick in y.ticks():
        _line(svg, "grid", LEFT, y(tick), width - RIGHT, y(tick))
        _text(svg, LEFT - 7, y(tick) + 4, _tick(tick), "end")
    for tick in x.ticks(8):
        if tick == int(tick):
            _text(svg, x(tick), height - BOTTOM + 16, f"{tick:g}", "middle")
    _text(svg, (LEFT + width - RIGHT) / 2, height - 4, x_label, "middle")
    svg.set("role", "img")
    svg.set("aria-label", f"{y_label} over {x_label}")
    return svg


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, finer where the axis spans few of them, linear where it spans less than a factor of two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) <= most + 1:
            return found if len(found) >= 3 else _linear_ticks(low, high, most - 1)
    return found[:: math.ceil(len(found) / most)]


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    """The points that have a place on the axes."""

    def real(value: object) -> bool:
        return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e300

    return [(a, b) for a, b in points if real(a) and real(b) and (b > 1e-300 or not log)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    step = math.ceil(len(points) / MOST_POINTS)
    return list(points) if step <= 1 else [*points[:-1:step], points[-1]]


def _svg(width: float, height: float) -> ET.Element:
    return ET.Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "xmlns": "http://www.w3.org/2000/svg"})


def _line(svg: ET.Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    ET.SubElement(svg, "line", {"class": kind, "x1": f"{x1:g}", "y1": f"{y1:g}", "x2": f"{x2:g}", "y2": f"{y2:g}"})


def _mark(svg: ET.Element, x: float, y: float, radius: float, kind: str, title: str) -> ET.Element:
    mark = ET.SubElement(svg, "circle", {"class": f"mark {kind}", "cx": f"{x:g}", "cy": f"{y:g}", "r": f"{radius:g}"})
    _titled(mark, title)
    return mark


def _text(svg: ET.Element, x: float, y: float, text: str, anchor: str, kind: str = "tick") -> None:
    element = ET.SubElement(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": kind})
    element.text = _printable(text)


def _titled(element: ET.Element, title: str) -> None:
    ET.SubElement(element, "title").text = _printable(title)


def _printable(text: str) -> str:
    """Without control characters, which no XML may hold."""
    return "".join(c if c.isprintable() else " " for c in text)


def _markup(svg: ET.Element) -> Markup:
    """The serialized tree, in which every text is escaped."""
    return Markup(ET.tostring(svg, encoding="unicode"))
