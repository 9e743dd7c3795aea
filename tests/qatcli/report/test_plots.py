"""Plots: marks at the right places, round ticks, nothing where nothing can be drawn, and text that stays text."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

import pytest

from qatcli.report import plots

NAME = "{http://www.w3.org/2000/svg}"


def elements(svg: str | None, name: str) -> list[ET.Element]:
    assert svg is not None
    return list(ET.fromstring(svg).iter(NAME + name))


def ticks(svg: str | None) -> list[str]:
    return [str(text.text) for text in elements(svg, "text")]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(24.931, "24.93"), (124.23, "124.2"), (820111.3, "820,111"), (0.01234, "0.01234"), (3.1e-6, "3.1e-06"), (0, "0")],
)
def test_numbers(value: float, shown: str) -> None:
    assert plots.number(value) == shown


def test_a_log_axis_places_equal_factors_at_equal_distances() -> None:
    axis = plots.Axis(1.0, 100.0, 0.0, 200.0, log=True)
    assert [axis(value) for value in (1, 10, 100)] == [0, 100, 200]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.021, 0.34), (0.5, 0.52), (3e-5, 2e4), (24.0, 900000.0), (7.0, 7.1)])
def test_ticks_are_few_and_inside(log: bool, low: float, high: float) -> None:
    found = plots.Axis(low, high, 0, 1, log=log).ticks()
    assert 2 <= len(found) <= 8
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in found)
    assert found == sorted(set(found))


def test_ranges_join_before_and_after() -> None:
    svg = plots.ranges([(0, 0.4, 0.2), (1, 0.8, 0.1)], x_label="block", y_label="loss")
    marks = elements(svg, "circle")
    assert [mark.get("class") for mark in marks] == ["mark before", "mark after"] * 2
    before, after = (float(str(mark.get("cy"))) for mark in marks[2:])
    assert before < after, "a larger loss is further up"
    assert "block 1, after training: 0.1" in [title.text for title in elements(svg, "title")]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0, None, "1"])
def test_what_has_no_place_on_a_log_scale_is_left_out(bad: object) -> None:
    series = [plots.Series("a", [(0, 1.0), (1, bad), (2, 2.0)], "quantized", marks=True)]  # type: ignore[list-item]
    assert len(elements(plots.lines(series, x_label="x", y_label="y", log=True), "circle")) == 2
    assert plots.ranges([(0, bad, 1.0)], x_label="x", y_label="y") is None  # type: ignore[list-item]


def test_nothing_to_draw() -> None:
    assert plots.lines([], x_label="x", y_label="y") is None
    assert plots.lines([plots.Series("a", [], "quantized")], x_label="x", y_label="y") is None
    assert plots.bars([], x_label="x", y_label="y", title=lambda at, value: "") is None
    assert plots.heat_map([], [], {}, x_label="x", span=(0, 1)) is None
    assert plots.scale([("a", "other", 1.0)]) is None
    assert plots.sparkline([1.0]) is None


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [0.0, 0.0], [1e-9, 1e9], [1e300, 1.0]])
def test_degenerate_data_are_drawn(values: list[float]) -> None:
    points = list(enumerate(values))
    svg = plots.lines([plots.Series("a", points, "quantized", marks=True)], x_label="x", y_label="y")
    for mark in elements(svg, "circle"):
        assert math.isfinite(float(str(mark.get("cx")))) and math.isfinite(float(str(mark.get("cy"))))


def test_long_lines_are_thinned_and_keep_their_end() -> None:
    series = [plots.Series("a", [(i, 1.0 + i) for i in range(100_000)], "quantized")]
    (line,) = elements(plots.lines(series, x_label="x", y_label="y"), "polyline")
    points = str(line.get("points")).split()
    assert 200 < len(points) <= plots.MOST_POINTS + 1
    assert points[-1].startswith(f"{520 - plots.RIGHT}")


def test_a_heat_map_shades_from_smallest_to_largest() -> None:
    values = {("q", 0): 1.0, ("q", 1): 2.0, ("k", 1): 3.0}
    shades = {}
    for high in (3.0, 5.0):
        cells = elements(plots.heat_map(["q", "k"], [0, 1], values, x_label="block", span=(1.0, high)), "rect")
        shades[high] = [float(str(cell.get("fill-opacity"))) for cell in cells]
        assert len(shades[high]) == 3
        assert shades[high] == sorted(shades[high])
    assert shades[3.0][-1] == 1.0
    assert shades[5.0][-1] < 0.6, "two maps with the same span have the same shades"


def test_text_stays_text() -> None:
    hostile = '</title><script>alert("1")</script>\x00\x0b&'
    svg = plots.scale([(hostile, "other", 1.0), ("b", "other", 2.0)])
    assert svg is not None
    assert "<script" not in svg
    assert any("<script>" in label for label in ticks(svg)), "escaped in the source, whole for the reader"
