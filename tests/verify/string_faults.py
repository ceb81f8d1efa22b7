"""What the faults that are planted in string processes share: the processes, and how faults are registered.

A fault changes the components of a process: ``fault(parts)`` returns them, or changes them in place. It is applied to
the toys and to the declared components alike, as a faulty component would be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.strings import make_parts
from sedd_graph.verify.strings import prove_strings
from tests.plans import string_plan
from tests.verify.string_kernels import REGISTRY, part

__all__ = ["FAULTS", "PROCESSES", "Fault", "fault", "patched", "prove_faulty", "scaled"]

LINEAR = part("linear_rate", rate_min=0.01, rate_max=40.0)
PROCESSES: dict[str, ProcessPlan] = {
    "delete": string_plan(part("delete"), part("loglinear"), part("dise"), part("string_tau"), 10),
    "sampled": string_plan(part("delete"), part("loglinear"), part("dise", targets="sampled"), part("string_tau"), 10),
    "dice": string_plan(part("delete"), part("loglinear"), part("dice"), part("string_first_hitting"), 10),
    "dice_tau": string_plan(part("delete"), part("loglinear"), part("dice"), part("string_tau"), 10),
    "thinning": string_plan(part("delete"), part("loglinear"), part("dise"), part("string_thinning"), 10),
    "indel": string_plan(part("indel", mean_length=1.0), LINEAR, part("dise"), part("string_tau"), 10),
    "edit_flow": string_plan(
        part("edit_flow", mean_length=2.0), part("cubic"), part("edit_flow_loss"), part("string_tau"), 10
    ),
    "empty": string_plan(part("edit_flow"), part("cubic"), part("edit_flow_loss"), part("string_tau"), 10),
    "flexmdm": string_plan(part("mask_delete", pace=2.0), part("loglinear"), part("flexmdm"), part("flexmdm_tau"), 10),
    "flexmdm_thinning": string_plan(
        part("mask_delete"), part("loglinear"), part("flexmdm"), part("flexmdm_thinning"), 10
    ),
}


class Fault(NamedTuple):
    """A fault of one component.

    Attributes:
        process: Name of the process in :data:`PROCESSES`.
        plant: Changes the components in place.
        names: Checks of which at least one must fail.
    """

    process: str
    plant: Callable[[StringParts], None]
    names: frozenset[str]


FAULTS: dict[str, Fault] = {}


def fault(*processes: str, names: str) -> Callable[[Callable[[StringParts], None]], Callable[[StringParts], None]]:
    """Register a fault of several processes, that the checks ``names``, separated by blanks, must find."""

    def register(plant: Callable[[StringParts], None]) -> Callable[[StringParts], None]:
        for process in processes:
            FAULTS[f"{plant.__name__}-{process}"] = Fault(process, plant, frozenset(names.split()))
        return plant

    return register


def prove_faulty(process: str, plant: Callable[[StringParts], None], proof: Proof) -> list[Check]:
    """Prove a process whose components have a fault."""

    def make(states: int | None) -> StringParts:
        parts = make_parts(PROCESSES[process], REGISTRY, states)
        plant(parts)
        return parts

    return prove_strings(make, proof)


def patched(owner: Any, name: str, wrap: Callable[..., Any]) -> None:
    """Replace the method ``name`` of an object by ``wrap(method, *arguments, **keywords)``."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: wrap(method, *a, **k))


def scaled(factor: float, which: int | None = None) -> Callable[..., Tensor]:
    """A wrap that multiplies the result, or one of its columns, by a factor."""

    def wrap(method: Any, *a: Any, **k: Any) -> Tensor:
        found = method(*a, **k).clone()
        found[..., slice(None) if which is None else which] *= factor
        return found

    return wrap
