"""What a block claims of itself (``invertible:``), held against its inputs; and where claimed blocks are used.

Whether a claim is true is for others to derive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from sedd_graph.blueprint.problems import dotted
from sedd_graph.blueprint.schema import Block, Blueprint, Invertible
from sedd_graph.errors import listed, suggest
from sedd_graph.graph.location import Location
from sedd_graph.graph.model import Claim, Graph, Region, Running, Step

__all__ = ["Use", "demoted", "read_claim", "uses"]


def read_claim(at: Location, body: Blueprint | Block) -> Claim | None:
    """The claim of a block, which stands at ``at``. A name that is no input of the block is a problem there."""
    found = body.invertible if isinstance(body, Block) else None
    if not found:
        return None
    spec = found if isinstance(found, Invertible) else Invertible()
    for index, name in enumerate(spec.given):
        if name not in body.inputs:
            message = f"no input {name!r}{suggest(name, body.inputs)}; inputs: {listed(body.inputs)}"
            (at / "given" / index).refuse(message)
    if not body.inputs.keys() - set(spec.given):
        (at / "given").refuse("every input is given: nothing is left to be undone")
    return Claim(tuple(dict.fromkeys(spec.given)), spec.level, at.place, dotted(at.path), spec.on_failure)


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A claimed block and how a graph uses it.

    ``name`` is its label (with a number where two have the same), ``path`` that of the first step that stands for it,
    ``depth`` the longest chain of it, ``exact`` whether any use has exact arithmetic.
    """

    name: str
    path: str
    layer: Region
    depth: int
    exact: bool

    @property
    def on_failure(self) -> str:
        return self.layer.claim.on_failure if self.layer.claim else "error"


def _layer(step: Step) -> Region | None:
    """The claimed block that a step stands for, once or in a chain."""
    body = step.body
    if isinstance(body, Region) and body.repeat and isinstance(body.steps[0].body, Region):
        body = body.steps[0].body
    return body if isinstance(body, Region) and body.claim is not None else None


def uses(root: Region) -> tuple[Use, ...]:
    """Every block below ``root`` that claims to be invertible, each once, in order."""
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
    """The graph with the claimed blocks at ``paths`` (see :class:`Use`) checkpointed wherever they were to be rebuilt."""
    layers = {id(use.layer) for use in uses(graph.root) if use.path in paths}
    made: dict[int, Region] = {}

    def rebuilt(region: Region) -> Region:
        if id(region) not in made:
            made[id(region)] = dataclasses.replace(region, steps=tuple(map(changed, region.steps)))
        return made[id(region)]

    def changed(step: Step) -> Step:
        if not isinstance(step.body, Region):
            return step
        running = step.running
        if id(_layer(step)) in layers and running.memory == "reversible":
            running = Running("checkpoint", running.exact)
        return dataclasses.replace(step, body=rebuilt(step.body), running=running)

    return dataclasses.replace(graph, root=rebuilt(graph.root)) if layers else graph
