"""Memory that training and sampling need, compared with what the device has before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from sedd_graph.engine.hardware import matmul_speed
from sedd_graph.engine.measure import ForwardCost, Measure, measure, measure_forward
from sedd_graph.engine.memory import MemoryLimit, memory_limit, resident_bytes
from sedd_graph.engine.samples import SampleRequest
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Graph, Region, Running, Step
from sedd_graph.runs.check import Report
from sedd_graph.runs.memory_plan import has_tail
from sedd_graph.runs.open import Run

__all__ = ["measure_text", "measure_training", "require_sampling_memory", "require_training_memory"]

Say = Callable[[str], None]
"""Function that prints a line for the user."""
FLAG = "--ignore-memory"
GIB = 2**30
SMALL = 2**14
"""Requests of up to this number of tokens times steps are not measured, so that they stay fast."""
LONG_S, LONG_BYTES = 60, 2**30
"""A request is announced from this estimated time on, seconds, or from this memory on, bytes."""


def measure_training(report: Report, processes: int = 1, activations: int | None = None) -> Measure:
    """Measure the memory and FLOPs of one forward and backward pass of training, on the meta device.

    The pass has ``train.batch / (train.accumulate * processes)`` rows. In distillation it includes the networks beside the
    student, on whole rows.

    Args:
        report: Result of checking the blueprint.
        processes: Number of processes that will train.
        activations: Bytes that are saved for the backward pass of the network, where a plan has chosen them.
    """
    return _measured(report, report.graph, processes, activations)


def _measured(report: Report, graph: Graph, processes: int = 1, activations: int | None = None) -> Measure:
    rows = max(1, report.train.batch // (report.train.accumulate * processes))
    averaged = report.train.ema is not None
    found = measure(
        graph,
        report.registry,
        batch=rows,
        length=report.data.length,
        averaged=averaged,
        tail=has_tail(report),
        trained=report.trained,
    )
    if activations is not None:
        found = dataclasses.replace(found, saved_bytes=activations)
    if report.distillation is None:
        return found
    return found.beside(follower=report.registry.component(report.distillation.contract.op).follows)


def measure_text(found: Measure, report: Report) -> str:
    """Return two lines for the user: compute and memory of training."""
    average = " and average" if report.train.ema is not None else ""
    return (
        f"compute     {found.flops_per_token:,} FLOPs per {report.plan.unit} forward, {found.passes * found.flops_per_token:,} in training\n"
        f"memory      about {_gib(found.state_bytes + found.saved_bytes)} to train in float32: {_gib(found.state_bytes)} for "
        f"weights, gradients, moments{average}, {_gib(found.saved_bytes)} saved for backward "
        f"({found.batch} rows of {found.length})"
    )


def require_training_memory(cost: Measure, report: Report, device: torch.device, *, ignore: bool, say: Say) -> None:
    """Compare the memory that training needs with what ``device`` has, before anything is allocated.

    Args:
        cost: Cost of a training step.
        report: Result of checking the blueprint.
        device: Device of the training.
        ignore: True to print a warning instead of raising an error.
        say: Function that prints a line for the user.

    Raises:
        UserError: Training does not fit; the message tells which settings would.
    """
    limit, used = memory_limit(device), resident_bytes(device)
    need = used + cost.state_bytes + cost.saved_bytes
    if limit is None or need <= limit.size:
        return
    fits = list(_what_fits(cost, report, limit.size - used))
    advice = (
        f"; {' or '.join(fits)} would fit" if fits else "; take a smaller model (params), or fewer tokens (data.length)"
    )
    _refuse("training", need, limit, advice, ignore=ignore, say=say)


def _refuse(what: str, need: int, limit: MemoryLimit, advice: str, *, ignore: bool, say: Say) -> None:
    text = f"{what} needs about {_gib(need)}, more than the {_gib(limit.size)} {limit.what}{advice}"
    if not ignore:
        raise UserError(f"{text}. {FLAG} goes on all the same")
    say(f"warning     {text}")


def _what_fits(cost: Measure, report: Report, room: int) -> Iterator[str]:
    """Yield the settings under which training fits into ``room`` bytes."""
    config = report.train
    rows, processes = _rows(cost, room), max(1, report.train.batch // (report.train.accumulate * cost.batch))
    accumulate = next(
        (
            n
            for n in range(config.accumulate + 1, config.batch + 1)
            if config.batch % (n * processes) == 0 and config.batch // (n * processes) <= rows
        ),
        None,
    )
    if accumulate is not None:
        yield f"train.accumulate={accumulate} ({config.batch // (accumulate * processes)} rows at a time, the same gradient)"
    if 0 < rows < cost.batch:
        yield f"train.batch={rows * config.accumulate * processes}"
    names = [s.name for s in report.graph.root.steps if isinstance(s.body, Region) and s.running.memory == "store"]
    if names and (rows := _rows(_measured(report, _checkpointed(report.graph)), room)) > 0:
        settings = " ".join(f"nodes.{name}.memory=checkpoint" for name in names)
        fewer = "" if rows >= cost.batch else f" with at most {rows} rows at a time"
        yield f"{settings} (activation checkpointing: one more forward pass){fewer}"


def _rows(cost: Measure, room: int) -> int:
    """Return how many rows of one backward pass fit into ``room`` bytes beside the weights."""
    fixed = cost.state_bytes + cost.chunk_bytes
    return max(0, (room - fixed) * cost.batch // max(1, cost.saved_bytes - cost.chunk_bytes))


def _checkpointed(graph: Graph) -> Graph:
    """Return ``graph`` with activation checkpointing for the blocks at its root that save all activations."""

    def changed(step: Step) -> Step:
        if not isinstance(step.body, Region) or step.running.memory != "store":
            return step
        return dataclasses.replace(step, running=Running("checkpoint", step.running.exact))

    root = dataclasses.replace(graph.root, steps=tuple(map(changed, graph.root.steps)))
    return dataclasses.replace(graph, root=root)


def require_sampling_memory(run: Run, request: SampleRequest, *, trajectory: bool, ignore: bool, say: Say) -> None:
    """Compare the memory that a sampling request needs with what the device has, before anything is allocated.

    If the request is estimated to take a minute or more, or 1 GiB or more, both estimates are printed. A request of at
    most :data:`SMALL` tokens times steps is not measured.

    Args:
        run: The opened run folder.
        request: The request.
        trajectory: Whether the tokens after every step are retained.
        ignore: True to print a warning instead of raising an error.
        say: Function that prints a line for the user.

    Raises:
        UserError: The request does not fit; the message suggests a number of rows that would fit, or other settings.
    """
    process, device = run.engine.process, run.engine.device
    length, steps = request.length or run.report.data.length, process.evaluations(request)
    if request.batch * length * (steps or 1) <= SMALL:
        return
    span, graph, registry = process.span(request), run.report.graph, run.report.registry
    cost = ForwardCost(0, 0, 0) if span is None else measure_forward(graph, registry, batch=request.batch, length=span)
    # tokens as int32 and confidences as bytes, in the memory of the CPU
    frames = 5 * (1 + (steps or 0)) * request.batch * length if trajectory else 0
    working = cost.peak_bytes + cost.output_bytes  # of the last step, which the sampler holds during a forward pass
    _announce(request, length, steps, cost, working + frames, device, say)
    limit, cpu = memory_limit(device), torch.device("cpu")
    need = resident_bytes(device) + working + (frames if device == cpu else 0)
    if limit is not None and need > limit.size:
        rows = max(0, limit.size - need + working) * request.batch // max(1, working)
        advice = (
            f"; --batch {rows} would fit" if 0 < rows < request.batch else "; take a smaller --length or fewer --steps"
        )
        _refuse("this request", need, limit, advice, ignore=ignore, say=say)
    limit = memory_limit(cpu)
    if frames and limit is not None and (need := resident_bytes(cpu) + frames) > limit.size:
        _refuse("the trajectory", need, limit, "; leave --trajectory out or take fewer --steps", ignore=ignore, say=say)


def _announce(
    request: SampleRequest,
    length: int,
    steps: int | None,
    cost: ForwardCost,
    size: int,
    device: torch.device,
    say: Say,
) -> None:
    """Print what the request takes, if that is long or large."""
    seconds = cost.flops * (steps or 1) / matmul_speed(device)
    if seconds < LONG_S and size < LONG_BYTES:
        return
    times = "" if steps is None else f" in {steps:,} steps"
    say(
        f"sampling    {request.batch:,} rows of up to {length:,} tokens{times}: at least {_duration(seconds)} on {device} "
        f"(by its speed of matrix products), about {_gib(size)}"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"
