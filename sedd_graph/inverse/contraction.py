"""Search for contractions: residual sums ``y = a x + r(x)`` that a fixed-point iteration can invert.

Here y is known, x is unknown, and every other unknown term of the sum is a function of x. The equation has exactly one
solution, to which ``x <- (y - r(x)) / a`` converges, if b < |a| is a Lipschitz constant of r (Banach; Behrmann et al.,
Invertible Residual Networks, arXiv 1811.00995). The pair (a, b) is composed through the graph from x to y. A weighted
sum of inputs has the weighted sum of their pairs (with absolute weights for b). The output of any other component has
a = 0, and b the sum over its inputs of L (|a| + b), where (a, b) is the pair of the input and L the component's
Lipschitz bound with respect to that input. Lipschitz constants are in the Euclidean norm of a whole sequence.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

from sedd_graph.inverse.factors import rational
from sedd_graph.inverse.system import FixedPoint, Key, System

__all__ = ["MARGIN", "ContractionSearch", "find_fixed_point", "iterations"]

MARGIN = 1e-9
"""A contraction whose Lipschitz constant is 1 - ``MARGIN`` or more is rejected, since rounding could raise it to 1."""


@dataclasses.dataclass(frozen=True, eq=False)
class ContractionSearch:
    """Result of the search for a contraction in a sum y = a x + r(x): the contraction, or the reason why there is none.

    Values and components are identified by their indices in :class:`sedd_graph.inverse.flat.Flat`. If a contraction is
    found, the attributes after ``fixed_point`` have their defaults.

    Attributes:
        work: Number of values and components visited.
        fixed_point: The contraction; None if there is none.
        sources: If the sum depends on several independent unknown inputs of the region, so that there is no x: these
            inputs. Otherwise empty.
        target: The unknown value x, from which all other unknown terms are computed; -1 if there is none.
        scale: Factor a of x in the sum.
        bound: Lipschitz constant of r divided by |a|; infinite if a is 0 or a component of r has no Lipschitz bound.
        unbounded: Components of r without a Lipschitz bound, as (component, input port, output port).
    """

    work: int
    fixed_point: FixedPoint | None = None
    sources: tuple[int, ...] = ()
    target: int = -1
    scale: Fraction = Fraction(0)
    bound: float = math.inf
    unbounded: tuple[tuple[int, str, str], ...] = ()


def iterations(bound: float) -> int:
    """Return the number of plain (Picard) steps that reduce the error to 1e-6 of its initial value.

    Args:
        bound: Lipschitz constant of the contraction, in [0, 1).
    """
    return 1 if bound <= 0 else max(1, math.ceil(math.log(1e-6) / math.log(bound)))


def find_fixed_point(system: System, keys: Sequence[Key | None], value: int) -> ContractionSearch:
    """Search for a contraction that derives an unknown value x from a known value y = a x + r(x).

    The search visits the unknown values that y depends on, from y towards the inputs, in reverse order of computation.
    As soon as only one of them is left to visit, all visited ones are computed from it, and it is taken as x. A value x
    further from y cannot give a smaller Lipschitz bound, since the bounds of the two parts of the path would multiply.

    Args:
        system: Equations of the region.
        keys: For each value, by index, the cost of its derivation; None marks the unknown values.
        value: Index of y, the known output of a component that has unknown inputs.

    Returns:
        The contraction, or the reason why there is none.
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
                if factor := rational(factors.get(name, 0)):
                    scale += factor * a
                    moved += abs(float(factor)) * b
            elif (name, port) in node.algebra.lipschitz:
                if lipschitz := node.algebra.lipschitz[name, port]:
                    moved += lipschitz * (abs(float(a)) + b)
            else:
                unbounded.append((index, name, port))
                moved = math.inf
    return scale, moved
