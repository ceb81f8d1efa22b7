"""Type checking of a graph node that applies a component.

The component's contract (the description of its Config and ports) is looked up in the registry, the node's Config is
validated, and the types of the component's ports are unified with those of the values that feed them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sedd_graph.blueprint.location import Location, Refused
from sedd_graph.blueprint.schema import Node
from sedd_graph.component.axes import AxisError, Size
from sedd_graph.component.contract import size_fields
from sedd_graph.component.kinds import NODE, kinds_at
from sedd_graph.component.registry import Registry
from sedd_graph.graph.configure import configure, find_contract
from sedd_graph.graph.edges import Edge
from sedd_graph.graph.model import Op, Step
from sedd_graph.graph.ports import Scope, assign, declared_outputs, unify_inputs
from sedd_graph.graph.unify import Binding

__all__ = ["op_step"]


def op_step(at: Location, node: Node, edges: Sequence[Edge], scope: Scope, registry: Registry) -> Step:
    """Type-check a node whose ``op`` names a component, and return it as a step of the typed graph.

    Args:
        at: Location of the node in the blueprint.
        node: The node as written.
        edges: Edges into the node, each with the value that it carries and the type of the value.
        scope: Sizes of the axis names that the node's expressions may use.
        registry: The installed components.

    Raises:
        Refused: The component, its Config or an edge is invalid; the problem was reported.
        Mismatch: An input value does not have the type of its port, an output does not have its declared type, or the
            size of an axis cannot be determined.
    """
    contract = find_contract(registry, node.op or "", kinds_at(NODE), at / "op")
    config = None if contract is None else configure(contract, node.with_, scope, at / "with")
    if contract is None or config is None:
        raise Refused
    # Ports may depend on the number of edges into a variadic port; edges without a port name count for it.
    arity = {"*": len(edges), **Counter(str(edge.port) for edge in edges)}
    try:
        signature = contract.signature(config, arity)
    except (ValueError, TypeError, AxisError) as error:
        raise (at / "with" if node.with_ else at).refuse(f"{node.op}: {error}") from None
    label = f"op {contract.name!r}"
    taken = assign(at, signature.inputs, edges, label)
    symbols = {s for p in (*signature.inputs, *signature.outputs) for s in p.type.symbols}
    sizes = {name: getattr(config, name) for name in sorted(symbols & size_fields(contract.config))}
    binding = Binding({name: Size.of(size) for name, size in sizes.items() if isinstance(size, int)})
    unify_inputs(binding, signature.inputs, taken, label)
    for port, declared, here in declared_outputs(at / "out", node, signature.outputs, scope):
        binding.unify(port, declared, label=f"output {port.name!r} of {label}", at=here)
    binding.finish()
    outputs = {port.name: binding.result(port) for port in signature.outputs}
    inputs = {port: tuple(edge.ref for edge in found) for port, found in taken.items()}
    op = Op(contract, config, signature, binding.axes)
    return Step(str(at.path[-1]), op, inputs, outputs, node.save, at.position)
