"""From a fixpoint to a program: only what is wanted of it, and whole blocks where all within is evaluated forward."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

import networkx as nx

from sedd_graph.graph.model import Ref
from sedd_graph.inverse.contraction import Fixpoint
from sedd_graph.inverse.flat import Block, Flat
from sedd_graph.inverse.program import Contraction, Derivation, Forward, Solve
from sedd_graph.inverse.propagate import Closure, Edge

__all__ = ["Plan", "derivations", "needed", "plans"]

Plan = Mapping[int, list[int | Block]]
"""What the contractions of a fixpoint evaluate: by the value they start from, components and blocks in order."""


def plans(closure: Closure) -> Plan:
    """The bodies of all contractions used, in whole blocks where that computes nothing in vain."""
    flat = closure.flat
    found: dict[int, list[int | Block]] = {}
    known = [edge is None and closure.known(v) for v, edge in enumerate(closure.made_by)]
    for edge in closure.edges:
        if edge.fixpoint is not None:
            found[edge.fixpoint.target] = _body(flat, edge.fixpoint, known)
        for v in edge.targets:
            known[v] = True
    return found


def _body(flat: Flat, fixpoint: Fixpoint, known: Sequence[bool]) -> list[int | Block]:
    inside, fit = set(fixpoint.nodes), {}

    def fits(block: Block) -> bool:
        """Each of its components is evaluated anyway, or can be and is of use to another."""
        for index in block.nodes:
            if index not in inside:
                steady = all(known[v] for v in flat.nodes[index].needs)
                users = (u for v in flat.nodes[index].outputs.values() for u in flat.users[v])
                if not steady or not any(u in block.nodes for u in users):
                    return False
        return True

    body: dict[int, int | Block] = {}
    for index in fixpoint.nodes:
        chosen: int | Block = index
        for block in flat.around[index]:
            if id(block) not in fit:
                fit[id(block)] = fits(block)
            if fit[id(block)]:
                chosen = block
                break
        body[chosen if isinstance(chosen, int) else chosen.nodes.start] = chosen
    return [body[start] for start in sorted(body)]


def _outside(flat: Flat, target: int, value: int, body: list[int | Block]) -> tuple[int, ...]:
    """What a contraction needs: the known value, and whatever its body does not compute itself."""
    own, needs = {target}, dict.fromkeys([value])
    for part in body:
        needs |= dict.fromkeys(v for v in (flat.nodes[part] if isinstance(part, int) else part).needs if v not in own)
        for index in (part,) if isinstance(part, int) else part.nodes:
            own.update(flat.nodes[index].outputs.values())
    return tuple(needs)


def needed(closure: Closure, plan: Plan, wanted: Iterable[int]) -> list[Edge]:
    """The edges of ``closure`` that ``wanted`` rests on, in order."""
    todo, marked = list(wanted), set()
    while todo:
        edge = closure.made_by[todo.pop()]
        if edge is None or id(edge) in marked:
            continue
        marked.add(id(edge))
        fixpoint = edge.fixpoint
        if fixpoint is None:
            todo += edge.needs
        else:
            todo += _outside(closure.flat, fixpoint.target, fixpoint.value, plan[fixpoint.target])
    return [edge for edge in closure.edges if id(edge) in marked]


def derivations(
    closure: Closure, plan: Plan, edges: Sequence[Edge], linear: Mapping[int, Derivation]
) -> tuple[Derivation, ...]:
    """``edges`` as derivations, blocks folded. ``linear`` has those of weighted sums, by their place in ``edges``."""
    flat = closure.flat
    made: list[Derivation] = []
    by_node: dict[int, int] = {}
    maker: dict[Ref, int] = {}
    for place, edge in enumerate(edges):
        maker |= {flat.refs[v]: place for v in edge.targets if closure.made_by[v] is edge}
        if edge.forward:
            by_node[edge.node] = place
            made.append(_call(flat, edge.node))
        elif edge.rule is not None:
            made.append(_solve(flat, edge))
        elif edge.fixpoint is not None:
            made.append(_contraction(flat, edge.fixpoint, plan[edge.fixpoint.target]))
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


def _solve(flat: Flat, edge: Edge) -> Solve:
    node, rule = flat.nodes[edge.node], edge.rule
    assert rule is not None
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
        log_det=node.algebra.log_det.get(rule.target),
        cost=rule.cost,
    )


def _contraction(flat: Flat, fixpoint: Fixpoint, body: list[int | Block]) -> Contraction:
    calls = tuple(_call(flat, part) for part in body)
    return Contraction(
        target=flat.refs[fixpoint.target],
        value=flat.refs[fixpoint.value],
        scale=fixpoint.scale,
        body=calls,
        bound=fixpoint.bound,
        iterations=fixpoint.iterations,
        cost=fixpoint.iterations * sum(call.cost for call in calls),
    )


def _folded(
    flat: Flat, made: list[Derivation], maker: Mapping[Ref, int], by_node: Mapping[int, int]
) -> tuple[Derivation, ...]:
    """``made`` with blocks in place of their components, where all of these are there and the order allows it.

    ``maker`` has the place of the derivation that each value comes from: facts, which some may give again, have none.
    """
    count = [0]
    for index in range(len(flat.nodes)):
        count.append(count[-1] + (index in by_node))

    def whole(members: Iterable[int | Block]) -> list[Block]:
        """The outermost blocks whose components are all evaluated forward."""
        found: list[Block] = []
        for member in members:
            if isinstance(member, Block):
                within = count[member.nodes.stop] - count[member.nodes.start]
                found += [member] if within == len(member.nodes) else whole(member.members) if within else []
        return found

    blocks = whole(flat.members)
    while True:
        units: list[tuple[Derivation, Block | None]] = []
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
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(range(len(units)))
        bad: set[int] = set()
        for unit, (derivation, _) in enumerate(units):
            for ref in derivation.needs:
                source = unit_of[maker[ref]] if ref in maker else unit
                if source != unit:
                    graph.add_edge(source, unit)
                    if units[source][1] is not None and ref not in units[source][0].targets:
                        bad.add(source)
        for circle in nx.strongly_connected_components(graph):
            if len(circle) > 1:
                bad |= {unit for unit in circle if units[unit][1] is not None}
        if not bad:
            order = _ordered(graph, first)
            return tuple(units[unit][0] for unit in order)
        opened = [found for unit in sorted(bad) if (found := units[unit][1]) is not None]
        blocks = [b for b in blocks if b not in opened] + [b for block in opened for b in whole(block.members)]


def _ordered(graph: nx.DiGraph[int], first: Sequence[int]) -> list[int]:
    """An order that can be run, as near to the one of derivation as it can be."""
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
