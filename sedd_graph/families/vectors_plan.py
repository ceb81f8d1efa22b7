"""Plans of processes on vectors: as for tokens, with the sizes that the kernel declares. Imports no torch."""

from __future__ import annotations

import dataclasses

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.location import Location, Refused
from sedd_graph.component.registry import Registry
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import ProcessPlan, read_process
from sedd_graph.graph.model import Graph

__all__ = ["VectorsPlan", "read_vectors"]


@dataclasses.dataclass(frozen=True)
class VectorsPlan(ProcessPlan):
    """Plan of a diffusion process on vectors; ``states`` is the number of tokens.

    Attributes:
        width: Width of a vector.
    """

    width: int = 0

    def describe(self) -> str:
        return super().describe().replace(" states;", f" tokens as vectors of {self.width};", 1)


def read_vectors(loaded: Loaded, graph: Graph, registry: Registry) -> VectorsPlan:
    """Return the validated plan of a process on vectors.

    Args:
        loaded: The blueprint, with the file positions of its keys.
        graph: The expanded graph of the blueprint.
        registry: The installed components.

    Raises:
        BlueprintError: The declared process is invalid or does not fit the graph. The error lists every problem.
    """
    plan = read_process(loaded, graph, registry)
    at = Location(loaded)
    tokens, width = registry.component(plan.kernel.contract.op).sizes(plan.kernel.config)
    try:
        with at.gather():
            x = graph.root.inputs["x"]
            if (found := x.dims[-1].size.constant) != width:
                (at / "inputs" / "x").refuse(f"must have the width {width} of the kernel's vectors, not {found}")
            for output in plan.outputs:
                expected, what = (tokens, "tokens") if output.name == "logits" else (width, "width of its vectors")
                if (found := graph.root.output_types[output.name].dims[-1].size.constant) != expected:
                    (at / "outputs" / output.name).refuse(
                        f"the kernel {plan.kernel.name!r} reads a last axis of {expected} ({what}), not {found}"
                    )
    except Refused:
        raise BlueprintError(at.problems) from None
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return VectorsPlan(**{**fields, "states": tokens}, width=width)
