"""Proof of the level of an inverse program: injective, bijective or volume preserving.

A value is a tensor of the region. The unknowns are the inputs (conditioning excepted) and all inner values; each output
of a component contributes one equation: value = function of the component's inputs. Suppose that every equation is used
exactly once, to derive as many elements as it has. Then the Jacobian of the whole system is block triangular in the
order of derivation, every output has exactly one inverse image, and log |det d outputs / d inputs| is the sum over the
diagonal blocks. A value that the program does not need is evaluated forward afterwards, by its own equation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

import networkx as nx

from sedd_graph.component.axes import AxisError
from sedd_graph.inverse.factors import log, shown
from sedd_graph.inverse.flat import Flat, log_det_of, numbers, steady, total
from sedd_graph.inverse.linear import determinant
from sedd_graph.inverse.names import Names, join_and
from sedd_graph.inverse.program import Level, Linear
from sedd_graph.inverse.propagate import Closure
from sedd_graph.inverse.system import Edge, FixedPointEdge, ForwardEdge, LinearEdge, RuleEdge

__all__ = ["ROUNDING", "classify"]

ROUNDING = 1e-12
"""Largest magnitude of a log-determinant, nats per number, that is taken for 0: factors such as a cosine are rounded."""


def classify(
    closure: Closure, edges: Sequence[Edge], given: Iterable[int], stored: Iterable[int]
) -> tuple[Level, str, dict[int, Linear]]:
    """Prove the level of invertibility of an inverse program and construct its linear derivations.

    Args:
        closure: All values that can be derived, with the edge that derives each.
        edges: Edges of the program (ways to derive values), in order of derivation.
        given: Indices of the conditioning inputs.
        stored: Indices of the stored values.

    Returns:
        The level; the reason why the level is not higher (empty at the highest one); and the linear derivations, keyed
        by the index in ``edges`` of the edge that each comes from.
    """
    flat, names = closure.flat, Names(closure.flat.refs)
    linear, matched = _linear(closure, edges)
    if any(True for _ in stored):
        return "injective", "values are stored beside the outputs", linear
    fixed = steady(flat, given)
    recoded = any(isinstance(edge, RuleEdge) and edge.rule.onto for edge in edges)
    note = _shared(flat, fixed) or _sizes(flat, fixed, recoded) or _unmatched(closure, edges, matched, names, fixed)
    if note:
        return "injective", note, linear
    note = _volume(flat, edges, linear, names)
    return ("bijective", note, linear) if note else ("volume_preserving", "", linear)


def _shared(flat: Flat, fixed: frozenset[int]) -> str:
    """Return which outputs are one value; empty if each output that depends on the unknowns is a value of its own."""
    name_of: dict[int, str] = {}
    for name, v in flat.outputs.items():
        if v not in fixed and name_of.setdefault(v, name) != name:
            return f"the outputs {name_of[v]!r} and {name!r} are one value"
    return ""


def _sizes(flat: Flat, fixed: frozenset[int], recoded: bool) -> str:
    """Return how sizes differ; empty where outputs hold as many numbers of each kind as the inputs that are not given.

    Outputs that depend on the conditioning inputs alone (``fixed``) do not count; nor do integers where some are
    ``recoded`` one-to-one as another number of integers (:attr:`Rule.onto`), such as a token as its digits.
    """
    outputs = [v for v in flat.outputs.values() if flat.producer[v] >= 0 and v not in fixed]
    passed = {v for v in flat.outputs.values() if flat.producer[v] < 0}
    inputs = [v for v in flat.inputs.values() if v not in fixed and v not in passed]
    for kind, what in (("float", "numbers"), ("int", "integers"), ("bool", "booleans")):
        try:
            made, wanted = (total([t for v in some if (t := flat.types[v]).kind == kind]) for some in (outputs, inputs))
        except AxisError as error:
            return f"sizes cannot be compared: {error}"
        if kind == "int" and recoded:
            continue
        if made != wanted:
            if kind == "float" and not wanted.terms:
                names = join_and(flat.refs[v].port for v in inputs)
                return f"{names} holds no real numbers, so that the map is onto its image only and has no volume"
            return f"the outputs hold {made} {what} and the inputs {wanted}"
    return ""


def _own(closure: Closure, edges: Sequence[Edge]) -> list[int]:
    """Return the indices of the values that are not part of a program, and are evaluated forward afterwards."""
    flat, used = closure.flat, {id(edge) for edge in edges}
    facts = {v for v, edge in enumerate(closure.derived_by) if edge is None}
    return [
        v
        for v, edge in enumerate(closure.derived_by)
        if flat.producer[v] >= 0 and v not in facts and (edge is None or id(edge) not in used)
    ]


def _fresh(closure: Closure, edge: Edge) -> list[int]:
    """Return the values that ``edge`` derived first."""
    return [v for v in dict.fromkeys(edge.targets) if closure.derived_by[v] is edge]


def _unmatched(
    closure: Closure, edges: Sequence[Edge], matched: Counter[int] | None, names: Names, fixed: frozenset[int]
) -> str:
    """Return which equation is not used exactly once; empty where each is. Those of ``fixed`` values have no unknown."""
    flat = closure.flat
    if matched is None:
        return "a linear relation is used for more values than it determines"
    used: Counter[int] = Counter(matched)
    for edge in edges:
        fresh = _fresh(closure, edge)
        if isinstance(edge, FixedPointEdge):
            used[edge.fixed_point.value] += 1
        elif isinstance(edge, RuleEdge):
            node = flat.nodes[edge.node]
            equations = [node.outputs[name] for name in edge.rule.given if name in node.outputs]
            used.update(equations)
            try:
                taken, found = total([flat.types[v] for v in equations]), total([flat.types[v] for v in fresh])
            except AxisError as error:
                return f"sizes cannot be compared: {error}"
            if taken != found and not edge.rule.onto:
                return f"op {node.op.contract.name!r} ({node.path}) uses {taken} numbers to recover {found}"
        elif isinstance(edge, ForwardEdge):
            used.update(v for v in fresh if v not in matched)
    used.update(v for v in _own(closure, edges) if v not in matched)
    equations = [v for v, made_by in enumerate(flat.producer) if made_by >= 0 and v not in fixed]
    twice = next((v for v in equations if used[v] != 1), None)
    if twice is None:
        return ""
    return f"the equation of {names.value(flat.refs[twice])} is used {used[twice]} times"


def _linear(closure: Closure, edges: Sequence[Edge]) -> tuple[dict[int, Linear], Counter[int] | None]:
    """Return linear derivations by position of their edge in ``edges``, and the equations that relations account for.

    Relations and the values derived from them form connected parts; a part with as many of one as of the other is a square
    system. Its determinant is counted with the first derivation in it. The equations are None where a part is not square.

    In order of derivation, each value of a part follows from a weighted sum of the part's relations in which its own factor
    is 1 and that of every later value is 0. The matrix of these weights times the matrix of the part's factors is therefore
    triangular with ones on the diagonal, so that neither is singular.
    """
    flat, relations = closure.flat, closure.system.relations
    solved = [(place, s) for place, edge in enumerate(edges) if isinstance(edge, LinearEdge) for s in edge.solutions]
    combination: dict[int, frozenset[int]] = {s.target: s.relations for _, s in solved}
    involved = {relations[r].out: r for _, s in solved for r in s.relations}
    for v in _own(closure, edges):
        if v in involved:
            combination[v] = frozenset((involved[v],))
    for edge in edges:
        if isinstance(edge, ForwardEdge):
            combination |= {v: frozenset((involved[v],)) for v in _fresh(closure, edge) if v in involved}
    graph: nx.Graph[tuple[str, int]] = nx.Graph()
    for v, used in combination.items():
        graph.add_edges_from((("value", v), ("relation", r)) for r in used)
    factor_at: dict[int, Fraction] = {}
    fits = True
    place_of = {s.target: place for place, s in reversed(solved)}
    for part in nx.connected_components(graph):
        values = sorted(v for kind, v in part if kind == "value")
        square = 2 * len(values) == len(part)
        column = {v: i for i, v in enumerate(values)}
        rows = [
            {column[v]: c for v, c in relations[r].terms.items() if v in column}
            for r in sorted(r for kind, r in part if kind == "relation")
        ]
        det = determinant(rows) if square else Fraction(0)
        if not det:
            fits = False
            continue
        place = min(place_of[v] for v in values if v in place_of)
        factor_at[place] = factor_at.get(place, Fraction(1)) * det
    made: dict[int, Linear] = {}
    for place, edge in enumerate(edges):
        if isinstance(edge, LinearEdge):
            paths = {flat.nodes[relations[r].node].path for s in edge.solutions for r in s.relations}
            made[place] = Linear(
                targets=tuple(flat.refs[s.target] for s in edge.solutions),
                terms=tuple(tuple((flat.refs[v], c) for v, c in s.terms) for s in edge.solutions),
                paths=tuple(sorted(paths)),
                factor=factor_at.get(place, Fraction(1)),
                cost=0.0,
            )
    return made, Counter(dict.fromkeys(involved, 1)) if fits else None


def _volume(flat: Flat, edges: Sequence[Edge], linear: dict[int, Linear], names: Names) -> str:
    """Return which derivation changes volume; empty where the log-determinant is zero, to rounding."""
    kept = _unit_factor(flat, linear.values())
    for place, edge in enumerate(edges):
        if isinstance(edge, FixedPointEdge):
            return f"the contraction that gives {names.value(flat.refs[edge.fixed_point.target])} changes volume"
        if not kept and isinstance(edge, LinearEdge) and linear[place].factor != 1:
            gives = join_and(names.value(ref) for ref in linear[place].targets)
            return f"the linear system that gives {gives} changes volume {shown(linear[place].factor)}-fold per number"
        if isinstance(edge, RuleEdge):
            node = flat.nodes[edge.node]
            log_det = log_det_of(flat, node, edge.rule)
            if log_det != "zero":
                what = "declares no log-determinant" if log_det is None else "changes volume"
                return f"op {node.op.contract.name!r} ({node.path}) {what}"
    return ""


def _unit_factor(flat: Flat, linear: Iterable[Linear]) -> bool:
    """Return whether the factors of all linear derivations cancel, to rounding: scales by 2 and 1/2, a cosine and a sine.

    The sum of the logarithms is taken for each monomial in batch and length, and zero for each of them.
    """
    logs: dict[tuple[str, ...], float] = {}
    weights: dict[tuple[str, ...], int] = {}
    for d in linear:
        if d.factor == 1:
            continue
        try:
            size = numbers(flat.types[flat.index[d.targets[0]]])
        except AxisError:
            return False
        for monomial, count in size.terms:
            logs[monomial] = logs.get(monomial, 0.0) + count * log(d.factor)
            weights[monomial] = weights.get(monomial, 0) + abs(count)
    return all(abs(total) <= ROUNDING * weights[monomial] for monomial, total in logs.items())
