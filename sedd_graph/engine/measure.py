"""Parameters, FLOPs and memory of a model, measured on the meta device, without allocating anything."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sedd_graph.component.axes import PortType
from sedd_graph.component.registry import Registry
from sedd_graph.engine.construct import build_shapes, count_parameters
from sedd_graph.engine.peak import PeakMemory
from sedd_graph.engine.split import outputs_of, split
from sedd_graph.engine.tail import tail_bytes
from sedd_graph.errors import SeddGraphError
from sedd_graph.graph.model import Graph

__all__ = ["ForwardCost", "Measure", "measure", "measure_forward"]

_DTYPES = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}


@dataclasses.dataclass(frozen=True)
class Measure:
    """Cost of one float32 training step.

    Attributes:
        parameters: Number of parameters.
        batch: Number of rows of the batch.
        length: Tokens per row.
    """

    parameters: int
    flops_per_token: int
    """FLOPs per token of one forward pass of the network (a multiply-add counts as two)."""
    saved_bytes: int
    """Bytes of the activations that autograd saves for the backward pass of the whole batch, and of the chunks of the loss."""
    chunk_bytes: int
    """Bytes of ``saved_bytes`` that do not grow with the batch once it is large: those of one chunk of head and loss."""
    state_bytes: int
    """Bytes of weights, gradients, AdamW's two moments and, if it is trained with one, the weight average (EMA)."""
    average_bytes: int
    """Bytes of ``state_bytes`` that are those of the weight average."""
    batch: int
    length: int
    passes: int = 3
    """Number of forward passes that cost as much as a training step: a backward pass counts as two."""

    def beside(self, *, follower: bool) -> Measure:
        """Return the cost where a frozen teacher is evaluated beside the network, and a follower trained if there is one.

        The follower has as many parameters, trained ones and activations as the network, and no weight average.
        """
        state, saved, passes = self.state_bytes + 4 * self.parameters, self.saved_bytes, self.passes + 1
        if follower:
            state, saved, passes = state + self.state_bytes - self.average_bytes, 2 * saved, passes + self.passes
        return dataclasses.replace(self, state_bytes=state, saved_bytes=saved, passes=passes)


@dataclasses.dataclass(frozen=True)
class ForwardCost:
    """Cost of one forward pass in float32, without gradients.

    Attributes:
        flops: FLOPs of the whole batch (a multiply-add counts as two).
        peak_bytes: Largest memory of inputs, outputs and intermediate tensors at one time, bytes; weights apart.
        output_bytes: Size of the outputs, bytes.
    """

    flops: int
    peak_bytes: int
    output_bytes: int


class _FusedAttention(TorchFunctionMode):
    """Dispatches attention to the fused kernel.

    Devices have kernels that never store the matrix of attention weights, [b, heads, l, l], but the meta device would
    take torch's reference implementation, which does.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention and not {*(kwargs or {})} - {"attn_mask", "is_causal", "scale"}:
            return _fused(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    bias = attn_mask
    if bias is not None:
        bias = bias.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    made: Tensor = fused(query, key, value, bias, query.requires_grad, 0.0, is_causal, scale=scale)[0]
    return made


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


def _inputs(graph: Graph, batch: int, length: int) -> dict[str, Tensor]:
    """Return inputs of the network without data, on the meta device."""
    return {
        name: torch.empty(_shape(found, batch, length), dtype=_DTYPES[found.kind], device="meta")
        for name, found in graph.root.inputs.items()
    }


@torch.no_grad()
def measure_forward(graph: Graph, registry: Registry, *, batch: int, length: int) -> ForwardCost:
    """Measure the cost of a forward pass by running the model on the meta device.

    Args:
        graph: The typed graph.
        registry: The installed components.
        batch: Number of rows of the batch.
        length: Tokens per row.
    """
    model = build_shapes(graph, registry)
    counter = _Flops()
    peak = PeakMemory([*model.parameters(), *model.buffers()])
    with _FusedAttention(), counter, peak:
        outputs, _ = model.run(_inputs(graph, batch, length))
    size = sum(value.numel() * value.element_size() for value in outputs.values())
    return ForwardCost(counter.total, peak.peak, size)


def measure(
    graph: Graph,
    registry: Registry,
    *,
    batch: int,
    length: int,
    averaged: bool = True,
    tail: bool = False,
    trained: tuple[int, int] | None = None,
) -> Measure:
    """Measure the cost of a training step by running the model on the meta device.

    Args:
        graph: The typed graph.
        registry: The installed components.
        batch: Number of rows of the batch.
        length: Tokens per row.
        averaged: Whether training averages the weights (EMA).
        tail: Whether the position-wise end of the network is evaluated at a few positions at a time
            (:mod:`sedd_graph.engine.tail`); without it, the memory of the loss is not counted.
        trained: Numbers of trained and of frozen parameters, of which these have no gradient, moments or average; None if
            all are trained.

    Raises:
        SeddGraphError: The shape of an output or saved activation of the network differs from its declared type.
    """
    model = build_shapes(graph, registry)
    inputs = _inputs(graph, batch, length)
    packed: list[weakref.ref[_Held]] = []

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        packed.append(weakref.ref(held))
        return held

    counter, end, chunk = _Flops(), 0, 0
    parts = split(graph, model) if tail else None
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor)
    with _FusedAttention(), counter:
        if parts is None:
            with hooks:
                outputs, activations = model.run(inputs)
        else:
            with hooks:
                made = parts.trunk(None, *[inputs[name] for name in model.input_names])
            values, saved_ones = made[: len(parts.layouts)], made[len(parts.layouts) :]
            end, chunk = tail_bytes(parts, values, batch * length)
            with torch.no_grad():
                outputs = outputs_of(parts, [model.root._modules[name] for name, _ in parts.steps], values)  # type: ignore[misc]
            activations = dict(zip(model.tap_names, saved_ones, strict=True))
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
    own_state, frozen = (parameters, 0) if trained is None else trained
    return Measure(
        parameters=parameters,
        flops_per_token=round(counter.total / (batch * length)),
        saved_bytes=sum(saved.values()) + end + chunk,
        chunk_bytes=chunk,
        state_bytes=4 * (own_state * (5 if averaged else 4) + frozen),
        average_bytes=4 * own_state if averaged else 0,
        batch=batch,
        length=length,
    )
