"""A spot: one part of one file of a blueprint, which can say where it stands and report what is wrong there."""

from __future__ import annotations

import dataclasses

from sedd_graph.blueprint.load import Loaded
from sedd_graph.errors import MAX_PROBLEMS, BlueprintError, Problem
from sedd_graph.graph.model import Place

__all__ = ["Location"]


@dataclasses.dataclass(frozen=True)
class Location:
    """``spot / "nodes" / "head"`` goes deeper; all spots of one expansion share one list of ``problems``."""

    loaded: Loaded
    path: tuple[str | int, ...]
    problems: list[Problem] = dataclasses.field(repr=False, compare=False)

    def __truediv__(self, part: str | int) -> Location:
        return Location(self.loaded, (*self.path, part), self.problems)

    def refuse(self, message: str, *, environment: bool = False) -> None:
        """Report a problem here. Raises :class:`BlueprintError` with all of them where there are very many already."""
        self.problems.append(dataclasses.replace(self.loaded.problem(self.path, message), environment=environment))
        if len(self.problems) >= MAX_PROBLEMS:
            raise BlueprintError(self.problems)

    @property
    def place(self) -> Place:
        """File, line and column."""
        return self.loaded.position(self.path)
