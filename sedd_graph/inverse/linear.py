"""Linear relations among unknown values, solved together, exactly (Gauss-Jordan elimination over fractions)."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    from sedd_graph.inverse.propagate import Key, Problem

__all__ = ["Solved", "determinant", "solve_together"]

MAX_WORK, MAX_BITS = 2_000_000, 8192


@dataclasses.dataclass(frozen=True, eq=False)
class Solved:
    """``target`` is the sum over ``terms``; ``used`` says which combination of linear relations gives that."""

    target: int
    terms: tuple[tuple[int, Fraction], ...]
    used: Mapping[int, Fraction]


def solve_together(
    problem: Problem, keys: Sequence[Key | None], start: Iterable[int]
) -> tuple[list[list[Solved]], int]:
    """Every unknown value that the relations around ``start`` determine, in groups that share relations; and the work.

    A value that is determined to be zero, from nothing, is left out: a sum over no terms has no shape.
    """
    rows, work = _around(problem, keys, start)
    if not rows:
        return [], work
    rank = problem.flat.rank
    reduced, more = _reduce(
        {r: {v: c for v, c in problem.rows[r].terms.items() if keys[v] is None} for r in rows}, rank
    )
    work += more
    solved: list[Solved] = []
    for pivot, (left, used) in reduced.items():
        if len(left) > 1:
            continue
        used = {r: c / left[pivot] for r, c in used.items()}
        terms: dict[int, Fraction] = {}
        for r, c in used.items():
            for v, factor in problem.rows[r].terms.items():
                if keys[v] is not None:
                    terms[v] = terms.get(v, Fraction(0)) - c * factor
        kept = tuple((v, c) for v, c in sorted(terms.items(), key=lambda t: rank[t[0]]) if c)
        if kept:
            solved.append(Solved(pivot, kept, used))
    return _grouped(sorted(solved, key=lambda s: rank[s.target])), work


def _around(problem: Problem, keys: Sequence[Key | None], start: Iterable[int]) -> tuple[list[int], int]:
    """The relations with several unknown values that are joined to ``start`` through unknown values, by name."""
    seen: set[int] = set()
    todo = list(start)
    work = 0
    while todo:
        r = todo.pop()
        if r in seen:
            continue
        seen.add(r)
        for v in problem.rows[r].terms:
            work += 1
            if keys[v] is None:
                todo += [other for other in problem.rows_of[v] if other not in seen]
    rank = problem.flat.rank
    unknown = [r for r in seen if any(keys[v] is None for v in problem.rows[r].terms)]
    return sorted(unknown, key=lambda r: rank[problem.rows[r].out]), work


def _reduce(
    rows: dict[int, dict[int, Fraction]], rank: Sequence[int]
) -> tuple[dict[int, tuple[dict[int, Fraction], dict[int, Fraction]]], int]:
    """Reduced form: pivot -> (its row, the combination of relations that it is). Values in few relations go first.

    Where the numbers grow beyond bounds, what has been reduced by then is returned: each row is right for itself.
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


def _grouped(solved: list[Solved]) -> list[list[Solved]]:
    """Those that share a relation, together."""
    graph: nx.Graph[str] = nx.Graph()
    for place, item in enumerate(solved):
        graph.add_edges_from((f"target {place}", f"relation {r}") for r in item.used)
    places = [
        sorted(int(name.split()[1]) for name in part if name.startswith("target"))
        for part in nx.connected_components(graph)
    ]
    return [[solved[place] for place in part] for part in sorted(places)]


def determinant(matrix: list[dict[int, Fraction]]) -> Fraction:
    """Of a square sparse matrix, rows as {column: value}. Zero where it is singular."""
    rows = [dict(row) for row in matrix]
    result = Fraction(1)
    while rows:
        rows.sort(key=len)
        row = rows.pop(0)
        if not row:
            return Fraction(0)
        column = min(row, key=lambda c: sum(c in r for r in rows))
        result *= row[column]
        for other in rows:
            if column in other:
                ratio = other[column] / row[column]
                for c, value in row.items():
                    left = other.get(c, Fraction(0)) - ratio * value
                    if left:
                        other[c] = left
                    else:
                        other.pop(c, None)
    return abs(result)
