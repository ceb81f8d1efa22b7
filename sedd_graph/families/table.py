"""The families of processes by name. A new one is one file beside this and one line here."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence

import torch

from sedd_graph.component.registry import Registry
from sedd_graph.engine.process import GraphOnly, Process
from sedd_graph.families.plan import Plan
from sedd_graph.graph.model import Graph

__all__ = ["FAMILIES", "make_process", "process_class"]

FAMILIES = {
    "tokens": "sedd_graph.families.tokens:TokenProcess",
    "strings": "sedd_graph.families.strings:StringProcess",
    "points": "sedd_graph.families.points:PointProcess",
}
"""The class of each family's process. A kind of kernel, or of objective, names its family in
:data:`sedd_graph.component.kinds.KINDS`."""


def process_class(family: str) -> type[Process]:
    """Import and return the class of a family."""
    found: type[Process] = pkgutil.resolve_name(FAMILIES[family])
    return found


def make_process(
    plan: Plan | None,
    graph: Graph,
    registry: Registry,
    *,
    device: torch.device,
    forbidden: Sequence[int] = (),
    pieces: Callable[[], Sequence[bytes | None]] | None = None,
) -> Process:
    """Make the process that ``plan`` declares, on ``device``.

    Args:
        plan: None for a blueprint that is only a graph.
        forbidden: ids of tokens that are never generated.
        pieces: gives the bytes of each token, where there is a tokenizer.

    Raises:
        BlueprintError: with every reason why the components do not go together.
    """
    if plan is None:
        return GraphOnly()
    return process_class(plan.family).make(
        plan, registry, graph=graph, device=device, forbidden=forbidden, pieces=pieces
    )
