"""Data model of an expanded graph: immutable regions of steps, connected by references, with the type of every value.

Expansion turns each use of a block into a :class:`Region` and each node into a :class:`Step`. Names are relative to
their region, so that all repeats of a block share one region, which the engine compiles once. The dotted path of a step
(``trunk.3.attend.qkv``) is its PyTorch module path, its prefix in the state dict and its zarr group.
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
    """Execution mode of a block in training: what is saved for backward, and the arithmetic."""

    memory: Literal["store", "checkpoint", "reversible"] = "store"
    """Values saved for backward: all activations (``store``), the inputs of each repeat (``checkpoint``), or only the
    first repeat's inputs and the last repeat's outputs (``reversible``)."""
    exact: bool = False
    """True for exact arithmetic: the terms of additions and subtractions are rounded to multiples of a fixed power of
    two, so that inputs are reconstructed bit for bit."""
    share: float = 1.0
    """Share of the memory of their activations that compiled code of repeats with stored activations saves, in (0, 1]; it
    recomputes the others. Without compiled code it saves all."""
    stored: int = 0
    """Number of last repeats that save all activations, whatever ``memory`` is; fewer than the block has."""


@dataclasses.dataclass(frozen=True)
class Ref:
    """Reference to a value inside a region.

    Attributes:
        step: Name of the step that computes the value; empty for an input of the region.
        port: Output port of the step, or name of the input.
    """

    step: str
    port: str

    def __str__(self) -> str:
        return f"{self.step}.{self.port}" if self.step else self.port


@dataclasses.dataclass(frozen=True)
class Op:
    """A component with its Config, and with the axis names of its ports bound to sizes.

    Attributes:
        contract: Contract of the component.
        config: Validated Config.
        signature: Input and output ports under this Config.
        axes: Size of each axis name in the types of the ports: a number, or an expression in ``batch`` and
            ``length``.
    """

    contract: Contract
    config: ComponentConfig
    signature: Signature
    axes: Mapping[str, Size]

    @property
    def static_axes(self) -> dict[str, int]:
        """Sizes of the axes that do not depend on the batch size or the length, by axis name."""
        return {n: c for n, s in self.axes.items() if (c := s.constant) is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A node of a region: a component, or a nested region.

    Attributes:
        name: Name of the node, or index of a repeat.
        body: The component or region that the step applies.
        inputs: For each input port, the values that feed the port; several only for a variadic port.
        outputs: Type of each output port.
        save: Settings for saving activations, or None.
        position: File, line and column of the node.
        running: Execution mode of a region in training; without effect for a component.
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
        given: Inputs that are passed to the inverse in addition to the outputs.
        level: Claimed property: ``injective``, ``bijective`` or ``volume_preserving``.
        position: File, line and column of the claim.
        path: Dotted path of the claim within the file, for messages.
        on_failure: Action of ``build`` if the inverse is numerically too inaccurate: raise an error (``error``), or
            warn and use activation checkpointing for the block (``checkpoint``).
    """

    given: tuple[str, ...]
    level: str
    position: Position
    path: str
    on_failure: Literal["error", "checkpoint"] = "error"


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A typed subgraph: the expanded form of a block, of a repeated block, or of the whole graph.

    Attributes:
        label: Name in messages and drawings.
        inputs: Type of each input.
        outputs: Reference to the value that each output returns.
        steps: Steps in topological order.
        repeat: For a repeated block, the number of repeats, each of which is a step; else 0.
        description: Description of the block.
        claim: The block's claim to be invertible, or None.
    """

    label: str
    inputs: Mapping[str, PortType]
    outputs: Mapping[str, Ref]
    steps: tuple[Step, ...]
    repeat: int = 0
    description: str = ""
    claim: Claim | None = None

    @cached_property
    def by_name(self) -> dict[str, Step]:
        """Steps of the region by name."""
        return {s.name: s for s in self.steps}

    @cached_property
    def size(self) -> int:
        """Number of components in the region, counting every repeat."""
        return sum(s.body.size if isinstance(s.body, Region) else 1 for s in self.steps)

    def type_of(self, ref: Ref) -> PortType:
        """Return the type of the value that ``ref`` refers to."""
        return self.by_name[ref.step].outputs[ref.port] if ref.step else self.inputs[ref.port]

    @cached_property
    def output_types(self) -> dict[str, PortType]:
        """Type of each output of the region."""
        return {name: self.type_of(ref) for name, ref in self.outputs.items()}

    @cached_property
    def digraph(self) -> nx.DiGraph[Any]:
        """The region as a networkx graph.

        Nodes are the names of steps, and pairs ``("input", name)`` for inputs. An edge joins each pair that is
        connected by at least one value.
        """
        graph: nx.DiGraph[Any] = nx.DiGraph()
        graph.add_nodes_from(s.name for s in self.steps)
        for step in self.steps:
            for port, refs in step.inputs.items():
                for ref in refs:
                    graph.add_edge(ref.step or ("input", ref.port), step.name, port=port, ref=ref)
        return graph

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Step]]:
        """Yield the dotted path and step of every component in the region, counting every repeat.

        Args:
            prefix: Text before each path.
        """
        for step in self.steps:
            path = f"{prefix}{step.name}"
            if isinstance(step.body, Region):
                yield from step.body.walk(path + ".")
            else:
                yield path, step


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The typed graph of a whole blueprint.

    Attributes:
        name: Name of the model.
        root: The top-level region.
        axes: Size of each axis name of the blueprint: a number, or an expression in ``batch`` and ``length``.
    """

    name: str
    root: Region
    axes: Mapping[str, Size]

    @cached_property
    def taps(self) -> tuple[tuple[str, SaveSpec, PortType], ...]:
        """Output ports whose activations are saved in training, as tuples (path, settings, type).

        The path is dotted and ends with the port, such as ``trunk.0.x``; the type is that of the port.
        """

        def visit(region: Region, prefix: str) -> Iterator[tuple[str, SaveSpec, PortType]]:
            for step in region.steps:
                path = f"{prefix}{step.name}"
                if isinstance(step.body, Region):
                    yield from visit(step.body, path + ".")
                if step.save is not None:
                    yield from ((f"{path}.{port}", step.save, step.outputs[port]) for port in step.save.ports)

        return tuple(visit(self.root, ""))
