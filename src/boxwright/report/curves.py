"""Line charts and matrices as SVG. Their colours are CSS classes, so that they follow the light or dark scheme.

The page must define the classes `grid`, `axis`, `tick`, `cell` and, for curves, `c0` to `c7`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

NUM_COLOURS = 8
MAX_POINTS = 300


@dataclass(frozen=True)
class Curve:
    """A named line of a chart."""

    name: str
    """Name in the legend."""
    xs: Sequence[float] | np.ndarray
    """x coordinates in ascending order."""
    ys: Sequence[float] | np.ndarray
    """y coordinates, one per x. Points with NaN or infinity are skipped."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` tick positions at round numbers, which cover the range from low to high."""
    if not high > low:
        high = low + 1
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def line_chart(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (520, 280),
    legend: bool = True,
) -> str:
    """HTML figure with a line chart.

    Args:
        curves: the curves; colours repeat after `NUM_COLOURS` curves.
        title: title above the chart; escaped by this function.
        x_label: label below the x axis.
        x_range: range of the x axis; by default the range of the data.
        y_range: range of the y axis; by default the range of the data including zero.
        size: (width, height) in pixels, before the page scales the figure.
        legend: whether to add a legend, if there are several curves.
    """
    width, height = size
    left, right, top, bottom = 44, 12, 8, 34 if x_label else 22
    points = [_clean(curve) for curve in curves]
    all_x = np.concatenate([np.zeros(0), *(xs for xs, _ in points)])
    all_y = np.concatenate([np.zeros(0), *(ys for _, ys in points)])
    if x_range is None:
        x_range = (float(all_x.min()), float(all_x.max())) if len(all_x) else (0.0, 1.0)
    if y_range is None:
        y_range = (min(0.0, float(all_y.min())), float(all_y.max())) if len(all_y) else (0.0, 1.0)
    small = size[0] < 300
    y_ticks = ticks(*y_range, 2 if small else 5)
    if x_range[1] > x_range[0]:
        x_ticks = ticks(*x_range, 2 if small else 6)
    else:  # all points have the same x: put it in the middle of the axis
        x_ticks, x_range = [x_range[0]], (x_range[0] - 1, x_range[0] + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    x_low, x_high = x_range

    def to_pixels(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        across = left + (xs - x_low) / (x_high - x_low) * (width - left - right)
        down = top + (y_high - ys) / (y_high - y_low) * (height - top - bottom)
        return across, down

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">']
    for tick in y_ticks:
        y = float(to_pixels(np.array(x_low), np.array(tick))[1])
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x = float(to_pixels(np.array(tick), np.array(y_low))[0])
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{height - bottom + 15}" text-anchor="middle">{_number(tick)}</text>'
            )
    if x_label:
        middle = (left + width - right) / 2
        parts.append(f'<text class="axis" x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for index, (xs, ys) in enumerate(points):
        across, down = to_pixels(xs, ys)
        colour = f"c{index % NUM_COLOURS}"
        if len(xs) == 1:
            parts.append(f'<circle class="{colour} dot" cx="{across[0]:.1f}" cy="{down[0]:.1f}" r="3"/>')
        elif len(xs):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
            parts.append(f'<polyline class="{colour}" points="{path}"/>')
    parts.append("</svg>")
    legend_html = ""
    if legend and len(curves) > 1:
        keys = (
            f'<span class="key"><i class="c{index % NUM_COLOURS}"></i>{escape(curve.name)}</span>'
            for index, curve in enumerate(curves)
        )
        legend_html = f'<div class="legend">{"".join(keys)}</div>'
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}{legend_html}</figure>"


def _clean(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """The finite points of a curve, subsampled to `MAX_POINTS`."""
    xs, ys = np.asarray(curve.xs, dtype=np.float64), np.asarray(curve.ys, dtype=np.float64)
    finite = np.isfinite(xs) & np.isfinite(ys)
    xs, ys = xs[finite], ys[finite]
    if len(xs) > MAX_POINTS:
        keep = np.unique(np.linspace(0, len(xs) - 1, MAX_POINTS).round().astype(int))
        xs, ys = xs[keep], ys[keep]
    return xs, ys


def _number(value: float) -> str:
    """Short text of a tick: 0.5, 20, 90k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"


def matrix_chart(counts: np.ndarray, names: Sequence[str], *, row_title: str, column_title: str) -> str:
    """Square matrix of counts as SVG. The shade of a cell is its share of the row's sum; the tooltip has its values.

    Args:
        counts: [K, K] int, K >= 1.
        names: K names, for rows and columns.
        row_title: title of the rows.
        column_title: title of the columns.
    """
    num = len(names)
    cell = min(44.0, max(10.0, 620 / num))
    font = min(12.0, cell * 0.9)
    margin = min(150.0, 12 + font * 0.58 * max(len(name) for name in names))
    side = margin + num * cell + 2
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    middle, full = margin + num * cell / 2, f"{side + 14:.0f}"
    about = escape(f"{row_title} by {column_title}", quote=True)
    parts = [
        f'<svg viewBox="0 0 {full} {full}" style="max-width:{full}px" role="img" aria-label="{about}">',
        '<g transform="translate(14 14)">',
        f'<text class="axis" x="{middle:.1f}" y="-3" text-anchor="middle">{escape(column_title)}</text>',
        f'<text class="axis" transform="translate(-3 {middle:.1f}) rotate(-90)" text-anchor="middle">',
        f"{escape(row_title)}</text>",
    ]
    for index, name in enumerate(names):
        short = escape(name if len(name) <= 22 else name[:21] + "…")
        middle = margin + (index + 0.5) * cell
        style = f'class="tick" style="font-size:{font:.1f}px"'
        parts.append(f'<text {style} x="{margin - 5:.1f}" y="{middle + font / 3:.1f}" text-anchor="end">{short}</text>')
        parts.append(
            f'<text {style} transform="translate({middle + font / 3:.1f} {margin - 5:.1f}) rotate(-90)">{short}</text>'
        )
    parts.append(
        f'<rect class="frame" x="{margin:.1f}" y="{margin:.1f}" width="{num * cell:.1f}" height="{num * cell:.1f}"/>'
    )
    for row, column in zip(*np.nonzero(counts), strict=True):
        count, share = int(counts[row, column]), float(shares[row, column])
        x, y = margin + column * cell, margin + row * cell
        kind = "cell right" if row == column else "cell"
        about = escape(f"{names[row]} → {names[column]}: {count} ({share:.0%})")
        parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
            f'fill-opacity="{0.12 + 0.88 * share:.2f}"><title>{about}</title></rect>'
        )
        if cell >= 26:
            shade = "count strong" if share > 0.5 else "count"
            parts.append(
                f'<text class="{shade}" x="{x + cell / 2 - 0.5:.1f}" y="{y + cell / 2 + 3.5:.1f}" '
                f'text-anchor="middle">{count}</text>'
            )
    parts.append("</g></svg>")
    return "".join(parts)
