"""Counts taken on the meta device: parameters, FLOPs, bytes kept for backward. Nothing is allocated and nothing runs."""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sedd_graph.component.axes import PortType
from sedd_graph.component.registry import Registry
from sedd_graph.engine.construct import build_shapes, count_parameters
from sedd_graph.errors import SeddGraphError
from sedd_graph.graph.model import Graph

__all__ = ["Measure", "measure"]

_DTYPES = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}


@dataclasses.dataclass(frozen=True)
class Measure:
    """Sizes of one training step of ``batch`` rows of ``length`` tokens, in float32."""

    parameters: int
    flops_per_token: int
    """Of one forward pass (a multiplication and an addition count as two); a training step takes three times that."""
    saved_bytes: int
    """Kept from forward to backward."""
    state_bytes: int
    """Weights, gradients, AdamW's two moments, averaged weights."""
    batch: int
    length: int


class _Held:
    """A tensor saved for the backward pass; alive as long as a graph wants it (evaluations made in vain are not counted)."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def _shape(found: PortType, batch: int, length: int) -> list[int]:
    return [d.size.evaluate({"batch": batch, "length": length}) for d in found.dims]


def measure(graph: Graph, registry: Registry, *, batch: int, length: int) -> Measure:
    """Run the network's shapes. Raises :class:`SeddGraphError` where a component's output is not of the type it declares."""
    model = build_shapes(graph, registry)
    inputs = {
        name: torch.empty(_shape(found, batch, length), dtype=_DTYPES[found.kind], device="meta")
        for name, found in graph.root.inputs.items()
    }
    packed: list[weakref.ref[_Held]] = []

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        packed.append(weakref.ref(held))
        return held

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        outputs, taps = model.run(inputs)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = [held.tensor.untyped_storage() for ref in packed if (held := ref()) is not None]
    kept = {s._cdata: s.nbytes() for s in storages if s._cdata not in own}
    declared = dict(graph.root.output_types) | {path: found for path, _, found in graph.taps}
    for name, value in {**outputs, **taps}.items():
        shape = _shape(declared[name], batch, length)
        if list(value.shape) != shape:
            raise SeddGraphError(
                f"{name} is declared as {declared[name]}, so {shape}, but the component makes {list(value.shape)}"
            )
    parameters = count_parameters(model)
    return Measure(
        parameters=parameters,
        flops_per_token=round(counter.get_total_flops() / (batch * length)),
        saved_bytes=sum(kept.values()),
        state_bytes=parameters * 4 * 5,
        batch=batch,
        length=length,
    )
