"""What a block claims of itself (``invertible:``), held against its inputs. Whether it is true is for others to derive."""

from __future__ import annotations

from sedd_graph.blueprint.problems import dotted
from sedd_graph.blueprint.schema import Block, Blueprint, Invertible
from sedd_graph.errors import listed, suggest
from sedd_graph.graph.model import Claim
from sedd_graph.graph.spot import Spot

__all__ = ["read_claim"]


def read_claim(at: Spot, body: Blueprint | Block) -> Claim | None:
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
