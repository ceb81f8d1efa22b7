"""Ports: the types that a blueprint declares, and which edge goes into which port."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sedd_graph.blueprint.schema import Node
from sedd_graph.component.axes import AxisError, PortType, Size, parse_port_type
from sedd_graph.component.contract import Port
from sedd_graph.errors import listed, suggest
from sedd_graph.graph.edges import Edge
from sedd_graph.graph.location import Location

__all__ = ["Scope", "assign", "declared_outputs", "read_type"]

Scope = Mapping[str, Size]
"""The axis names that may be used at some place, with their sizes over ``batch`` and ``length``."""


def read_type(at: Location, text: str, scope: Scope) -> PortType | None:
    """The type written at ``at``, its axes replaced by their sizes."""
    try:
        declared = parse_port_type(text, scope)
        if any(d.variadic for d in declared.dims):
            raise AxisError(f"port type {text!r}: a starred axis cannot stand in a blueprint")
        for written, dim in zip(text.split()[1:], declared.dims, strict=True):
            if dim.size.constant is not None and dim.size.constant <= 0:
                shown = written if written == str(dim) else f"{written} = {dim}"
                raise AxisError(f"port type {text!r}: {shown}, but a size is at least 1")
        return declared
    except AxisError as error:
        at.refuse(str(error))
        return None


def declared_outputs(at: Location, node: Node, ports: Sequence[Port]) -> list[tuple[Port, str]]:
    """What the node's ``out`` (at ``at``) declares, port by port; a single type is that of the first output."""
    if node.out is None:
        return []
    if isinstance(node.out, str):
        return [(ports[0], node.out)]
    by_name, found = {p.name: p for p in ports}, []
    for name, text in node.out.items():
        if name in by_name:
            found.append((by_name[name], text))
        else:
            (at / name).refuse(f"no output {name!r}{suggest(name, by_name)}; outputs: {listed(by_name)}")
    return found


def assign(at: Location, ports: Sequence[Port], edges: Sequence[Edge], what: str) -> dict[str, list[Edge]] | None:
    """Which edges go into which port of ``what``, the node at ``at``; None where some misfit was reported."""
    before = len(at.problems)
    by_name = {p.name: p for p in ports}
    variadic = next((p for p in ports if p.variadic), None)
    taken: dict[str, list[Edge]] = {}
    names = listed(p.name + ("?" if p.optional else "*" if p.variadic else "") for p in ports)
    for edge in edges:
        if isinstance(edge.port, int):
            port = ports[edge.port] if edge.port < len(ports) and not ports[edge.port].variadic else variadic
            if port is None:
                edge.at.refuse(f"{what} takes {len(ports)} input(s) ({names}), not {edge.port + 1}")
                continue
        else:
            port = by_name.get(edge.port)
            if port is None:
                edge.at.refuse(f"{what} has no input {edge.port!r}{suggest(edge.port, by_name)}; inputs: {names}")
                continue
        slot = taken.setdefault(port.name, [])
        if slot and not port.variadic:
            edge.at.refuse(f"input {port.name!r} of {what} takes one value, not several")
            continue
        slot.append(edge)
    for port in ports:
        if not port.optional and port.name not in taken:
            at.refuse(f"{what} needs its input {port.name!r} ({port.type}); inputs: {names}")
    return taken if len(at.problems) == before else None
