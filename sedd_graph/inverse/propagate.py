"""Derivation of all values that follow from known ones, in order of increasing cost.

A value is a tensor of the region. Each component contributes edges: ways to derive some values (targets) from others
(needs). An edge makes its targets known once all its needs are known. The algorithm is Knuth's generalisation of
Dijkstra's algorithm (Information Processing Letters 6(1), 1977); the key of an edge is the greatest key among its needs
plus the cost of the edge. Keys (:data:`sedd_graph.inverse.system.Key`) prefer closed forms to iterations. Ties are
broken by name, so that the result does not depend on the order of components.

Where propagation stops, linear relations among unknown values are solved jointly (:mod:`sedd_graph.inverse.linear`),
then contractions are searched for (:mod:`sedd_graph.inverse.contraction`), and propagation resumes.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence

from sedd_graph.inverse.contraction import ContractionSearch, find_fixed_point
from sedd_graph.inverse.flat import steady
from sedd_graph.inverse.linear import solve_together
from sedd_graph.inverse.system import Edge, FixedPointEdge, ForwardEdge, Key, LinearEdge, Solution, System

__all__ = ["Closure"]


@dataclasses.dataclass(eq=False)
class _Waiting:
    """Edge that needs values which other edges are about to derive.

    Attributes:
        edge: The edge.
        rank: Place among edges of equal key.
        left: Number of values that it needs and that are still unknown.
    """

    edge: LinearEdge
    rank: int
    left: int


class Closure:
    """All values of a region that can be derived from the initially known ones, each by its cheapest derivation.

    The derivation is complete when the constructor returns. Values are identified by their indices in
    :class:`sedd_graph.inverse.flat.Flat`.

    Args:
        system: Equations of the region.
        facts: Indices of the initially known values (facts), such as the outputs of the region.
        given: Indices of the conditioning inputs, which are among the facts. Values that depend on these alone are
            evaluated forward, even where an output would give them at less cost: an equation of such a value contains
            no unknown, and must not be counted in the log-determinant.

    Attributes:
        keys: For each value, by index, the cost of its derivation; None where the value is unknown.
        derived_by: For each value, by index, the edge (way to derive values) that derives it; None for facts and
            unknown values.
        edges: Edges that derive at least one value, in order of derivation.
        searched: Result of the latest search for a contraction in each linear relation, by index of the relation. Only
            relations with a known output and at least two unknown terms are searched.
        work: Number of visits of edges and relations, as a measure of computing time.
    """

    def __init__(self, system: System, facts: Iterable[int], given: Iterable[int] = ()) -> None:
        self.system, self.flat = system, system.flat
        count = len(self.flat.refs)
        self.keys: list[Key | None] = [None] * count
        self.derived_by: list[Edge | None] = [None] * count
        self.edges: list[Edge] = []
        self.searched: dict[int, ContractionSearch] = {}
        self.work = 0
        self._left = [len(e.needs) for e in system.edges]
        self._unknown = [len(r.terms) for r in system.relations]
        self._unknown_sum = [sum(r.terms) for r in system.relations]
        self._heap: list[tuple[Key, int, int, int, Edge]] = []
        self._serial = 0
        self._waiting: dict[int, list[_Waiting]] = {}
        self._touched: set[int] = set()
        self._dirty: set[int] = set()
        self._count, self._patience = 0, 0
        self._tried: dict[int, int] = {}
        for v in dict.fromkeys(facts):
            self._know(v, (0, 0.0, 0), None)
        for e, edge in enumerate(system.edges):
            if not edge.needs:
                self._push(edge, system.edge_rank[e])
        self._evaluate(steady(self.flat, given))
        self._run()

    def known(self, v: int) -> bool:
        """Return whether the value with index ``v`` is known initially or can be derived."""
        return self.keys[v] is not None

    def _know(self, v: int, key: Key, edge: Edge | None) -> None:
        """Mark ``v`` as known, and queue the edges and relations that become usable with it."""
        self.keys[v], self.derived_by[v] = key, edge
        self._count += 1
        system = self.system
        for e in system.needed_by[v]:
            self._left[e] -= 1
            self.work += 1
            if not self._left[e]:
                self._push(system.edges[e], system.edge_rank[e])
        for waiting in self._waiting.pop(v, ()):
            waiting.left -= 1
            if not waiting.left:
                self._push(waiting.edge, waiting.rank, -1)
        for r in system.relations_of[v]:
            self._unknown[r] -= 1
            self._unknown_sum[r] -= v
            self.work += 1
            self._touched.add(r)
            self._dirty.add(r)
            if self._unknown[r] == 1:
                self._push_relation(r, self._unknown_sum[r])

    def _push(self, edge: Edge, rank: int, by: int = 0) -> None:
        """Queue ``edge``. Edges of equal key are taken by ``rank``, then ``by``, which follow from names alone."""
        if all(self.keys[v] is not None for v in edge.targets):
            return
        key = max((k for v in edge.needs if (k := self.keys[v]) is not None), default=(0, 0.0, 0))
        self._serial += 1
        made = (key[0] + edge.iterative, key[1] + edge.cost, key[2] + 1)
        heapq.heappush(self._heap, (made, rank, by, self._serial, edge))

    def _push_relation(self, r: int, v: int) -> None:
        """Queue the last unknown value ``v`` of a relation. The forward edge covers the relation's own output."""
        relation = self.system.relations[r]
        if v == relation.out and len(relation.terms) == len(self.flat.nodes[relation.node].needs) + 1:
            return
        factor = relation.terms[v]
        terms = tuple((u, -c / factor) for u, c in relation.terms.items() if u != v)
        self._push_solutions((Solution(v, terms, frozenset((r,))),), by=self.flat.rank[relation.out])

    def _push_solutions(self, group: Sequence[Solution], *, by: int = -1) -> None:
        needs = tuple(dict.fromkeys(v for s in group for v, _ in s.terms))
        targets = tuple(s.target for s in group)
        rank = len(self.system.edges) + min(self.flat.rank[v] for v in targets)
        edge = LinearEdge(needs, targets, 0.0, False, tuple(group))
        unknown = [v for v in needs if self.keys[v] is None]
        if not unknown:
            self._push(edge, rank, by)
            return
        waiting = _Waiting(edge, rank, len(unknown))
        for v in unknown:
            self._waiting.setdefault(v, []).append(waiting)

    def _evaluate(self, values: frozenset[int]) -> None:
        """Derive ``values`` by forward evaluation, before any other edge is used."""
        others = []
        while self._heap:
            entry = heapq.heappop(self._heap)
            key, *_, edge = entry
            if isinstance(edge, ForwardEdge) and values.issuperset(edge.targets):
                self._use(key, edge)
            else:
                others.append(entry)
        heapq.heapify(others)
        self._heap = others

    def _use(self, key: Key, edge: Edge) -> None:
        """Mark the targets of ``edge`` that are unknown as known."""
        fresh = [v for v in edge.targets if self.keys[v] is None]
        if fresh:
            self.edges.append(edge)
        for v in fresh:
            if self.keys[v] is None:  # an edge may list a target twice
                self._know(v, key, edge)

    def _run(self) -> None:
        tier = 0
        while True:
            while self._heap and self._heap[0][0][0] <= tier:
                key, *_, edge = heapq.heappop(self._heap)
                self._use(key, edge)
            # A search that failed is repeated only once as much has been derived as it cost, or at the end.
            if self._count * 4 >= self._patience and self._eliminate():
                continue
            self._contract(patient=True)
            if not self._heap:
                if self._eliminate():
                    continue
                self._contract(patient=False)
            if not self._heap:
                return
            tier = max(tier, self._heap[0][0][0])

    def _eliminate(self) -> bool:
        """Solve the linear relations that have changed for their unknowns. Return whether any was determined."""
        if not self._touched:
            return False
        groups, cost = solve_together(self.system, self.keys, self._touched)
        self._touched.clear()
        self._patience = 0 if groups else self._count * 4 + cost
        self.work += cost
        for group in groups:
            self._push_solutions(group)
        return bool(groups)

    def _contract(self, *, patient: bool) -> None:
        """Search for contractions behind the known outputs of linear relations."""
        system = self.system
        for r in sorted(self._dirty, key=lambda r: self.flat.rank[system.relations[r].out]):
            relation, tried = system.relations[r], self._tried.get(r, -1)
            if self._unknown[r] < 2 or self.keys[relation.out] is None:
                self._dirty.discard(r)
                continue
            if tried == self._count or (patient and tried >= 0 and (self._count - tried) * 4 < self.searched[r].work):
                continue
            search = find_fixed_point(system, self.keys, relation.out)
            self.work += search.work
            self._tried[r] = self._count
            self.searched[r] = search
            if (found := search.fixed_point) is not None:
                self._dirty.discard(r)
                rank = len(system.edges) + self.flat.rank[found.target]
                edge = FixedPointEdge(found.needs, (found.target,), found.cost, True, found)
                self._push(edge, rank, self.flat.rank[relation.out])
