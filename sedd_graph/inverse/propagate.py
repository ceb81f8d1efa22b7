"""Everything that follows from a set of facts: unit propagation, cheapest derivation first.

Knuth's generalisation of Dijkstra's algorithm (Information Processing Letters 6(1), 1977) over and/or edges: an edge makes
its targets known once all its needs are, and its key is the greatest key among its needs plus its own cost. The key is
(iterations one after another, evaluations one after another, derivations one after another), compared in that order, so
that a value is had in closed form wherever it can be; ties go by name. Hence the result depends on no order of nodes.

Where propagation is stuck, linear relations among unknown values are solved together (:mod:`sedd_graph.inverse.linear`),
then contractions are looked for (:mod:`sedd_graph.inverse.contraction`), and it goes on, to the fixpoint.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from fractions import Fraction

from sedd_graph.component.contract import Rule
from sedd_graph.inverse.contraction import Fixed, Fixpoint, find_fixpoint
from sedd_graph.inverse.flat import Flat
from sedd_graph.inverse.linear import Solved, solve_together

__all__ = ["Closure", "Edge", "Key", "Problem", "Row"]

Key = tuple[int, float, int]
"""Iterations, evaluations and derivations one after another, compared in that order: what a value costs."""
Terms = tuple[tuple[int, Fraction], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Edge:
    """One way to make ``targets`` known from ``needs``. What it is follows from which of the last four are set.

    ``node`` alone: forward. ``node`` and ``rule``: a component's rule. ``solved``: weighted sums. ``fixpoint``: a
    contraction.
    """

    needs: tuple[int, ...]
    targets: tuple[int, ...]
    cost: float
    steps: int
    node: int = -1
    rule: Rule | None = None
    solved: tuple[Solved, ...] = ()
    fixpoint: Fixpoint | None = None

    @property
    def forward(self) -> bool:
        return self.node >= 0 and self.rule is None


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A linear relation that a component imposes: the sum of factor times value over ``terms`` is zero.

    ``out`` is the component's output, with factor -1. All values have one type.
    """

    node: int
    out: int
    terms: dict[int, Fraction]


class Problem:
    """A flat region with its edges and linear relations: what does not depend on the facts."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.edges: list[Edge] = []
        self.rows: list[Row] = []
        for index, node in enumerate(flat.nodes):
            self.edges.append(Edge(node.needs, tuple(node.outputs.values()), node.cost, 0, index))
            for rule in node.algebra.rules:
                edge = self._rule(index, rule)
                if edge is not None:
                    self.edges.append(edge)
            for port, factors in node.algebra.linear.items():
                row = self._row(index, node.outputs[port], factors)
                if row is not None:
                    self.rows.append(row)
        names = [(flat.nodes[e.node].path, e.rule is not None, *self._name(e)) for e in self.edges]
        self.edge_rank = [0] * len(names)
        for place, e in enumerate(sorted(range(len(names)), key=names.__getitem__)):
            self.edge_rank[e] = place
        self.needed_by: list[list[int]] = [[] for _ in flat.refs]
        for e, edge in enumerate(self.edges):
            for v in edge.needs:
                self.needed_by[v].append(e)
        self.rows_of: list[list[int]] = [[] for _ in flat.refs]
        for r, row in enumerate(self.rows):
            for v in row.terms:
                self.rows_of[v].append(r)
        self.row_of_output = {row.out: r for r, row in enumerate(self.rows)}

    @staticmethod
    def _name(edge: Edge) -> tuple[str, ...]:
        return () if edge.rule is None else (*edge.rule.targets, "<", *edge.rule.given, edge.rule.method)

    def _rule(self, index: int, rule: Rule) -> Edge | None:
        """The edge of a rule; None where nothing feeds its target (an optional port)."""
        node = self.flat.nodes[index]
        targets = tuple(node.inputs[name][0] for name in rule.targets if name in node.inputs)
        if len(targets) < len(rule.targets):
            return None
        needs: list[int] = []
        for name in rule.given:
            needs += [node.outputs[name]] if name in node.outputs else node.inputs.get(name, ())
        return Edge(tuple(dict.fromkeys(needs)), targets, rule.cost, int(rule.iterative), index, rule)

    def _row(self, index: int, out: int, factors: object) -> Row | None:
        """The relation behind an output; None where it cannot serve (other shapes, no number, nothing left)."""
        node = self.flat.nodes[index]
        assert hasattr(factors, "items")
        terms: dict[int, Fraction] = {out: Fraction(-1)}
        for port, factor in factors.items():
            for v in node.inputs.get(port, ()):
                terms[v] = terms.get(v, Fraction(0)) + Fraction(factor)
        terms = {v: c for v, c in terms.items() if c}
        found = self.flat.types[out]
        if found.kind != "float" or len(terms) < 2 or any(self.flat.types[v] != found for v in terms):
            return None
        return Row(index, out, terms)


class Closure:
    """The fixpoint over ``facts``: ``keys[v]`` is None where ``v`` stays unknown; ``edges`` are those used, in order.

    ``made_by[v]`` is the edge that made ``v`` known, or None for a fact. ``searched`` has, for linear
    relations whose outputs were known before their terms, what was last found when looking for a contraction behind it.
    ``work`` counts the edges looked at.
    """

    def __init__(self, problem: Problem, facts: Iterable[int]) -> None:
        self.problem, self.flat = problem, problem.flat
        count = len(self.flat.refs)
        self.keys: list[Key | None] = [None] * count
        self.made_by: list[Edge | None] = [None] * count
        self.edges: list[Edge] = []
        self.searched: dict[int, Fixed] = {}
        self.work = 0
        self._left = [len(e.needs) for e in problem.edges]
        self._unknown = [len(r.terms) for r in problem.rows]
        self._unknown_sum = [sum(r.terms) for r in problem.rows]
        self._heap: list[tuple[Key, int, int, int, Edge]] = []
        self._serial = 0
        self._touched: set[int] = set()
        self._dirty: set[int] = set()
        self._count, self._patience = 0, 0
        self._tried: dict[int, int] = {}
        for v in dict.fromkeys(facts):
            self._know(v, (0, 0.0, 0), None)
        for e, edge in enumerate(problem.edges):
            if not edge.needs:
                self._push(edge, problem.edge_rank[e])
        self._run()

    def known(self, v: int) -> bool:
        return self.keys[v] is not None

    def _know(self, v: int, key: Key, edge: Edge | None) -> None:
        self.keys[v], self.made_by[v] = key, edge
        self._count += 1
        problem = self.problem
        for e in problem.needed_by[v]:
            self._left[e] -= 1
            self.work += 1
            if not self._left[e]:
                self._push(problem.edges[e], problem.edge_rank[e])
        for r in problem.rows_of[v]:
            self._unknown[r] -= 1
            self._unknown_sum[r] -= v
            self.work += 1
            self._touched.add(r)
            self._dirty.add(r)
            if self._unknown[r] == 1:
                self._push_row(r, self._unknown_sum[r])

    def _push(self, edge: Edge, rank: int, by: int = 0) -> None:
        """Of edges with one key, that of the lowest ``rank`` and then ``by`` is taken, which follow from names alone."""
        if all(self.keys[v] is not None for v in edge.targets):
            return
        key = max((k for v in edge.needs if (k := self.keys[v]) is not None), default=(0, 0.0, 0))
        self._serial += 1
        made = (key[0] + edge.steps, key[1] + edge.cost, key[2] + 1)
        heapq.heappush(self._heap, (made, rank, by, self._serial, edge))

    def _push_row(self, r: int, v: int) -> None:
        """The last unknown value of a relation. Where that is its output, the forward edge gives it."""
        row = self.problem.rows[r]
        if v == row.out and len(row.terms) == len(self.flat.nodes[row.node].needs) + 1:
            return
        factor = row.terms[v]
        terms = tuple((u, -c / factor) for u, c in row.terms.items() if u != v)
        self._push_solved((Solved(v, terms, {r: 1 / factor}),), by=self.flat.rank[row.out])

    def _push_solved(self, group: Sequence[Solved], *, by: int = -1) -> None:
        needs = tuple(dict.fromkeys(v for s in group for v, _ in s.terms))
        targets = tuple(s.target for s in group)
        rank = len(self.problem.edges) + min(self.flat.rank[v] for v in targets)
        self._push(Edge(needs, targets, 0.0, 0, solved=tuple(group)), rank, by)

    def _run(self) -> None:
        tier = 0
        while True:
            while self._heap and self._heap[0][0][0] <= tier:
                key, *_, edge = heapq.heappop(self._heap)
                fresh = [v for v in edge.targets if self.keys[v] is None]
                if fresh:
                    self.edges.append(edge)
                for v in fresh:
                    if self.keys[v] is None:  # a value may be a target twice over
                        self._know(v, key, edge)
            # What was looked at in vain is looked at again only after as much has been found as that cost, or at the end.
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
        """Solve what is unknown in the linear relations that have changed; whether that gave anything."""
        if not self._touched:
            return False
        groups, cost = solve_together(self.problem, self.keys, self._touched)
        self._touched.clear()
        self._patience = 0 if groups else self._count * 4 + cost
        self.work += cost
        for group in groups:
            self._push_solved(group)
        return bool(groups)

    def _contract(self, *, patient: bool) -> None:
        """Look for contractions behind the known outputs of linear relations."""
        problem = self.problem
        for r in sorted(self._dirty, key=lambda r: self.flat.rank[problem.rows[r].out]):
            row, tried = problem.rows[r], self._tried.get(r, -1)
            if self._unknown[r] < 2 or self.keys[row.out] is None:
                self._dirty.discard(r)
                continue
            if tried == self._count or (patient and tried >= 0 and (self._count - tried) * 4 < self.searched[r].work):
                continue
            found = find_fixpoint(problem, self.keys, row.out)
            self.work += found.work
            self._tried[r] = self._count
            self.searched[r] = found
            if (fixpoint := found.fixpoint) is not None:
                self._dirty.discard(r)
                rank = len(problem.edges) + self.flat.rank[fixpoint.target]
                edge = Edge(fixpoint.needs, (fixpoint.target,), fixpoint.cost, 1, fixpoint=fixpoint)
                self._push(edge, rank, self.flat.rank[row.out])
