"""Search for contractions: the one unknown behind a known sum in which all other terms move more slowly than it.

``y = a x + r(x)`` has exactly one solution, and ``x <- (y - r(x)) / a`` converges to it, if ``b < |a|`` is a Lipschitz constant
of r (Banach; Behrmann et al., Invertible Residual Networks, arXiv 1811.00995). The pair (a, b) is composed through the graph
from x to y: a linear relation sums both; any other component turns an input with (a, b) into an output with
``(0, L (|a| + b))`` by its own Lipschitz bound L, summed over its inputs. Bounds are in the Euclidean norm of a whole sequence.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

from sedd_graph.inverse.system import FixedPoint, Key, System

__all__ = ["MARGIN", "ContractionSearch", "find_fixed_point", "iterations"]

MARGIN = 1e-9
"""Smallest distance of a bound from 1: a nearer one may reach 1 by rounding, and is refused."""


@dataclasses.dataclass(frozen=True, eq=False)
class ContractionSearch:
    """Result of the search behind one known value: a ``fixed_point``, or the reason why there is none.

    Attributes:
        work: Number of values and components visited.
        sources: Independent unknowns that the value depends on, if there are several.
        target: The single unknown that all others follow from, or -1.
        scale: Factor of ``target`` in the value.
        bound: Lipschitz constant of the rest, relative to ``scale``.
        unbounded: Components on the way without a Lipschitz bound, as (node, input port, output port).
    """

    work: int
    fixed_point: FixedPoint | None = None
    sources: tuple[int, ...] = ()
    target: int = -1
    scale: Fraction = Fraction(0)
    bound: float = math.inf
    unbounded: tuple[tuple[int, str, str], ...] = ()


def iterations(bound: float) -> int:
    """Return how many plain steps of a contraction with Lipschitz constant ``bound`` reduce the error to 1e-6 of its start."""
    return 1 if bound <= 0 else max(1, math.ceil(math.log(1e-6) / math.log(bound)))


def find_fixed_point(system: System, keys: Sequence[Key | None], value: int) -> ContractionSearch:
    """Search for the contraction behind ``value``, which is known.

    Visits unknown values backwards from it, latest first. The first value that is alone on the frontier is the nearest one
    from which all others follow; a farther one cannot do better, since the pairs (a, b) of both stretches would multiply.
    """
    flat = system.flat
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
            return ContractionSearch(len(seen), sources=sources)
        cone.append(v)
        expand(v)
    nodes = tuple(sorted({flat.producer[u] for u in (*cone, value)}))
    moves: dict[int, tuple[Fraction, float]] = {v: (Fraction(1), 0.0)}
    unbounded: list[tuple[int, str, str]] = []
    for index in nodes:
        for port, out in flat.nodes[index].outputs.items():
            if out == value or out in seen:
                moves[out] = _moved(system, index, port, moves, unbounded)
    scale, moved = moves[value]
    work = len(seen) + len(nodes)
    bound = moved / abs(float(scale)) if scale else math.inf
    if bound >= 1 - MARGIN:
        return ContractionSearch(work, target=v, scale=scale, bound=bound, unbounded=tuple(unbounded))
    inside = {v, *(out for index in nodes for out in flat.nodes[index].outputs.values() if out in seen)}
    outside = dict.fromkeys(u for index in nodes for u in flat.nodes[index].needs if u not in inside)
    count = iterations(bound)
    cost = count * sum(flat.nodes[index].cost for index in nodes)
    needs = tuple({value: None} | outside)
    return ContractionSearch(work, FixedPoint(v, value, scale, bound, count, nodes, needs, cost))


def _moved(
    system: System,
    index: int,
    port: str,
    moves: dict[int, tuple[Fraction, float]],
    unbounded: list[tuple[int, str, str]],
) -> tuple[Fraction, float]:
    """Return (a, b) of one output of a component, and append its missing bounds to ``unbounded``.

    ``moves`` gives (a, b) of the unknown values; all others are known.
    """
    node = system.flat.nodes[index]
    factors = node.algebra.linear.get(port)
    scale, moved = Fraction(0), 0.0
    for name, values in node.inputs.items():
        for u in values:
            a, b = moves.get(u, (Fraction(0), 0.0))
            if not a and not b:
                continue  # known, or constant such as x - x
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
