"""One node that is a component: its contract found, its Config validated, its ports unified with what comes in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sedd_graph.blueprint.schema import Node
from sedd_graph.component.axes import AxisError, PortType, Size
from sedd_graph.component.contract import size_fields
from sedd_graph.component.kinds import NODE, kinds_at
from sedd_graph.component.registry import Registry
from sedd_graph.graph.configure import configure, find_contract
from sedd_graph.graph.edges import Edge
from sedd_graph.graph.location import Location
from sedd_graph.graph.model import Op, Ref, Region, Running
from sedd_graph.graph.ports import Scope, assign, declared_outputs, read_type
from sedd_graph.graph.unify import Binding, Mismatch

__all__ = ["Made", "make_op"]


class Made(NamedTuple):
    """What a node comes to: what runs there, what feeds its inputs, and the types of its outputs."""

    body: Op | Region
    inputs: Mapping[str, tuple[Ref, ...]]
    outputs: Mapping[str, PortType]
    running: Running = Running()


def make_op(at: Location, node: Node, edges: Sequence[Edge], scope: Scope, registry: Registry) -> Made | None:
    """The component that the node at ``at`` names, typed; None where a problem was reported."""
    assert node.op is not None
    contract = find_contract(registry, node.op, kinds_at(NODE), at / "op")
    if contract is None:
        return None
    config = configure(contract, node.with_, scope, at / "with")
    if config is None:
        return None
    # Ports may depend on how many edges a variadic port gets: a list or a single value goes there whole.
    arity = {"*": len(edges), **Counter(str(edge.port) for edge in edges)}
    try:
        signature = contract.signature(config, arity)
    except (ValueError, TypeError, AxisError) as error:
        (at / "with" if node.with_ else at).refuse(f"{node.op}: {error}")
        return None
    what = f"op {contract.name!r}"
    taken = assign(at, signature.inputs, edges, what)
    if taken is None:
        return None
    symbols = {s for p in (*signature.inputs, *signature.outputs) for s in p.type.symbols}
    sizes = {name: getattr(config, name) for name in sorted(symbols & size_fields(contract.config))}
    binding = Binding({name: Size.of(size) for name, size in sizes.items() if isinstance(size, int)})
    out = at / "out"
    try:
        for port in signature.inputs:
            for edge in taken.get(port.name, ()):
                binding.unify(port, edge.type, label=f"input {port.name!r} of {what}", at=edge.at)
        for port, text in declared_outputs(out, node, signature.outputs):
            declared = read_type(out, text, scope)
            if declared is None:
                return None
            binding.unify(port, declared, label=f"output {port.name!r} of {what}", at=out)
        binding.finish()
        outputs = {port.name: binding.result(port) for port in signature.outputs}
    except Mismatch as error:
        (error.at or at).refuse(str(error))
        return None
    inputs = {port: tuple(edge.ref for edge in found) for port, found in taken.items()}
    return Made(Op(contract, config, signature, binding.axes, node.with_), inputs, outputs)
