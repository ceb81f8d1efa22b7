"""What a block claims of itself (``invertible:``), held against its inputs. Whether it is true is for others to derive."""

from __future__ import annotations

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.schema import Block, Blueprint, Invertible
from sedd_graph.errors import Problem, suggest
from sedd_graph.graph.model import Claim

__all__ = ["read_claim"]


def read_claim(
    loaded: Loaded, base: tuple[str | int, ...], body: Blueprint | Block, problems: list[Problem]
) -> Claim | None:
    """The claim of a block; ``problems`` is told of names that are no inputs of it."""
    found = body.invertible if isinstance(body, Block) else None
    if not found:
        return None
    spec = found if isinstance(found, Invertible) else Invertible()
    at = (*base, "invertible")
    for index, name in enumerate(spec.given):
        if name not in body.inputs:
            message = f"no input {name!r}{suggest(name, body.inputs)}; inputs: {', '.join(body.inputs)}"
            problems.append(loaded.problem((*at, "given", index), message))
    if not body.inputs.keys() - set(spec.given):
        problems.append(loaded.problem((*at, "given"), "every input is given: nothing is left to be undone"))
    place = loaded.position(at)
    return Claim(tuple(dict.fromkeys(spec.given)), spec.level, place, ".".join(map(str, at)))
