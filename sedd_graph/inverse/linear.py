"""Exact joint solution of the linear relations among unknown values, by sparse Gaussian elimination over fractions.

The equations are brought into echelon form and solved backwards: the solution of an unknown is a weighted sum of known
values and of unknowns solved before it. Solutions are not substituted into each other, since a deep chain of sums would
give long fractions. The exception is a coupled system of at most :data:`CLOSED` unknowns, whose solutions are sums of
values outside the system.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

from sedd_graph.inverse.system import Key, Solution, System

__all__ = ["dependent", "determinant", "solve_together"]

MAX_WORK, MAX_BITS = 4_000_000, 2**16
"""Limits of the elimination: entries visited (``MAX_WORK``; an entry counts once more for each 1,024 bits that it has),
and bits of a numerator or denominator (``MAX_BITS``)."""
CLOSED = 32
"""Largest number of unknowns of a coupled system that are given in closed form."""

_Row = dict[int, Fraction]


# -- elimination ----------------------------------------------------------------------------------------------------


def _magnitude(c: Fraction) -> int:
    """Return the base-2 logarithm of a fraction's magnitude, up to 1."""
    return c.numerator.bit_length() - c.denominator.bit_length()


@dataclasses.dataclass(frozen=True, eq=False)
class _Pivot:
    """Row of the echelon form: an equation in the unknown ``column``, in unknowns eliminated after it, and in known values.

    Attributes:
        column: The unknown that the row is solved for.
        row: Coefficients of unknowns, ``column`` included.
        base: Coefficients of known values.
        used: Indices of the relations that the row combines.
    """

    column: int
    row: _Row
    base: _Row
    used: frozenset[int]


class _Elimination:
    """Sparse forward elimination with active rows only; unknowns in few rows are eliminated first.

    Beyond :data:`MAX_WORK` or :data:`MAX_BITS` elimination stops early; each pivot found by then is correct by itself.

    Args:
        rows: For each relation, by index, the coefficients of its unknowns.
        base: For each relation, by index, the coefficients of its known values.
        rank: Place of each unknown in the order that breaks ties.

    Attributes:
        pivots: Rows of the echelon form, in order of elimination.
        vanished: For each row that was left without unknowns, the indices of the relations that it combines.
        work: Number of entries visited.
    """

    def __init__(self, rows: Mapping[int, _Row], base: Mapping[int, _Row], rank: Sequence[int]) -> None:
        self.left = {r: dict(row) for r, row in rows.items()}
        self.base = {r: dict(base.get(r, {})) for r in rows}
        self.used = {r: {r} for r in rows}
        self.rank, self.order = rank, {r: place for place, r in enumerate(rows)}
        self.holders: dict[int, set[int]] = {}
        for r, row in self.left.items():
            for v in row:
                self.holders.setdefault(v, set()).add(r)
        self.heap = [(len(where), rank[v], v) for v, where in self.holders.items()]
        heapq.heapify(self.heap)
        self.pivots: list[_Pivot] = []
        self.vanished: list[frozenset[int]] = []
        self.work = 0
        self._run()

    def _run(self) -> None:
        while self.heap and self.work < MAX_WORK:
            count, _, v = heapq.heappop(self.heap)
            where = self.holders[v]
            if not where or count > len(where):  # done, or queued again when the count fell
                continue
            if count < len(where):
                heapq.heappush(self.heap, (len(where), self.rank[v], v))
                continue
            self._pivot(v, where)

    def _pivot(self, v: int, where: set[int]) -> None:
        # how far the coefficient is below the largest of its row: back substitution in floating point multiplies rounding
        # errors by that
        below = {r: max(map(_magnitude, self.left[r].values())) - _magnitude(self.left[r][v]) for r in where}
        least = max(min(below.values()), 0)
        chosen = min((r for r in where if below[r] <= least), key=lambda r: (len(self.left[r]), self.order[r]))
        row, base, used = self.left.pop(chosen), self.base.pop(chosen), self.used.pop(chosen)
        for u in row:
            self._release(u, chosen)
        self.pivots.append(_Pivot(v, row, base, frozenset(used)))
        for other in sorted(where, key=self.order.__getitem__):
            ratio = self.left[other][v] / row[v]
            bits = max(ratio.numerator.bit_length(), ratio.denominator.bit_length())
            if bits > MAX_BITS:
                self.work = MAX_WORK
                return
            _subtract(self.base[other], base, ratio)
            for u in _subtract(self.left[other], row, ratio):
                if u in self.left[other]:
                    self.holders[u].add(other)
                else:
                    self._release(u, other)
            self.used[other] |= used
            self.work += (len(row) + len(base)) * (1 + bits // 1024) + len(used)
            if not self.left[other]:
                self.vanished.append(frozenset(self.used[other]))

    def _release(self, u: int, r: int) -> None:
        """Take row ``r`` from the holders of the unknown ``u``, and queue the unknown with its lower count."""
        self.holders[u].discard(r)
        if self.holders[u]:
            heapq.heappush(self.heap, (len(self.holders[u]), self.rank[u], u))


def _subtract(row: _Row, other: Mapping[int, Fraction], ratio: Fraction) -> list[int]:
    """Subtract ``ratio`` times another row from a row, in place, and return the columns that appeared or vanished."""
    changed = []
    for u, c in other.items():
        old = row.get(u)
        value = (old or 0) - ratio * c
        if value:
            row[u] = value
            if old is None:
                changed.append(u)
        elif old is not None:
            del row[u]
            changed.append(u)
    return changed


# -- solution -------------------------------------------------------------------------------------------------------


def solve_together(
    system: System, keys: Sequence[Key | None], start: Iterable[int]
) -> tuple[list[list[Solution]], int]:
    """Solve the linear relations connected to ``start`` for every unknown value that they determine.

    Two relations are connected if they share an unknown value. Each solution is a weighted sum of known values and of
    values solved before it. An unknown that is always zero is left out: its sum would have no terms, from which to take
    the shape of the tensor.

    Args:
        system: Equations of the region.
        keys: For each value, by index, the cost of its derivation; None marks the unknown values.
        start: Indices of linear relations in ``system.relations``.

    Returns:
        Two results: the solutions as a list of groups, in the order in which they can be evaluated, and the number of
        matrix entries visited. A solution reads only known values and values of earlier groups, none of its own group.
    """
    rows, work = _around(system, keys, start)
    if not rows:
        return [], work
    found = _elimination(system, keys, rows)
    rank = system.flat.rank
    groups = _grouped(_back(found.pivots))
    ordered = [
        [dataclasses.replace(s, terms=tuple(sorted(s.terms, key=lambda t: rank[t[0]]))) for s in group]
        for group in groups
    ]
    return [sorted(group, key=lambda s: rank[s.target]) for group in ordered], work + found.work


def dependent(system: System, keys: Sequence[Key | None], start: int) -> tuple[int, ...]:
    """Return linearly dependent relations that include a given one: in a weighted sum of them, all unknowns cancel.

    Args:
        system: Equations of the region.
        keys: For each value, by index, the cost of its derivation; None marks the unknown values.
        start: Index of a linear relation with unknown values.

    Returns:
        Indices of the relations, ``start`` included, sorted by the names of their outputs; empty if elimination finds
        no dependency that involves ``start``.
    """
    rows, _ = _around(system, keys, [start])
    rank, relations = system.flat.rank, system.relations
    found = [used for used in _elimination(system, keys, rows).vanished if start in used]
    return tuple(sorted(min(found, key=len, default=()), key=lambda r: rank[relations[r].out]))


def _elimination(system: System, keys: Sequence[Key | None], rows: Iterable[int]) -> _Elimination:
    left: dict[int, _Row] = {}
    base: dict[int, _Row] = {}
    for r in rows:
        terms = system.relations[r].terms
        left[r] = {v: c for v, c in terms.items() if keys[v] is None}
        base[r] = {v: c for v, c in terms.items() if keys[v] is not None}
    return _Elimination(left, base, system.flat.rank)


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


def _back(pivots: Sequence[_Pivot]) -> list[Solution]:
    """Return the solution of each unknown that the echelon form determines, in the order of back substitution."""
    solved: list[Solution] = []
    determined: set[int] = set()
    open_: dict[int, _Pivot] = {}  # rows of unknowns that are not determined, or always zero
    for pivot in reversed(pivots):
        row, base, used = dict(pivot.row), dict(pivot.base), set(pivot.used)
        for u in [u for u in row if u in open_]:
            other = open_[u]
            ratio = row[u] / other.row[u]
            _subtract(row, other.row, ratio)
            _subtract(base, other.base, ratio)
            used |= other.used
        v = pivot.column
        if all(u == v or u in determined for u in row) and len(row) + len(base) > 1:
            terms = tuple((u, -c / row[v]) for u, c in (row | base).items() if u != v)
            solved.append(Solution(v, terms, frozenset(used)))
            determined.add(v)
        else:
            open_[v] = _Pivot(v, row, base, frozenset(used))
    return solved


def _grouped(solved: Sequence[Solution]) -> list[list[Solution]]:
    """Group the solutions that share a relation, and give those of small systems in closed form.

    A solution that needs a value which is solved after the first one of its system is a group by itself.
    """
    system_of = _systems(solved)
    count: dict[int, int] = {}
    for place in range(len(solved)):
        count[system_of[place]] = count.get(system_of[place], 0) + 1
    place_of: dict[int, int] = {}
    made: list[Solution] = []
    groups: dict[int, list[Solution]] = {}
    first: dict[int, int] = {}
    for place, item in enumerate(solved):
        name = system_of[place]
        if count[name] <= CLOSED:
            within = [u for u, _ in item.terms if u in place_of and system_of[place_of[u]] == name]
            item = _closed(item, {u: made[place_of[u]] for u in within})
        made.append(item)
        place_of[item.target] = place
        start = first.setdefault(name, place)
        early = all(place_of.get(u, -1) < start for u, _ in item.terms)
        groups.setdefault(start if early else place, []).append(item)
    return [groups[place] for place in sorted(groups)]


def _closed(item: Solution, within: Mapping[int, Solution]) -> Solution:
    """Return a solution with the solutions ``within`` put in for their targets."""
    terms: _Row = {}
    used = set(item.relations)
    for u, c in item.terms:
        if u in within:
            _subtract(terms, dict(within[u].terms), -c)
            used |= within[u].relations
        else:
            _subtract(terms, {u: c}, Fraction(-1))
    return Solution(item.target, tuple(terms.items()), frozenset(used)) if terms else item


def _systems(solved: Sequence[Solution]) -> list[int]:
    """Return for each solution the place of the first one that shares a relation with it, directly or through others."""
    parent = list(range(len(solved)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    holder: dict[int, int] = {}
    for place, item in enumerate(solved):
        for r in item.relations:
            a, b = root(holder.setdefault(r, place)), root(place)
            parent[max(a, b)] = min(a, b)
    return [root(place) for place in range(len(solved))]


def determinant(matrix: Sequence[Mapping[int, Fraction]]) -> Fraction:
    """Return the absolute determinant of a square sparse matrix.

    It is 0 if the matrix is singular, or if the elimination exceeds :data:`MAX_WORK` or :data:`MAX_BITS`.

    Args:
        matrix: Rows, each a mapping from column index to entry without the zeros.
    """
    columns = max((v for row in matrix for v in row), default=-1) + 1
    found = _Elimination({r: dict(row) for r, row in enumerate(matrix)}, {}, range(columns))
    if len(found.pivots) < len(matrix):
        return Fraction(0)
    return abs(math.prod((p.row[p.column] for p in found.pivots), start=Fraction(1)))
