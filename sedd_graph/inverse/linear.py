"""Exact joint solution of the linear relations among unknown values, by Gauss-Jordan elimination over fractions."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import networkx as nx

from sedd_graph.inverse.system import Key, Solution, System

__all__ = ["determinant", "solve_together"]

MAX_WORK, MAX_BITS = 2_000_000, 8192
"""Limits of the elimination: entries visited (``MAX_WORK``), and bits of a numerator or denominator (``MAX_BITS``)."""


def solve_together(
    system: System, keys: Sequence[Key | None], start: Iterable[int]
) -> tuple[list[list[Solution]], int]:
    """Solve the linear relations connected to ``start`` for every unknown value that they determine.

    Two relations are connected if they share an unknown value. Each solution is a weighted sum of known values. An
    unknown that is always zero is left out: its sum would have no terms, from which to take the shape of the tensor.

    Args:
        system: Equations of the region.
        keys: For each value, by index, the cost of its derivation; None marks the unknown values.
        start: Indices of linear relations in ``system.relations``.

    Returns:
        The solutions, and the number of matrix entries visited. Solutions are in one group if they use a common
        relation, directly or through other solutions.
    """
    rows, work = _around(system, keys, start)
    if not rows:
        return [], work
    rank = system.flat.rank
    reduced, more = _reduce(
        {r: {v: c for v, c in system.relations[r].terms.items() if keys[v] is None} for r in rows}, rank
    )
    work += more
    solved: list[Solution] = []
    for pivot, (left, used) in reduced.items():
        if len(left) > 1:
            continue
        used = {r: c / left[pivot] for r, c in used.items()}
        terms: dict[int, Fraction] = {}
        for r, c in used.items():
            for v, factor in system.relations[r].terms.items():
                if keys[v] is not None:
                    terms[v] = terms.get(v, Fraction(0)) - c * factor
        known = tuple((v, c) for v, c in sorted(terms.items(), key=lambda t: rank[t[0]]) if c)
        if known:
            solved.append(Solution(pivot, known, used))
    return _grouped(sorted(solved, key=lambda s: rank[s.target])), work


def _around(system: System, keys: Sequence[Key | None], start: Iterable[int]) -> tuple[list[int], int]:
    """Return the relations connected to ``start`` through unknown values, by name, and the number of terms visited."""
    seen: set[int] = set()
    todo = list(start)
    work = 0
    while todo:
        r = todo.pop()
        if r in seen:
            continue
        seen.add(r)
        for v in system.relations[r].terms:
            work += 1
            if keys[v] is None:
                todo += [other for other in system.relations_of[v] if other not in seen]
    rank = system.flat.rank
    unknown = [r for r in seen if any(keys[v] is None for v in system.relations[r].terms)]
    return sorted(unknown, key=lambda r: rank[system.relations[r].out]), work


def _reduce(
    rows: Mapping[int, Mapping[int, Fraction]], rank: Sequence[int]
) -> tuple[dict[int, tuple[dict[int, Fraction], dict[int, Fraction]]], int]:
    """Reduce ``rows``; values in few relations are eliminated first.

    Beyond :data:`MAX_WORK` or :data:`MAX_BITS` elimination stops early; each row reduced by then is correct by itself.

    Returns:
        For each pivot its row and the combination of relations that it is, and the work.
    """
    left = {r: dict(row) for r, row in rows.items()}
    used = {r: {r: Fraction(1)} for r in rows}
    holders: dict[int, set[int]] = {}
    for r, row in left.items():
        for v in row:
            holders.setdefault(v, set()).add(r)
    active = set(left)
    order = {r: place for place, r in enumerate(rows)}
    heap = [(len(where), rank[v], v) for v, where in holders.items()]
    heapq.heapify(heap)
    pivots: dict[int, int] = {}
    work = 0
    while heap and work < MAX_WORK:
        count, _, v = heapq.heappop(heap)
        where = holders[v] & active
        if v in pivots or not where:
            continue
        if len(holders[v]) != count:
            heapq.heappush(heap, (len(holders[v]), rank[v], v))
            continue
        chosen = min(where, key=lambda r: (len(left[r]), order[r]))
        pivots[v] = chosen
        active.discard(chosen)
        for other in sorted(holders[v] - {chosen}, key=order.__getitem__):
            ratio = left[other][v] / left[chosen][v]
            if max(ratio.numerator.bit_length(), ratio.denominator.bit_length()) > MAX_BITS:
                work = MAX_WORK
                break
            for u, c in left[chosen].items():
                value = left[other].get(u, Fraction(0)) - ratio * c
                if value:
                    left[other][u] = value
                    holders[u].add(other)
                else:
                    left[other].pop(u, None)
                    holders[u].discard(other)
            for r, c in used[chosen].items():
                value = used[other].get(r, Fraction(0)) - ratio * c
                if value:
                    used[other][r] = value
                else:
                    used[other].pop(r, None)
            work += len(left[chosen]) + len(used[chosen])
    return {v: (left[r], used[r]) for v, r in pivots.items()}, work


def _grouped(solved: list[Solution]) -> list[list[Solution]]:
    """Group the solutions that share a relation."""
    graph: nx.Graph[str] = nx.Graph()
    for place, item in enumerate(solved):
        graph.add_edges_from((f"target {place}", f"relation {r}") for r in item.relations)
    places = [
        sorted(int(name.split()[1]) for name in part if name.startswith("target"))
        for part in nx.connected_components(graph)
    ]
    return [[solved[place] for place in part] for part in sorted(places)]


def determinant(matrix: Sequence[Mapping[int, Fraction]]) -> Fraction:
    """Return the absolute determinant of a square sparse matrix.

    It is 0 if the matrix is singular, or if the elimination exceeds :data:`MAX_WORK` or :data:`MAX_BITS`.

    Args:
        matrix: Rows, each a mapping from column index to entry without the zeros.
    """
    columns = max((v for row in matrix for v in row), default=-1) + 1
    reduced, _ = _reduce(dict(enumerate(matrix)), range(columns))
    if len(reduced) < len(matrix) or any(len(row) > 1 for row, _ in reduced.values()):
        return Fraction(0)
    return abs(math.prod((row[pivot] for pivot, (row, _) in reduced.items()), start=Fraction(1)))
