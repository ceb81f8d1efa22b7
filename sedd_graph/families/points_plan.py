"""Plans of normalizing flows: graphs that are bijections of real vectors with a log-determinant. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.location import Location, Refused
from sedd_graph.blueprint.schema import Blueprint
from sedd_graph.component.axes import PortType, Size
from sedd_graph.component.contract import ComponentConfig, Contract
from sedd_graph.component.registry import Registry
from sedd_graph.errors import BlueprintError
from sedd_graph.graph.configure import configure
from sedd_graph.graph.model import Graph, Region, Step
from sedd_graph.inverse.format import diagnosis
from sedd_graph.inverse.program import Refusal
from sedd_graph.inverse.solve import solve

__all__ = ["PointsPlan", "read_points"]


@dataclasses.dataclass(frozen=True)
class PointsPlan:
    """Plan of a normalizing flow.

    Attributes:
        contract: Description of the objective's class. The objective of a flow is a component of the kind
            ``likelihood``, which defines the base density.
        config: Validated Config of the objective.
        shape: Shape of a row of data x, without the batch axis.
        out: Shape of a row of the network's output z, without the batch axis.
    """

    contract: Contract
    config: ComponentConfig
    shape: tuple[int, ...]
    out: tuple[int, ...]

    family, unit, states = "points", "row", 0
    sampler_op = "inverse"

    @property
    def objective_op(self) -> str:
        """Name of the objective with its version, such as ``exact_likelihood.v1``."""
        return self.contract.op

    def describe(self) -> str:
        """Return a one-line summary for the console: the shape of a row and the name of the objective."""
        return f"flow of rows of {' x '.join(map(str, self.shape))}; likelihood {self.contract.name}"

    def sampling(self) -> dict[str, Any]:
        """Return an empty dict, since a flow is sampled by its inverse, without a Config."""
        return {}

    def record(self) -> dict[str, dict[str, Any]]:
        """Return an empty dict, since no noise process determines the likelihood of a flow."""
        return {}


def read_points(loaded: Loaded, graph: Graph, registry: Registry) -> PointsPlan:
    """Return the plan of a flow from the section ``objective`` of a blueprint, a component of the kind ``likelihood``.

    The graph must be invertible, with a log-determinant, and have one input and one output of real numbers.

    Args:
        loaded: The blueprint, with the file positions of its keys.
        graph: The expanded graph of the blueprint.
        registry: The installed components.

    Returns:
        The validated plan.

    Raises:
        BlueprintError: The blueprint has a noise process, or the graph is no flow. The error lists every problem.
    """
    at, blueprint = Location(loaded), loaded.blueprint
    try:
        with at.gather():
            for key in ("process", "sample"):
                if getattr(blueprint, key) is not None:
                    (at / key).refuse(
                        f"a flow has no noise process, and is sampled by its inverse: leave {key!r} out, "
                        "or take an objective that is not a likelihood"
                    )
            if blueprint.objective is None:
                raise (at / "objective").refuse(
                    "a flow needs an objective of kind likelihood, such as exact_likelihood"
                )
            contract = registry.contract(blueprint.objective.op)
            config = configure(contract, blueprint.objective.config, graph.axes, at / "objective")
            shapes = {}
            for key, ports in (("inputs", graph.root.inputs), ("outputs", graph.root.output_types)):
                with suppress(Refused):
                    shapes[key] = _row_shape(at / key, ports)
            if len(shapes) == 2:
                _check_flow(at / "objective", graph)
            _refuse_save(at, graph)
        if config is None:  # reported by ``configure``
            raise Refused
    except Refused:
        raise BlueprintError(at.problems) from None
    return PointsPlan(contract, config, shapes["inputs"], shapes["outputs"])


def _check_flow(at: Location, graph: Graph) -> None:
    """Report at ``at`` the reason if the graph is not a bijection with a log-determinant."""
    found = solve(graph.root)
    if isinstance(found, Refusal):
        at.refuse(f"the graph is no flow: {diagnosis(found)}")
    elif found.level == "injective":
        at.refuse(f"the graph is no flow: it is only injective: {found.note}")
    elif found.unmeasured:
        names = ", ".join(d.path for d in found.unmeasured)
        at.refuse(f"the likelihood needs a log-determinant, which {names} does not declare")
    elif found.mixed_rows:
        at.refuse(f"the likelihood needs a log-determinant of each row: {found.mixed_rows}")


def _refuse_save(at: Location, graph: Graph) -> None:
    """Report each node with ``save``: a flow frees activations layer by layer, so training could not store them."""
    saving = {step.position for step in _steps(graph.root) if step.save is not None}
    for node in _nodes(at):
        if node.position in saving:
            (node / "save").refuse("a flow stores no activations: leave 'save' out")


def _steps(region: Region) -> Iterator[Step]:
    for step in region.steps:
        yield step
        if isinstance(step.body, Region):
            yield from _steps(step.body)


def _nodes(at: Location) -> Iterator[Location]:
    """Yield the location of each node of a blueprint and of its blocks, included files included."""
    library = at.loaded.library
    if isinstance(library, Blueprint):
        yield from (at / "nodes" / name for name in library.nodes)
    yield from (at / "blocks" / name / "nodes" / node for name, b in library.blocks.items() for node in b.nodes)
    for included in at.loaded.libraries.values():
        yield from _nodes(Location(included, problems=at.problems))


def _row_shape(at: Location, ports: Mapping[str, PortType]) -> tuple[int, ...]:
    """Return the shape of a row, without the batch axis, of the single port in ``ports``. Raises :class:`Refused`."""
    if len(ports) != 1:
        raise at.refuse(f"a flow has one of them, not {len(ports)}: {', '.join(ports)}")
    ((name, found),) = ports.items()
    sizes = [d.size.constant for d in found.dims[1:]]
    shape = tuple(size for size in sizes if size is not None)
    if found.kind != "float" or not shape or len(shape) < len(sizes) or found.dims[0].size != Size.of("batch"):
        raise (at / name).refuse(f"a flow's rows are real numbers of a fixed shape, such as float b 1 2, not {found}")
    return shape
