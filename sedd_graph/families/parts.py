"""The components of a plan, made."""

from __future__ import annotations

from typing import Any

from sedd_graph.component.base import Context
from sedd_graph.component.registry import Registry
from sedd_graph.errors import Problem
from sedd_graph.families.plan import ProcessPlan

__all__ = ["make_components", "problem"]


def make_components(plan: ProcessPlan, registry: Registry, *, states: int | None = None) -> tuple[Any, Any, Any, Any]:
    """Make kernel, schedule, objective and sampler, for the declared number of states or (for a proof) cut down to ``states``."""
    context = Context({"n": states or plan.states})
    noise, goal = registry.component(plan.kernel.contract.op), registry.component(plan.objective.contract.op)
    kernel = noise(plan.kernel.config if states is None else noise.toy(plan.kernel.config, states), context)
    objective = goal(plan.objective.config if states is None else goal.toy(plan.objective.config), context)
    schedule, sampler = (registry.component(p.contract.op)(p.config, context) for p in (plan.schedule, plan.sampler))
    return kernel, schedule, objective, sampler


def problem(key: str, message: str) -> Problem:
    """A problem of the blueprint at ``key``, whose line is found by the caller."""
    return Problem("blueprint", 0, 0, key, message)
