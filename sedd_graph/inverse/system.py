"""Equations of a region as a search problem: ways to derive values (edges), and linear relations among values.

A value is a tensor of the region. Values and components are identified by their indices in
:class:`sedd_graph.inverse.flat.Flat`. These types are shared by propagation (:mod:`sedd_graph.inverse.propagate`),
linear solving (:mod:`sedd_graph.inverse.linear`) and the search for contractions
(:mod:`sedd_graph.inverse.contraction`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction

from sedd_graph.component.contract import Rule
from sedd_graph.inverse.factors import rational
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
"""Cost of deriving a value, compared lexicographically: (iterative derivations, component evaluations, derivations).

The three numbers are sums along the most expensive chain of derivations that leads to the value.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Relation:
    """Linear relation that a component imposes on values: the sum of factor times value over ``terms`` is zero.

    All values of the relation have the same tensor type. Indices are those of :class:`sedd_graph.inverse.flat.Flat`.

    Attributes:
        node: Index of the component.
        out: Index of the value that the component computes, whose factor is -1.
        terms: Factor of each value in the sum, keyed by the index of the value; ``out`` is included.
    """

    node: int
    out: int
    terms: Mapping[int, Fraction]


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """Solution of linear relations for one unknown: ``target`` is the sum of factor times value over ``terms``.

    Attributes:
        target: Index of the unknown value.
        terms: Pairs (index of a value that is known or solved before, factor).
        relations: Indices in :attr:`System.relations` of the relations whose weighted sum is the solution.
    """

    target: int
    terms: tuple[tuple[int, Fraction], ...]
    relations: frozenset[int]


@dataclasses.dataclass(frozen=True, eq=False)
class FixedPoint:
    """Contraction: a known value with ``value = scale * target + r(target)``, to be solved for ``target`` by iteration.

    Attributes:
        target: Index of the unknown value.
        value: Index of the known value.
        scale: Factor of ``target`` in the equation, not 0.
        bound: Upper bound on the Lipschitz constant of r, divided by |scale|; less than 1.
        iterations: Number of plain (Picard) steps that reduce the error to 1e-6 of its initial value.
        nodes: Indices of the components that compute ``value`` from ``target``, in topological order.
        needs: Indices of the known values that the iteration reads.
        cost: Number of component evaluations in ``iterations`` steps.
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
    """A way to derive some values once other values are known (a hyperedge of the search).

    Attributes:
        needs: Indices of the values that must be known.
        targets: Indices of the values that are derived.
        cost: Number of component evaluations.
        iterative: Whether the targets are computed by iteration, up to a tolerance, instead of in closed form.
    """

    needs: tuple[int, ...]
    targets: tuple[int, ...]
    cost: float
    iterative: bool


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardEdge(Edge):
    """Edge that evaluates a component in the forward direction.

    Attributes:
        node: Index of the component.
    """

    node: int


@dataclasses.dataclass(frozen=True, eq=False)
class RuleEdge(Edge):
    """Edge that calls an inversion rule of a component.

    Attributes:
        node: Index of the component.
        rule: The inversion rule.
    """

    node: int
    rule: Rule


@dataclasses.dataclass(frozen=True, eq=False)
class LinearEdge(Edge):
    """Edge that computes weighted sums of known values.

    Attributes:
        solutions: For each target, in order, the weighted sum that gives it.
    """

    solutions: tuple[Solution, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class FixedPointEdge(Edge):
    """Edge that solves a contraction by fixed-point iteration.

    Attributes:
        fixed_point: The contraction.
    """

    fixed_point: FixedPoint


_Name = tuple[str, bool, tuple[str, ...]]


class System:
    """All edges (ways to derive values) and all linear relations that the components of a region contribute.

    They do not depend on which values are known.

    Args:
        flat: The flattened region.

    Attributes:
        edges: Edges that evaluate a component or call an inversion rule.
        relations: Linear relations of the components.
        edge_rank: For each edge, by index in ``edges``, its place when edges are sorted by name; breaks ties
            independently of the order of components.
        needed_by: For each value, by index, the indices of the edges that need it.
        relations_of: For each value, by index, the indices of the relations in which it is a term.
        relation_of_output: Index of the relation in which a value is the output (``out``), keyed by the index of the
            value.
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
                terms[v] = terms.get(v, Fraction(0)) + rational(factor)
        terms = {v: c for v, c in terms.items() if c}
        found = self.flat.types[out]
        if found.kind != "float" or len(terms) < 2 or any(self.flat.types[v] != found for v in terms):
            return None
        return Relation(index, out, terms)
