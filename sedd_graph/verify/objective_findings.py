"""What the verification of one form of an objective found, and the checks that are made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from sedd_graph.component.check import Check
from sedd_graph.verify.objective_draws import Wrong
from sedd_graph.verify.objective_values import POINTWISE
from sedd_graph.verify.worst import worst

__all__ = ["Findings", "form_check", "verdict"]

_WORDS = {"loss": "the loss of single draws", "gradient": "the gradient of single draws"}


@dataclasses.dataclass
class Findings:
    """Results of the verification of one loss of an objective (:class:`View`).

    Attributes:
        wrong: Deviations beyond the tolerance.
        worst: Largest relative deviation from the expected ``loss`` and from the expected ``gradient``, by these names.
        value: For each enumerated toy, a text with the bound of a perfect network and the entropy, in nats.
        ran: Parts (:attr:`Wrong.part`) that were verified on a toy.
        optimum: Number of times at which the optimum is not verified, by the reason, and of those verified by "".
        missed: Parts that were not verified on a toy, since an earlier part of that toy is wrong or raised an error.
    """

    wrong: list[Wrong] = dataclasses.field(default_factory=list)
    worst: dict[str, float] = dataclasses.field(default_factory=dict)
    value: list[str] = dataclasses.field(default_factory=list)
    ran: set[str] = dataclasses.field(default_factory=set)
    missed: set[str] = dataclasses.field(default_factory=set)
    optimum: dict[str, int] = dataclasses.field(default_factory=dict)

    def not_run(self, parts: Iterable[str]) -> str | None:
        """Return a text if one of ``parts`` was not verified on all toys; None if each was."""
        missed = self.missed.intersection(parts)
        if not missed:
            return None
        return "not run" if not missed & self.ran else "not run on all data sets"

    def note(self, part: str, gap: float) -> None:
        """Record a relative deviation from the kernel's own loss."""
        self.worst[part] = worst(self.worst.get(part, 0.0), gap)
        if not gap < POINTWISE:
            self.wrong.append(Wrong(part, f"{_WORDS[part]} is {gap:.2g} off"))


def form_check(name: str, found: Findings) -> Check:
    """Return the check of the bound, or of its evaluation."""
    claim = {
        "bound": "the bound of the objective passes the same checks",
        "evaluated": "so does the form for evaluation",
    }
    wrong = [f"{w.part}: {w.text}" for w in found.wrong]
    holds, value = verdict(wrong, found.not_run(found.missed), "; ".join(found.value))
    return Check(f"objective.{name}", claim[name], holds, value, "loss, gradient, draws, value, optimum, roles")


def verdict(wrong: list[str], not_run: str | None, value: str) -> tuple[bool | None, str]:
    """Return :attr:`Check.holds` and :attr:`Check.value`: False if anything is wrong, None if a part was not run."""
    return (False, wrong[0]) if wrong else (None, not_run) if not_run is not None else (True, value)
