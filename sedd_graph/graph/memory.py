"""Memory modes of the blocks of a graph that a plan for a memory budget chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from sedd_graph.graph.model import Graph, Region, Running, Step

__all__ = ["free_steps", "planned"]


def free_steps(graph: Graph, fixed: Collection[str]) -> tuple[Step, ...]:
    """Return the nodes at the root of a graph that use a block, without those named in ``fixed``."""
    return tuple(s for s in graph.root.steps if isinstance(s.body, Region) and s.name not in fixed)


def planned(graph: Graph, plan: Mapping[str, Running]) -> Graph:
    """Return ``graph`` with the execution modes of a plan.

    Args:
        graph: The graph.
        plan: Execution mode by the name of a node at the root; nodes of other names keep theirs.
    """
    steps = tuple(dataclasses.replace(s, running=plan.get(s.name, s.running)) for s in graph.root.steps)
    return dataclasses.replace(graph, root=dataclasses.replace(graph.root, steps=steps)) if plan else graph
