"""Parameters, FLOPs and bytes saved for backward of a model, measured on the meta device."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sedd_graph.component.axes import PortType
from sedd_graph.component.registry import Registry
from sedd_graph.engine.construct import build_shapes, count_parameters
from sedd_graph.errors import SeddGraphError
from sedd_graph.graph.model import Graph

__all__ = ["Measure", "measure"]

_DTYPES = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}


@dataclasses.dataclass(frozen=True)
class Measure:
    """Cost of one float32 training step.

    Attributes:
        parameters: Number of parameters.
        batch: Rows of the batch.
        length: Tokens per row.
    """

    parameters: int
    flops_per_token: int
    """FLOPs per token of one forward pass (a multiply-add counts as two). A training step takes three times as many."""
    saved_bytes: int
    """Bytes of the activations that autograd saves for the backward pass of the whole batch."""
    state_bytes: int
    """Bytes of weights, gradients, AdamW's two moments and the weight average (EMA)."""
    batch: int
    length: int


class _Held:
    """Tensor saved for backward, freed with the autograd graph that refers to it; freed tensors are not counted."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


class _Flops(TorchDispatchMode):
    """Mode that counts the FLOPs of all operations, by the formulas of ``torch.utils.flop_counter``.

    ``FlopCounterMode`` of that module also follows modules, by hooks in the autograd graph. They chain the nodes of all
    layers by references of Python, whose release overflows the stack at about 3,000 layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func.overloadpacket)
        if count is None:
            with self:
                parts = func.decompose(*args, **kwargs)  # of which each is dispatched
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=out)
        return out


def _shape(found: PortType, batch: int, length: int) -> list[int]:
    return [d.size.evaluate({"batch": batch, "length": length}) for d in found.dims]


def measure(graph: Graph, registry: Registry, *, batch: int, length: int) -> Measure:
    """Measure the cost of a training step by running the model on the meta device.

    Args:
        graph: The typed graph.
        registry: The installed components.
        batch: Rows of the batch.
        length: Tokens per row.

    Raises:
        SeddGraphError: The shape of a component's output differs from its declared type.
    """
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

    counter = _Flops()
    with counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        outputs, activations = model.run(inputs)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = [held.tensor.untyped_storage() for ref in packed if (held := ref()) is not None]
    saved = {s._cdata: s.nbytes() for s in storages if s._cdata not in own}
    declared = dict(graph.root.output_types) | {path: found for path, _, found in graph.taps}
    for name, value in {**outputs, **activations}.items():
        shape = _shape(declared[name], batch, length)
        if list(value.shape) != shape:
            raise SeddGraphError(
                f"{name} is declared as {declared[name]}, so {shape}, but the component returns {list(value.shape)}"
            )
    parameters = count_parameters(model)
    return Measure(
        parameters=parameters,
        flops_per_token=round(counter.total / (batch * length)),
        saved_bytes=sum(saved.values()),
        state_bytes=parameters * 4 * 5,
        batch=batch,
        length=length,
    )
