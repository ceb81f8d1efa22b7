"""A graph that is a flow as a whole: a bijection with a log-determinant, from rows of real numbers to rows as large."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.location import Location
from sedd_graph.blueprint.schema import OpSpec
from sedd_graph.component.axes import PortType, Size
from sedd_graph.component.contract import ComponentConfig, Contract
from sedd_graph.component.registry import Registry
from sedd_graph.data.config import PointsConfig
from sedd_graph.errors import BlueprintError
from sedd_graph.graph.configure import configure
from sedd_graph.graph.model import Graph
from sedd_graph.inverse.format import diagnosis
from sedd_graph.inverse.program import Refusal
from sedd_graph.inverse.solve import solve

__all__ = ["PointsPlan", "read_points"]


@dataclasses.dataclass(frozen=True)
class PointsPlan:
    """The likelihood of a flow, its input and its output, and the shapes of a row of either."""

    family = "points"
    unit = "row"
    states = 0

    contract: Contract
    config: ComponentConfig
    input: str
    output: str
    shape: tuple[int, ...]
    out: tuple[int, ...]

    sampler_op = "inverse"

    @property
    def objective_op(self) -> str:
        """The pinned name of the likelihood."""
        return self.contract.op

    def describe(self) -> str:
        """One line: the shape of a row, and the likelihood by name."""
        return f"flow of rows of {' x '.join(map(str, self.shape))}; likelihood {self.contract.name}"

    def sampling(self) -> dict[str, Any]:
        """The sampler's Config: an inverse has none."""
        return {}

    def record(self) -> dict[str, dict[str, Any]]:
        """The components that the likelihood depends on, as JSON values: none but the network."""
        return {}


def read_points(loaded: Loaded, graph: Graph, registry: Registry, objective: OpSpec) -> PointsPlan:
    """Read a flow whose ``objective`` is a likelihood.

    Raises:
        BlueprintError: with every reason why the graph is no flow.
    """
    contract = registry.contract(objective.op)
    at = Location(loaded, (), [])
    for key in ("process", "sample"):
        if getattr(loaded.blueprint, key) is not None:
            (at / key).refuse(
                f"a flow has no noise process, and is sampled by its inverse: leave {key!r} out, "
                f"or take an objective other than {contract.name!r}"
            )
    if "data" in loaded.sections and not isinstance(loaded.sections["data"], PointsConfig):
        (at / "data").refuse("a flow learns from real numbers: give data.points, such as {op: two_moons}")
    if getattr(loaded.sections.get("train"), "sample", None) is not None:
        (at / "train" / "sample").refuse(
            "samples on the way are texts, which a flow has none of: leave train.sample out"
        )
    config = configure(contract, objective.config, graph.axes, at / "objective")
    ends = [
        _end(at / key, ports) for key, ports in (("inputs", graph.root.inputs), ("outputs", graph.root.output_types))
    ]
    if ends[0] is not None and ends[1] is not None:
        found = solve(graph.root)
        if isinstance(found, Refusal):
            (at / "objective").refuse(f"the graph is no flow: {diagnosis(found)}")
        elif found.level == "injective":
            (at / "objective").refuse(f"the graph is no flow: it is only injective: {found.note}")
        elif found.unmeasured:
            names = ", ".join(d.path for d in found.unmeasured)
            (at / "objective").refuse(f"the likelihood needs a log-determinant, which {names} does not declare")
    if at.problems or config is None or ends[0] is None or ends[1] is None:
        raise BlueprintError(at.problems)
    return PointsPlan(contract, config, ends[0][0], ends[1][0], ends[0][1], ends[1][1])


def _end(at: Location, ports: Mapping[str, PortType]) -> tuple[str, tuple[int, ...]] | None:
    """The one input or output, and the shape of a row of it."""
    if len(ports) != 1:
        at.refuse(f"a flow has one of them, not {len(ports)}: {', '.join(ports)}")
        return None
    ((name, found),) = ports.items()
    sizes = [d.size.constant for d in found.dims[1:]]
    if found.kind != "float" or not found.dims or found.dims[0].size != Size.of("batch") or None in sizes or not sizes:
        (at / name).refuse(f"a flow's rows are real numbers of a fixed shape, such as float b 1 2, not {found}")
        return None
    return name, tuple(s for s in sizes if s is not None)
