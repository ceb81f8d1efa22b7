"""The process that a blueprint declares, read and checked against its graph. No torch.

A family is what is generated: rows of tokens, strings, points. It follows from the kind of the kernel, or of the objective
where there is no noise (:data:`sedd_graph.component.kinds.KINDS`). What the graph must put out and may take in is declared by
the components themselves: a kernel's ``parametrizations``, an objective's ``feeds``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.location import Location
from sedd_graph.blueprint.schema import Blueprint, OpSpec
from sedd_graph.component.axes import parse_port_type
from sedd_graph.component.contract import ComponentConfig, Contract
from sedd_graph.component.kinds import KINDS, kinds_at
from sedd_graph.component.outputs import Input, Output
from sedd_graph.component.registry import Registry
from sedd_graph.errors import BlueprintError, SeddGraphError
from sedd_graph.families.points_plan import PointsPlan, read_points
from sedd_graph.graph.configure import configure, find_contract
from sedd_graph.graph.model import Graph

__all__ = ["Part", "Plan", "ProcessPlan", "read_plan"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One process component under one Config."""

    contract: Contract
    config: ComponentConfig

    @property
    def name(self) -> str:
        return self.contract.name

    def record(self) -> dict[str, Any]:
        """The pinned name and the Config, as JSON values."""
        return {"op": self.contract.op, **self.config.model_dump(mode="json")}


@dataclasses.dataclass(frozen=True)
class ProcessPlan:
    """Kernel, schedule, objective and sampler of one family, and the graph's ``outputs`` that the kernel reads.

    ``states`` counts the kernel's states. Samples may be drawn towards a label that a ``classifier`` predicts.
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
    """What a row consists of."""

    def describe(self) -> str:
        """One line: the components by name."""
        states = f"{self.states:,} states"
        guide = "" if self.classifier is None else f", guided by {self.classifier.name}"
        return (
            f"{self.kernel.name} with {self.schedule.name}, {states}; objective {self.objective.name}; "
            f"sampler {self.sampler.name}{guide}"
        )

    @property
    def output(self) -> str:
        """The name under which objective and sampler read the first output."""
        return self.outputs[0].read_as

    @property
    def objective_op(self) -> str:
        """The pinned name of the objective."""
        return self.objective.contract.op

    @property
    def sampler_op(self) -> str:
        """The pinned name of the sampler."""
        return self.sampler.contract.op

    def sampling(self) -> dict[str, Any]:
        """The sampler's Config, as JSON values."""
        return self.sampler.config.model_dump(mode="json")

    def record(self) -> dict[str, dict[str, Any]]:
        """The components that a bound is an expectation over, as JSON values."""
        parts = {"kernel": self.kernel, "schedule": self.schedule, "objective": self.objective}
        return {name: part.record() for name, part in parts.items()}


Plan = ProcessPlan | PointsPlan


def read_plan(loaded: Loaded, graph: Graph, registry: Registry) -> Plan | None:
    """Read the declared process; None for a blueprint that is only a graph.

    Raises:
        BlueprintError: with every problem of the process.
    """
    blueprint = loaded.blueprint
    if not isinstance(blueprint, Blueprint):
        raise TypeError("a library of blocks declares no process")
    objective = blueprint.objective
    if objective is not None and _family(registry, objective.op) == "points":
        return read_points(loaded, graph, registry, objective)
    specs = {"process": blueprint.process, "objective": objective, "sample": blueprint.sample}
    at = Location(loaded, (), [])
    if all(spec is None for spec in specs.values()):
        return None
    first = next(name for name, spec in specs.items() if spec is not None)
    for name, spec in specs.items():
        if spec is None:
            (at / first).refuse(f"'{first}' is given, but '{name}' is missing: all three belong together")
    process, sample = blueprint.process, blueprint.sample
    if at.problems or process is None or objective is None or sample is None:
        raise BlueprintError(at.problems)

    def part(key: Location, spec: OpSpec, place: str, family: str | None) -> Part | None:
        kinds = [k for k in kinds_at(place) if family is None or KINDS[k].family in (None, family)]
        contract = find_contract(registry, spec.op, tuple(kinds), key / "op")
        config = None if contract is None else configure(contract, spec.config, graph.axes, key)
        return None if contract is None or config is None else Part(contract, config)

    kernel = part(at / "process", process, "process", None)
    family = None if kernel is None else KINDS[kernel.contract.kind].family
    schedule = part(at / "process" / "schedule", process.schedule, "process.schedule", family)
    if kernel is None or family is None:
        raise BlueprintError(at.problems)
    objective_ = part(at / "objective", objective, "objective", family)
    sampler = part(at / "sample", sample, "sample", family)
    classifier = None
    if (wanted := sample.classifier) is not None:
        key = at / "sample" / "classifier"
        if any(KINDS[k].family == family for k in kinds_at("sample.classifier")):
            classifier = part(key, wanted, "sample.classifier", family)
        else:
            key.refuse(f"a classifier guides rows of one length, not the {family} of {kernel.name!r}: leave it out")
    if objective_ is not None:
        _check_inputs(at, graph, objective_, registry.component(objective_.contract.op).feeds)
    cls = registry.component(kernel.contract.op)
    found = _read_outputs(at / "outputs", graph, kernel, cls.parametrizations(kernel.config))
    if at.problems or schedule is None or objective_ is None or sampler is None or found is None:
        raise BlueprintError(at.problems)
    outputs, size = found
    return ProcessPlan(family, kernel, schedule, objective_, sampler, size + cls.extra_states, outputs, classifier)


def _family(registry: Registry, op: str) -> str | None:
    try:
        return KINDS[registry.contract(op).kind].family
    except SeddGraphError:
        return None  # reported with its place when the part is read


def _check_inputs(at: Location, graph: Graph, objective: Part, feeds: Iterable[Input]) -> None:
    """The graph takes no input that the objective does not feed, and every input that it requires."""
    known = {feed.name: feed for feed in feeds}
    for name, found in graph.root.inputs.items():
        if name not in known:
            told = "; ".join(f"{n}: {feed.type}" for n, feed in known.items())
            (at / "inputs" / name).refuse(f"objective {objective.name!r} feeds no input {name!r}; it feeds {told}")
        elif not _fits(found, known[name].type):
            (at / "inputs" / name).refuse(f"the process feeds {name!r} as {known[name].type}, not {found}")
    for feed in known.values():
        if feed.required and feed.name not in graph.root.inputs:
            message = (
                f"objective {objective.name!r} needs a graph with the input {feed.name}: {feed.type} ({feed.meaning})"
            )
            (at / "inputs").refuse(message)


def _fits(found: Any, wanted: str) -> bool:
    """Whether a port type is of the kind and the number of axes of ``wanted``."""
    declared = parse_port_type(wanted)
    return bool(found.kind == declared.kind and len(found.dims) == len(declared.dims))


def _read_outputs(
    at: Location, graph: Graph, kernel: Part, alternatives: tuple[tuple[Output, ...], ...]
) -> tuple[tuple[Output, ...], int] | None:
    """The kernel's outputs that the graph has, and the size of the last axis of the first."""
    names = set(graph.root.outputs)
    chosen = max(alternatives, key=lambda outputs: len(names & {o.name for o in outputs}))
    before = len(at.problems)
    if len(alternatives) > 1 and sum(bool(names & {o.name for o in outputs}) for outputs in alternatives) != 1:
        told = " or ".join(" and ".join(o.name for o in outputs) for outputs in alternatives)
        at.refuse(f"a graph with the kernel {kernel.name!r} has one output named {told}")
        return None
    for name in [n for n in graph.root.outputs if n not in {o.name for o in chosen}]:
        (at / name).refuse(f"nothing reads the output {name!r} under the kernel {kernel.name!r}: leave it out")
    size = None
    for output in chosen:
        if output.name not in names:
            at.refuse(f"the kernel {kernel.name!r} needs the output {output.name}: {output.type} ({output.meaning})")
            continue
        found = graph.root.output_types[output.name]
        last = found.dims[-1].size.constant if found.dims else None
        if not _fits(found, output.type):
            (at / output.name).refuse(f"must be {output.type}, not {found}")
        elif output is chosen[0]:
            size = last
            if size is None or size < 2:
                (at / output.name).refuse(f"must be {output.type} with two or more states v, not {found}")
        elif output.type.endswith(" v") and last != size:
            (at / output.name).refuse(f"must have the {size} states of {chosen[0].name}, not {last}")
    return None if len(at.problems) > before or size is None else (chosen, size)
