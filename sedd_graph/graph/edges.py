"""Edges inside one region: reading references, sorting nodes topologically, resolving references to typed values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import networkx as nx

from sedd_graph.blueprint.location import Location, Refused
from sedd_graph.blueprint.schema import Node
from sedd_graph.component.axes import PortType
from sedd_graph.errors import choices, listed
from sedd_graph.graph.model import Ref, Region, Step

__all__ = ["Edge", "Values", "WrittenEdge", "read_edges", "refuse_unused", "run_order"]


@dataclasses.dataclass(frozen=True)
class WrittenEdge:
    """A reference in a node's ``in``, before it is resolved.

    Attributes:
        port: The input port that the reference feeds: a name, or an index in the order of the ports.
        at: Location of the reference in the blueprint.
        text: The reference as written, such as ``trunk.x``.
    """

    port: str | int
    at: Location
    text: str


@dataclasses.dataclass(frozen=True)
class Edge:
    """A resolved edge from a value to an input port of a node.

    Attributes:
        port: The input port: a name, or an index in the order of the ports.
        at: Location of the reference in the blueprint.
        ref: Reference to the value that feeds the port.
        type: Type of the value.
    """

    port: str | int
    at: Location
    ref: Ref
    type: PortType


def read_edges(at: Location, node: Node) -> list[WrittenEdge]:
    """Return the edges into a node, as they are written under its key ``in``.

    Args:
        at: Location of the node in the blueprint.
        node: The node.
    """
    at, written = at / "in", node.in_
    if not isinstance(written, dict):
        return list(_edges(at, None, written or []))
    return [edge for port, refs in written.items() for edge in _edges(at / port, port, refs)]


def _edges(at: Location, port: str | None, refs: str | list[str]) -> Iterable[WrittenEdge]:
    """Yield the edges to ``port``, or if it is None to the ports in their order."""
    if isinstance(refs, str):
        yield WrittenEdge(0 if port is None else port, at, refs)
        return
    for index, text in enumerate(refs):
        yield WrittenEdge(index if port is None else port, at / index, text)


def run_order(at: Location, edges: Mapping[str, Iterable[WrittenEdge]]) -> list[str]:
    """Return the names of a region's nodes in topological order; of several possible next nodes, the first in the file.

    Args:
        at: Location of the region.
        edges: The edges into each node, by the node's name.

    Raises:
        Refused: The nodes form a cycle; the problem was reported.
    """
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(edges)
    for name, into in edges.items():
        sources = (edge.text.partition(".")[0] for edge in into)
        graph.add_edges_from((source, name) for source in sources if source in edges)
    rank = {name: index for index, name in enumerate(edges)}
    try:
        return list(nx.lexicographical_topological_sort(graph, key=rank.__getitem__))
    except nx.NetworkXUnfeasible:
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        chain = " -> ".join([*cycle, cycle[0]] if len(cycle) <= 16 else [*cycle[:15], "...", cycle[-1], cycle[0]])
        raise (at / "nodes" / cycle[0]).refuse(f"nodes form a cycle: {chain}") from None


class Values:
    """The values that references inside one region can resolve to: the region's inputs and the outputs of its nodes.

    Args:
        inputs: Type of each input of the region.
        nodes: Names of its nodes.
    """

    def __init__(self, inputs: Mapping[str, PortType], nodes: Iterable[str]) -> None:
        self.inputs = inputs
        self.nodes: dict[str, Mapping[str, PortType] | None] = dict.fromkeys(nodes)
        """Types of the outputs of each node, by node name and output port; None for a node that is not typed yet or has
        problems."""

    def find(self, at: Location, text: str) -> tuple[Ref, PortType]:
        """Resolve a reference to a value of the region, and return the value and its type.

        Args:
            at: Location of the reference in the blueprint.
            text: ``node``, ``node.port`` or the name of an input.

        Raises:
            Refused: There is no such value (the problem was reported), or its node has problems that were reported
                already.
        """
        source, _, port = text.partition(".")
        if source in self.inputs:
            if port:
                raise at.refuse(f"{source!r} is an input and has no ports")
            return Ref("", source), self.inputs[source]
        if source not in self.nodes:
            raise at.refuse(f"no node or input is called {source!r}{choices(source, [*self.inputs, *self.nodes])}")
        ports = self.nodes[source]
        if ports is None:
            raise Refused
        if not port and len(ports) > 1 and "out" not in ports:
            options = listed(f"{source}.{name}" for name in ports)
            raise at.refuse(f"{source!r} has several outputs: name one of {options}")
        port = port or ("out" if "out" in ports else next(iter(ports)))
        if port not in ports:
            raise at.refuse(f"{source!r} has no output {port!r}{choices(port, ports, label='outputs')}")
        return Ref(source, port), ports[port]


def refuse_unused(at: Location, region: Region) -> None:
    """Report each node and input of a region on which no output of the region and no saved activation depends.

    Args:
        at: Location of the region.
        region: The expanded region.
    """
    graph = region.digraph
    used = {ref.step or ("input", ref.port) for ref in region.outputs.values()}
    used |= {step.name for step in region.steps if _saves(step)}
    used = used.union(*(nx.ancestors(graph, node) for node in used if node in graph))
    for step in region.steps:
        if step.name not in used:
            (at / "nodes" / step.name).refuse(f"node {step.name!r} feeds no output")
    for name in region.inputs:
        if ("input", name) not in used:
            (at / "inputs" / name).refuse(f"input {name!r} is never read")


def _saves(step: Step) -> bool:
    return step.save is not None or (isinstance(step.body, Region) and any(map(_saves, step.body.steps)))
