"""Verification of the invertibility claims of the blocks in a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from sedd_graph.errors import BlueprintError, Problem
from sedd_graph.graph.model import Claim, Graph, Region
from sedd_graph.inverse.format import diagnosis, summary
from sedd_graph.inverse.program import LEVELS, Program, Refusal
from sedd_graph.inverse.solve import SIZES, solve

__all__ = ["MAX_CLAIMED", "Derived", "claimed", "derive", "require_claims"]

MAX_CLAIMED = 200_000
"""Largest total number of components in the blocks of a graph that claim to be invertible.

If such a block is nested in another, its components are counted in both.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Derived:
    """Result of deriving the inverse of one block that claims to be invertible.

    Attributes:
        region: The block.
        claim: The block's claim: level and conditioning inputs.
        found: The derived inverse, or the diagnosis if there is none.
    """

    region: Region
    claim: Claim
    found: Program | Refusal

    @property
    def problem(self) -> Problem | None:
        """The error to report if the claim does not hold, with its location in the blueprint; otherwise None."""
        if isinstance(self.found, Refusal):
            return Problem(*self.claim.position, self.claim.path, diagnosis(self.found))
        if LEVELS.index(self.found.level) >= LEVELS.index(self.claim.level):
            return None
        message = f"claims to be {self.claim.level}, but is proved to be no more than {self.found.level}"
        return Problem(*self.claim.position, self.claim.path, f"{message}: {self.found.note}")

    def __str__(self) -> str:
        """Return a one-line summary of the inverse, or the first line of the diagnosis."""
        if isinstance(self.found, Refusal):
            return diagnosis(self.found).partition("\n")[0]
        count = len(self.found.derivations)
        given = f"given {', '.join(self.claim.given)}; " if self.claim.given else ""
        steps = f"{count} derivation{'' if count == 1 else 's'}"
        return f"{self.region.label}: {given}{steps}; {summary(self.found)}"


def claimed(region: Region) -> Iterator[tuple[Region, Claim]]:
    """Yield each nested region of ``region`` that claims to be invertible, with its claim.

    A region that is used several times is yielded once. The order is that of the steps, outer regions first.
    """
    seen: set[int] = set()

    def visit(outer: Region) -> Iterator[tuple[Region, Claim]]:
        for step in outer.steps:
            if isinstance(step.body, Region) and id(step.body) not in seen:
                seen.add(id(step.body))
                if step.body.claim is not None:
                    yield step.body, step.body.claim
                yield from visit(step.body)

    return visit(region)


def derive(graph: Graph, sizes: Mapping[str, int] = SIZES) -> tuple[Derived, ...]:
    """Derive the inverse of every block of a graph that claims to be invertible.

    Args:
        graph: The typed graph.
        sizes: Values of ``batch`` and ``length`` at which a diagnosis states sizes in bytes.

    Returns:
        One result for each claim, whether the claim holds or not.

    Raises:
        BlueprintError: The blocks contain more than :data:`MAX_CLAIMED` components.
    """
    found, count = [], 0
    for region, claim in claimed(graph.root):
        count += region.size
        if count > MAX_CLAIMED:
            message = f"with this block, those that claim to be invertible hold more than {MAX_CLAIMED} components"
            raise BlueprintError([Problem(*claim.position, claim.path, message)])
        found.append(Derived(region, claim, solve(region, given=claim.given, sizes=sizes)))
    return tuple(found)


def require_claims(graph: Graph, sizes: Mapping[str, int] = SIZES) -> tuple[Derived, ...]:
    """Verify all invertibility claims of a graph and return the derived inverses.

    Args:
        graph: The typed graph.
        sizes: Values of ``batch`` and ``length`` at which a diagnosis states sizes in bytes.

    Raises:
        BlueprintError: Some claims do not hold, and the error lists a diagnosis of each; or the blocks contain more
            than :data:`MAX_CLAIMED` components.
    """
    found = derive(graph, sizes)
    problems = [problem for one in found if (problem := one.problem) is not None]
    if problems:
        raise BlueprintError(problems)
    return found
