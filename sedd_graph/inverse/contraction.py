"""Fixed points: the one unknown behind a known sum, where everything else in the sum moves more slowly than it.

``y = a x + r(x)`` has exactly one solution, and ``x <- (y - r(x)) / a`` runs into it, if r moves at most b < |a| times as
far as x does (Banach; Behrmann et al., Invertible Residual Networks, arXiv 1811.00995). The pair (a, b) is composed
through the graph from x to y: a linear relation sums both; any other component turns what moves at most |a| + b into
(0, L (|a| + b)) by its own bound L, summed over its inputs. Bounds are in the Euclidean norm of a whole sequence.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sedd_graph.inverse.propagate import Key, Problem

__all__ = ["MARGIN", "Fixed", "Fixpoint", "find_fixpoint", "iterations"]

MARGIN = 1e-9
"""A bound this near to 1 is refused: it may be 1 but for rounding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fixpoint:
    """``value = scale * target + r(target)``; ``nodes`` evaluate it, in order."""

    target: int
    value: int
    scale: Fraction
    bound: float
    iterations: int
    nodes: tuple[int, ...]
    needs: tuple[int, ...]
    cost: float


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """What the search behind one known value found: a ``fixpoint``, or why there is none.

    ``sources``: the unknowns that it goes back to, none of which all the others follow from. ``target``: the one that they
    do follow from, with ``scale`` and ``bound`` (relative to scale) where those exist; ``unbounded`` lists the components
    on the way that declare no Lipschitz bound, as (node, input port, output port).
    """

    work: int
    fixpoint: Fixpoint | None = None
    sources: tuple[int, ...] = ()
    target: int = -1
    scale: Fraction = Fraction(0)
    bound: float = math.inf
    unbounded: tuple[tuple[int, str, str], ...] = ()


def iterations(bound: float) -> int:
    """How many bring an error below 1e-6 of where it started."""
    return 1 if bound <= 0 else max(1, math.ceil(math.log(1e-6) / math.log(bound)))


def find_fixpoint(problem: Problem, keys: Sequence[Key | None], value: int) -> Fixed:
    """Look for the contraction behind ``value``, which is known.

    Going back from it through unknown values, latest first, the first one that stands alone is the nearest from which
    all others follow. No farther one can do better: a and b of the two stretches would have to multiply.
    """
    flat = problem.flat
    frontier: list[tuple[int, int]] = []
    seen: set[int] = set()

    def expand(v: int) -> None:
        for u in flat.nodes[flat.producer[v]].needs:
            if keys[u] is None and u not in seen:
                seen.add(u)
                heapq.heappush(frontier, (-flat.producer[u], u))

    expand(value)
    cone: list[int] = []
    while True:
        _, v = heapq.heappop(frontier)
        if not frontier:
            break
        if flat.producer[v] < 0:
            sources = tuple(sorted([v, *(u for _, u in frontier)], key=flat.rank.__getitem__))
            return Fixed(len(seen), sources=sources)
        cone.append(v)
        expand(v)
    nodes = tuple(sorted({flat.producer[u] for u in (*cone, value)}))
    moves: dict[int, tuple[Fraction, float]] = {v: (Fraction(1), 0.0)}
    unbounded: list[tuple[int, str, str]] = []
    for index in nodes:
        for port, out in flat.nodes[index].outputs.items():
            if out == value or out in seen:
                moves[out] = _moved(problem, index, port, moves, unbounded)
    scale, moved = moves[value]
    work = len(seen) + len(nodes)
    bound = moved / abs(float(scale)) if scale else math.inf
    if bound >= 1 - MARGIN:
        return Fixed(work, target=v, scale=scale, bound=bound, unbounded=tuple(unbounded))
    inside = {v, *(out for index in nodes for out in flat.nodes[index].outputs.values() if out in seen)}
    outside = dict.fromkeys(u for index in nodes for u in flat.nodes[index].needs if u not in inside)
    count = iterations(bound)
    cost = count * sum(flat.nodes[index].cost for index in nodes)
    return Fixed(work, Fixpoint(v, value, scale, bound, count, nodes, tuple({value: None} | outside), cost))


def _moved(
    problem: Problem,
    index: int,
    port: str,
    moves: dict[int, tuple[Fraction, float]],
    unbounded: list[tuple[int, str, str]],
) -> tuple[Fraction, float]:
    """(a, b) of one output. What is not in ``moves`` is known."""
    node = problem.flat.nodes[index]
    factors = node.algebra.linear.get(port)
    scale, moved = Fraction(0), 0.0
    for name, values in node.inputs.items():
        for u in values:
            a, b = moves.get(u, (Fraction(0), 0.0))
            if not a and not b:
                continue  # known, or such as x - x: it stands still
            if factors is not None:
                if factor := Fraction(factors.get(name, 0)):
                    scale += factor * a
                    moved += abs(float(factor)) * b
            elif (name, port) in node.algebra.lipschitz:
                if lipschitz := node.algebra.lipschitz[name, port]:
                    moved += lipschitz * (abs(float(a)) + b)
            else:
                unbounded.append((index, name, port))
                moved = math.inf
    return scale, moved
