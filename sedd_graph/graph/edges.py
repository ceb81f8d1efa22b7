"""Edges: references as they are written, the order they allow, what each of them means, and what leads nowhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx

from sedd_graph.blueprint.schema import Block, Blueprint, Node
from sedd_graph.component.axes import PortType
from sedd_graph.errors import listed, suggest
from sedd_graph.graph.location import Location
from sedd_graph.graph.model import Ref, Region, Step

__all__ = ["Edge", "Values", "Wire", "read_wires", "refuse_unused", "run_order"]


@dataclasses.dataclass(frozen=True)
class Wire:
    """One reference in a node's ``in``: the port it goes to (a name, or a position) and what it says."""

    port: str | int
    at: Location
    text: str

    @property
    def source(self) -> str:
        return self.text.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Edge:
    """A wire whose reference is known to be good: what travels along it, and where it comes from."""

    port: str | int
    at: Location
    ref: Ref
    type: PortType


def read_wires(at: Location, node: Node, body: Blueprint | Block) -> list[Wire]:
    """The wires into the node at ``at``. What names nothing in ``body`` is reported."""
    at, wires = at / "in", []
    if isinstance(node.in_, str):
        wires.append(Wire(0, at, node.in_))
    elif isinstance(node.in_, list):
        wires += [Wire(i, at / i, text) for i, text in enumerate(node.in_)]
    elif isinstance(node.in_, dict):
        for port, refs in node.in_.items():
            if isinstance(refs, list):
                wires += [Wire(port, at / port / i, text) for i, text in enumerate(refs)]
            else:
                wires.append(Wire(port, at / port, refs))
    for wire in wires:
        if wire.source not in body.inputs and wire.source not in body.nodes:
            wire.at.refuse(_nothing(wire.source, [*body.inputs, *body.nodes]))
    return wires


def _nothing(name: str, known: Sequence[str]) -> str:
    return f"nothing here is called {name!r}{suggest(name, known)}; known: {listed(known)}"


def run_order(at: Location, wires: Mapping[str, list[Wire]]) -> list[str] | None:
    """The nodes of the region at ``at`` in an order that can be run, as near to the written one as it can be."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(wires)
    for name, edges in wires.items():
        graph.add_edges_from((wire.source, name) for wire in edges if wire.source in wires)
    try:
        rank = {name: i for i, name in enumerate(wires)}
        return list(nx.lexicographical_topological_sort(graph, key=rank.__getitem__))
    except nx.NetworkXUnfeasible:
        circle = [edge[0] for edge in nx.find_cycle(graph)]
        chain = " -> ".join([*circle, circle[0]] if len(circle) <= 16 else [*circle[:15], "...", circle[-1], circle[0]])
        (at / "nodes" / circle[0]).refuse(f"nodes feed each other in a circle: {chain}")
        return None


class Values:
    """What may be referred to inside one region: its inputs, and the ports of the steps made so far."""

    def __init__(self, inputs: Mapping[str, PortType]) -> None:
        self.inputs = inputs
        self.steps: dict[str, Mapping[str, PortType] | None] = {}
        """The ports of each step; None for one that has problems of its own."""

    def find(self, at: Location, text: str) -> tuple[Ref, PortType] | None:
        """The value that ``text`` (``node`` or ``node.port``, written at ``at``) refers to; None where there is none."""
        source, _, port = text.partition(".")
        if source in self.inputs:
            if port:
                at.refuse(f"{source!r} is an input and has no ports")
                return None
            return Ref("", source), self.inputs[source]
        if source not in self.steps:
            at.refuse(_nothing(source, [*self.inputs, *self.steps]))
            return None
        ports = self.steps[source]
        if ports is None:
            return None
        if not port:
            if len(ports) > 1 and "out" not in ports:
                options = listed(f"{source}.{p}" for p in ports)
                at.refuse(f"{source!r} has several outputs: say which of {options}")
                return None
            port = "out" if "out" in ports else next(iter(ports))
        if port not in ports:
            at.refuse(f"{source!r} has no output {port!r}{suggest(port, ports)}; outputs: {listed(ports)}")
            return None
        return Ref(source, port), ports[port]


def refuse_unused(at: Location, region: Region) -> None:
    """A node or an input that reaches no output and is not saved is a mistake."""
    graph = region.digraph
    wanted: set[Any] = {r.step or ("input", r.port) for r in region.outputs.values()}
    wanted |= {s.name for s in region.steps if _saves(s)}
    useful = wanted.union(*(nx.ancestors(graph, w) for w in wanted if w in graph))
    for step in region.steps:
        if step.name not in useful:
            (at / "nodes" / step.name).refuse(f"node {step.name!r} feeds no output")
    for name in region.inputs:
        if ("input", name) not in useful:
            (at / "inputs" / name).refuse(f"input {name!r} is never read")


def _saves(step: Step) -> bool:
    return step.save is not None or (isinstance(step.body, Region) and any(_saves(s) for s in step.body.steps))
