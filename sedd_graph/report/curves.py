"""Figures of the report as SVG: line plots over training steps or noise levels with error bands, and scatter plots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from sedd_graph.report.render import render

__all__ = ["Line", "Point", "curve", "scatter"]

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 30
DOTS = 60
"""Maximum number of points of a line that are drawn as dots with a tooltip."""


class Point(NamedTuple):
    """A point of a line plot: horizontal position, value, and the value's standard error (0 if unknown)."""

    step: float
    value: float
    error: float = 0.0

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" ± {self.error:.2g}" if self.error else "")


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a plot.

    Attributes:
        label: Label in the legend.
        colour: CSS colour.
        points: Points from left to right.
    """

    label: str
    colour: str
    points: Sequence[Point]

    def finite(self) -> list[Point]:
        """Return the points whose value and standard error are finite."""
        return [p for p in self.points if math.isfinite(p.value) and math.isfinite(p.error)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return positions of axis ticks: at most ``count + 1`` round numbers between ``low`` and ``high``."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: list[float]) -> tuple[float, float]:
    """Return the range of the vertical axis. The top 2 % of values may exceed it, such as high initial losses."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[round(0.98 * (len(ordered) - 1))]
    room = (high - low) or abs(high) or 1.0
    return low - 0.06 * room, high + 0.08 * room


def curve(lines: Sequence[Line], *, title: str, over: str = "step") -> Markup:
    """Return a line plot as SVG, or empty markup if no line has a finite point.

    Args:
        lines: Lines to draw; their labels are shown if there is more than one.
        title: Caption of the figure.
        over: Label of the horizontal axis.
    """
    drawn = [(line, line.finite()) for line in lines if line.finite()]
    if not drawn:
        return Markup()
    every = [p for _, points in drawn for p in points]
    x0, x1 = min(p.step for p in every), max(p.step for p in every)
    x1 = x1 if x1 > x0 else x0 + 1
    y0, y1 = _range([p.value for p in every])

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return min(HEIGHT - BOTTOM, max(4.0, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)))

    def path(corners: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in corners)

    drawings = []
    for line, points in drawn:
        band = [(p.step, p.value + 2 * p.error) for p in points]
        band += [(p.step, p.value - 2 * p.error) for p in reversed(points)]
        drawings.append(
            {
                "label": line.label,
                "colour": line.colour,
                "band": path(band) if any(p.error for p in points) else "",
                "points": path([(p.step, p.value) for p in points]),
                "readings": " ".join(f"{p.step:.7g},{str(p).replace(' ', '')}" for p in points),
                "dots": [
                    {
                        "x": f"{px(p.step):.1f}",
                        "y": f"{py(p.value):.1f}",
                        "radius": 4 if p.error else 2.2,
                        "note": f"{line.label}: {p} at {over} {p.step:.7g}",
                    }
                    for p in points[:: max(1, len(points) // DOTS)]
                ],
            }
        )
    return render(
        "curve.html",
        title=title,
        over=over,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        top=TOP,
        rows=[(f"{py(v):.1f}", f"{py(v) + 4:.1f}", f"{v:.6g}") for v in ticks(y0, y1)],
        columns=[(f"{px(v):.1f}", f"{v:.7g}") for v in ticks(x0, x1)],
        lines=drawings,
    )


def scatter(rows: npt.NDArray[Any]) -> Markup:
    """Return a scatter plot of the first two columns of ``rows``, as SVG.

    Args:
        rows: Real numbers, [row, ...]; axes after the first are flattened to columns.

    Returns:
        The plot, or empty markup if there are fewer than two columns or no finite rows.
    """
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    flat = flat[np.isfinite(flat).all(1)]
    if not len(flat) or flat.shape[1] < 2:
        return Markup()
    middle, side = flat[:, :2].mean(0), WIDTH - 2 * TOP
    reach = max(float(np.abs(flat[:, :2] - middle).max()), 1e-9)  # the same scale both ways
    dots = [
        (f"{TOP + side * (0.5 + x / (2 * reach)):.1f}", f"{TOP + side * (0.5 - y / (2 * reach)):.1f}")
        for x, y in flat[:, :2] - middle
    ]
    title = f"{len(flat):,} rows by their first two of {flat.shape[1]:,} numbers"
    return render("scatter.html", title=title, width=WIDTH, dots=dots)
