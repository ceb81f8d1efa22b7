"""The expanded graph as plain frozen data: regions of steps, connected by references, with the type of every value.

A blueprint has blocks and nodes. Expanded, each use of a block is a :class:`Region` and each node a :class:`Step`. Names in
a region are relative to it, so that all repeats of a block are one object, which the engine compiles once. The path of a
step (``trunk.3.attend.qkv``) is its module path, its state-dict prefix and its zarr group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import networkx as nx

from sedd_graph.blueprint.schema import SaveSpec
from sedd_graph.blueprint.yaml import Position
from sedd_graph.component.axes import PortType, Size
from sedd_graph.component.contract import ComponentConfig, Contract, Signature

__all__ = ["Claim", "Graph", "Op", "Position", "Ref", "Region", "Running", "Step"]


@dataclasses.dataclass(frozen=True)
class Running:
    """Execution of a block in training: the values that are saved for backward, and the arithmetic."""

    memory: Literal["store", "checkpoint", "reversible"] = "store"
    """Saved for backward: all activations, the inputs of each repeat, or the outputs alone."""
    exact: bool = False
    """Streams are rounded to a grid, so that reconstruction is exact to the last bit."""


@dataclasses.dataclass(frozen=True)
class Ref:
    """Reference to a value inside one region: an input of the region (``step`` is empty) or an output port of a step."""

    step: str
    port: str

    def __str__(self) -> str:
        return f"{self.step}.{self.port}" if self.step else self.port


@dataclasses.dataclass(frozen=True)
class Op:
    """A component under one Config, with the axis names of its ports bound to sizes over ``batch`` and ``length``."""

    contract: Contract
    config: ComponentConfig
    signature: Signature
    axes: Mapping[str, Size]

    @property
    def static_axes(self) -> dict[str, int]:
        """The axes whose sizes are known before a step runs: all that do not depend on batch or length."""
        return {n: c for n, s in self.axes.items() if (c := s.constant) is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One node of a region: a component, or a region of its own.

    Attributes:
        name: The node's name, or the index of a repeat.
        body: What it runs.
        inputs: By input port, the values that feed it; several for a variadic port.
        outputs: By output port, its type.
        save: Outputs that training writes to disk.
        position: Where the node is written.
        running: How a region runs in training.
    """

    name: str
    body: Op | Region
    inputs: Mapping[str, tuple[Ref, ...]]
    outputs: Mapping[str, PortType]
    save: SaveSpec | None
    position: Position
    running: Running = Running()


@dataclasses.dataclass(frozen=True)
class Claim:
    """A block's claim to be invertible.

    Attributes:
        given: Inputs that the inverse receives besides the outputs.
        level: ``injective``, ``bijective`` or ``volume_preserving``.
        position: Where the claim is written.
        path: The same place as a path within the file, for messages.
        on_failure: What ``build`` does where the inverse is too inaccurate numerically.
    """

    given: tuple[str, ...]
    level: str
    position: Position
    path: str
    on_failure: Literal["error", "checkpoint"] = "error"


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Steps in topological order, from typed inputs to outputs. ``repeat`` > 0 marks a chain of one region."""

    label: str
    inputs: Mapping[str, PortType]
    outputs: Mapping[str, Ref]
    steps: tuple[Step, ...]
    repeat: int = 0
    description: str = ""
    claim: Claim | None = None

    @cached_property
    def by_name(self) -> dict[str, Step]:
        """The steps by name."""
        return {s.name: s for s in self.steps}

    @cached_property
    def size(self) -> int:
        """The number of components in it, repeats counted out."""
        return sum(s.body.size if isinstance(s.body, Region) else 1 for s in self.steps)

    def type_of(self, ref: Ref) -> PortType:
        """Return the type of a value."""
        return self.by_name[ref.step].outputs[ref.port] if ref.step else self.inputs[ref.port]

    @cached_property
    def output_types(self) -> dict[str, PortType]:
        """The types of the outputs."""
        return {name: self.type_of(ref) for name, ref in self.outputs.items()}

    @cached_property
    def digraph(self) -> nx.DiGraph[Any]:
        """The region as a networkx graph: a node per step and per input (``("input", name)``), an edge per connected pair."""
        graph: nx.DiGraph[Any] = nx.DiGraph()
        graph.add_nodes_from(s.name for s in self.steps)
        for step in self.steps:
            for port, refs in step.inputs.items():
                for ref in refs:
                    graph.add_edge(ref.step or ("input", ref.port), step.name, port=port, ref=ref)
        return graph

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Step]]:
        """Yield every component with its dotted path, repeats counted out."""
        for step in self.steps:
            path = f"{prefix}{step.name}"
            if isinstance(step.body, Region):
                yield from step.body.walk(path + ".")
            else:
                yield path, step


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The graph of a whole blueprint. ``axes`` maps its axis names to sizes over ``batch`` and ``length``."""

    name: str
    root: Region
    axes: Mapping[str, Size]

    @cached_property
    def taps(self) -> tuple[tuple[str, SaveSpec, PortType], ...]:
        """The saved activations: the dotted path, with the port last, the spec and the type of each."""

        def visit(region: Region, prefix: str) -> Iterator[tuple[str, SaveSpec, PortType]]:
            for step in region.steps:
                path = f"{prefix}{step.name}"
                if isinstance(step.body, Region):
                    yield from visit(step.body, path + ".")
                if step.save is not None:
                    yield from ((f"{path}.{port}", step.save, step.outputs[port]) for port in step.save.ports)

        return tuple(visit(self.root, ""))
