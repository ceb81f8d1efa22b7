"""Claims of blocks to be invertible (the key ``invertible``): functions that read claims and list the claiming blocks.

The claims are verified in :mod:`sedd_graph.inverse`, which derives the inverses.
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
    """Return the claim of a block to be invertible, or None if the block makes no claim.

    Problems with ``given``, the inputs that the claim passes to the inverse, are reported: a name that is not an input
    of the block, or no input left to reconstruct.

    Args:
        at: Location of the claim.
        body: The block; or a whole blueprint, which has no key ``invertible``, so that the result is None.
    """
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
    """A block that claims to be invertible, with facts about its uses in a graph.

    A block that is expanded with other parameters or input types counts as another block.

    Attributes:
        name: Label of the block, followed by ``_2``, ``_3``, ... if blocks before it have the same label.
        path: Dotted path of the first step that uses the block.
        layer: The expanded block (one repeat of it).
        depth: Largest number of repeats among the steps that use the block; 1 if none repeats it.
        exact: True if any of these steps has exact arithmetic (:attr:`Running.exact`).
    """

    name: str
    path: str
    layer: Region
    depth: int
    exact: bool

    @property
    def on_failure(self) -> str:
        """Action of :func:`sedd_graph.build` if the inverse is numerically too inaccurate.

        ``error``: raise an error. ``checkpoint``: warn, and use activation checkpointing for the block.
        """
        return self.layer.claim.on_failure if self.layer.claim else "error"


def _layer(step: Step) -> Region | None:
    """Return the invertible block that a step uses, once or in a chain; None for any other step."""
    body = step.body
    if isinstance(body, Region) and body.repeat and isinstance(body.steps[0].body, Region):
        body = body.steps[0].body
    return body if isinstance(body, Region) and body.claim is not None else None


def uses(root: Region) -> tuple[Use, ...]:
    """Return every block inside ``root`` that claims to be invertible, each once, in order of first use."""
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
    """Return ``graph`` with the given invertible blocks set to activation checkpointing instead of reconstruction.

    Args:
        graph: The graph.
        paths: Paths of the blocks, as in :attr:`Use.path`.
    """
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
