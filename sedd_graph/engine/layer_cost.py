"""Measured time and memory of one layer of a repeated block, by memory mode."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sedd_graph.component.axes import PortType
from sedd_graph.component.registry import Registry
from sedd_graph.engine.compiling import compile_in_place
from sedd_graph.engine.construct import build_block
from sedd_graph.engine.memory_plan import LayerCost
from sedd_graph.engine.regions import RegionModule
from sedd_graph.graph.model import Region, Running

__all__ = ["measure_layers", "retained"]

_DTYPES = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}
_ROUNDS = 5
"""Number of timed passes of each mode, in rotation; the shortest counts, which other programs disturb least."""
_LAYERS = 3
"""Number of layers of the chain that is measured."""


def measure_layers(
    layer: Region,
    registry: Registry,
    modes: Sequence[tuple[str, float]],
    *,
    chained: bool,
    exact: bool,
    batch: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
) -> Mapping[tuple[str, float], LayerCost]:
    """Measure forward and backward passes of a short chain of a block on a device.

    Args:
        layer: The block.
        registry: The installed components.
        modes: Memory modes to measure, each with the share of the activations that compiled code saves.
        chained: Whether the block is repeated; otherwise a single one is measured.
        exact: Whether the block has exact arithmetic.
        batch: Number of rows.
        length: Number of positions of a row.
        device: The device.
        dtype: Autocast dtype of training; float32 for none.
        compiled: Whether training runs compiled code.

    Returns:
        The cost of a layer by mode.
    """
    inputs = [_input(found, batch, length, device) for found in layer.inputs.values()]
    count = _LAYERS if chained else 1

    def chain(mode: tuple[str, float], repeat: int) -> Callable[[], list[Tensor]]:
        running = Running(mode[0], exact, mode[1])  # type: ignore[arg-type]  # one of the modes
        module = build_block(layer, registry, repeat=repeat if chained else 0, running=running).to(device).train()
        if compiled:
            for block in module.branches():
                compile_in_place(block, mode[1])
        return lambda: _forward(module, inputs, dtype)

    long = {mode: chain(mode, count) for mode in modes}
    seconds: dict[tuple[str, float], list[float]] = {mode: [] for mode in modes}
    for number in range(_ROUNDS + 2):
        for mode, forward in long.items():
            spent = _timed(forward, inputs)
            if number > 1:  # the first compile
                seconds[mode].append(spent)
    costs = {}
    for mode, forward in long.items():
        whole = retained(forward, device)
        one = retained(chain(mode, 1), device) if chained else whole
        size = (whole - one) // (count - 1) if chained else whole
        costs[mode] = LayerCost(min(seconds[mode]) / count, max(0, size), max(0, one - size))
    return costs


def _input(found: PortType, batch: int, length: int, device: torch.device) -> Tensor:
    shape = [d.size.evaluate({"batch": batch, "length": length}) for d in found.dims]
    if found.kind == "float":
        return torch.randn(shape, device=device, requires_grad=True)
    return torch.ones(shape, device=device, dtype=_DTYPES[found.kind])


def _forward(module: RegionModule, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    rows = next((len(x) for x in inputs if x.dim()), 1)
    key = torch.arange(rows, dtype=torch.int32, device=inputs[0].device) if module.keyed else None
    with torch.autocast(inputs[0].device.type, dtype, enabled=dtype is not torch.float32):
        made: tuple[Tensor, ...] = module(key, *[x.view_as(x) for x in inputs])
    return [x for x in made if x.requires_grad]


def _timed(forward: Callable[[], list[Tensor]], inputs: Sequence[Tensor]) -> float:
    """Return the seconds of a forward and backward pass."""
    _synchronize(inputs[0].device)
    began = time.perf_counter()
    outputs = forward()
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    _synchronize(inputs[0].device)
    for x in inputs:
        x.grad = None
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def retained(forward: Callable[[], object], device: torch.device) -> int:
    """Return the memory that a forward pass allocates and retains for its backward pass, by the allocator, bytes.

    Args:
        forward: Function whose result holds the autograd graph.
        device: Device of the tensors.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        held = forward()
        return torch.cuda.memory_allocated(device) - before if held is not None else 0
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        held = forward()
    events = found.profiler.kineto_results.events() if found.profiler is not None else []
    return sum(e.nbytes() for e in events if e.name() == "[memory]") if held is not None else 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context in which nothing is written to the standard error stream, to which the profiler's library reports."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
