"""All that the blocks of a graph claim of themselves, derived or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from sedd_graph.errors import BlueprintError, Problem
from sedd_graph.graph.model import Claim, Graph, Region
from sedd_graph.inverse.format import summary
from sedd_graph.inverse.program import LEVELS, Program, Refusal
from sedd_graph.inverse.solve import SIZES, solve

__all__ = ["MAX_CLAIMED", "Derived", "claimed", "derive", "prove"]

MAX_CLAIMED = 200_000
"""How many components the blocks that claim to be invertible may hold, all together (nested ones count in each)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Derived:
    """A claim, the region that makes it, and what the solver says."""

    region: Region
    claim: Claim
    found: Program | Refusal

    @property
    def problem(self) -> Problem | None:
        """Why the claim does not hold, at its place; None where it does."""
        if isinstance(self.found, Refusal):
            return Problem(*self.claim.position, self.claim.path, str(self.found))
        if LEVELS.index(self.found.level) >= LEVELS.index(self.claim.level):
            return None
        message = f"claims to be {self.claim.level}, but is proved to be no more than {self.found.level}"
        return Problem(*self.claim.position, self.claim.path, f"{message}: {self.found.note}")

    def __str__(self) -> str:
        assert isinstance(self.found, Program)
        count = len(self.found.derivations)
        given = f"given {', '.join(self.claim.given)}; " if self.claim.given else ""
        steps = f"{count} derivation{'' if count == 1 else 's'}"
        return f"{self.region.label}: {given}{steps}; {summary(self.found)}"


def claimed(region: Region) -> Iterator[Region]:
    """Every region below ``region`` that claims to be invertible, each once, in order."""
    seen: set[int] = set()

    def visit(outer: Region) -> Iterator[Region]:
        for step in outer.steps:
            if isinstance(step.body, Region) and id(step.body) not in seen:
                seen.add(id(step.body))
                if step.body.claim is not None:
                    yield step.body
                yield from visit(step.body)

    return visit(region)


def derive(graph: Graph, sizes: Mapping[str, int] = SIZES) -> tuple[Derived, ...]:
    """What the solver says of every claim. ``sizes`` gives batch and length, for the bytes in a diagnosis.

    Raises :class:`BlueprintError` where there is too much to look at.
    """
    found, count = [], 0
    for region in claimed(graph.root):
        assert region.claim is not None
        count += region.size
        if count > MAX_CLAIMED:
            message = f"with this block, those that claim to be invertible hold more than {MAX_CLAIMED} components"
            raise BlueprintError([Problem(*region.claim.position, region.claim.path, message)])
        found.append(Derived(region, region.claim, solve(region, given=region.claim.given, sizes=sizes)))
    return tuple(found)


def prove(graph: Graph, sizes: Mapping[str, int] = SIZES) -> tuple[Derived, ...]:
    """As :func:`derive`, and every claim holds; otherwise raises :class:`BlueprintError` with every diagnosis."""
    found = derive(graph, sizes)
    problems = [problem for one in found if (problem := one.problem) is not None]
    if problems:
        raise BlueprintError(problems)
    return found
