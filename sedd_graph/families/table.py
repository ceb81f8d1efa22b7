"""Table of the families of processes, and validation of the process that a blueprint declares. Imports no torch.

To add a family, add its module to this package and one entry to :data:`FAMILIES`.
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
    """Family of processes. Both attributes are import paths, ``module:name``, which are imported on first use.

    Attributes:
        process: Import path of a subclass of :class:`sedd_graph.engine.process.Process`.
        reader: Import path of the function that returns the validated plan of a blueprint, without importing torch. It
            is called as ``reader(loaded, graph, registry)``, like :func:`sedd_graph.families.plan.read_process`.
    """

    process: str
    reader: str = "sedd_graph.families.plan:read_process"


FAMILIES = {
    "graph": Family("sedd_graph.families.graph:GraphOnly"),
    "tokens": Family("sedd_graph.families.tokens:TokenProcess"),
    "strings": Family("sedd_graph.families.strings:StringProcess"),
    "vectors": Family("sedd_graph.families.vectors:VectorProcess", "sedd_graph.families.vectors_plan:read_vectors"),
    "points": Family("sedd_graph.families.points:PointProcess", "sedd_graph.families.points_plan:read_points"),
}
"""All families of processes by name. The family ``graph`` is for blueprints without a process. Each other family has
component kinds of its own, such as ``string_kernel`` for ``strings`` (:data:`sedd_graph.component.kinds.KINDS`)."""


def process_class(family: str) -> type[Process]:
    """Import and return the process class of a family, given its name, a key of :data:`FAMILIES`."""
    found: type[Process] = pkgutil.resolve_name(FAMILIES[family].process)
    return found


def read_plan(loaded: Loaded, graph: Graph, registry: Registry) -> Plan:
    """Return the validated plan of the process that a blueprint declares.

    The component kind of the objective determines the family (:data:`sedd_graph.component.kinds.KINDS`); if the
    objective is missing or unknown, the kind of the kernel does, or else that of the sampler.

    Args:
        loaded: The blueprint, with the file positions of its keys.
        graph: The expanded graph of the blueprint.
        registry: The installed components.

    Returns:
        The plan; a :class:`~sedd_graph.families.plan.GraphPlan` for a blueprint without a process.

    Raises:
        BlueprintError: The declared process is invalid or does not fit the graph. The error lists every problem.
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
    """Return the family of a component; None if the component is unknown, which the reader of the plan reports."""
    try:
        return KINDS[registry.contract(op).kind].family
    except SeddGraphError:
        return None
