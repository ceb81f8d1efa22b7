"""Blueprints that declare a network without a process. The network can be built and run, but not trained or sampled."""

from __future__ import annotations

from typing import Any, NoReturn

from sedd_graph.engine.process import Process
from sedd_graph.families.plan import refuse_graph

__all__ = ["GraphOnly"]


class GraphOnly(Process):
    """Placeholder process of a blueprint that declares only a graph. Training and sampling raise :class:`UserError`."""

    family = "graph"
    trains = False
    text = False

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        refuse_graph()

    batch = draw = loss = bound_rows = sample = stored = conditions = prompt = _refuse
