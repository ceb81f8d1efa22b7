"""The noise process that a blueprint declares: four components, resolved and configured (no torch)."""

from __future__ import annotations

import dataclasses

from sedd_graph.blueprint.load import Loaded
from sedd_graph.blueprint.schema import Blueprint, OpSpec
from sedd_graph.contract import ComponentConfig, Contract
from sedd_graph.errors import BlueprintError, Problem
from sedd_graph.graph.configure import configure, find_contract
from sedd_graph.graph.model import Graph
from sedd_graph.plugins import Registry

__all__ = ["FED", "Part", "ProcessPlan", "read_process"]

FED = {"tokens": "int b l", "sigma": "float b", "t": "float b", "attend": "bool b l"}
"""The graph inputs that the engine feeds: noised tokens, total noise, time, and which positions may be looked at."""

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
    problems: list[Problem] = []
    specs: dict[str, OpSpec | None] = {
        "process": blueprint.process,
        "objective": blueprint.objective,
        "sample": blueprint.sample,
    }
    given = [name for name, spec in specs.items() if spec is not None]
    if not given:
        return None
    for name in specs:
        if name not in given:
            problems.append(
                loaded.problem(
                    (given[0],), f"'{given[0]}' is given, but '{name}' is missing: all three belong together"
                )
            )
    for name, found in graph.root.inputs.items():
        if name not in FED:
            known = "; ".join(f"{n}: {t}" for n, t in FED.items())
            problems.append(loaded.problem(("inputs", name), f"the engine feeds no input {name!r}; it feeds {known}"))
        elif found.kind != FED[name].split()[0] or len(found.dims) != len(FED[name].split()) - 1:
            problems.append(loaded.problem(("inputs", name), f"the engine feeds {name!r} as {FED[name]}, not {found}"))
    outputs = [n for n in graph.root.outputs if n in OUTPUTS]
    states = 0
    if len(outputs) != 1:
        problems.append(
            loaded.problem(("outputs",), "a graph with a noise process has one output named log_score or log_x0")
        )
    else:
        found = graph.root.output_types[outputs[0]]
        size = found.dims[-1].size.constant if found.dims else None
        if found.kind != "float" or len(found.dims) != 3 or size is None or size < 2:
            problems.append(
                loaded.problem(("outputs", outputs[0]), f"must be float b l v with two or more states v, not {found}")
            )
        else:
            states = size
    if problems:
        raise BlueprintError(problems)

    def part(path: tuple[str, ...], spec: OpSpec, kind: str) -> Part | None:
        contract = find_contract(
            registry, spec.op, (kind,), lambda message: problems.append(loaded.problem((*path, "op"), message))
        )
        if contract is None:
            return None
        config = configure(
            contract,
            spec.config,
            graph.axes,
            base=path,
            locate=loaded.position,
            report=problems.append,
            refuse=lambda at, message: problems.append(loaded.problem(at, message)),
        )
        return None if config is None else Part(contract, config)

    assert blueprint.process is not None
    assert blueprint.objective is not None
    assert blueprint.sample is not None
    parts = [
        part(("process",), blueprint.process, "kernel"),
        part(("process", "schedule"), blueprint.process.schedule, "schedule"),
        part(("objective",), blueprint.objective, "objective"),
        part(("sample",), blueprint.sample, "sampler"),
    ]
    if problems:
        raise BlueprintError(problems)
    kernel, schedule, objective, sampler = (p for p in parts if p is not None)
    return ProcessPlan(kernel, schedule, objective, sampler, states, outputs[0])
