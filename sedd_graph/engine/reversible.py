"""Reversible execution: the backward pass reconstructs the inputs of each layer from its outputs by the derived inverse.

Each layer is one autograd function, with its inputs and parameters as inputs, so that autograd accumulates the gradients
of its parameters, and hooks (DDP, FSDP2) see them, before the layer below is reconstructed. The function of the last
layer saves its outputs, the first layer's inputs and the dropout key. The others save nothing: in the backward pass,
each layer hands its reconstructed inputs to the layer below (:class:`Pass`).

Each branch (such as the attention of a residual layer) is evaluated once in the backward pass, both for the
reconstruction and for its gradient. Dropout masks are a function of the key and therefore equal in both passes; the
autocast state of the forward pass is restored. If the reconstructed inputs of a layer are inaccurate
(:mod:`sedd_graph.engine.drift`), the inputs of this layer and of those below are computed again from the first layer's
inputs, before gradients are computed from them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sedd_graph.engine.drift import DriftGuard, checksum, checksum_error, drift_limit, relative_error
from sedd_graph.engine.host_number import reads
from sedd_graph.engine.layer_gradients import accumulated, propagate
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.errors import UserError

__all__ = ["Pass", "run_layer"]


@dataclasses.dataclass(eq=False)
class Pass:
    """One forward pass of reversible layers, and what its backward pass hands from layer to layer.

    Attributes:
        layout: Layout of each layer.
        layers: Modules of the layers.
        keys: Function that derives the dropout key of each layer from that of all layers, int32 [b].
        snapped: Function that rounds the inputs of the first layer for exact arithmetic; the identity otherwise.
        flows: For each layer, which of its graph values require a gradient.
        guard: Guard against inaccurate reconstruction.
        shared: Whether processes share the weights of the layers (FSDP).
        first: Index of the lowest layer that has a gradient.
        key: Dropout key of all layers, int32 [b]; None without dropout.
        inputs: Inputs of the layer ``first``.
    """

    layout: Layout
    layers: Sequence[nn.Module]
    keys: Callable[[Tensor], Sequence[Tensor]]
    snapped: Callable[[Sequence[Tensor]], list[Tensor]]
    flows: Sequence[Sequence[bool]]
    guard: DriftGuard
    shared: bool
    first: int
    key: Tensor | None
    inputs: Sequence[Tensor]

    def __post_init__(self) -> None:
        kind = self.inputs[0].device.type
        enabled = kind != "meta" and torch.is_autocast_enabled(kind)
        self._autocast = (kind, torch.get_autocast_dtype(kind) if enabled else None)
        self._keys: Sequence[Tensor] | None = None if self.key is None else self.keys(self.key)
        self._checksums: dict[int, list[Tensor]] = {}
        self._outputs: dict[str, Tensor] = {}
        self._computed: dict[int, list[Tensor]] = {}
        self._error: Tensor | None = None

    @property
    def threaded(self) -> list[str]:
        """Names of the conditioning inputs that a layer does not return as outputs."""
        return [name for name in self.layout.given if name not in self.layout.outputs]

    @property
    def returned(self) -> list[int]:
        """Graph-value indices of what a layer returns: its outputs, and the inputs :attr:`threaded`."""
        return [*self.layout.outputs.values(), *(self.layout.inputs[name] for name in self.threaded)]

    @property
    def last(self) -> int:
        """Index of the last layer."""
        return len(self.layers) - 1

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the autocast context of the forward pass, the same in both passes, so that branches compile once.

        Its cache of weights is off: a cached weight belongs to the autograd graph of one evaluation.
        """
        kind, dtype = self._autocast
        if kind == "meta":  # which has no autocast
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False)

    def layer(self, at: int) -> LayerRun:
        """Return the run of a layer, without tensors."""
        own = None if self._keys is None else self._keys[at]
        return LayerRun(self.layout, self.layers[at], own, self.flows[at])

    def saved(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what the last layer saves for backward, given its outputs, and retain none of it."""
        kept = [*self.inputs, *outputs, *([] if self.key is None else [self.key])]
        self.inputs, self.key, self._keys = (), None, None
        return kept

    # -- backward ---------------------------------------------------------------------------------------------------

    def begin(self, saved: Sequence[Tensor], keyed: bool) -> None:
        """Start a backward pass with the saved tensors."""
        tensors, key = (saved[:-1], saved[-1]) if keyed else (saved, None)
        count = len(self.layout.inputs)
        self.inputs, self.key = tensors[:count], key
        self._keys = None if key is None else self.keys(key)
        self._outputs = dict(zip(self.layout.outputs, tensors[count:], strict=True))
        self._computed, self._error = {}, None

    def reconstructed(self, at: int) -> LayerRun:
        """Return the run of a layer with its inputs, reconstructed or, after an inaccurate reconstruction, computed."""
        layout = self.layout
        if at not in self._computed:
            run = self.layer(at)
            for name, value in layout.outputs.items():
                run.values[value] = self._outputs[name]
            for name, x in zip(layout.inputs, self.inputs, strict=True):
                if name in layout.given:
                    run.values[layout.inputs[name]] = x
            run.invert()
            if self._accurate(at, [run.values[layout.inputs[name]] for name in layout.streams]):
                return run
            del run
            self._compute(at)
        run = self.layer(at)
        run.put(layout.inputs.values(), self._computed.pop(at))
        return run

    def finish(self, at: int, run: LayerRun) -> None:
        """Hand the inputs of a layer to the layer below."""
        self._outputs = {name: run.values[value] for name, value in self.layout.inputs.items()}
        if at == self.first:
            if self._error is not None:
                self.guard.put(self._error, drift_limit(self._autocast[1]), shared=self.shared)
            self.inputs, self.key, self._keys, self._outputs, self._error = (), None, None, {}, None

    def _originals(self) -> list[Tensor]:
        every = zip(self.layout.inputs, self.snapped(self.inputs), strict=True)
        return [x for name, x in every if name in self.layout.streams]

    def _accurate(self, at: int, streams: Sequence[Tensor]) -> bool:
        """Return whether the reconstructed inputs of a layer are accurate, as far as the host may know by now."""
        if streams[0].is_meta:
            return True
        if at == self.first:
            error = relative_error(streams, self._originals())
        else:
            error = checksum_error(streams, self._checksums[at], [self.guard.weights(x) for x in streams])
        if not reads(error.device):
            self._error = error if self._error is None else torch.maximum(self._error, error)
            return True
        limit = drift_limit(self._autocast[1])
        return not self.guard.exceeded(error, limit, estimated=at != self.first, shared=self.shared)

    def _compute(self, at: int) -> None:
        """Compute the inputs of the layers up to ``at`` from those of the first."""
        values = self.snapped(self.inputs)
        for number in range(self.first, at + 1):
            self._computed[number] = list(values)
            if number < at:
                run = self.layer(number)
                run.put(self.layout.inputs.values(), values)
                self.layers[number](None, evaluate=run.forward)  # within the hooks of the module
                made = {name: run.values[value] for name, value in self.layout.outputs.items()}
                values = [made.get(name, x) for name, x in zip(self.layout.inputs, values, strict=True)]

    # -- forward ----------------------------------------------------------------------------------------------------

    def watch(self, at: int, inputs: Sequence[Tensor]) -> None:
        """Save the checksums of a layer's inputs."""
        streams = [x for name, x in zip(self.layout.inputs, inputs, strict=True) if name in self.layout.streams]
        if at > self.first and not streams[0].is_meta:
            self._checksums[at] = [checksum(x, self.guard.weights(x)) for x in streams]


def run_layer(run: Pass, at: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Evaluate one layer of a pass.

    Args:
        run: The pass.
        at: Index of the layer.
        *inputs: Inputs of the layer, in order.

    Returns:
        The outputs; the inputs of :attr:`Pass.threaded`, for the layers above to read; the saved activations; and, in exact
        arithmetic, the largest magnitude of a value on the grid.

    Raises:
        UserError: The weights of a branch of the layer are sharded, without those of the layer.
    """
    parameters = [p for p in run.layers[at].parameters() if p.requires_grad]
    if any(hasattr(p, "device_mesh") for p in parameters):
        raise UserError(
            f"block {run.guard.label!r} is run reversibly, and the weights of a part of it are sharded by themselves: shard "
            "whole layers (Model.layers)"
        )
    made: tuple[Tensor, ...] = _Layer.apply(run, at, parameters, *inputs, *parameters)
    return made


def _parted(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors, each as an object of its own, as autograd functions must return them."""
    seen = {id(x) for x in others}
    for x in tensors:
        yield x.detach() if id(x) in seen else x
        seen.add(id(x))


class _Layer(torch.autograd.Function):
    """One layer of a :class:`Pass`: inputs and parameters in; outputs, conditioning inputs and saved activations out.

    Conditioning inputs are outputs too, for the layer above to read: their gradients then are summed layer by layer, in
    the order in which autograd sums them where activations are stored.
    """

    @staticmethod
    def forward(ctx: Any, run: Pass, at: int, parameters: list[nn.Parameter], *tensors: Tensor) -> tuple[Tensor, ...]:
        layout, flow = run.layout, run.flows[at]
        inputs = tensors[: len(layout.inputs)]
        run.watch(at, inputs)
        layer = run.layer(at)
        layer.put(layout.inputs.values(), inputs)
        with run.autocast():
            saved = layer.forward()
        outputs = layer.take(layout.outputs.values())
        threaded = [x for name, x in zip(layout.inputs, inputs, strict=True) if name in run.threaded]
        made = list(_parted([*outputs, *threaded], inputs))
        # saved activations may be changed by whoever gets them
        saved = [x.detach().clone() for x in saved]
        if layout.grid is not None:
            saved.append(layer.largest())
        ctx.mark_non_differentiable(*(x for x, v in zip(made, run.returned, strict=True) if not flow[v]), *saved)
        ctx.set_materialize_grads(False)
        ctx.run, ctx.at, ctx.parameters, ctx.keyed = run, at, parameters, run.key is not None
        if at == run.last:
            ctx.save_for_backward(*run.saved(made[: len(outputs)]))
        return (*made, *saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Any, ...]:
        run, at = ctx.run, ctx.at
        layout: Layout = run.layout
        if at == run.last:
            run.begin(ctx.saved_tensors, ctx.keyed)
        gradients: list[Tensor | None] = [None] * layout.count
        for value, gradient in zip(run.returned, arriving, strict=False):
            gradients[value] = accumulated(gradients[value], gradient)
        with run.autocast():
            layer = run.reconstructed(at)
            found = propagate(layer, gradients)
            run.finish(at, layer)
        entering = (gradients[value] for value in layout.inputs.values())
        return (None, None, None, *entering, *(found.get(p) for p in ctx.parameters))
