"""Reversible execution and activation checkpointing of blocks.

In reversible execution the forward pass saves only the last layer's outputs, the conditioning inputs and the dropout
key. The backward pass runs the derived inverse layer by layer and reuses each branch evaluation for both the
reconstruction and its gradient. Parameters and conditioning inputs are explicit inputs of one autograd function, so
that each of their gradients is produced once, as DDP requires. Dropout masks are a function of the key and therefore
equal in both passes; the autocast state of the forward pass is restored. A checksum of the reconstructed inputs is
compared with that of the original inputs; a block whose error exceeds the tolerance is checkpointed from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sedd_graph.component.counter_rng import fold
from sedd_graph.engine.grid import Grid
from sedd_graph.engine.layer_run import LayerRun, accumulated, gradient_flow
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.regions import Plan, RegionModule
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Region, Running

__all__ = ["DRIFT", "DriftWarning", "RunningModule", "make_running"]

DRIFT = 1e-3
"""Tolerance of the inputs that the backward pass reconstructs; beyond it, a block falls back to checkpointing.

The error is the largest of two numbers for each reconstructed input, with n elements: the absolute change of its sum,
divided by sqrt(n times its sum of squares), and the relative change of its sum of squares.
"""


class DriftWarning(UserWarning):
    """Warning: inputs reconstructed in the backward pass differ from the original inputs by more than :data:`DRIFT`."""


def make_running(region: Region, children: Mapping[str, nn.Module], plan: Plan, running: Running) -> RunningModule:
    """Build the module of a block, or of a chain of one repeated block, with the declared memory mode and arithmetic.

    Args:
        region: The block, or the chain, whose steps are then the repeats of the block.
        children: Modules of the steps by name.
        plan: Execution plan of the region.
        running: Memory mode (``store``, ``checkpoint`` or ``reversible``) and arithmetic.

    Raises:
        UserError: The block cannot be run as ``running`` declares, such as reversibly without a claim to be invertible,
            or with exact arithmetic where its inverse rounds.
    """
    body = region.steps[0].body if region.repeat else region
    layer = body if isinstance(body, Region) else region
    layout = None
    if layer.claim is not None:
        given = set(layer.claim.given)
        if region.repeat:  # layer-invariant inputs
            given |= set(layer.inputs) - set(layer.outputs)
        layout = Layout(layer, [name for name in layer.inputs if name in given], Grid() if running.exact else None)
    elif running.memory == "reversible":
        raise UserError(f"block {layer.label!r} claims no inverse, so that it cannot be run reversibly")
    return RunningModule(children, plan, layer, layout, running.memory, repeat=region.repeat)


class RunningModule(RegionModule):
    """Module of a block, or of a chain of ``repeat`` layers, with a memory mode. Built by :func:`make_running`.

    Attributes:
        layout: Tensors, components and derived inverse of one layer; None if the block does not claim to be invertible
            and therefore has no inverse.
        memory: Memory mode, by what is saved for backward: ``store`` (all activations), ``checkpoint`` (each layer's
            inputs) or ``reversible`` (the last layer's outputs).
        drift: Relative error of the inputs that the last backward pass reconstructed (see :data:`DRIFT`), float64 [].
            The next forward pass compares it with the tolerance and resets it. None: no reconstruction since then.
    """

    def __init__(
        self,
        children: Mapping[str, nn.Module],
        plan: Plan,
        layer: Region,
        layout: Layout | None,
        memory: str,
        *,
        repeat: int,
    ) -> None:
        super().__init__(children, plan, repeat=repeat)
        self.label, self.layout, self.memory = layer.label, layout, memory
        self.input_names, self.output_names = tuple(layer.inputs), tuple(layer.outputs)
        self.drift: Tensor | None = None

    @property
    def grid(self) -> Grid | None:
        """Fixed-point grid for bit-exact inversion; None for ordinary floating point."""
        return None if self.layout is None else self.layout.grid

    def layers(self, key: Tensor | None) -> list[tuple[nn.Module, Tensor | None]]:
        """Return the module of each layer with the layer's dropout key, int32 [b], or None without dropout.

        A block that is not a chain is one layer.

        Args:
            key: Dropout key of each row b for the whole chain, int32 [b]; None turns dropout off.
        """
        if not self.repeat:
            return [(self, key)]
        return [(child, None if key is None else fold(key, at)) for at, child in enumerate(self.children())]

    @property
    def custom_backward(self) -> bool:
        """Whether the module runs layer by layer and cannot be compiled with its surroundings."""
        return self.memory != "store" or self.grid is not None

    def branches(self) -> Iterator[nn.Module]:
        """Yield the modules to compile.

        In reversible execution or exact arithmetic: the nested blocks that each layer evaluates as a whole. Otherwise:
        the same modules as for any region, see :meth:`RegionModule.branches`.
        """
        if self.layout is None or (self.memory != "reversible" and self.grid is None):
            yield from super().branches()
            return
        for layer, _ in self.layers(None):
            modules = [unit.module(layer) for unit in self.layout.units]
            yield from (module for module in modules if isinstance(module, RegionModule))

    def forward(self, key: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Evaluate the block with its memory mode.

        Args:
            key: Dropout key of each row, int32 [b]; None turns dropout off.
            *inputs: Input tensors in the order of the region's inputs.

        Returns:
            The outputs, followed by the saved activations.
        """
        self._check_drift()
        training = torch.is_grad_enabled()
        if self.grid is None and (self.memory == "store" or not training):
            return super().forward(key, *inputs)
        if self.layout is not None and self.memory == "reversible" and training:
            parameters = [p for p in self.parameters() if p.requires_grad]
            made: tuple[Tensor, ...] = _Reversible.apply(self, self.layout, key, parameters, *inputs, *parameters)
            return made
        return self._layer_by_layer(key, inputs, checkpointed=self.memory == "checkpoint" and training)

    def _layer_by_layer(
        self, key: Tensor | None, inputs: Sequence[Tensor], *, checkpointed: bool
    ) -> tuple[Tensor, ...]:
        """Run the layers in ordinary autograd, which saves all activations or only those of one layer at a time."""
        saved: list[Tensor] = []
        outputs: tuple[Tensor, ...] = ()
        values = self.snapped(inputs)
        for layer, own in self.layers(key):
            function = partial(self._run_layer, layer, own)
            if checkpointed:
                made = checkpoint(function, *values, use_reentrant=False, preserve_rng_state=False)
            else:
                made = function(*values)
            count = len(self.output_names)
            outputs = made[:count]
            saved += made[count:]
            values = self.next_inputs(values, outputs)
        if self.grid is not None:
            self.grid.check_range(outputs, f"block {self.label!r}")
        return (*outputs, *saved)

    def _run_layer(self, layer: nn.Module, key: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.layout is None or self.grid is None:
            made: tuple[Tensor, ...] = layer(key, *inputs) if self.repeat else super().forward(key, *inputs)
            return made
        run = LayerRun(self.layout, layer, key)
        run.put(self.layout.inputs.values(), inputs)
        saved = run.forward()
        return (*run.take(self.layout.outputs.values()), *saved)

    def snapped(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs in order; in exact arithmetic, round those that the inverse reconstructs to the grid."""
        if self.layout is None or self.grid is None:
            return list(inputs)
        streams = self.layout.streams
        return [self.grid.snap(x) if name in streams else x for name, x in zip(self.input_names, inputs, strict=True)]

    def next_inputs(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs of the next layer: each output of this layer replaces the input of the same name.

        A block that is not a chain has no next layer; its inputs are returned as they are.

        Args:
            inputs: Inputs of this layer, in order.
            outputs: Outputs of this layer, in order.
        """
        if not self.repeat:
            return list(inputs)
        new = dict(zip(self.output_names, outputs, strict=True))
        return [new.get(name, x) for name, x in zip(self.input_names, inputs, strict=True)]

    def _check_drift(self) -> None:
        """Check the drift of the last backward pass: in the next forward pass, its value is ready without waiting."""
        if self.drift is None:
            return
        drift, self.drift = float(self.drift), None
        if self.memory == "reversible" and not drift <= DRIFT:
            self.memory = "checkpoint"
            warnings.warn(
                f"block {self.label!r}: inputs reconstructed in the backward pass are off by {drift:.1e} of their size "
                f"(tolerance {DRIFT:g}); from now on it is checkpointed instead. Fewer layers, 'arithmetic: exact' or "
                "float32 streams keep it reversible",
                DriftWarning,
                stacklevel=2,
            )


def _checksum(streams: Sequence[Tensor]) -> Tensor:
    """Return sum, sum of squares and number of elements of each stream, float64 [streams, 3]."""
    double = torch.float64
    rows = [(x.sum(dtype=double), x.square().sum(dtype=double), x.new_tensor(x.numel(), dtype=double)) for x in streams]
    return torch.stack([torch.stack(row) for row in rows])


def _drift(before: Tensor, after: Tensor) -> Tensor:
    total, power, size = before.unbind(1)
    power = power.clamp(min=1e-30)
    shift = (after[:, 0] - total).abs() / (size * power).sqrt()
    growth = (after[:, 1] - power).abs() / power
    return torch.maximum(shift, growth).nan_to_num(torch.inf).max()


class _Reversible(torch.autograd.Function):
    """All layers of a :class:`RunningModule`: inputs and parameters in, outputs and saved activations out."""

    @staticmethod
    def forward(
        ctx: Any,
        block: RunningModule,
        layout: Layout,
        key: Tensor | None,
        parameters: list[nn.Parameter],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = block.snapped(tensors[: len(layout.inputs)])
        layers = block.layers(key)
        needs = ctx.needs_input_grad[4 : 4 + len(layout.inputs)]
        # the first layer's streams may need no gradient; those of later layers do
        later = [need or name in layout.streams for name, need in zip(layout.inputs, needs, strict=True)]
        ctx.flow = [gradient_flow(layout, layers[0][0], needs), gradient_flow(layout, layers[-1][0], later)]
        ctx.checksum = _checksum([x for name, x in zip(layout.inputs, inputs, strict=True) if name in layout.streams])
        saved: list[Tensor] = []
        outputs: list[Tensor] = []
        for at, (layer, own) in enumerate(layers):
            run = LayerRun(layout, layer, own, ctx.flow[at > 0])
            run.put(layout.inputs.values(), inputs)
            saved += run.forward()
            outputs = run.take(layout.outputs.values())
            inputs = block.next_inputs(inputs, outputs)
        if layout.grid is not None:
            layout.grid.check_range(outputs, f"block {block.label!r}")
        # autograd functions may not return an input as it is
        outputs = [o.clone() if any(o is t for t in tensors) else o for o in outputs]
        given = [x for name, x in zip(layout.inputs, inputs, strict=True) if name in layout.given]
        ctx.save_for_backward(*outputs, *given, *([] if key is None else [key]))
        ctx.block, ctx.layout, ctx.parameters, ctx.keyed = block, layout, parameters, key is not None
        kind = outputs[0].device.type
        plain = kind == "meta" or not torch.is_autocast_enabled(kind)
        ctx.autocast = None if plain else torch.get_autocast_dtype(kind)
        saved = [x.detach().clone() for x in saved]
        ctx.mark_non_differentiable(*saved)
        return (*outputs, *saved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        layout: Layout = ctx.layout
        tensors = list(ctx.saved_tensors)
        key = tensors.pop() if ctx.keyed else None
        outputs, given = tensors[: len(layout.outputs)], tensors[len(layout.outputs) :]
        given_values = [layout.inputs[name] for name in layout.given]
        # the outputs of the layer at hand and their gradients, by name; of the given inputs, the sum over layers so far
        known = dict(zip(layout.outputs, outputs, strict=True))
        leaving: dict[str, Tensor | None] = dict(zip(layout.outputs, arriving, strict=False))
        given_gradients: list[Tensor | None] = [None] * len(given)
        found: dict[nn.Parameter, Tensor | None] = {}
        autocast = torch.autocast(
            outputs[0].device.type, ctx.autocast, enabled=ctx.autocast is not None, cache_enabled=False
        )
        layers = ctx.block.layers(key)
        with autocast:
            for at in reversed(range(len(layers))):
                layer, own = layers[at]
                run = LayerRun(layout, layer, own, ctx.flow[at > 0])
                gradients: list[Tensor | None] = [None] * layout.count
                for name, value in layout.outputs.items():
                    run.values[value] = known[name]
                    gradients[value] = accumulated(gradients[value], leaving[name])
                run.put(given_values, given)
                for value, gradient in zip(given_values, given_gradients, strict=True):
                    gradients[value] = gradient
                run.invert()
                for parameter, gradient in run.backward(gradients).items():
                    found[parameter] = accumulated(found.get(parameter), gradient)
                known = {name: run.values[layout.inputs[name]] for name in layout.streams}
                leaving = {name: gradients[layout.inputs[name]] for name in layout.streams}
                given_gradients = [gradients[value] for value in given_values]
        ctx.block.drift = _drift(ctx.checksum, _checksum(list(known.values())))
        entering = leaving | dict(zip(layout.given, given_gradients, strict=True))
        return (None,) * 4 + (*(entering[name] for name in layout.inputs), *(found.get(p) for p in ctx.parameters))
