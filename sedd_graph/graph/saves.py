"""Choice of the output ports whose activations a graph saves. Does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sedd_graph.blueprint.schema import SaveSpec
from sedd_graph.errors import UserError, choices
from sedd_graph.graph.model import Graph, Region, Step

__all__ = ["saving"]


def saving(graph: Graph, ports: Sequence[str]) -> Graph:
    """Return ``graph`` with the activations of the given ports saved, and no others.

    Args:
        graph: The graph.
        ports: Paths of output ports with slashes, such as ``trunk/x``, or ``trunk/norm/out`` for a node of the block that
            ``trunk`` applies. A port of a node in a repeated block is saved in each repeat.

    Raises:
        UserError: There is no such port.
    """
    wanted = [port.split("/") for port in ports]
    for path in wanted:
        _require(graph.root, path, "/".join(path))
    return dataclasses.replace(graph, root=_replaced(graph.root, wanted, {}))


def _require(region: Region, path: list[str], whole: str) -> None:
    """Raise :class:`UserError` unless ``path`` is that of a port of a step in the region."""
    while region.repeat and isinstance(region.steps[0].body, Region):
        region = region.steps[0].body
    step = region.by_name.get(path[0])
    if step is None:
        raise UserError(f"no port {whole!r}: no node {path[0]!r}{choices(path[0], region.by_name, label='nodes')}")
    if len(path) > 2 and isinstance(step.body, Region):
        _require(step.body, path[1:], whole)
    elif len(path) != 2 or path[1] not in step.outputs:
        port = "/".join(path[1:])
        raise UserError(f"no port {whole!r}: {step.name!r} has no {port!r}{choices(port, step.outputs, label='ports')}")


def _replaced(region: Region, wanted: list[list[str]], made: dict[tuple[int, str], Region]) -> Region:
    """Return the region with the ports at the paths ``wanted`` saved; equal repeats remain one object."""
    key = id(region), repr(wanted)
    if key not in made:
        steps = (_saving(step, wanted, made, repeat=bool(region.repeat)) for step in region.steps)
        made[key] = dataclasses.replace(region, steps=tuple(steps))
    return made[key]


def _saving(step: Step, wanted: list[list[str]], made: dict[tuple[int, str], Region], *, repeat: bool) -> Step:
    own = wanted if repeat else [path[1:] for path in wanted if path[0] == step.name]
    ports = [] if repeat else [path[0] for path in own if len(path) == 1]
    save = SaveSpec(ports=list(dict.fromkeys(ports)), every=1) if ports else None
    if not isinstance(step.body, Region):
        return dataclasses.replace(step, save=save)
    inner = [path for path in own if len(path) > 1]
    return dataclasses.replace(step, save=save, body=_replaced(step.body, inner, made))
