"""Type checking of a node that uses a block: resolves the block, its parameters, its ports and its repeats."""

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
"""Maximum number of components in a graph, counting every repeat."""

MAX_REPEAT = 4096


def find_block(at: Location, text: str) -> tuple[Location, Block]:
    """Resolve the name of a block to its definition.

    Args:
        at: Location of the name in the blueprint.
        text: ``name``, or ``alias.name`` for a block of an included file.

    Returns:
        The location of the definition, and the block.

    Raises:
        Refused: There is no such block; the problem was reported.
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
    """Return the number of repeats of a node; 1 if ``repeat`` is absent or invalid (a problem is then reported).

    Args:
        at: Location of the node.
        node: The node.
        scope: Sizes of the axis names that the expression in ``repeat`` may use.
    """
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
    """Return the memory and arithmetic mode in which a node runs its block.

    Modes that require an invertible block are reported as problems if the block does not claim to be invertible.

    Args:
        at: Location of the node.
        node: The node.
        region: The expanded block.
    """
    memory, exact, invertible = node.memory or "auto", node.arithmetic == "exact", region.claim is not None
    for key, asked in (("memory", memory == "reversible"), ("arithmetic", exact)):
        if asked and not invertible:
            (at / key).refuse(f"block {node.block!r} does not claim to be invertible: give it an 'invertible' key")
    if memory == "auto":
        memory = "reversible" if invertible else "store"
    return Running(memory, exact)


def read_params(at: Location, node: Node, block: Block) -> dict[str, Scalar]:
    """Return the values of a block's parameters: those set by the node, else the block's defaults.

    Unknown, invalid and missing parameters are reported as problems.

    Args:
        at: Location of the node.
        node: The node that uses the block.
        block: The block.
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
    """Return the inputs of a block as ports, whose types have axis names as written, not yet bound to sizes.

    Args:
        home: Location of the block's definition.
        block: The block.

    Raises:
        Refused: A type is invalid; the problem was reported.
    """
    ports = []
    for name, text in block.inputs.items():
        with (home / "inputs" / name).reporting(AxisError):
            ports.append(Port(name, parse_port_type(text)))
    return tuple(ports)


def check_declared(at: Location, node: Node, region: Region, scope: Scope) -> None:
    """Report each output of a block whose type differs from the type that the node declares under ``out``.

    Args:
        at: Location of the node.
        node: The node that uses the block.
        region: The expanded block.
        scope: Sizes of the axis names that the node's declarations may use.

    Raises:
        Refused: A declared type is invalid; the problem was reported.
    """
    ports = [Port(name, found) for name, found in region.output_types.items()]
    for port, declared, here in declared_outputs(at / "out", node, ports, scope):
        if declared != port.type:
            here.refuse(f"output {port.name!r} is {port.type}, not {declared}")


def chain(at: Location, region: Region, repeat: int, label: str) -> Region:
    """Return a region that applies ``region`` ``repeat`` times in sequence, after checking that this is possible.

    The outputs of each application replace the inputs of the same names in the next one. The other inputs are passed
    to every application.

    Args:
        at: Location of the node.
        region: The expanded block.
        repeat: Number of applications.
        label: Description of the node in messages.

    Raises:
        Refused: An output has no input of the same name and type, or the graph exceeds ``MAX_NODES``; problems were
            reported.
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
    """Return a region that applies ``region`` ``repeat`` times in sequence, without the checks of :func:`chain`.

    The outputs of each application replace the inputs of the same names in the next one.

    Args:
        region: Region to repeat; each output must match an input in name and type.
        repeat: Number of applications, at least 1.
        position: File, line and column of the node, for messages.
    """
    steps = []
    for index in range(repeat):
        inputs = {
            name: (Ref(str(index - 1), name) if index and name in region.outputs else Ref("", name),)
            for name in region.inputs
        }
        steps.append(Step(str(index), region, inputs, region.output_types, None, position))
    outputs = {name: Ref(str(repeat - 1), name) for name in region.outputs}
    return Region(region.label, region.inputs, outputs, tuple(steps), repeat=repeat, description=region.description)
