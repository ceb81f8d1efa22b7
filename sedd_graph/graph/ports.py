"""Ports of a node: reading declared types, assigning edges to input ports, and unifying their types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from sedd_graph.blueprint.location import Location, Refused
from sedd_graph.blueprint.schema import Node
from sedd_graph.component.axes import AxisError, PortType, Size, parse_port_type
from sedd_graph.component.contract import Port
from sedd_graph.errors import choices, listed, suggest
from sedd_graph.graph.edges import Edge
from sedd_graph.graph.unify import Binding

__all__ = ["Scope", "assign", "declared_outputs", "read_type", "unify_inputs"]

Scope = Mapping[str, Size]
"""Size of each axis name that a block or blueprint may use in types and expressions: a number, or an expression in
``batch`` and ``length``, which are known only when the network runs."""


def read_type(at: Location, text: str, scope: Scope) -> PortType:
    """Parse a port type, and replace its axis names by their sizes.

    Args:
        at: Location of the type in the blueprint.
        text: The type, such as ``float b l d``.
        scope: Sizes of the axis names.

    Raises:
        Refused: The type is invalid; the problem was reported.
    """
    with at.reporting(AxisError):
        declared = parse_port_type(text, scope)
        if any(dim.variadic for dim in declared.dims):
            raise AxisError(f"port type {text!r}: a starred axis cannot stand in a blueprint")
        for written, dim in zip(text.split()[1:], declared.dims, strict=True):
            if dim.size.constant is not None and dim.size.constant <= 0:
                shown = written if written == str(dim) else f"{written} = {dim}"
                raise AxisError(f"port type {text!r}: {shown}, but a size is at least 1")
    return declared


def declared_outputs(
    at: Location, node: Node, ports: Sequence[Port], scope: Scope
) -> list[tuple[Port, PortType, Location]]:
    """Return the outputs that a node declares under ``out``, each with its declared type and its location.

    If ``out`` is a single type, it is that of the first output. If ``out`` names an output that the node does not have,
    a problem is recorded, and the name is left out of the result.

    Args:
        at: Location of ``out``.
        node: The node.
        ports: Output ports of the node.
        scope: Sizes of the axis names.

    Raises:
        Refused: A type is invalid; the problem was reported.
    """
    by_name, found = {port.name: port for port in ports}, []
    written = {ports[0].name: node.out} if isinstance(node.out, str) else node.out or {}
    for name, text in written.items():
        here = at if isinstance(node.out, str) else at / name
        if name in by_name:
            found.append((by_name[name], read_type(here, text, scope), here))
        else:
            here.refuse(f"no output {name!r}{choices(name, by_name, label='outputs')}")
    return found


def assign(at: Location, ports: Sequence[Port], edges: Sequence[Edge], label: str) -> dict[str, list[Edge]]:
    """Assign the edges into a node to its input ports, and return the edges of each port by name.

    Args:
        at: Location of the node.
        ports: Input ports of the node.
        edges: Edges into the node.
        label: Description of the node in messages.

    Raises:
        Refused: An edge has no matching port, or a required port has no edge; the problems were reported.
    """
    taken: dict[str, list[Edge]] = {}
    with at.gather():
        for edge in edges:
            with suppress(Refused):
                port = _port(edge, ports, label)
                if port.name in taken and not port.variadic:
                    raise edge.at.refuse(f"input {port.name!r} of {label} takes one value, not several")
                taken.setdefault(port.name, []).append(edge)
        for port in ports:
            if not port.optional and port.name not in taken:
                at.refuse(f"{label} requires its input {port.name!r} ({port.type}); inputs: {_names(ports)}")
    return taken


def unify_inputs(binding: Binding, ports: Sequence[Port], taken: Mapping[str, list[Edge]], label: str) -> None:
    """Unify the type of each input port with the types of the values that feed the port, binding axis names to sizes.

    Args:
        binding: Sizes of the axis names in the node's port types, updated in place.
        ports: Input ports of the node.
        taken: Edges of each port, from :func:`assign`.
        label: Description of the node in messages.

    Raises:
        Mismatch: A value does not have the type of its port.
    """
    for port in ports:
        for edge in taken.get(port.name, ()):
            binding.unify(port, edge.type, label=f"input {port.name!r} of {label}", at=edge.at)


def _port(edge: Edge, ports: Sequence[Port], label: str) -> Port:
    if isinstance(edge.port, int):
        if edge.port < len(ports) and not ports[edge.port].variadic:
            return ports[edge.port]
        found = next((port for port in ports if port.variadic), None)
        message = f"takes {len(ports)} input(s) ({_names(ports)}), not {edge.port + 1}"
    else:
        found = next((port for port in ports if port.name == edge.port), None)
        near = "" if found else suggest(edge.port, [port.name for port in ports])
        message = f"has no input {edge.port!r}{near}; inputs: {_names(ports)}"
    if found is None:
        raise edge.at.refuse(f"{label} {message}")
    return found


def _names(ports: Sequence[Port]) -> str:
    return listed(port.name + ("?" if port.optional else "*" if port.variadic else "") for port in ports)
