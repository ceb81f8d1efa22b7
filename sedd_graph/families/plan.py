"""The plan of a process: the components that a blueprint declares, read and checked against its graph. No torch.

The kind of the kernel determines the family (:data:`sedd_graph.component.kinds.KINDS`). The components themselves declare the
outputs of the graph that they read (a kernel's ``parametrizations``) and the inputs that they feed (an objective's ``feeds``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, Protocol

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.location import Location, Refused
from sedd_graph.blueprint.schema import OpSpec
from sedd_graph.component.axes import PortType, parse_port_type
from sedd_graph.component.contract import ComponentConfig, Contract
from sedd_graph.component.kinds import KINDS, kinds_at
from sedd_graph.component.outputs import Input, Output
from sedd_graph.component.registry import Registry
from sedd_graph.errors import BlueprintError, UserError, choices
from sedd_graph.graph.configure import configure, find_contract
from sedd_graph.graph.model import Graph

__all__ = ["GraphPlan", "Part", "Plan", "ProcessPlan", "read_process", "refuse_graph"]


class Plan(Protocol):
    """The declared process, as far as rooms above the families depend on it. Each reader of plans has a class for it."""

    @property
    def family(self) -> str:
        """Name of the family, a key of :data:`sedd_graph.families.table.FAMILIES`."""

    @property
    def unit(self) -> str:
        """Name of the elements of a row, such as ``token``."""

    @property
    def states(self) -> int:
        """Number of states of a token; 0 where rows are not tokens."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row of real numbers, without the batch; empty where rows are tokens."""

    @property
    def objective_op(self) -> str:
        """Pinned name of the objective. Raises :class:`UserError` for a graph without a process."""

    @property
    def sampler_op(self) -> str:
        """Pinned name of the sampler."""

    def describe(self) -> str:
        """Return one line for the user; empty for a graph without a process."""

    def sampling(self) -> dict[str, Any]:
        """Return the sampler's Config, as JSON values."""

    def record(self) -> dict[str, dict[str, Any]]:
        """Return the components that determine the value of a bound, as JSON values."""


def refuse_graph() -> NoReturn:
    """Raise the :class:`UserError` of a graph without a process."""
    raise UserError("this blueprint is a graph without a process: add process, objective and sample to train or sample")


class GraphPlan:
    """The plan of a blueprint that is only a graph."""

    family, unit, states, shape = "graph", "token", 0, ()

    @property
    def objective_op(self) -> str:
        refuse_graph()

    sampler_op = objective_op

    def describe(self) -> str:
        return ""

    def sampling(self) -> dict[str, Any]:
        refuse_graph()

    record = sampling


@dataclasses.dataclass(frozen=True)
class Part:
    """One component of a process with its Config."""

    contract: Contract
    config: ComponentConfig

    @property
    def name(self) -> str:
        """Name of the component, without its version."""
        return self.contract.name

    def record(self) -> dict[str, Any]:
        """Return the pinned name and the Config, as JSON values."""
        return {"op": self.contract.op, **self.config.model_dump(mode="json")}


@dataclasses.dataclass(frozen=True)
class ProcessPlan:
    """The plan of a noise process.

    Attributes:
        family: Name of the family of the kernel.
        kernel: The forward process.
        schedule: Its noise schedule.
        objective: The training loss.
        sampler: The sampler.
        states: Number of the kernel's states: data tokens and those that only noise makes, such as a mask.
        outputs: The outputs of the graph that the kernel reads.
        classifier: Guides samples towards a label.
    """

    family: str
    kernel: Part
    schedule: Part
    objective: Part
    sampler: Part
    states: int
    outputs: tuple[Output, ...]
    classifier: Part | None = None

    unit = "token"
    shape = ()

    def describe(self) -> str:
        """Return one line with the names of the components."""
        guide = "" if self.classifier is None else f", guided by {self.classifier.name}"
        return (
            f"{self.kernel.name} with {self.schedule.name}, {self.states:,} states; objective {self.objective.name}; "
            f"sampler {self.sampler.name}{guide}"
        )

    @property
    def output(self) -> str:
        """Name under which objective and sampler read the first output."""
        return self.outputs[0].read_as

    @property
    def objective_op(self) -> str:
        """Pinned name of the objective."""
        return self.objective.contract.op

    @property
    def sampler_op(self) -> str:
        """Pinned name of the sampler."""
        return self.sampler.contract.op

    def sampling(self) -> dict[str, Any]:
        """Return the sampler's Config, as JSON values."""
        return self.sampler.config.model_dump(mode="json")

    def record(self) -> dict[str, dict[str, Any]]:
        """Return the components that determine the value of a bound, as JSON values."""
        return {name: getattr(self, name).record() for name in ("kernel", "schedule", "objective")}


def read_process(loaded: Loaded, graph: Graph, registry: Registry) -> ProcessPlan:
    """Read ``process``, ``objective`` and ``sample``, and check that the graph has the outputs and inputs that they need.

    Raises:
        BlueprintError: Holds every problem that was found.
    """
    at, blueprint, parts = Location(loaded), loaded.blueprint, dict[str, Part]()
    noise, objective, sample = blueprint.process, blueprint.objective, blueprint.sample

    def read(place: str, spec: OpSpec, family: str | None) -> None:
        with suppress(Refused):
            parts[place] = _read_part(at, place, spec, family, graph, registry)

    try:
        if noise is None or objective is None or sample is None:
            raise _missing(at)
        with at.gather():
            read("process", noise, None)
            family = KINDS[parts["process"].contract.kind].family if "process" in parts else None
            read("process.schedule", noise.schedule, family)
            if family is None:
                raise Refused
            read("objective", objective, family)
            read("sample", sample, family)
            if sample.classifier is not None:
                read("sample.classifier", sample.classifier, family)
            if "objective" in parts:
                feeds = registry.component(parts["objective"].contract.op).feeds
                _check_inputs(at / "inputs", graph, parts["objective"], feeds)
            kernel = parts["process"]
            cls = registry.component(kernel.contract.op)
            outputs, size = _read_outputs(at / "outputs", graph, kernel, cls.parametrizations(kernel.config))
    except Refused:
        raise BlueprintError(at.problems) from None
    return ProcessPlan(
        family,
        kernel,
        parts["process.schedule"],
        parts["objective"],
        parts["sample"],
        size + cls.extra_states,
        outputs,
        parts.get("sample.classifier"),
    )


def _missing(at: Location) -> Refused:
    """Report each of the three sections that is missing, at the first that is there."""
    sections = {name: getattr(at.loaded.blueprint, name) for name in ("process", "objective", "sample")}
    first = next(name for name, spec in sections.items() if spec is not None)
    for name, spec in sections.items():
        if spec is None:
            (at / first).refuse(f"'{first}' is given, but '{name}' is missing: all three belong together")
    return Refused()


def _read_part(at: Location, place: str, spec: OpSpec, family: str | None, graph: Graph, registry: Registry) -> Part:
    """Read the component at ``place``, of any family if ``family`` is None. Raises :class:`Refused`."""
    here = at / tuple(place.split("."))
    kinds = tuple(k for k in kinds_at(place) if family is None or KINDS[k].family in (None, family))
    if not kinds:
        raise here.refuse(f"a process of {family} takes no {place.rpartition('.')[2]}: leave it out")
    contract = find_contract(registry, spec.op, kinds, here / "op")
    config = None if contract is None else configure(contract, spec.config, graph.axes, here)
    if contract is None or config is None:
        raise Refused
    return Part(contract, config)


def _check_inputs(at: Location, graph: Graph, objective: Part, feeds: Iterable[Input]) -> None:
    """Report inputs of the graph that the objective does not feed or feeds with another type, and missing ones."""
    known = {feed.name: feed for feed in feeds}
    for name, found in graph.root.inputs.items():
        if name not in known:
            told = choices(name, known, label="it feeds")
            (at / name).refuse(f"objective {objective.name!r} feeds no input {name!r}{told}")
        elif not _fits(found, known[name].type):
            (at / name).refuse(f"objective {objective.name!r} feeds {name!r} as {known[name].type}, not {found}")
    for feed in known.values():
        if feed.required and feed.name not in graph.root.inputs:
            at.refuse(
                f"objective {objective.name!r} needs a graph with the input {feed.name}: {feed.type} ({feed.meaning})"
            )


def _fits(found: PortType, wanted: str) -> bool:
    """Return whether a port type has the kind and the number of axes of ``wanted``."""
    declared = parse_port_type(wanted)
    return found.kind == declared.kind and len(found.dims) == len(declared.dims)


def _read_outputs(
    at: Location, graph: Graph, kernel: Part, alternatives: Sequence[tuple[Output, ...]]
) -> tuple[tuple[Output, ...], int]:
    """Return the alternative whose outputs the graph has, and the size of the last axis of its first output.

    Raises:
        Refused: The graph has none of them or several, lacks an output, has one too many, or has one of another type.
    """
    types = graph.root.output_types
    counts = [sum(output.name in types for output in outputs) for outputs in alternatives]
    if len(alternatives) > 1 and sum(map(bool, counts)) != 1:
        told = " or ".join(" and ".join(o.name for o in outputs) for outputs in alternatives)
        raise at.refuse(f"a graph with the kernel {kernel.name!r} has one output named {told}")
    chosen = alternatives[counts.index(max(counts))]
    with at.gather():
        for name in types.keys() - {o.name for o in chosen}:
            (at / name).refuse(f"the kernel {kernel.name!r} does not read the output {name!r}: leave it out")
        size = _last(types.get(chosen[0].name))
        for number, output in enumerate(chosen):
            found = types.get(output.name)
            if found is None:
                at.refuse(
                    f"the kernel {kernel.name!r} needs the output {output.name}: {output.type} ({output.meaning})"
                )
            elif not _fits(found, output.type):
                (at / output.name).refuse(f"must be {output.type}, not {found}")
            elif number == 0 and size < 2:
                (at / output.name).refuse(f"must be {output.type} with two or more states v, not {found}")
            elif output.type.endswith(" v") and _last(found) != size:
                (at / output.name).refuse(f"must have the {size} states of {chosen[0].name}, not {_last(found)}")
    return chosen, size


def _last(found: PortType | None) -> int:
    """Return the size of the last axis; 0 where it is not constant."""
    return 0 if found is None or not found.dims else found.dims[-1].size.constant or 0
