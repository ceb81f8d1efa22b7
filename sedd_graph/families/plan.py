"""Plans of processes: the components that a blueprint declares, validated against its graph without importing torch.

A plan is the validated description of a process. For diffusion on tokens and strings, the outputs and inputs of the
graph are checked against two declarations: the kernel (the noise process) declares the outputs that the network must
have, such as ``log_score`` or ``log_x0`` (``parametrizations``), and the objective declares the inputs that it passes
to the network, such as ``tokens`` and ``sigma`` (``feeds``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn, Protocol

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.location import Location, Refused
from sedd_graph.blueprint.schema import OpSpec, ProcessSpec
from sedd_graph.component.axes import PortType, parse_port_type
from sedd_graph.component.contract import ComponentConfig, Contract
from sedd_graph.component.kinds import KINDS, kinds_at
from sedd_graph.component.outputs import Input, Output
from sedd_graph.component.registry import Registry
from sedd_graph.errors import BlueprintError, UserError, choices
from sedd_graph.graph.configure import configure, find_contract
from sedd_graph.graph.model import Graph

__all__ = ["GraphPlan", "Part", "Plan", "ProcessPlan", "read_distillation", "read_process", "refuse_graph"]


class Plan(Protocol):
    """Interface of the validated description of a process, common to all families.

    Each family of processes has a function that makes its plans (``reader`` in
    :class:`sedd_graph.families.table.Family`).
    """

    @property
    def family(self) -> str:
        """Name of the family of processes, a key of :data:`sedd_graph.families.table.FAMILIES`."""

    @property
    def unit(self) -> str:
        """Unit of reported compute costs, such as FLOPs per unit: ``token``, or ``row`` for rows of real numbers."""

    @property
    def states(self) -> int:
        """Number of states of each position, special states such as the mask included; 0 if rows are not tokens."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row of real numbers, without the batch axis; empty if rows are tokens."""

    @property
    def objective_op(self) -> str:
        """Name of the objective with its version, such as ``nelbo.v1``.

        Raises:
            UserError: The blueprint is a graph without process.
        """

    @property
    def sampler_op(self) -> str:
        """Name of the sampler with its version, such as ``ancestral.v1``.

        Raises:
            UserError: The blueprint is a graph without process.
        """

    def describe(self) -> str:
        """Return a one-line summary for the console; an empty string for a graph without a process."""

    def sampling(self) -> dict[str, Any]:
        """Return the Config of the sampler as JSON values. Raises :class:`UserError` for a graph without process."""

    def record(self) -> dict[str, dict[str, Any]]:
        """Return the components that determine the likelihood bound, as JSON values by role, such as ``kernel``.

        The result is empty for a flow.

        Raises:
            UserError: The blueprint is a graph without process.
        """


def refuse_graph() -> NoReturn:
    """Raise :class:`UserError`: the blueprint is a graph without a process, which cannot be trained or sampled."""
    raise UserError("this blueprint is a graph without a process: add process, objective and sample to train or sample")


class GraphPlan:
    """Plan of a blueprint that declares only a graph, without process, objective and sampler."""

    family, unit, states, shape = "graph", "token", 0, ()

    @property
    def objective_op(self) -> str:
        """Raises :class:`UserError`: a graph without a process has no objective and no sampler."""
        refuse_graph()

    sampler_op = objective_op

    def describe(self) -> str:
        """Return an empty string."""
        return ""

    def sampling(self) -> dict[str, Any]:
        """Raise :class:`UserError`: a graph without a process has no sampler and no likelihood."""
        refuse_graph()

    record = sampling


@dataclasses.dataclass(frozen=True)
class Part:
    """Component of a process, such as its kernel or its sampler, with its Config.

    Attributes:
        contract: Description of the component's class, such as its name, version and Config class.
        config: Validated Config of the component.
    """

    contract: Contract
    config: ComponentConfig

    @property
    def name(self) -> str:
        """Name of the component, without its version."""
        return self.contract.name

    def record(self) -> dict[str, Any]:
        """Return the component as a blueprint declares it: its versioned name as ``op``, and the keys of its Config."""
        return {"op": self.contract.op, **self.config.model_dump(mode="json")}


@dataclasses.dataclass(frozen=True)
class ProcessPlan:
    """Plan of a diffusion process on tokens or strings.

    Attributes:
        family: Name of the family of processes: ``tokens`` or ``strings``.
        kernel: Forward (noising) process.
        schedule: Noise schedule of the forward process.
        objective: Training objective.
        sampler: Sampler of the reverse process.
        states: Number of states of the kernel: data tokens, and special states, such as the mask.
        outputs: Outputs of the graph that the kernel reads.
        classifier: Classifier that guides samples towards a label; None without guidance.
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
        """Return a one-line summary for the console: the names of the components and the number of states."""
        guide = "" if self.classifier is None else f", guided by {self.classifier.name}"
        return (
            f"{self.kernel.name} with {self.schedule.name}, {self.states:,} states; objective {self.objective.name}; "
            f"sampler {self.sampler.name}{guide}"
        )

    @property
    def output(self) -> str:
        """Name under which objective and sampler read the graph's first output, such as ``log_score`` or ``log_x0``."""
        return self.outputs[0].read_as

    @property
    def objective_op(self) -> str:
        """Name of the objective with its version, such as ``nelbo.v1``."""
        return self.objective.contract.op

    @property
    def sampler_op(self) -> str:
        """Name of the sampler with its version, such as ``ancestral.v1``."""
        return self.sampler.contract.op

    def sampling(self) -> dict[str, Any]:
        """Return the Config of the sampler as JSON values."""
        return self.sampler.config.model_dump(mode="json")

    def record(self) -> dict[str, dict[str, Any]]:
        """Return ``kernel``, ``schedule`` and ``objective``, which determine the likelihood bound, as JSON values."""
        return {name: getattr(self, name).record() for name in ("kernel", "schedule", "objective")}


def read_process(loaded: Loaded, graph: Graph, registry: Registry) -> ProcessPlan:
    """Return the plan that the sections ``process``, ``objective`` and ``sample`` of a blueprint declare.

    The graph must have the outputs that the kernel reads, and exactly the inputs that the objective computes.

    Args:
        loaded: The blueprint, with the file positions of its keys.
        graph: The expanded graph of the blueprint.
        registry: The installed components.

    Returns:
        The validated plan.

    Raises:
        BlueprintError: The sections are incomplete or invalid, or do not fit the graph. The error lists every problem.
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
            if family is None:
                raise Refused
            cls = registry.component(parts["process"].contract.op)
            read("process.schedule", _schedule(at, noise, parts["process"], cls.own_schedule), family)
            read("objective", objective, family)
            read("sample", sample, family)
            if sample.classifier is not None:
                read("sample.classifier", sample.classifier, family)
            if "objective" in parts:
                feeds = registry.component(parts["objective"].contract.op).feeds
                _check_inputs(at / "inputs", graph, parts["objective"], feeds)
            kernel = parts["process"]
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


def read_distillation(loaded: Loaded, graph: Graph, registry: Registry) -> Part | None:
    """Return the distillation objective that the section ``distill`` of a blueprint declares; None without the section.

    Raises:
        BlueprintError: The section is invalid.
    """
    spec, at = loaded.blueprint.distill, Location(loaded)
    if spec is None:
        return None
    try:
        return _read_part(at, "distill", spec, None, graph, registry)
    except Refused:
        raise BlueprintError(at.problems) from None


def _missing(at: Location) -> Refused:
    """Report each missing one of ``process``, ``objective`` and ``sample``, at the first section that is present."""
    sections = {name: getattr(at.loaded.blueprint, name) for name in ("process", "objective", "sample")}
    first = next(name for name, spec in sections.items() if spec is not None)
    for name, spec in sections.items():
        if spec is None:
            (at / first).refuse(f"'{first}' is given, but '{name}' is missing: all three belong together")
    return Refused()


def _schedule(
    at: Location, noise: ProcessSpec, kernel: Part, own: Callable[[ComponentConfig], Mapping[str, Any] | None]
) -> OpSpec:
    """Return the declared schedule, or that of a kernel in discrete time. Raises :class:`Refused` if it has no other."""
    fixed = own(kernel.config)
    if fixed is None and noise.schedule is None:
        raise (at / "process").refuse(
            f"the kernel {kernel.name!r} needs a schedule, such as schedule: {{op: loglinear}}"
        )
    if fixed is not None and noise.schedule is not None:
        message = f"the kernel {kernel.name!r} is in discrete time and has its own schedule: leave 'schedule' out"
        raise (at / "process" / "schedule").refuse(message)
    return noise.schedule or OpSpec.model_validate(fixed)


def _read_part(at: Location, place: str, spec: OpSpec, family: str | None, graph: Graph, registry: Registry) -> Part:
    """Read the component at the dotted key ``place``; ``family`` None allows every family. Raises :class:`Refused`."""
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
    """Report graph inputs that the objective does not compute, or with another type, and missing required inputs."""
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
    """Return whether the port type ``found`` has the kind (float, int, bool) and the number of axes of ``wanted``."""
    declared = parse_port_type(wanted)
    return found.kind == declared.kind and len(found.dims) == len(declared.dims)


def _read_outputs(
    at: Location, graph: Graph, kernel: Part, alternatives: Sequence[tuple[Output, ...]]
) -> tuple[tuple[Output, ...], int]:
    """Return the outputs that the kernel reads from this graph, and the size of the last axis of the first output.

    Args:
        at: Location of the outputs in the blueprint.
        graph: The expanded graph.
        kernel: The kernel.
        alternatives: Alternative sets of outputs that the kernel can read. The graph must have exactly one of them.

    Raises:
        Refused: The graph has outputs of no set or of several, lacks an output, has one too many, or one of a wrong
            type.
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
            elif output.type.endswith(" v") and chosen[0].type.endswith(" v") and _last(found) != size:
                (at / output.name).refuse(f"must have the {size} states of {chosen[0].name}, not {_last(found)}")
    return chosen, size


def _last(found: PortType | None) -> int:
    """Return the size of the last axis of a port type; 0 if it is not constant or there is no axis."""
    return 0 if found is None or not found.dims else found.dims[-1].size.constant or 0
