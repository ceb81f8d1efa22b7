"""Invertibility claims of the blocks of a graph: derivation of each, and the problems of those that do not hold."""

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
"""Largest number of components in all blocks that claim to be invertible together; nested ones count in each block."""


@dataclasses.dataclass(frozen=True, eq=False)
class Derived:
    """Claim of a region, and the derived inverse or the diagnosis."""

    region: Region
    claim: Claim
    found: Program | Refusal

    @property
    def problem(self) -> Problem | None:
        """Reason why the claim does not hold, at its place in the blueprint; None where it holds."""
        if isinstance(self.found, Refusal):
            return Problem(*self.claim.position, self.claim.path, diagnosis(self.found))
        if LEVELS.index(self.found.level) >= LEVELS.index(self.claim.level):
            return None
        message = f"claims to be {self.claim.level}, but is proved to be no more than {self.found.level}"
        return Problem(*self.claim.position, self.claim.path, f"{message}: {self.found.note}")

    def __str__(self) -> str:
        """Return one line: the summary of the inverse, or the first line of the diagnosis."""
        if isinstance(self.found, Refusal):
            return diagnosis(self.found).partition("\n")[0]
        count = len(self.found.derivations)
        given = f"given {', '.join(self.claim.given)}; " if self.claim.given else ""
        steps = f"{count} derivation{'' if count == 1 else 's'}"
        return f"{self.region.label}: {given}{steps}; {summary(self.found)}"


def claimed(region: Region) -> Iterator[tuple[Region, Claim]]:
    """Yield every region below ``region`` that claims to be invertible, with its claim, each once, in order."""
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
    """Derive the inverse of every block that claims one.

    Args:
        graph: The expanded graph.
        sizes: Batch and length, for the bytes in a diagnosis.

    Raises:
        BlueprintError: The blocks hold more than :data:`MAX_CLAIMED` components.
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
    """Derive as :func:`derive` does. Raises :class:`BlueprintError` with every diagnosis unless all claims hold."""
    found = derive(graph, sizes)
    problems = [problem for one in found if (problem := one.problem) is not None]
    if problems:
        raise BlueprintError(problems)
    return found
