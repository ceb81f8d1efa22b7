"""The expanded graph as plain frozen data: regions of steps, joined by references, every edge with its type.

A :class:`Region` holds names only relative to itself, so all repeats of a block are one and the same object: that is
what lets the engine compile one of them for all. A step's path (``trunk.3.attend.qkv``) is at once its module path,
its state-dict prefix and its zarr group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import networkx as nx

from sedd_graph.blueprint.schema import SaveSpec
from sedd_graph.component.axes import PortType, Size
from sedd_graph.component.contract import ComponentConfig, Contract, Signature

__all__ = ["Claim", "Graph", "Op", "Place", "Ref", "Region", "Running", "Step"]

Place = tuple[str, int, int]
"""File, line and column (from 1; 0 where they are not known)."""


@dataclasses.dataclass(frozen=True)
class Running:
    """How a block is run in training: what is kept for the backward pass, and with which arithmetic."""

    memory: Literal["store", "checkpoint", "reversible"] = "store"
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class Ref:
    """A value inside one region: an input of the region (``step`` is empty) or a port of one of its steps."""

    step: str
    port: str

    def __str__(self) -> str:
        return f"{self.step}.{self.port}" if self.step else self.port


@dataclasses.dataclass(frozen=True)
class Op:
    """A component under one Config, with its own axis names bound to sizes."""

    contract: Contract
    config: ComponentConfig
    signature: Signature
    axes: Mapping[str, Size]
    raw: Mapping[str, Any]

    @property
    def static_axes(self) -> dict[str, int]:
        """The axes that are known before a step runs (all but batch and length)."""
        return {n: c for n, s in self.axes.items() if (c := s.constant) is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One node within a region: a component or a region of its own. ``outputs`` gives the type of every port."""

    name: str
    body: Op | Region
    inputs: Mapping[str, tuple[Ref, ...]]
    outputs: Mapping[str, PortType]
    save: SaveSpec | None
    place: Place
    running: Running = Running()


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a block says of itself: its inputs follow from its outputs and from the inputs in ``given``, to ``level``.

    ``place`` and ``path`` are where it says so. ``on_failure`` is what is done where it does not hold in numbers.
    """

    given: tuple[str, ...]
    level: str
    place: Place
    path: str
    on_failure: Literal["error", "checkpoint"] = "error"


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Steps in an order that can be run, from typed inputs to outputs. ``repeat`` > 0 marks a chain of one block."""

    label: str
    inputs: Mapping[str, PortType]
    outputs: Mapping[str, Ref]
    steps: tuple[Step, ...]
    repeat: int = 0
    description: str = ""
    claim: Claim | None = None

    @cached_property
    def by_name(self) -> dict[str, Step]:
        return {s.name: s for s in self.steps}

    @cached_property
    def size(self) -> int:
        """How many components stand in it, repeats counted out."""
        return sum(s.body.size if isinstance(s.body, Region) else 1 for s in self.steps)

    def type_of(self, ref: Ref) -> PortType:
        return self.by_name[ref.step].outputs[ref.port] if ref.step else self.inputs[ref.port]

    @cached_property
    def output_types(self) -> dict[str, PortType]:
        return {name: self.type_of(ref) for name, ref in self.outputs.items()}

    @cached_property
    def digraph(self) -> nx.DiGraph[Any]:
        """Steps and inputs (as ``(input, name)``) as nodes, one edge for each pair that is joined."""
        graph: nx.DiGraph[Any] = nx.DiGraph()
        graph.add_nodes_from(s.name for s in self.steps)
        for step in self.steps:
            for port, refs in step.inputs.items():
                for ref in refs:
                    graph.add_edge(ref.step or ("input", ref.port), step.name, port=port, ref=ref)
        return graph

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Step]]:
        """Every component, with its dotted path, repeats counted out."""
        for step in self.steps:
            path = f"{prefix}{step.name}"
            if isinstance(step.body, Region):
                yield from step.body.walk(path + ".")
            else:
                yield path, step


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A whole blueprint's graph. ``axes`` maps the blueprint's axis names to sizes over ``batch`` and ``length``."""

    name: str
    root: Region
    axes: Mapping[str, Size]

    @cached_property
    def taps(self) -> tuple[tuple[str, SaveSpec, PortType], ...]:
        """Every saved port as (dotted path with the port last, its spec, its type)."""
        found: list[tuple[str, SaveSpec, PortType]] = []

        def visit(region: Region, prefix: str) -> None:
            for step in region.steps:
                path = f"{prefix}{step.name}"
                if isinstance(step.body, Region):
                    visit(step.body, path + ".")
                if step.save is not None:
                    found.extend((f"{path}.{p}", step.save, step.outputs[p]) for p in step.save.ports)

        visit(self.root, "")
        return tuple(found)
