"""Small SVGs: lines over training steps or noise levels, with a band for standard errors, and points in the plane. Numbers in, text out;
nothing is read here."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Line", "Point", "curve", "scatter"]

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 30
DOTS = 60
"""Points of a line that can be pointed at: more would be a smear."""


class Point(NamedTuple):
    """A value at a step, and its standard error (0: none is known)."""

    step: float
    value: float
    error: float = 0.0


@dataclasses.dataclass(frozen=True)
class Line:
    """``colour`` is anything that CSS takes."""

    label: str
    colour: str
    points: Sequence[Point]

    def finite(self) -> list[Point]:
        return [p for p in self.points if math.isfinite(p.value) and math.isfinite(p.error)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most ``count + 1`` round numbers from ``low`` to ``high``."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _range(values: list[float]) -> tuple[float, float]:
    """What the vertical axis shows. The highest fiftieth may lie above it: the first losses would flatten all the rest."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[round(0.98 * (len(ordered) - 1))]
    room = (high - low) or abs(high) or 1.0
    return low - 0.06 * room, high + 0.08 * room


def curve(lines: Sequence[Line], *, title: str, over: str = "step") -> str:
    """A figure of ``lines`` over what ``over`` names, or an empty string where they have no points."""
    drawn = [(line, line.finite()) for line in lines if line.finite()]
    if not drawn:
        return ""
    every = [p for _, points in drawn for p in points]
    x0, x1 = min(p.step for p in every), max(p.step for p in every)
    x1 = x1 if x1 > x0 else x0 + 1
    y0, y1 = _range([p.value for p in every])

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return min(HEIGHT - BOTTOM, max(4.0, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)))

    parts = [f'<text x="{LEFT - 6}" y="{HEIGHT - 10}" text-anchor="end">{html.escape(over)}</text>']
    for value in ticks(y0, y1):
        y = py(value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>'
        )
    for value in ticks(x0, x1):
        parts.append(f'<text x="{px(value):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{value:.7g}</text>')
    for number, (line, points) in enumerate(drawn):
        if any(p.error for p in points):
            band = [(p.step, p.value + 2 * p.error) for p in points]
            band += [(p.step, p.value - 2 * p.error) for p in reversed(points)]
            corners = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in band)
            parts.append(f'<polygon points="{corners}" fill="{line.colour}" opacity="0.18"/>')
        path = " ".join(f"{px(p.step):.1f},{py(p.value):.1f}" for p in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.6"/>')
        for p in points[:: max(1, len(points) // DOTS)]:
            note = (
                f"{line.label}: {p.value:.4g}" + (f" ± {p.error:.2g}" if p.error else "") + f" at {over} {p.step:.7g}"
            )
            parts.append(
                f'<circle cx="{px(p.step):.1f}" cy="{py(p.value):.1f}" r="{4 if p.error else 2.2}" fill="{line.colour}">'
                f"<title>{html.escape(note)}</title></circle>"
            )
        if len(drawn) > 1:
            parts.append(
                f'<text x="{WIDTH - RIGHT - 6}" y="{TOP + 12 + 16 * number}" text-anchor="end" style="fill:{line.colour}">{html.escape(line.label)}</text>'
            )
    name = html.escape(title)
    return (
        f'<figure><figcaption>{name}</figcaption><svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{name} over {html.escape(over)}">{"".join(parts)}</svg></figure>'
    )


def scatter(rows: npt.NDArray[Any]) -> str:
    """A figure of rows of real numbers by their first two, or an empty string where they have but one."""
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    flat = flat[np.isfinite(flat).all(1)]
    if not len(flat) or flat.shape[1] < 2:
        return ""
    middle, side = flat[:, :2].mean(0), WIDTH - 2 * TOP
    reach = max(float(np.abs(flat[:, :2] - middle).max()), 1e-9)  # the same scale both ways
    dots = "".join(
        f'<circle cx="{TOP + side * (0.5 + x / (2 * reach)):.1f}" cy="{TOP + side * (0.5 - y / (2 * reach)):.1f}" r="1.6"/>'
        for x, y in flat[:, :2] - middle
    )
    name = f"{len(flat):,} rows by their first two of {flat.shape[1]:,} numbers"
    return (
        f'<figure><figcaption>{name}</figcaption><svg class="curve" viewBox="0 0 {WIDTH} {WIDTH}" role="img" '
        f'aria-label="{name}"><g fill="var(--a)" opacity="0.5">{dots}</g></svg></figure>'
    )
