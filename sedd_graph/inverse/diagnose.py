"""Diagnosis of a region that is not invertible: its lost inputs, the components responsible, and possible remedies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sedd_graph.inverse.cheapest import cheapest
from sedd_graph.inverse.flat import Node
from sedd_graph.inverse.program import Blocker, Lost, Refusal
from sedd_graph.inverse.propagate import Closure
from sedd_graph.inverse.reasons import Reasons

__all__ = ["diagnose"]


def diagnose(closure: Closure, facts: Sequence[int], given: tuple[str, ...], sizes: Mapping[str, int]) -> Refusal:
    """Return the diagnosis of a region in which some input cannot be recovered.

    Args:
        closure: Everything that could be derived from ``facts``.
        facts: Indices of the values (tensors) that are known at inversion: outputs, conditioning inputs and stored
            values.
        given: Names of the conditioning inputs.
        sizes: Values of ``batch`` and ``length`` at which the diagnosis states sizes in bytes.
    """
    flat = closure.flat
    reasons = Reasons(closure)
    lost: list[Lost] = []
    stuck: set[int] = set()
    for name, v in flat.inputs.items():
        if not closure.known(v):
            nodes, ends = _frontier(closure, v)
            lost.append(Lost(name, tuple(flat.refs[u] for u in sorted(ends, key=flat.rank.__getitem__))))
            stuck |= nodes
    blockers: list[Blocker] = []
    rewrites: list[str] = []
    for index in sorted(stuck):
        node = flat.nodes[index]
        blockers.append(Blocker(node.path, node.op.contract.name, node.step.position, reasons.reason(index)))
        if (hint := reasons.rewrite(index)) is not None:
            rewrites.append(hint)
    remedy = cheapest(closure, facts, sizes)
    if (hint := reasons.conditioning(remedy, given, len(lost))) is not None:
        rewrites = [hint]
    return Refusal(
        region=flat.region,
        given=given,
        lost=tuple(lost),
        blockers=tuple(blockers),
        remedy=remedy,
        rewrites=tuple(dict.fromkeys(rewrites)),
        types=dict(zip(flat.refs, flat.types, strict=True)),
    )


def _frontier(closure: Closure, start: int) -> tuple[set[int], set[int]]:
    """Follow a lost input through unknown values to the components where the derivation stops.

    It stops at a component with a known output, or at one whose rule would need an output that nothing uses. An input
    that reaches neither is lost where its path ends.

    Returns:
        The components, and the values through which they are reached.
    """
    flat = closure.flat
    stuck: set[int] = set()
    ends: set[int] = set()
    dead: set[int] = set()
    seen, todo = {start}, [start]
    while todo:
        v = todo.pop()
        maker = flat.producer[v]
        if not flat.users[v] and maker >= 0:
            if _serves_a_rule(flat.nodes[maker], v):
                stuck.add(maker)
                ends.add(v)
            else:
                dead.add(maker)
        for index in flat.users[v]:
            outputs = flat.nodes[index].outputs.values()
            if any(closure.known(u) for u in outputs) and not _waits(closure, flat.nodes[index]):
                stuck.add(index)
                ends.add(v)
            fresh = [u for u in outputs if not closure.known(u) and u not in seen]
            seen.update(fresh)
            todo += fresh
    if not stuck:
        return dead, set()
    return stuck, ends - {start}


def _waits(closure: Closure, node: Node) -> bool:
    """Return whether an inversion rule lacks only outputs of the component, whose derivation stops elsewhere."""
    for rule in node.algebra.rules:
        lacks = [name for name in rule.given if name in node.outputs and not closure.known(node.outputs[name])]
        inputs = [v for name in rule.given for v in node.inputs.get(name, ())]
        if lacks and all(closure.known(v) for v in inputs):
            return True
    return False


def _serves_a_rule(node: Node, v: int) -> bool:
    return any(node.outputs.get(name) == v for rule in node.algebra.rules for name in rule.given)
