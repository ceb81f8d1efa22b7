"""From a loaded blueprint to a :class:`Graph`: names resolved, blocks and repeats expanded, every edge typed.

Every problem of the whole expansion is gathered and raised at once. A block is expanded once for each way it is used
(parameters and input types), so a thousand repeats cost what one does. This module drives; what one node comes to is
in :mod:`~sedd_graph.graph.ops` and :mod:`~sedd_graph.graph.blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from sedd_graph.blueprint.interpolate import InterpolationFault, resolve
from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.problems import model_problems
from sedd_graph.blueprint.schema import Block, Blueprint, Node
from sedd_graph.component.axes import DYNAMIC, AxisError, PortType, Size, parse_size
from sedd_graph.component.registry import Registry
from sedd_graph.errors import BlueprintError, listed, suggest
from sedd_graph.graph import blocks
from sedd_graph.graph.claims import read_claim
from sedd_graph.graph.edges import Edge, Values, Wire, read_wires, refuse_unused, run_order
from sedd_graph.graph.location import Location
from sedd_graph.graph.model import Graph, Ref, Region, Step
from sedd_graph.graph.ops import Made, make_op
from sedd_graph.graph.ports import Scope, assign, read_type

__all__ = ["expand"]

MAX_BLOCK_DEPTH, MAX_STEPS = 32, 10_000


def expand(loaded: Loaded, registry: Registry) -> Graph:
    """Expand ``loaded``. Raises :class:`BlueprintError` with every problem found."""
    blueprint = loaded.blueprint
    assert isinstance(blueprint, Blueprint)
    root = Location(loaded, (), [])
    axes = _read_axes(root, blueprint)
    types = {name: read_type(root / "inputs" / name, text, axes) for name, text in blueprint.inputs.items()}
    inputs = {name: found for name, found in types.items() if found is not None}
    if root.problems:
        raise BlueprintError(root.problems)
    region = _Expander(registry, axes).region(root, blueprint, loaded.params, inputs, axes, label=blueprint.name)
    if root.problems or region is None:
        raise BlueprintError(root.problems)
    return Graph(name=blueprint.name, root=region, axes=axes)


def _read_axes(root: Location, blueprint: Blueprint) -> dict[str, Size]:
    """The blueprint's ``axes`` as sizes over ``batch`` and ``length``; an axis may use those written before it."""
    axes: dict[str, Size] = {}
    for name, value in blueprint.axes.items():
        try:
            size = parse_size(value, axes | {n: Size.of(n) for n in DYNAMIC if n not in axes})
            if size.constant is not None and size.constant <= 0:
                raise AxisError(f"axis {name!r} is {size.constant}: a size is at least 1")
            axes[name] = size
        except AxisError as error:
            (root / "axes" / name).refuse(str(error))
    return axes


class _Expander:
    def __init__(self, registry: Registry, root_axes: Scope) -> None:
        self.registry, self.root_axes = registry, root_axes
        self.done: dict[Any, Region | None] = {}
        self.active: list[str] = []
        self.steps = 0

    def region(
        self,
        at: Location,
        body: Blueprint | Block,
        params: Mapping[str, Any],
        inputs: Mapping[str, PortType],
        scope: Scope,
        *,
        label: str,
    ) -> Region | None:
        """The nodes of the root or of one block as steps in order; None where a problem was reported."""
        before = len(at.problems)
        nodes: dict[str, Node] = {}
        for name, written in body.nodes.items():
            spot = at / "nodes" / name
            if name in body.inputs:
                spot.refuse(f"node {name!r} has the name of an input")
            node = _interpolated(spot, written, params)
            if node is not None:
                nodes[name] = node
        if len(at.problems) > before:
            return None
        wires = {name: read_wires(at / "nodes" / name, node, body) for name, node in nodes.items()}
        order = run_order(at, wires)
        if len(at.problems) > before or order is None:
            return None
        values, steps = Values(inputs), []
        for name in order:
            step = self.step(at / "nodes" / name, name, nodes[name], wires[name], values, scope)
            values.steps[name] = step.outputs if step else None
            if step:
                steps.append(step)
        outputs: dict[str, Ref] = {}
        for name, text in body.outputs.items():
            found = values.find(at / "outputs" / name, text)
            if found is not None:
                outputs[name] = found[0]
        claim = read_claim(at / "invertible", body)
        if len(at.problems) > before:
            return None
        region = Region(label, inputs, outputs, tuple(steps), description=body.description, claim=claim)
        refuse_unused(at, region)
        if region.size > blocks.MAX_NODES:
            at.refuse(f"expands to more than {blocks.MAX_NODES} components")
        return None if len(at.problems) > before else region

    def step(
        self, at: Location, name: str, node: Node, wires: Sequence[Wire], values: Values, scope: Scope
    ) -> Step | None:
        before = len(at.problems)
        self.steps += 1
        if self.steps > MAX_STEPS:
            at.refuse(f"blocks are used in so many ways that they come to more than {MAX_STEPS} different nodes")
            raise BlueprintError(at.problems)
        edges = []
        for wire in wires:
            found = values.find(wire.at, wire.text)
            if found is not None:
                edges.append(Edge(wire.port, wire.at, *found))
        if len(edges) < len(wires):
            return None
        made = make_op(at, node, edges, scope, self.registry) if node.op else self.block(at, node, edges, scope)
        if made is None or len(at.problems) > before:
            return None
        if node.save is not None:
            for index, port in enumerate(node.save.ports):
                if port not in made.outputs:
                    known = listed(made.outputs)
                    message = f"{name!r} has no output {port!r}{suggest(port, made.outputs)}; outputs: {known}"
                    (at / "save" / "ports" / index).refuse(message)
        return Step(name, made.body, made.inputs, made.outputs, node.save, at.place, made.running)

    def block(self, at: Location, node: Node, edges: Sequence[Edge], scope: Scope) -> Made | None:
        """The block that the node at ``at`` stands for, expanded for this use."""
        assert node.block is not None
        found = blocks.find_block(at / "block", node.block)
        if found is None:
            return None
        home, block = found
        what = f"block {node.block!r}"
        repeat = blocks.read_repeat(at, node, scope)
        params = blocks.read_params(at, node, block)
        ports = blocks.read_ports(home, block, self.root_axes)
        taken = None if ports is None else assign(at, ports, edges, what)
        if ports is None or repeat is None or params is None or taken is None:
            return None
        axes = blocks.bind_axes(at, ports, taken, self.root_axes, what)
        if axes is None:
            return None
        types = {port.name: taken[port.name][0].type for port in ports}
        region = self.expanded(at, home, block, params, types, {**self.root_axes, **axes})
        if region is None or not blocks.hold_declared(at, node, region, scope):
            return None
        body = region if node.repeat is None else blocks.chain(at, region, repeat, what)
        running = blocks.read_running(at, node, region)
        inputs = {port: (found[0].ref,) for port, found in taken.items()}
        return None if body is None else Made(body, inputs, region.output_types, running)

    def expanded(
        self,
        at: Location,
        home: Location,
        block: Block,
        params: Mapping[str, Any],
        types: Mapping[str, PortType],
        scope: Scope,
    ) -> Region | None:
        """The block at ``home`` under these parameters and input types: made once, however often it is used."""
        file, name = home.loaded.file, str(home.path[-1])
        key = (file, name, tuple(params.items()), tuple(map(type, params.values())), tuple(types.items()))
        if key in self.done:
            return self.done[key]
        label = f"{file}:{name}"
        if label in self.active:
            chain = " -> ".join(x.rsplit(":", 1)[1] for x in [*self.active[self.active.index(label) :], label])
            (at / "block").refuse(f"blocks contain each other in a circle: {chain}")
            return None
        if len(self.active) >= MAX_BLOCK_DEPTH:
            (at / "block").refuse(f"blocks nested deeper than {MAX_BLOCK_DEPTH}")
            return None
        self.active.append(label)
        self.done[key] = self.region(home, block, params, types, scope, label=name)
        self.active.pop()
        return self.done[key]


def _interpolated(at: Location, node: Node, params: Mapping[str, Any]) -> Node | None:
    written = {"out": node.out, "with": node.with_, "repeat": node.repeat}
    try:
        data = resolve(written, params)
    except InterpolationFault as fault:
        for path, message in fault.faults:
            Location(at.loaded, (*at.path, *path), at.problems).refuse(message)
        return None
    if data == written:
        return node
    data = node.model_dump(by_alias=True, exclude_unset=True) | {k: v for k, v in data.items() if v is not None}
    try:
        return Node.model_validate(data)  # what was a text may be anything now
    except pydantic.ValidationError as error:
        at.problems.extend(model_problems(error, Node, at.loaded.position, at.path, data))
        return None
