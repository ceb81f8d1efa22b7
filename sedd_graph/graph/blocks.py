"""Typing of a node that uses a block: the block it names, its parameters, its ports and its repeats."""

from __future__ import annotations

from sedd_graph.blueprint.location import Location
from sedd_graph.blueprint.schema import Block, Node, Scalar
from sedd_graph.component.axes import AxisError, parse_port_type, parse_size
from sedd_graph.component.contract import Port
from sedd_graph.errors import choices, listed
from sedd_graph.graph.model import Position, Ref, Region, Running, Step
from sedd_graph.graph.ports import Scope, declared_outputs

__all__ = [
    "chain",
    "chained",
    "check_declared",
    "find_block",
    "read_params",
    "read_ports",
    "read_repeat",
    "read_running",
]

MAX_NODES = 100_000
"""Largest number of components in a graph, repeats counted out."""

MAX_REPEAT = 4096


def find_block(at: Location, text: str) -> tuple[Location, Block]:
    """Return where the block ``text`` (``name`` or ``alias.name``, written at ``at``) is defined, and the block.

    Raises:
        Refused: There is none.
    """
    alias, dot, name = text.rpartition(".")
    libraries = at.loaded.libraries
    if dot and alias not in libraries:
        raise at.refuse(f"no alias {alias!r} under 'use'{choices(alias, libraries)}")
    home = libraries[alias] if dot else at.loaded
    if name not in home.library.blocks:
        raise at.refuse(f"unknown block {text!r}{choices(name, home.library.blocks)}")
    return Location(home, ("blocks", name), at.problems), home.library.blocks[name]


def read_repeat(at: Location, node: Node, scope: Scope) -> int:
    """Return the number of repeats of the node at ``at``; 1 where it declares none or a problem was reported."""
    if node.repeat is None:
        return 1
    try:
        size = parse_size(node.repeat, scope)
        if size.constant is None or not 1 <= size.constant <= MAX_REPEAT:
            raise AxisError(f"repeat is {size}: it must be from 1 to {MAX_REPEAT}")
        return size.constant
    except AxisError as error:
        (at / "repeat").refuse(str(error))
        return 1


def read_running(at: Location, node: Node, region: Region) -> Running:
    """Return how the node at ``at`` runs its block. Where the block is not invertible, modes that require it are reported as problems."""
    memory, exact, invertible = node.memory or "auto", node.arithmetic == "exact", region.claim is not None
    for key, asked in (("memory", memory == "reversible"), ("arithmetic", exact)):
        if asked and not invertible:
            (at / key).refuse(f"block {node.block!r} does not claim to be invertible: give it an 'invertible' key")
    if memory == "auto":
        memory = "reversible" if invertible else "store"
    return Running(memory, exact)


def read_params(at: Location, node: Node, block: Block) -> dict[str, Scalar]:
    """Return the block's parameters: its defaults, with the values that the node at ``at`` gives.

    Unknown, invalid and missing parameters are reported; a missing one is left out of the result.
    """
    for key, value in node.with_.items():
        if key not in block.params:
            message = f"block {node.block!r} has no parameter {key!r}{choices(key, block.params)}"
            (at / "with" / key).refuse(message)
        elif not isinstance(value, bool | int | float | str):
            (at / "with" / key).refuse("a block's parameter is a number, a string, or true or false")
    params = {**block.params, **node.with_}
    for key, value in params.items():
        if value is None:
            at.refuse(f"block {node.block!r} requires its parameter {key!r}")
    return {key: value for key, value in params.items() if value is not None}


def read_ports(home: Location, block: Block) -> tuple[Port, ...]:
    """Return the inputs of the block at ``home``, over axis names of its own and those of the blueprint.

    Raises:
        Refused: A type cannot be read.
    """
    ports = []
    for name, text in block.inputs.items():
        with (home / "inputs" / name).reporting(AxisError):
            ports.append(Port(name, parse_port_type(text)))
    return tuple(ports)


def check_declared(at: Location, node: Node, region: Region, scope: Scope) -> None:
    """Report outputs of a block whose types are not those that the node at ``at`` declares. Raises :class:`Refused`."""
    ports = [Port(name, found) for name, found in region.output_types.items()]
    for port, declared, here in declared_outputs(at / "out", node, ports, scope):
        if declared != port.type:
            here.refuse(f"output {port.name!r} is {port.type}, not {declared}")


def chain(at: Location, region: Region, repeat: int, label: str) -> Region:
    """Return ``repeat`` uses of one region in sequence for the node at ``at``: outputs replace the inputs of the same name.

    Raises:
        Refused: An output is no input or has another type, or the graph becomes too large.
    """
    fault = at / "repeat"
    with at.gather():
        for name, made in region.output_types.items():
            if name not in region.inputs:
                inputs = listed(region.inputs)
                fault.refuse(f"{label} is repeated, but its output {name!r} is none of its inputs: {inputs}")
            elif made != region.inputs[name]:
                fault.refuse(
                    f"{label} is repeated, but {name!r} is {region.inputs[name]} as input and {made} as output"
                )
        if region.size * repeat > MAX_NODES:
            fault.refuse(f"expands to more than {MAX_NODES} components")
    return chained(region, repeat, at.position)


def chained(region: Region, repeat: int, position: Position) -> Region:
    """Return ``repeat`` uses of one region in sequence. Its outputs are among its inputs, by name and type."""
    steps = []
    for index in range(repeat):
        inputs = {
            name: (Ref(str(index - 1), name) if index and name in region.outputs else Ref("", name),)
            for name in region.inputs
        }
        steps.append(Step(str(index), region, inputs, region.output_types, None, position))
    outputs = {name: Ref(str(repeat - 1), name) for name in region.outputs}
    return Region(region.label, region.inputs, outputs, tuple(steps), repeat=repeat, description=region.description)
