"""Entry point of the inverse solver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sedd_graph.errors import UserError, suggest
from sedd_graph.graph.model import Ref, Region
from sedd_graph.inverse.diagnose import diagnose
from sedd_graph.inverse.extract import contractions, derivations, needed
from sedd_graph.inverse.flat import flatten
from sedd_graph.inverse.level import classify
from sedd_graph.inverse.program import Program, Refusal
from sedd_graph.inverse.propagate import Closure
from sedd_graph.inverse.rows import mixed_rows
from sedd_graph.inverse.system import System

__all__ = ["SIZES", "solve"]

SIZES = {"batch": 1, "length": 1024}
"""Default ``batch`` and ``length`` (positions per row) at which a diagnosis states sizes in bytes."""


def solve(
    region: Region,
    *,
    given: Iterable[str] = (),
    stored: Iterable[Ref] = (),
    sizes: Mapping[str, int] = SIZES,
) -> Program | Refusal:
    """Derive the inverse of a region: a program that computes its inputs from its outputs.

    The result does not depend on the order of steps.

    Args:
        region: The block or graph to invert.
        given: Names of the conditioning inputs, which are known at inversion.
        stored: References of inner values that are stored in the forward pass, and known at inversion besides the
            outputs.
        sizes: Values of ``batch`` and ``length`` at which a diagnosis states sizes in bytes.

    Returns:
        The inverse program, or the diagnosis if the region is not invertible.

    Raises:
        UserError: ``given`` names an input, or ``stored`` a value, that the region does not have.
        EnvironmentFault: A component declares inconsistent algebraic properties.
    """
    given, stored = tuple(dict.fromkeys(given)), tuple(dict.fromkeys(stored))
    for name in given:
        if name not in region.inputs:
            known = ", ".join(region.inputs)
            raise UserError(f"{region.label!r} has no input {name!r}{suggest(name, region.inputs)}; inputs: {known}")
    flat = flatten(region)
    for ref in stored:
        if ref not in flat.index:
            raise UserError(f"{region.label!r} has no value {ref}{suggest(str(ref), map(str, flat.refs))}")
    known_inputs, stored_values = [flat.inputs[name] for name in given], [flat.index[ref] for ref in stored]
    facts = [*flat.outputs.values(), *known_inputs, *stored_values]
    closure = Closure(System(flat), facts, known_inputs)
    if not all(closure.known(v) for v in flat.inputs.values()):
        return diagnose(closure, facts, given, sizes)
    iterated = contractions(closure)
    edges = needed(closure, iterated, flat.inputs.values())
    level, note, linear = classify(closure, edges, known_inputs, stored_values)
    steps = derivations(closure, iterated, edges, linear)
    return Program(
        region=region,
        given=given,
        stored=stored,
        outputs={name: flat.refs[v] for name, v in flat.outputs.items()},
        derivations=steps,
        types=dict(zip(flat.refs, flat.types, strict=True)),
        level=level,
        note=note,
        mixed_rows=mixed_rows(flat, steps),
    )
