"""Expansion of a loaded blueprint into a :class:`Graph`: resolves names, expands blocks, and types every edge.

All problems are collected and raised together. A block is expanded once per combination of parameters and input types,
so that the cost does not grow with the number of repeats. :mod:`~sedd_graph.graph.ops` and
:mod:`~sedd_graph.graph.blocks` check the types of single nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from sedd_graph.blueprint.interpolate import InterpolationFault, resolve
from sedd_graph.blueprint.location import Loaded, Location, Refused
from sedd_graph.blueprint.schema import Block, Blueprint, Node, Scalar
from sedd_graph.component.axes import DYNAMIC, AxisError, PortType, Size, parse_size
from sedd_graph.component.registry import Registry
from sedd_graph.errors import BlueprintError, choices
from sedd_graph.graph import blocks
from sedd_graph.graph.claims import read_claim
from sedd_graph.graph.edges import Edge, Values, WrittenEdge, read_edges, refuse_unused, run_order
from sedd_graph.graph.model import Graph, Region, Step
from sedd_graph.graph.ops import op_step
from sedd_graph.graph.ports import Scope, assign, read_type, unify_inputs
from sedd_graph.graph.unify import Binding, Mismatch

__all__ = ["expand"]

MAX_BLOCK_DEPTH, MAX_STEPS = 32, 10_000

Params = Mapping[str, Scalar]
Types = Mapping[str, PortType]


def expand(loaded: Loaded, registry: Registry) -> Graph:
    """Expand a blueprint and return its typed graph.

    Args:
        loaded: The blueprint and its included files.
        registry: The installed components.

    Raises:
        BlueprintError: Holds every problem that was found.
    """
    blueprint, root, inputs = loaded.blueprint, Location(loaded), dict[str, PortType]()
    try:
        with root.gather():
            axes = _read_axes(root, blueprint)
            for name, text in blueprint.inputs.items():
                with suppress(Refused):
                    inputs[name] = read_type(root / "inputs" / name, text, axes)
        region = _Expander(registry, axes).region(root, blueprint, loaded.params, inputs, axes)
    except Refused:
        raise BlueprintError(root.problems) from None
    return Graph(name=blueprint.name, root=region, axes=axes)


def _read_axes(root: Location, blueprint: Blueprint) -> dict[str, Size]:
    """Return the blueprint's ``axes`` as sizes over ``batch`` and ``length``; an axis may refer to preceding ones."""
    axes: dict[str, Size] = {}
    for name, value in blueprint.axes.items():
        with suppress(Refused), (root / "axes" / name).reporting(AxisError):
            size = parse_size(value, axes | {n: Size.of(n) for n in DYNAMIC if n not in axes})
            if size.constant is not None and size.constant <= 0:
                raise AxisError(f"axis {name!r} is {size.constant}: a size is at least 1")
            axes[name] = size
    return axes


class _Expander:
    """Expansion of one blueprint, with a cache of the expanded blocks."""

    def __init__(self, registry: Registry, root_axes: Scope) -> None:
        self.registry, self.root_axes = registry, root_axes
        self.regions: dict[object, Region | None] = {}
        """By block, parameters and input types; None where problems were reported."""
        self.active: list[tuple[str, str]] = []
        """File and name of the blocks that are being expanded, the outermost first."""
        self.steps = 0

    def region(self, at: Location, body: Blueprint | Block, params: Params, inputs: Types, scope: Scope) -> Region:
        """Return the root of the graph, or the block that is declared at ``at``, as a region.

        Args:
            at: Where it is defined.
            body: Its content.
            params: The values of its parameters.
            inputs: The types of its inputs.
            scope: The axis names that it may use.

        Raises:
            Refused: Problems were reported.
        """
        nodes: dict[str, Node] = {}
        with at.gather():
            for name, written in body.nodes.items():
                with suppress(Refused):
                    if name in body.inputs:
                        raise (at / "nodes" / name).refuse(f"node {name!r} has the name of an input")
                    nodes[name] = _interpolated(at / "nodes" / name, written, params)
        edges = {name: read_edges(at / "nodes" / name, node) for name, node in nodes.items()}
        values, steps, outputs = Values(inputs, nodes), [], {}
        with at.gather():
            for name in run_order(at, edges):
                here = at / "nodes" / name
                try:
                    step = self.step(here, nodes[name], edges[name], values, scope)
                except Mismatch as error:
                    (error.at or here).refuse(str(error))
                except Refused:
                    pass
                else:
                    values.nodes[name] = step.outputs
                    steps.append(step)
            for name, text in body.outputs.items():
                with suppress(Refused):
                    outputs[name] = values.find(at / "outputs" / name, text)[0]
            claim = read_claim(at / "invertible", body)
        if len(steps) < len(nodes):
            raise Refused  # what a block lacks is reported once, where the block is first used
        label = body.name if isinstance(body, Blueprint) else str(at.path[-1])
        region = Region(label, inputs, outputs, tuple(steps), description=body.description, claim=claim)
        with at.gather():
            refuse_unused(at, region)
            if region.size > blocks.MAX_NODES:
                at.refuse(f"expands to more than {blocks.MAX_NODES} components")
        return region

    def step(self, at: Location, node: Node, written: Sequence[WrittenEdge], values: Values, scope: Scope) -> Step:
        """Return the typed step of the node at ``at``. Raises :class:`Refused` or :class:`Mismatch`."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            at.refuse(f"the uses of blocks expand to more than {MAX_STEPS} distinct nodes")
            raise BlueprintError(at.problems)
        edges: list[Edge] = []
        with at.gather():
            for edge in written:
                with suppress(Refused):
                    edges.append(Edge(edge.port, edge.at, *values.find(edge.at, edge.text)))
        if len(edges) < len(written):
            raise Refused
        with at.gather():
            if node.block is None:
                step = op_step(at, node, edges, scope, self.registry)
            else:
                step = self.block_step(at, node, node.block, edges, scope)
        ports = node.save.ports if node.save is not None else []
        for index, port in enumerate(ports):
            if port not in step.outputs:
                message = f"{step.name!r} has no output {port!r}{choices(port, step.outputs, label='outputs')}"
                (at / "save" / "ports" / index).refuse(message)
        return step

    def block_step(self, at: Location, node: Node, name: str, edges: Sequence[Edge], scope: Scope) -> Step:
        """Return the typed step of the node at ``at``, which uses the block ``name``."""
        home, block = blocks.find_block(at / "block", name)
        label = f"block {name!r}"
        with at.gather():
            repeat = blocks.read_repeat(at, node, scope)
            params = blocks.read_params(at, node, block)
            ports = blocks.read_ports(home, block)
            taken = assign(at, ports, edges, label)
        binding = Binding()
        unify_inputs(binding, ports, taken, label)
        binding.finish(self.root_axes)
        types = {port.name: taken[port.name][0].type for port in ports}
        region = self.expanded(at / "block", home, params, types, {**self.root_axes, **binding.axes})
        blocks.check_declared(at, node, region, scope)
        running = blocks.read_running(at, node, region)
        body = region if node.repeat is None else blocks.chain(at, region, repeat, label)
        inputs = {port: (found[0].ref,) for port, found in taken.items()}
        return Step(str(at.path[-1]), body, inputs, region.output_types, node.save, at.position, running)

    def expanded(self, at: Location, home: Location, params: Params, types: Types, scope: Scope) -> Region:
        """Return the block at ``home``, used at ``at``, as a region, cached by parameters and input types."""
        block = (home.loaded.file, str(home.path[-1]))
        key = (block, tuple(params.items()), tuple(map(type, params.values())), tuple(types.items()))
        if key not in self.regions:
            if block in self.active:
                chain = " -> ".join(name for _, name in [*self.active[self.active.index(block) :], block])
                raise at.refuse(f"blocks contain each other in a cycle: {chain}")
            if len(self.active) >= MAX_BLOCK_DEPTH:
                raise at.refuse(f"blocks nested deeper than {MAX_BLOCK_DEPTH}")
            self.active.append(block)
            try:
                self.regions[key] = self.region(home, home.loaded.library.blocks[block[1]], params, types, scope)
            except Refused:
                self.regions[key] = None
            self.active.pop()
        region = self.regions[key]
        if region is None:
            raise Refused
        return region


def _interpolated(at: Location, node: Node, params: Params) -> Node:
    """Return the node at ``at`` with the parameters filled in. Raises :class:`Refused`."""
    written = {"out": node.out, "with": node.with_, "repeat": node.repeat}
    with at.reporting(InterpolationFault):
        data = resolve(written, params)
    if data == written:
        return node
    data = node.model_dump(by_alias=True, exclude_unset=True) | {k: v for k, v in data.items() if v is not None}
    found = at.validate(Node, data)  # what was a text may be of any type now
    if found is None:
        raise Refused
    return found
