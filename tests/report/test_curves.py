"""Charts are well-formed SVG, also for long, empty and non-finite data."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from boxwright.report.curves import MAX_POINTS, Curve, line_chart, matrix_chart, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 90_000, [0, 20e3, 40e3, 60e3, 80e3, 100e3]),
        (3, 3, [3, 3.2, 3.4, 3.6, 3.8, 4]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_line_chart_is_valid_svg_and_skips_non_finite_points() -> None:
    long = Curve("a < b", range(5000), np.sin(np.arange(5000) / 500))
    gaps = Curve("gaps", [0, 1, 2], [float("nan"), 1, 0.5])
    figure = ElementTree.fromstring(
        line_chart([long, gaps, Curve("one", [4], [1])], title="Loss & more", x_label="step")
    )
    first, second = figure.findall(".//polyline")
    assert len(first.get("points", "").split()) == MAX_POINTS
    assert len(second.get("points", "").split()) == 2
    assert len(figure.findall(".//circle")) == 1
    ElementTree.fromstring(line_chart([Curve("none", [], [])], title="Empty"))
    single = ElementTree.fromstring(line_chart([Curve("one", [645], [1])], title="One", size=(360, 220)))
    below = [text for text in single.iter("text") if text.get("text-anchor") == "middle"]
    assert [text.text for text in below] == ["645"], "a single x value should have a single tick"
    assert below[0].get("x") == single.find(".//circle").get("cx")


def test_matrix_chart_has_tooltips_with_counts_and_shares() -> None:
    counts = np.array([[3, 1], [0, 0]])
    svg = ElementTree.fromstring(matrix_chart(counts, ["<one>", "nothing"], row_title="is", column_title="was"))
    titles = [title.text for title in svg.iter("title")]
    assert titles == ["<one> → <one>: 3 (75%)", "<one> → nothing: 1 (25%)"]
