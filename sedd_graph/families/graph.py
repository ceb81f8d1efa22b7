"""Blueprints that are only a graph: the network can be built and run, and neither trained nor sampled."""

from __future__ import annotations

from typing import Any, NoReturn

from sedd_graph.engine.process import Process
from sedd_graph.families.plan import refuse_graph

__all__ = ["GraphOnly"]


class GraphOnly(Process):
    """The process of a blueprint that declares none: every method that a process needs raises :class:`UserError`."""

    family = "graph"
    trains = False
    text = False

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        refuse_graph()

    batch = draw = loss = bound_rows = sample = stored = conditions = prompt = _refuse
