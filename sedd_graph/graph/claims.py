"""Claims of blocks to be invertible (``invertible:``), read and compared with their inputs; and the blocks that claim it.

Whether a claim is true is derived in :mod:`sedd_graph.inverse`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from sedd_graph.blueprint.location import Location
from sedd_graph.blueprint.problems import dotted
from sedd_graph.blueprint.schema import Block, Blueprint, Invertible
from sedd_graph.errors import choices
from sedd_graph.graph.model import Claim, Graph, Region, Running, Step

__all__ = ["Use", "demoted", "read_claim", "uses"]


def read_claim(at: Location, body: Blueprint | Block) -> Claim | None:
    """Return the claim of the block that is declared at ``at``; None where it makes none. Unknown names are reported."""
    found = body.invertible if isinstance(body, Block) else None
    if not found:
        return None
    spec = found if isinstance(found, Invertible) else Invertible()
    for index, name in enumerate(spec.given):
        if name not in body.inputs:
            (at / "given" / index).refuse(f"no input {name!r}{choices(name, body.inputs, label='inputs')}")
    if not body.inputs.keys() - set(spec.given):
        (at / "given").refuse("every input is given: no inputs left to invert")
    return Claim(tuple(dict.fromkeys(spec.given)), spec.level, at.position, dotted(at.path), spec.on_failure)


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A block that claims to be invertible, and how a graph uses it.

    Attributes:
        name: Its label, with a number where two blocks have the same.
        path: Path of the first step that uses it.
        layer: The block itself.
        depth: Length of its longest chain.
        exact: True where any use has exact arithmetic.
    """

    name: str
    path: str
    layer: Region
    depth: int
    exact: bool

    @property
    def on_failure(self) -> str:
        """Action of ``build`` if the inverse is too inaccurate: ``error`` or ``checkpoint``."""
        return self.layer.claim.on_failure if self.layer.claim else "error"


def _layer(step: Step) -> Region | None:
    """Return the invertible block that a step uses, once or in a chain; None for any other step."""
    body = step.body
    if isinstance(body, Region) and body.repeat and isinstance(body.steps[0].body, Region):
        body = body.steps[0].body
    return body if isinstance(body, Region) and body.claim is not None else None


def uses(root: Region) -> tuple[Use, ...]:
    """Return every block below ``root`` that claims to be invertible, once each, in order."""
    found: dict[int, Use] = {}
    seen: set[int] = set()

    def visit(outer: Region, prefix: str) -> None:
        for step in outer.steps:
            path = f"{prefix}{step.name}"
            layer = _layer(step)
            if layer is not None and isinstance(step.body, Region):
                names = [use.name for key, use in found.items() if key != id(layer) and use.layer.label == layer.label]
                before = found.get(id(layer)) or Use(
                    layer.label + (f"_{len(names) + 1}" if names else ""), path, layer, 1, False
                )
                depth, exact = max(before.depth, step.body.repeat), before.exact or step.running.exact
                found[id(layer)] = dataclasses.replace(before, depth=depth, exact=exact)
            if isinstance(step.body, Region) and id(step.body) not in seen:
                seen.add(id(step.body))
                visit(step.body, f"{path}.")

    visit(root, "")
    return tuple(found.values())


def demoted(graph: Graph, paths: Collection[str]) -> Graph:
    """Return the graph with the invertible blocks at ``paths`` (see :class:`Use`) checkpointed instead of reconstructed."""
    layers = {id(use.layer) for use in uses(graph.root) if use.path in paths}
    made: dict[int, Region] = {}

    def replaced(region: Region) -> Region:
        if id(region) not in made:
            made[id(region)] = dataclasses.replace(region, steps=tuple(map(changed, region.steps)))
        return made[id(region)]

    def changed(step: Step) -> Step:
        if not isinstance(step.body, Region):
            return step
        running = step.running
        if id(_layer(step)) in layers and running.memory == "reversible":
            running = Running("checkpoint", running.exact)
        return dataclasses.replace(step, body=replaced(step.body), running=running)

    return dataclasses.replace(graph, root=replaced(graph.root)) if layers else graph
