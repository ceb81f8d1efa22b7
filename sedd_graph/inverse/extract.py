"""Extraction of an inverse program: the derivations that are needed, with each nested block as one call if possible."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence

import networkx as nx

from sedd_graph.graph.model import Ref
from sedd_graph.inverse.flat import Block, Flat, log_det_of
from sedd_graph.inverse.program import Contraction, Derivation, Forward, Linear, Solve
from sedd_graph.inverse.propagate import Closure
from sedd_graph.inverse.system import Edge, FixedPoint, FixedPointEdge, ForwardEdge, LinearEdge, RuleEdge

__all__ = ["contractions", "derivations", "needed"]


def contractions(closure: Closure) -> dict[int, Contraction]:
    """Return the derivations by fixed-point iteration, keyed by the index of the value that each one computes.

    An iteration evaluates a nested block with one call if it needs the results of all the block's components.

    Args:
        closure: All values that can be derived, with the edge that derives each.
    """
    flat = closure.flat
    found: dict[int, Contraction] = {}
    known = [edge is None and closure.known(v) for v, edge in enumerate(closure.derived_by)]
    for edge in closure.edges:
        if isinstance(edge, FixedPointEdge):
            point = edge.fixed_point
            body = tuple(_call(flat, part) for part in _body(flat, point, known))
            used = {ref for call in body for ref in (*call.needs, *call.targets)}
            found[point.target] = Contraction(
                target=flat.refs[point.target],
                value=flat.refs[point.value],
                scale=point.scale,
                body=body,
                known=tuple(ref for v in point.needs if v != point.value and (ref := flat.refs[v]) in used),
                bound=point.bound,
                iterations=point.iterations,
                cost=point.iterations * sum(call.cost for call in body),
            )
        for v in edge.targets:
            known[v] = True
    return found


def _body(flat: Flat, found: FixedPoint, known: Sequence[bool]) -> list[int | Block]:
    """Return the components and blocks that evaluate a contraction, in order."""
    inside, fit = set(found.nodes), {}

    def fits(block: Block) -> bool:
        """Return whether each component is evaluated anyway, or is computable and read by another one in the block.

        A component that computes a known value again, from the iterate, must not pass it on within the block.
        """
        for index in block.nodes:
            if index in inside:
                again = (v for v in flat.nodes[index].outputs.values() if known[v] and v != found.value)
                if any(u in block.nodes for v in again for u in flat.users[v]):
                    return False
            else:
                steady = all(known[v] for v in flat.nodes[index].needs)
                users = (u for v in flat.nodes[index].outputs.values() for u in flat.users[v])
                if not steady or not any(u in block.nodes for u in users):
                    return False
        return True

    body: dict[int, int | Block] = {}
    for index in found.nodes:
        chosen: int | Block = index
        for block in flat.around[index]:
            if id(block) not in fit:
                fit[id(block)] = fits(block)
            if fit[id(block)]:
                chosen = block
                break
        body[chosen if isinstance(chosen, int) else chosen.nodes.start] = chosen
    return [body[start] for start in sorted(body)]


def needed(closure: Closure, iterated: Mapping[int, Contraction], wanted: Iterable[int]) -> list[Edge]:
    """Return the edges (ways to derive values) that are needed to derive the values ``wanted``, in order of derivation.

    Args:
        closure: All values that can be derived, with the edge that derives each.
        iterated: Fixed-point derivations, keyed by the index of the value that each one computes.
        wanted: Indices of the values to derive.
    """
    todo, marked = list(wanted), set()
    read: set[int] = set()
    while todo:
        read.add(v := todo.pop())
        edge = closure.derived_by[v]
        if edge is None or id(edge) in marked:
            continue
        marked.add(id(edge))
        if isinstance(edge, FixedPointEdge):
            todo += [closure.flat.index[ref] for ref in iterated[edge.fixed_point.target].needs]
        else:
            todo += edge.needs
    return [_pruned(closure, edge, read) for edge in closure.edges if id(edge) in marked]


def _pruned(closure: Closure, edge: Edge, read: set[int]) -> Edge:
    """Return a linear edge without the solutions that no other edge reads; any other edge as it is.

    A value that is left out is evaluated forward after the program, by its own equation.
    """
    if not isinstance(edge, LinearEdge) or read.issuperset(edge.targets):
        return edge
    solutions = tuple(s for s in edge.solutions if s.target in read)
    needs = tuple(dict.fromkeys(v for s in solutions for v, _ in s.terms))
    made = dataclasses.replace(edge, needs=needs, targets=tuple(s.target for s in solutions), solutions=solutions)
    for v in made.targets:
        if closure.derived_by[v] is edge:
            closure.derived_by[v] = made
    return made


def derivations(
    closure: Closure, iterated: Mapping[int, Contraction], edges: Sequence[Edge], linear: Mapping[int, Linear]
) -> tuple[Derivation, ...]:
    """Return the derivations of a program, given its edges (ways to derive values).

    Each edge becomes one derivation. If all components of a nested block are evaluated forward and the order of
    derivation allows it, their derivations are merged into one call of the block.

    Args:
        closure: All values that can be derived, with the edge that derives each.
        iterated: Fixed-point derivations, keyed by the index of the value that each one computes.
        edges: Edges of the program, in order of derivation.
        linear: Linear derivations, keyed by the index in ``edges`` of the edge that each comes from.
    """
    flat = closure.flat
    made: list[Derivation] = []
    by_node: dict[int, int] = {}
    maker: dict[Ref, int] = {}
    for place, edge in enumerate(edges):
        maker |= {flat.refs[v]: place for v in edge.targets if closure.derived_by[v] is edge}
        if isinstance(edge, ForwardEdge):
            by_node[edge.node] = place
            made.append(_call(flat, edge.node))
        elif isinstance(edge, RuleEdge):
            made.append(_solve(flat, edge))
        elif isinstance(edge, FixedPointEdge):
            made.append(iterated[edge.fixed_point.target])
        else:
            made.append(linear[place])
    return _folded(flat, made, maker, by_node)


def _refs(flat: Flat, values: Iterable[int]) -> tuple[Ref, ...]:
    return tuple(flat.refs[v] for v in values)


def _call(flat: Flat, part: int | Block) -> Forward:
    what = flat.nodes[part] if isinstance(part, int) else part
    return Forward(
        path=what.path,
        step=what.step,
        inputs={port: _refs(flat, values) for port, values in what.inputs.items()},
        outputs={port: flat.refs[v] for port, v in what.outputs.items()},
        cost=flat.nodes[part].cost if isinstance(part, int) else sum(flat.nodes[index].cost for index in part.nodes),
    )


def _solve(flat: Flat, edge: RuleEdge) -> Solve:
    node, rule = flat.nodes[edge.node], edge.rule
    given: list[Ref | None] = []
    for name in rule.given:
        if name in node.outputs:
            given.append(flat.refs[node.outputs[name]])
        else:
            given += _refs(flat, node.inputs[name]) if name in node.inputs else [None]
    return Solve(
        path=node.path,
        step=node.step,
        rule=rule,
        given=tuple(given),
        targets=_refs(flat, edge.targets),
        inputs={port: _refs(flat, values) for port, values in node.inputs.items()},
        log_det=log_det_of(flat, node, rule),
        cost=rule.cost,
    )


def _folded(
    flat: Flat, made: list[Derivation], maker: Mapping[Ref, int], by_node: Mapping[int, int]
) -> tuple[Derivation, ...]:
    """Replace forward evaluations by whole blocks where all components of one are evaluated and the order allows it.

    Args:
        flat: The region.
        made: Derivations in order.
        maker: Position of the derivation that each value comes from. Facts, which some may compute again, have none.
        by_node: Position of the forward evaluation of each component that has one.
    """
    count = [0]
    for index in range(len(flat.nodes)):
        count.append(count[-1] + (index in by_node))

    def whole(members: Iterable[int | Block]) -> list[Block]:
        """Return the outermost blocks whose components are all evaluated forward."""
        found: list[Block] = []
        for member in members:
            if isinstance(member, Block):
                within = count[member.nodes.stop] - count[member.nodes.start]
                found += [member] if within == len(member.nodes) else whole(member.members) if within else []
        return found

    blocks = whole(flat.members)
    while True:
        units, first, unit_of = _units(flat, blocks, made, by_node)
        graph, misplaced = _dependencies(units, unit_of, maker)
        if not misplaced:
            return tuple(units[unit][0] for unit in _ordered(graph, first))
        opened = [found for unit in sorted(misplaced) if (found := units[unit][1]) is not None]
        blocks = [b for b in blocks if b not in opened] + [b for block in opened for b in whole(block.members)]


_Units = list[tuple[Derivation, Block | None]]


def _units(
    flat: Flat, blocks: Iterable[Block], made: Sequence[Derivation], by_node: Mapping[int, int]
) -> tuple[_Units, list[int], list[int]]:
    """Return calls of ``blocks`` and the remaining derivations, the first position of each, and the unit of each position."""
    units: _Units = []
    first: list[int] = []
    unit_of = [-1] * len(made)
    for block in blocks:
        places = [by_node[index] for index in block.nodes]
        for place in places:
            unit_of[place] = len(units)
        units.append((_call(flat, block), block))
        first.append(min(places))
    for place, derivation in enumerate(made):
        if unit_of[place] < 0:
            unit_of[place] = len(units)
            units.append((derivation, None))
            first.append(place)
    return units, first, unit_of


def _dependencies(units: _Units, unit_of: Sequence[int], maker: Mapping[Ref, int]) -> tuple[nx.DiGraph[int], set[int]]:
    """Return the dependency graph of the units, and the blocks that cannot be one call.

    Such a block has an inner value that is needed outside the block, or is on a cycle of the graph.
    """
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(units)))
    misplaced: set[int] = set()
    for unit, (derivation, _) in enumerate(units):
        for ref in derivation.needs:
            source = unit_of[maker[ref]] if ref in maker else unit
            if source != unit:
                graph.add_edge(source, unit)
                if units[source][1] is not None and ref not in units[source][0].targets:
                    misplaced.add(source)
    for cycle in nx.strongly_connected_components(graph):
        if len(cycle) > 1:
            misplaced |= {unit for unit in cycle if units[unit][1] is not None}
    return graph, misplaced


def _ordered(graph: nx.DiGraph[int], first: Sequence[int]) -> list[int]:
    """Return a topological order as near as possible to that of the derivations."""
    left = dict(graph.in_degree())
    ready = [(first[unit], unit) for unit, count in left.items() if not count]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        unit = heapq.heappop(ready)[1]
        order.append(unit)
        for after in graph.successors(unit):
            left[after] -= 1
            if not left[after]:
                heapq.heappush(ready, (first[after], after))
    return order
