"""The families of processes by name, and the reader of the plan that a blueprint declares. No torch.

A new family is one file beside this and one line here.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from typing import TYPE_CHECKING, Any

from sedd_graph.blueprint.load import Loaded
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.registry import Registry
from sedd_graph.errors import SeddGraphError
from sedd_graph.families.plan import GraphPlan, Plan
from sedd_graph.graph.model import Graph

if TYPE_CHECKING:
    from sedd_graph.engine.process import Process

__all__ = ["FAMILIES", "Family", "process_class", "read_plan"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of processes. Its parts are dotted names, ``module:name``, that are imported on first use.

    Attributes:
        process: Class that implements :class:`sedd_graph.engine.process.Process`.
        reader: Function that reads and checks the plan without torch, called as ``reader(loaded, graph, registry)``.
    """

    process: str
    reader: str = "sedd_graph.families.plan:read_process"


FAMILIES = {
    "graph": Family("sedd_graph.families.graph:GraphOnly"),
    "tokens": Family("sedd_graph.families.tokens:TokenProcess"),
    "strings": Family("sedd_graph.families.strings:StringProcess"),
    "points": Family("sedd_graph.families.points:PointProcess", "sedd_graph.families.points_plan:read_points"),
}
"""Every family by name. Kinds of components name the family that they belong to in
:data:`sedd_graph.component.kinds.KINDS`; ``graph`` is that of a blueprint without a process."""


def process_class(family: str) -> type[Process]:
    """Import and return the class of a family."""
    found: type[Process] = pkgutil.resolve_name(FAMILIES[family].process)
    return found


def read_plan(loaded: Loaded, graph: Graph, registry: Registry) -> Plan:
    """Read and check the process that a blueprint declares.

    The family is that of the objective's kind, else of the kernel's or the sampler's.

    Raises:
        BlueprintError: The plan has problems; it holds all of them.
    """
    blueprint = loaded.blueprint
    specs = [s for s in (blueprint.objective, blueprint.process, blueprint.sample) if s is not None]
    if not specs:
        return GraphPlan()
    named = [family for spec in specs if (family := _family(registry, spec.op)) is not None]
    # where all components are unknown, any reader reports them
    reader: Any = pkgutil.resolve_name(FAMILIES[named[0] if named else "tokens"].reader)
    plan: Plan = reader(loaded, graph, registry)
    return plan


def _family(registry: Registry, op: str) -> str | None:
    """Return the family of a component; None where it is unknown, which is reported when its part of the plan is read."""
    try:
        return KINDS[registry.contract(op).kind].family
    except SeddGraphError:
        return None
