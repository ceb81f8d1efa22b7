"""Memory budget of a blueprint: measures its blocks, and chooses what each of their layers stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from sedd_graph.blueprint.schema import MemorySpec
from sedd_graph.engine.hardware import pick_dtype
from sedd_graph.engine.layer_cost import inputs_with_gradients, measure_layers
from sedd_graph.engine.measure import measure
from sedd_graph.engine.memory_plan import Option, choose, options
from sedd_graph.errors import UserError
from sedd_graph.families.table import process_class
from sedd_graph.graph.memory import free_steps, planned
from sedd_graph.graph.model import Graph, Region, Running, Step
from sedd_graph.runs.check import Report

__all__ = ["BudgetPlan", "budget_plan", "has_tail"]

SHARES = (1.0, 0.75, 0.375, 0.1)
"""Shares of their activations with which compiled layers are measured."""
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class BudgetPlan:
    """What :func:`budget_plan` chooses.

    Attributes:
        modes: Execution mode by the name of a node at the root of the graph.
        size: Memory of the activations of one backward pass, bytes.
    """

    modes: Mapping[str, Running]
    size: int


@dataclasses.dataclass(frozen=True)
class _Chain:
    """A node whose layers are chosen: its block, the number of its layers, and the choices for them."""

    step: Step
    layer: Region
    layers: int
    options: tuple[Option, ...]


def budget_plan(
    report: Report, *, device: torch.device, compiled: bool, say: Callable[[str], None], processes: int = 1
) -> BudgetPlan | None:
    """Choose the memory modes of blocks whose key ``memory`` is ``auto``, for the memory budget of a blueprint.

    The blocks are measured on the device. The budget is that of one backward pass of one process, of
    ``train.batch / (train.accumulate * processes)`` rows.

    Args:
        report: Result of checking the blueprint.
        device: Device of the training.
        compiled: Whether training runs compiled code.
        say: Function that prints a line for the user.
        processes: Number of processes of the training.

    Returns:
        The plan; None if the blueprint declares no budget.

    Raises:
        UserError: The budget cannot be met; the message tells the least one that can.
    """
    spec, process = report.loaded.blueprint.memory, process_class(report.plan.family)
    if spec is None or not process.trains:
        return None
    nodes = report.loaded.blueprint.nodes
    steps = free_steps(report.graph, [name for name, node in nodes.items() if node.memory not in (None, "auto")])
    batch = max(1, report.train.batch // (report.train.accumulate * processes))
    dtype = pick_dtype(report.train.dtype, device)
    needs = inputs_with_gradients(report.graph, report.registry, batch=1, length=report.data.length)
    compiled = compiled and process.compiles
    chains = [_chain(report, step, needs[step.name], batch, device, dtype, compiled=compiled) for step in steps]
    rest = _rest(report, chains, batch)
    chosen, fits = choose([chain.options for chain in chains], spec.size - rest)
    total = rest + sum(option.size for option in chosen)
    if not fits:
        raise UserError(_refusal(spec, total, rest))
    for line in _lines(chains, chosen, rest, spec):
        say(line)
    return BudgetPlan({c.step.name: option.running for c, option in zip(chains, chosen, strict=True)}, total)


def has_tail(report: Report) -> bool:
    """Return whether training evaluates the end of the network and the loss at a few positions at a time."""
    return report.distillation is None and process_class(report.plan.family).has_tail(report.plan, report.registry)


def _chain(
    report: Report,
    step: Step,
    needs: Mapping[str, bool],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> _Chain:
    body = step.body
    if not isinstance(body, Region):
        raise TypeError(f"{step.name} is not a block")
    inner = body.steps[0].body
    layer = inner if body.repeat and isinstance(inner, Region) else body
    exact = step.running.exact
    modes = [("store", share) for share in (SHARES if compiled and not exact else SHARES[:1])] + [("checkpoint", 1.0)]
    modes += [("reversible", 1.0)] if layer.claim is not None and step.running.memory == "reversible" else []
    costs = measure_layers(
        layer,
        report.registry,
        modes,
        needs=needs,
        chained=body.repeat > 0,
        exact=exact,
        batch=batch,
        length=report.data.length,
        device=device,
        dtype=dtype,
        compiled=compiled,
    )
    layers = max(1, body.repeat)
    return _Chain(step, layer, layers, tuple(options(costs, layers, exact=exact)))


def _rest(report: Report, chains: list[_Chain], batch: int) -> int:
    """Return the memory of the activations outside of the chosen blocks, bytes: what is saved without their layers."""
    tail = has_tail(report)

    def saved(graph: Graph) -> int:
        return measure(graph, report.registry, batch=batch, length=report.data.length, tail=tail).saved_bytes

    # checkpointed, a layer saves its inputs: those of the first layer and what differs from layer to layer
    modes = {c.step.name: Running("checkpoint", c.step.running.exact) for c in chains}
    own = sum(_inputs(c.layer, batch, report.data.length) * c.layers for c in chains)
    return max(0, saved(planned(report.graph, modes)) - own)


def _inputs(layer: Region, batch: int, length: int) -> int:
    """Return the size of those inputs of a layer that the layer before it computes, bytes."""
    sizes = {"batch": batch, "length": length}
    names = layer.outputs.keys() & layer.inputs.keys()
    total = 0
    for name in names:
        count = 1
        for dim in layer.inputs[name].dims:
            count *= dim.size.evaluate(sizes)
        total += 4 * count
    return total


def _refusal(spec: MemorySpec, least: int, rest: int) -> str:
    return (
        f"memory.budget: {spec.budget} cannot be met: the least is {_mib(least)}, of which {_mib(rest)} are outside of the blocks "
        "whose memory may be chosen (memory: auto). A larger train.accumulate takes fewer rows at a time"
    )


def _lines(chains: list[_Chain], chosen: tuple[Option, ...], rest: int, spec: MemorySpec) -> list[str]:
    """Return the plan as lines for the user."""
    total = rest + sum(option.size for option in chosen)
    every = rest + sum(chain.options[0].size for chain in chains)
    lines = [
        f"budget      {_mib(total)} of {spec.budget} for activations, where {_mib(every)} would store all; "
        f"{_mib(rest)} outside of "
        + ("these blocks:" if chains else "blocks. There is no block whose memory may be chosen")
    ]
    for chain, option in zip(chains, chosen, strict=True):
        running, parts = option.running, []
        count = chain.layers if running.memory == "store" else running.stored
        if count < chain.layers:
            how = "reconstructed" if running.memory == "reversible" else "recomputed from their inputs"
            parts.append(f"{chain.layers - count} of {chain.layers} layers {how}")
        if count:
            how = "stored" if running.share == 1 else f"stored to {running.share:.0%}, the rest recomputed"
            parts.append(f"{count} of {chain.layers} layers {how}")
        least = chain.options[0].seconds
        lines.append(
            f"            {chain.step.name}: {', '.join(parts)}; about {_mib(option.size)}, {1000 * option.seconds:.0f} ms per "
            f"pass ({option.seconds / least:.2f} x that of stored layers)"
        )
    return lines


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
