"""Search for the smallest set of values (tensors of a region) to store so that all inputs can be recovered.

This is a shortest-hyperpath problem, which is NP-hard, so the search is bounded.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

from sedd_graph.component.axes import AxisError, PortType, Size
from sedd_graph.inverse.flat import numbers
from sedd_graph.inverse.program import Remedy
from sedd_graph.inverse.propagate import Closure

__all__ = ["cheapest"]

WORK, TRIES = 300_000, 2000
"""Bounds of the search: visits of edges and linear relations (``WORK``), and sets of values tried (``TRIES``)."""

BYTES = {"float": 4, "int": 8, "bool": 1}
"""Bytes per element by kind of tensor type; ``float`` counts as float32."""


def _count(found: PortType, sizes: Mapping[str, int]) -> int:
    total = BYTES[found.kind]
    for dim in found.dims:
        total *= dim.size.evaluate(sizes)
    return total


def cheapest(closure: Closure, facts: Sequence[int], sizes: Mapping[str, int]) -> Remedy:
    """Return the cheapest set of values to store so that all inputs of a region can be recovered.

    The cost of a set is its size in bytes. Sets of unknown values are tried in order of cost; the first one with which
    all inputs can be derived is the cheapest. The search has two limits: its work (:data:`WORK`) and the number of sets
    that are tried (:data:`TRIES`). If it reaches one, the result is the set of inputs that cannot be recovered, without
    those that can be derived from the others; :attr:`Remedy.lower` is then a lower bound on the size of the cheapest
    set.

    Args:
        closure: All values that can be derived from ``facts``.
        facts: Indices of the values (tensors) that are known at inversion: outputs, conditioning inputs and stored
            values.
        sizes: Values of ``batch`` and ``length`` at which sizes in bytes are compared.
    """
    flat, system = closure.flat, closure.system
    symbols = sorted({s for found in flat.types for s in found.symbols} - sizes.keys())
    sizes = {**sizes, **dict.fromkeys(symbols, 1)}
    weight = [_count(found, sizes) for found in flat.types]
    unknown = [v for v in range(len(flat.refs)) if not closure.known(v)]
    lost = [v for v in flat.inputs.values() if not closure.known(v)]

    work = 0

    def close(values: Iterable[int]) -> Closure:
        nonlocal work
        made = Closure(system, [*facts, *values])
        work += made.work + 100
        return made

    best = list(lost)
    for v in sorted(lost, key=lambda v: (-weight[v], -flat.rank[v])):
        rest = [u for u in best if u != v]
        if work <= WORK and close(rest).known(v):
            best = rest
    most = sum(weight[v] for v in best)
    # Inputs first among values of equal size.
    order = sorted(unknown, key=lambda v: (weight[v], flat.producer[v] >= 0, flat.rank[v]))
    place = {v: i for i, v in enumerate(order)}
    heap: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]
    lower = tries = 0
    while heap:
        lower, _, chosen = heapq.heappop(heap)
        if lower >= most:
            lower = most
            break
        if work > WORK or tries > TRIES:
            break
        tries += 1
        made = close(order[i] for i in chosen) if chosen else closure
        if chosen and all(made.known(v) for v in flat.inputs.values()):
            best, most = [order[i] for i in chosen], lower
            break
        for v in order[(chosen[-1] + 1 if chosen else 0) :]:
            if lower + weight[v] > most:
                break
            if not made.known(v):
                heapq.heappush(heap, (lower + weight[v], len(chosen) + 1, (*chosen, place[v])))
    else:
        lower = most
    best.sort(key=lambda v: flat.rank[v])
    return Remedy(tuple(flat.refs[v] for v in best), _symbolic(flat.types[v] for v in best), most, lower, sizes)


def _symbolic(types: Iterable[PortType]) -> Size:
    size = Size()
    for found in types:
        try:
            size = size + numbers(found) * BYTES[found.kind]
        except AxisError:  # too large for a Size; the total suffices
            return Size()
    return size
