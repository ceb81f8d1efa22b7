"""One node that stands for a block: the block found, its parameters and ports held to how it is used, its repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sedd_graph.blueprint.schema import Block, Node
from sedd_graph.component.axes import AxisError, Size, parse_port_type, parse_size
from sedd_graph.component.contract import Port
from sedd_graph.errors import listed, suggest
from sedd_graph.graph.edges import Edge
from sedd_graph.graph.location import Location
from sedd_graph.graph.model import Place, Ref, Region, Running, Step
from sedd_graph.graph.ports import Scope, declared_outputs, read_type
from sedd_graph.graph.unify import Binding, Mismatch

__all__ = [
    "MAX_NODES",
    "bind_axes",
    "chain",
    "chained",
    "find_block",
    "hold_declared",
    "read_params",
    "read_ports",
    "read_repeat",
    "read_running",
]

MAX_NODES = 100_000
"""Components that a graph may have, repeats counted out."""

MAX_REPEAT = 4096


def find_block(at: Location, text: str) -> tuple[Location, Block] | None:
    """The block called ``text`` (``name`` or ``alias.name``, written at ``at``) and where it is defined."""
    alias, dot, name = text.rpartition(".")
    home = at.loaded.libraries.get(alias) if dot else at.loaded
    if home is None:
        known = listed(at.loaded.libraries)
        at.refuse(f"no alias {alias!r}{suggest(alias, at.loaded.libraries)} under 'use'; known: {known}")
        return None
    blocks = home.blueprint.blocks
    if name not in blocks:
        at.refuse(f"unknown block {text!r}{suggest(name, blocks)}; known: {listed(blocks)}")
        return None
    return Location(home, ("blocks", name), at.problems), blocks[name]


def read_repeat(at: Location, node: Node, scope: Scope) -> int | None:
    """How often the block of the node at ``at`` is repeated; 1 where it does not say."""
    if node.repeat is None:
        return 1
    try:
        size = parse_size(node.repeat, scope)
        count = size.constant
        if count is None or not 1 <= count <= MAX_REPEAT:
            raise AxisError(f"repeat is {size}: it must be from 1 to {MAX_REPEAT}")
        return count
    except AxisError as error:
        (at / "repeat").refuse(str(error))
        return None


def read_running(at: Location, node: Node, region: Region) -> Running:
    """How the block of the node at ``at`` is run; what rests on a claim that it does not make is a problem there."""
    memory = node.memory or "auto"
    missing = f"block {node.block!r} claims no inverse: give it an 'invertible' key"
    if region.claim is None and memory == "reversible":
        (at / "memory").refuse(missing)
    if region.claim is None and node.arithmetic == "exact":
        (at / "arithmetic").refuse(missing)
    if memory == "auto":
        memory = "reversible" if region.claim is not None else "store"
    return Running(memory, node.arithmetic == "exact")


def read_params(at: Location, node: Node, block: Block) -> dict[str, Any] | None:
    """The block's parameters as the node at ``at`` sets them."""
    before = len(at.problems)
    for key, value in node.with_.items():
        if key not in block.params:
            known = listed(block.params)
            message = f"block {node.block!r} has no parameter {key!r}{suggest(key, block.params)}; known: {known}"
            (at / "with" / key).refuse(message)
        elif not isinstance(value, bool | int | float | str):
            (at / "with" / key).refuse("a block's parameter is a number, a string, or true or false")
    params = {**block.params, **node.with_}
    for key, value in params.items():
        if value is None:
            at.refuse(f"block {node.block!r} needs its parameter {key!r}")
    return params if len(at.problems) == before else None


def read_ports(home: Location, block: Block, axes: Scope) -> tuple[Port, ...] | None:
    """The inputs of the block at ``home``, over the axis names of its own and those of the blueprint."""
    known = set(axes) | {s for text in block.inputs.values() for s in _axis_names(text)}
    ports = []
    for name, text in block.inputs.items():
        try:
            ports.append(Port(name, parse_port_type(text, known)))
        except AxisError as error:
            (home / "inputs" / name).refuse(str(error))
            return None
    return tuple(ports)


def _axis_names(text: str) -> frozenset[str]:
    try:
        return parse_port_type(text).symbols
    except AxisError:
        return frozenset()


def bind_axes(
    at: Location, ports: Sequence[Port], taken: Mapping[str, list[Edge]], axes: Scope, what: str
) -> dict[str, Size] | None:
    """The sizes of the axis names in ``ports``, from what is fed in; what that leaves open is the blueprint's."""
    binding = Binding()
    try:
        for port in ports:
            edge = taken[port.name][0]
            binding.unify(port, edge.type, label=f"input {port.name!r} of {what}", at=edge.at)
        binding.finish(axes)
    except Mismatch as error:
        (error.at or at).refuse(str(error))
        return None
    return binding.axes


def hold_declared(at: Location, node: Node, region: Region, scope: Scope) -> bool:
    """Whether the block's outputs are what the node at ``at`` declares."""
    at = at / "out"
    for port, text in declared_outputs(at, node, [Port(n, t) for n, t in region.output_types.items()]):
        declared = read_type(at, text, scope)
        if declared is not None and declared != port.type:
            at.refuse(f"output {port.name!r} is {port.type}, not {declared}")
            return False
    return True


def chain(at: Location, region: Region, repeat: int, what: str) -> Region | None:
    """``repeat`` uses of one region in a row, for the node at ``at``: outputs replace the inputs of the same name."""
    before = len(at.problems)
    fault = at / "repeat"
    for name, made in region.output_types.items():
        if name not in region.inputs:
            known = listed(region.inputs)
            fault.refuse(f"{what} is repeated, but its output {name!r} is none of its inputs: {known}")
        elif made != region.inputs[name]:
            fault.refuse(f"{what} is repeated, but {name!r} goes in as {region.inputs[name]} and comes out as {made}")
    if region.size * repeat > MAX_NODES:
        fault.refuse(f"expands to more than {MAX_NODES} components")
    if len(at.problems) > before:
        return None
    return chained(region, repeat, at.place)


def chained(region: Region, repeat: int, place: Place) -> Region:
    """``repeat`` uses of one region in a row, whose outputs are among its inputs, by name and type."""
    steps = []
    for index in range(repeat):
        inputs = {
            name: (Ref(str(index - 1), name) if index and name in region.outputs else Ref("", name),)
            for name in region.inputs
        }
        steps.append(Step(str(index), region, inputs, region.output_types, None, place))
    outputs = {name: Ref(str(repeat - 1), name) for name in region.outputs}
    return Region(region.label, region.inputs, outputs, tuple(steps), repeat=repeat, description=region.description)
