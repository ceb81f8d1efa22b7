"""The noise process that a blueprint declares: four components, resolved and configured (no torch)."""

from __future__ import annotations

import dataclasses

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.schema import Blueprint, OpSpec
from sedd_graph.contract import ComponentConfig, Contract
from sedd_graph.errors import BlueprintError
from sedd_graph.graph.configure import configure, find_contract
from sedd_graph.graph.model import Graph
from sedd_graph.graph.spot import Spot
from sedd_graph.plugins import Registry

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

OUTPUTS = ("log_score", "log_x0")
"""What a graph of a language model puts out: one of these."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One process component under one Config."""

    contract: Contract
    config: ComponentConfig


@dataclasses.dataclass(frozen=True)
class ProcessPlan:
    """Kernel, schedule, objective and sampler, the number of states, and the graph's output that they read."""

    kernel: Part
    schedule: Part
    objective: Part
    sampler: Part
    states: int
    output: str


def read_process(loaded: Loaded, graph: Graph, registry: Registry) -> ProcessPlan | None:
    """The declared process, or None for a blueprint that is only a graph. Raises :class:`BlueprintError`."""
    blueprint = loaded.blueprint
    assert isinstance(blueprint, Blueprint)
    process, objective, sample = blueprint.process, blueprint.objective, blueprint.sample
    at = Spot(loaded, (), [])
    if process is None and objective is None and sample is None:
        return None
    specs = {"process": process, "objective": objective, "sample": sample}
    first = next(name for name, spec in specs.items() if spec is not None)
    for name, spec in specs.items():
        if spec is None:
            (at / first).refuse(f"'{first}' is given, but '{name}' is missing: all three belong together")
    _hold_inputs(at / "inputs", graph)
    found = _states(at / "outputs", graph)
    if at.problems or process is None or objective is None or sample is None or found is None:
        raise BlueprintError(at.problems)

    def part(spot: Spot, spec: OpSpec, kind: str) -> Part | None:
        contract = find_contract(registry, spec.op, (kind,), spot / "op")
        config = None if contract is None else configure(contract, spec.config, graph.axes, spot)
        return None if contract is None or config is None else Part(contract, config)

    kernel = part(at / "process", process, "kernel")
    schedule = part(at / "process" / "schedule", process.schedule, "schedule")
    objective_ = part(at / "objective", objective, "objective")
    sampler = part(at / "sample", sample, "sampler")
    if kernel is None or schedule is None or objective_ is None or sampler is None:
        raise BlueprintError(at.problems)
    output, states = found
    return ProcessPlan(kernel, schedule, objective_, sampler, states, output)


def _hold_inputs(at: Spot, graph: Graph) -> None:
    """The engine can only feed what it has."""
    for name, found in graph.root.inputs.items():
        if name not in FED:
            known = "; ".join(f"{n}: {t}" for n, t in FED.items())
            (at / name).refuse(f"the engine feeds no input {name!r}; it feeds {known}")
        elif found.kind != FED[name].split()[0] or len(found.dims) != len(FED[name].split()) - 1:
            (at / name).refuse(f"the engine feeds {name!r} as {FED[name]}, not {found}")


def _states(at: Spot, graph: Graph) -> tuple[str, int] | None:
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
