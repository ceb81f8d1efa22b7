"""The noise process that a blueprint declares: four components, resolved and configured (no torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.location import Location
from sedd_graph.blueprint.schema import Blueprint, OpSpec
from sedd_graph.component.contract import ComponentConfig, Contract
from sedd_graph.component.registry import Registry
from sedd_graph.errors import BlueprintError
from sedd_graph.graph.configure import configure, find_contract
from sedd_graph.graph.model import Graph

__all__ = ["FED", "Part", "ProcessPlan", "read_process"]

FED = {
    "tokens": "int b l",
    "sigma": "float b",
    "t": "float b",
    "attend": "bool b l",
    "clean": "int b l",
    "places": "int 2*l",
    "sees": "bool 2*l 2*l",
}
"""The graph inputs that the engine feeds: noised tokens, total noise, time, and which positions may be looked at; for blocks
clean tokens, where noised and clean ones stand in the row, and who may look at whom."""

FED_STRINGS = {name: FED[name] for name in ("tokens", "sigma", "attend")}
"""Those of a process that changes lengths: strings that begin with the start state, total noise, and what is no padding."""

OUTPUTS = ("log_score", "log_x0")
"""What a graph of a language model puts out: one of these."""
EDITS: tuple[dict[str, str], ...] = (
    {"log_insert": "float b l v", "log_delete": "float b l", "log_substitute": "float b l v"},
    {"log_x0": "float b l v", "log_gap": "float b l"},
)
"""What it puts out where lengths change: the first of a family, and what else the kernel cannot be undone without."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One process component under one Config."""

    contract: Contract
    config: ComponentConfig


@dataclasses.dataclass(frozen=True)
class ProcessPlan:
    """Kernel, schedule, objective and sampler, the number of states, and the graph's output that they read.

    Where lengths change that is the first of ``edits``, all the outputs that say how a string is edited; else there are none.
    Samples may be drawn towards what a ``classifier`` knows.
    """

    kernel: Part
    schedule: Part
    objective: Part
    sampler: Part
    states: int
    output: str
    edits: tuple[str, ...] = ()
    classifier: Part | None = None


def read_process(loaded: Loaded, graph: Graph, registry: Registry) -> ProcessPlan | None:
    """The declared process, or None for a blueprint that is only a graph. Raises :class:`BlueprintError`."""
    blueprint = loaded.blueprint
    assert isinstance(blueprint, Blueprint)
    process, objective, sample = blueprint.process, blueprint.objective, blueprint.sample
    at = Location(loaded, (), [])
    if process is None and objective is None and sample is None:
        return None
    specs = {"process": process, "objective": objective, "sample": sample}
    first = next(name for name, spec in specs.items() if spec is not None)
    for name, spec in specs.items():
        if spec is None:
            (at / first).refuse(f"'{first}' is given, but '{name}' is missing: all three belong together")
    edits = any(_says_edits(family, graph) for family in EDITS)
    _hold_inputs(at / "inputs", graph, FED_STRINGS if edits else FED)
    found = (_edit_states if edits else _states)(at / "outputs", graph)
    if at.problems or process is None or objective is None or sample is None or found is None:
        raise BlueprintError(at.problems)

    def part(spot: Location, spec: OpSpec, kind: str) -> Part | None:
        contract = find_contract(registry, spec.op, (kind,), spot / "op")
        config = None if contract is None else configure(contract, spec.config, graph.axes, spot)
        return None if contract is None or config is None else Part(contract, config)

    kind = "string_" if edits else ""
    kernel = part(at / "process", process, kind + "kernel")
    schedule = part(at / "process" / "schedule", process.schedule, "schedule")
    objective_ = part(at / "objective", objective, kind + "objective")
    sampler = part(at / "sample", sample, kind + "sampler")
    classifier, wanted = None, sample.classifier
    if wanted is not None and edits:
        (at / "sample" / "classifier").refuse(
            "a classifier guides text of one length, not text whose length changes: leave it out"
        )
    elif wanted is not None:
        classifier = part(at / "sample" / "classifier", wanted, "classifier")
    if at.problems or kernel is None or schedule is None or objective_ is None or sampler is None:
        raise BlueprintError(at.problems)
    output, states = found
    edited = [n for family in EDITS if output in family for n in family if n in graph.root.outputs] if edits else []
    return ProcessPlan(kernel, schedule, objective_, sampler, states, output, tuple(edited), classifier)


def _hold_inputs(at: Location, graph: Graph, fed: Mapping[str, str]) -> None:
    """The engine can only feed what it has."""
    for name, found in graph.root.inputs.items():
        if name not in fed:
            known = "; ".join(f"{n}: {t}" for n, t in fed.items())
            (at / name).refuse(f"the engine feeds no input {name!r}; it feeds {known}")
        elif found.kind != fed[name].split()[0] or len(found.dims) != len(fed[name].split()) - 1:
            (at / name).refuse(f"the engine feeds {name!r} as {fed[name]}, not {found}")


def _states(at: Location, graph: Graph) -> tuple[str, int] | None:
    """The output that the objective reads, and the number of states that its last axis gives."""
    outputs = [n for n in graph.root.outputs if n in OUTPUTS]
    if len(outputs) != 1:
        at.refuse("a graph with a noise process has one output named log_score or log_x0")
        return None
    found = graph.root.output_types[outputs[0]]
    size = found.dims[-1].size.constant if found.dims else None
    if found.kind != "float" or len(found.dims) != 3 or size is None or size < 2:
        (at / outputs[0]).refuse(f"must be float b l v with two or more states v, not {found}")
        return None
    return outputs[0], size


def _says_edits(family: Mapping[str, str], graph: Graph) -> bool:
    """Whether there is an output of ``family`` that only a process which changes lengths has."""
    return bool(set(graph.root.outputs) & set(family) - set(OUTPUTS))


def _edit_states(at: Location, graph: Graph) -> tuple[str, int] | None:
    """As :func:`_states` for a process that changes lengths: what the first output tells apart, and the start state."""
    if "attend" not in graph.root.inputs:
        at.refuse(
            "strings of different lengths are padded: take the input attend: bool b l, and give it to every attention"
        )
    family = next(f for f in EDITS if _says_edits(f, graph))
    first = next(iter(family))
    for name in graph.root.outputs:
        if name not in family:
            (at / name).refuse(f"a graph with {first} has no other outputs than {', '.join(family)}")
    tokens = None
    for name, wanted in family.items():
        found = graph.root.output_types.get(name)
        if found is None:
            if name == first:
                at.refuse(f"{first} is missing: no string is edited without it")
            continue
        size = found.dims[-1].size.constant if found.dims else None
        if found.kind != "float" or len(found.dims) != len(wanted.split()) - 1:
            (at / name).refuse(f"must be {wanted}, not {found}")
        elif name == first and (size is None or size < 2):
            (at / name).refuse(f"must be {wanted} with two or more data tokens v, not {found}")
        elif name == first:
            tokens = size
        elif wanted.endswith("v") and size != tokens:
            (at / name).refuse(f"must be of the data tokens that {first} has, {tokens}, not {size}")
    if at.problems or tokens is None:
        return None
    return first, tokens + 1
