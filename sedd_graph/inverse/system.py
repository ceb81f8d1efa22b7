"""Equations of a region as a search graph: values, ways to derive them (edges) and linear relations among them.

Values and components are numbered as in :class:`sedd_graph.inverse.flat.Flat`. Propagation, linear solving and the search
for contractions all work on these types; none of them lives here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction

from sedd_graph.component.contract import Rule
from sedd_graph.inverse.flat import Flat

__all__ = [
    "Edge",
    "FixedPoint",
    "FixedPointEdge",
    "ForwardEdge",
    "Key",
    "LinearEdge",
    "Relation",
    "RuleEdge",
    "Solution",
    "System",
]

Key = tuple[int, float, int]
"""Cost of a value along its derivation: iterative steps, evaluations and derivations in sequence, compared in that order."""


@dataclasses.dataclass(frozen=True, eq=False)
class Relation:
    """Linear relation that a component imposes: the sum of factor times value over ``terms`` is zero.

    ``out`` is the component's output, with factor -1. All values have the same type.
    """

    node: int
    out: int
    terms: Mapping[int, Fraction]


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """An unknown in terms of known values: ``target`` is the sum of factor times value over ``terms``.

    ``relations`` gives the combination of linear relations (index to factor) that it follows from.
    """

    target: int
    terms: tuple[tuple[int, Fraction], ...]
    relations: Mapping[int, Fraction]


@dataclasses.dataclass(frozen=True, eq=False)
class FixedPoint:
    """Contraction ``value = scale * target + r(target)``, evaluated by ``nodes`` in order.

    ``bound`` < 1 is a Lipschitz constant of r / scale; ``iterations`` plain steps reduce the error to 1e-6 of its start.
    """

    target: int
    value: int
    scale: Fraction
    bound: float
    iterations: int
    nodes: tuple[int, ...]
    needs: tuple[int, ...]
    cost: float


@dataclasses.dataclass(frozen=True, eq=False)
class Edge:
    """One way to derive ``targets`` once all ``needs`` are known, at ``cost`` evaluations."""

    needs: tuple[int, ...]
    targets: tuple[int, ...]
    cost: float
    iterative: bool


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardEdge(Edge):
    """Forward evaluation of a component."""

    node: int


@dataclasses.dataclass(frozen=True, eq=False)
class RuleEdge(Edge):
    """Inversion rule of a component."""

    node: int
    rule: Rule


@dataclasses.dataclass(frozen=True, eq=False)
class LinearEdge(Edge):
    """Weighted sums, one solution for each target."""

    solutions: tuple[Solution, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class FixedPointEdge(Edge):
    """Fixed-point iteration."""

    fixed_point: FixedPoint


_Name = tuple[str, bool, tuple[str, ...]]


class System:
    """Edges and linear relations of a flat region: all that does not depend on which values are known.

    Attributes:
        edge_rank: Order of the edges by name, which breaks ties independently of the order of nodes.
        needed_by: For each value, the edges that need it.
        relations_of: For each value, the relations that it is a term of.
        relation_of_output: Relation of each output that has one.
    """

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.edges: list[ForwardEdge | RuleEdge] = []
        self.relations: list[Relation] = []
        for index, node in enumerate(flat.nodes):
            self.edges.append(ForwardEdge(node.needs, tuple(node.outputs.values()), node.cost, False, index))
            self.edges += [edge for rule in node.algebra.rules if (edge := self._rule(index, rule)) is not None]
            for port, factors in node.algebra.linear.items():
                relation = self._relation(index, node.outputs[port], factors)
                if relation is not None:
                    self.relations.append(relation)
        names = [self._name(edge) for edge in self.edges]
        self.edge_rank = [0] * len(names)
        for rank, e in enumerate(sorted(range(len(names)), key=names.__getitem__)):
            self.edge_rank[e] = rank
        self.needed_by: list[list[int]] = [[] for _ in flat.refs]
        for e, known in enumerate(self.edges):
            for v in known.needs:
                self.needed_by[v].append(e)
        self.relations_of: list[list[int]] = [[] for _ in flat.refs]
        for r, relation in enumerate(self.relations):
            for v in relation.terms:
                self.relations_of[v].append(r)
        self.relation_of_output = {relation.out: r for r, relation in enumerate(self.relations)}

    def _name(self, edge: ForwardEdge | RuleEdge) -> _Name:
        path = self.flat.nodes[edge.node].path
        if isinstance(edge, ForwardEdge):
            return path, False, ()
        return path, True, (*edge.rule.targets, "<", *edge.rule.given, edge.rule.method)

    def _rule(self, index: int, rule: Rule) -> RuleEdge | None:
        """Return the edge of a rule, or None where a target is an optional port that nothing feeds."""
        node = self.flat.nodes[index]
        targets = tuple(node.inputs[name][0] for name in rule.targets if name in node.inputs)
        if len(targets) < len(rule.targets):
            return None
        needs: list[int] = []
        for name in rule.given:
            needs += [node.outputs[name]] if name in node.outputs else node.inputs.get(name, ())
        return RuleEdge(tuple(dict.fromkeys(needs)), targets, rule.cost, rule.iterative, index, rule)

    def _relation(self, index: int, out: int, factors: Mapping[str, Fraction]) -> Relation | None:
        """Return the relation of an output, or None where it is of no use: mixed types, not floats, or no terms left."""
        node = self.flat.nodes[index]
        terms: dict[int, Fraction] = {out: Fraction(-1)}
        for port, factor in factors.items():
            for v in node.inputs.get(port, ()):
                terms[v] = terms.get(v, Fraction(0)) + Fraction(factor)
        terms = {v: c for v, c in terms.items() if c}
        found = self.flat.types[out]
        if found.kind != "float" or len(terms) < 2 or any(self.flat.types[v] != found for v in terms):
            return None
        return Relation(index, out, terms)
