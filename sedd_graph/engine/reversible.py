"""Reversible execution and activation checkpointing of blocks.

In reversible execution the forward pass saves only the first layer's inputs, the last layer's outputs and the dropout
key, whatever the number of layers. The backward pass runs the derived inverse layer by layer. It evaluates each branch
(such as the attention of a residual layer) once, both for the reconstruction and for the gradient. Dropout masks are a
function of the key and therefore equal in both passes; the autocast state of the forward pass is restored.

The reconstructed inputs of the first layer are compared with the original ones. If their relative error exceeds the
tolerance (:func:`drift_limit`), the gradients of the same step are recomputed from the original inputs, and the block
is checkpointed from then on.

Parameters and conditioning inputs are explicit inputs of one autograd function, so that each of their gradients is
produced once, as DDP requires.
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
from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.layer_run import LayerRun, accumulated, gradient_flow
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.regions import Plan, RegionModule
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Region, Running

__all__ = ["DRIFT", "DriftWarning", "RunningModule", "make_running"]

DRIFT = 1e-3
"""Largest relative error of the reconstructed inputs before a block falls back to checkpointing (:func:`drift_limit`).

The error of an input is the larger of two: the Euclidean norm of the difference relative to the norm of the input, and
the largest magnitude of an element of the difference relative to the largest magnitude of an element of the input.
"""


class DriftWarning(UserWarning):
    """Warning: inputs reconstructed in the backward pass differ from the original inputs by more than the tolerance."""


def drift_limit(autocast: torch.dtype | None) -> float:
    """Return the largest relative error of reconstructed inputs at which a block is still run reversibly.

    It is the larger of :data:`DRIFT` (1e-3) and the machine epsilon of the autocast dtype, such as 2^-7 for bfloat16.

    Args:
        autocast: Autocast dtype of the forward pass; None without autocast.
    """
    return DRIFT if autocast is None else max(DRIFT, torch.finfo(autocast).eps)


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
        changed = [
            name for name in layout.given if layout.outputs.get(name, layout.inputs[name]) != layout.inputs[name]
        ]
        if changed and region.repeat and running.memory == "reversible":
            raise UserError(
                f"block {layer.label!r} cannot be run reversibly and repeated: its given input {changed[0]!r} differs from "
                f"layer to layer, since the output {changed[0]!r} replaces it. Take it out of 'given', or name the output "
                "otherwise"
            )
    elif running.memory == "reversible":
        raise UserError(f"block {layer.label!r} claims no inverse, so that it cannot be run reversibly")
    return RunningModule(children, plan, layer, layout, running.memory, repeat=region.repeat)


class RunningModule(RegionModule):
    """Module of a block, or of a chain of ``repeat`` layers, with a memory mode. Built by :func:`make_running`.

    Attributes:
        layout: Static description of one layer, with its derived inverse (:class:`~sedd_graph.engine.layout.Layout`);
            None if the block does not claim to be invertible.
        memory: Memory mode, by what is saved for backward: ``store`` (all activations), ``checkpoint`` (each layer's
            inputs) or ``reversible`` (the first layer's inputs and the last layer's outputs).
        drift: Relative error of the inputs that the last backward pass reconstructed; None before.
        fallback: Relative error above the tolerance, at which the block fell back to checkpointing; None if it did not.
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
        self.drift: float | None = None
        self.fallback: float | None = None
        self._flows: tuple[object, list[list[bool]]] = (None, [])
        self._largest: Tensor | None = None

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
        largest: list[Tensor] = []
        outputs: Sequence[Tensor] = ()
        values = self.snapped(inputs)
        for layer, own in self.layers(key):
            function = partial(self._run_layer, layer, own)
            if checkpointed:
                made = checkpoint(function, *values, use_reentrant=False, preserve_rng_state=False)
            else:
                made = function(*values)
            count = len(self.output_names)
            outputs = made[:count]
            if self.grid is not None:
                *made, found = made
                largest.append(found)
            saved += made[count:]
            values = self.next_inputs(values, outputs)
        return (*self.in_range(outputs, largest), *saved)

    def _run_layer(self, layer: nn.Module, key: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.layout is None or self.grid is None:
            made: tuple[Tensor, ...] = layer(key, *inputs) if self.repeat else super().forward(key, *inputs)
            return made
        run = LayerRun(self.layout, layer, key)
        run.put(self.layout.inputs.values(), inputs)
        saved = run.forward()
        return (*run.take(self.layout.outputs.values()), *saved, run.largest())

    def snapped(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs, rounded for exact arithmetic.

        In exact arithmetic each floating-point input that the inverse reconstructs is rounded to a multiple of the
        spacing of the grid (:attr:`grid`), float32. Other inputs, and all inputs in ordinary arithmetic, are unchanged.

        Args:
            inputs: Inputs of the block, in order.
        """
        if self.layout is None or self.grid is None:
            return list(inputs)
        streams = self.layout.streams
        snapped = [name in streams and x.is_floating_point() for name, x in zip(self.input_names, inputs, strict=True)]
        return [self.grid.snap(x) if snap else x for snap, x in zip(snapped, inputs, strict=True)]

    def in_range(self, outputs: Sequence[Tensor], largest: Sequence[Tensor]) -> list[Tensor]:
        """Verify that values stayed in the range in which exact arithmetic is exact (:attr:`Grid.limit`).

        In ordinary arithmetic nothing is verified. On a CPU, a value out of range raises an error at once. On another
        device that would require waiting for the device; instead all outputs become NaN, and the next call raises the
        error.

        Args:
            outputs: Outputs of the last layer.
            largest: For each layer, the largest magnitude of its values on the grid: scalar tensors, float32 [].

        Returns:
            The outputs; NaN if a value is out of range on a device other than a CPU.

        Raises:
            DivergedError: A value is out of range, in this call on a CPU, or in the previous call on another device.
        """
        if self.grid is None or outputs[0].is_meta:
            return list(outputs)
        before, self._largest = self._largest, None
        worst, where = torch.stack(list(largest)).max(), f"block {self.label!r}"
        if before is not None:
            self.grid.check_range([before], where)
        if worst.device.type == "cpu":
            self.grid.check_range([worst], where)
            return list(outputs)
        self._largest = worst
        return self.grid.spoilt(outputs, worst)

    def gradient_flows(self, needs: Sequence[bool]) -> list[list[bool]]:
        """Return for each layer which of its tensors require a gradient (:func:`gradient_flow`).

        Args:
            needs: For each input of the first layer, whether it requires a gradient.

        Returns:
            For each layer a list with one entry for each tensor that the layer receives or computes, in the numbering
            of :attr:`layout`. An empty list if the block does not claim to be invertible.
        """
        layout = self.layout
        if layout is None:
            return []
        state = (tuple(needs), tuple(p.requires_grad for p in self.parameters()))
        if self._flows[0] != state:
            flows: list[list[bool]] = []
            for layer, _ in self.layers(None):
                flows.append(gradient_flow(layout, layer, needs))
                made = {name: flows[-1][value] for name, value in layout.outputs.items()}
                needs = [made.get(name, need) for name, need in zip(layout.inputs, needs, strict=True)]
            self._flows = (state, flows)
        return self._flows[1]

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

    def within(self, drift: float, limit: float) -> bool:
        """Record the relative error ``drift`` of the reconstructed inputs and return whether it is at most ``limit``.

        If it is not, warn, and checkpoint the block from now on.
        """
        self.drift = drift
        if drift <= limit:
            return True
        self.memory, self.fallback = "checkpoint", drift
        warnings.warn(
            f"block {self.label!r}: inputs reconstructed in the backward pass are off by {drift:.1e} of their size "
            f"(tolerance {limit:g}); the gradients of this step are recomputed from the original inputs, and from now on "
            "the block is checkpointed. Fewer layers, 'arithmetic: exact' or float32 streams keep it reversible",
            DriftWarning,
            stacklevel=2,
        )
        return False

    def recomputed_gradients(
        self,
        key: Tensor | None,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        parameters: Sequence[nn.Parameter],
        arriving: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Return the gradients of the inputs and parameters, by evaluating the layers again with checkpointing.

        Args:
            key: Dropout key of the forward pass, int32 [b]; None without dropout.
            inputs: Original inputs of the first layer.
            needs: For each input, whether it requires a gradient.
            parameters: The trainable parameters.
            arriving: Gradients of the outputs; None for zero.
        """
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
            made = self._layer_by_layer(key, leaves, checkpointed=True)
            pairs = [(o, g) for o, g in zip(made, arriving, strict=False) if g is not None and o.requires_grad]
            wanted = [*(x for x in leaves if x.requires_grad), *parameters]
            outputs, gradients = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return [next(found) if need else None for need in needs] + list(found)


def _relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative error of the tensors, as :data:`DRIFT` defines it; inf where one is not finite.

    Integers and booleans must be equal: the error is inf where one is not.
    """
    errors = []
    for a, b in zip(found, expected, strict=True):
        if not b.is_floating_point():
            errors.append(torch.where((a == b).all(), 0.0, torch.inf))
        elif b.numel():
            wide = torch.promote_types(b.dtype, torch.float32)
            for order in (2, torch.inf):
                size = torch.linalg.vector_norm(b, order, dtype=wide).clamp(min=1e-30)
                errors.append((torch.linalg.vector_norm(a - b, order, dtype=wide) / size).float())
    return float(torch.stack(errors).nan_to_num(torch.inf).max()) if errors else 0.0


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
        ctx.needs = ctx.needs_input_grad[4 : 4 + len(layout.inputs)]
        ctx.flows = block.gradient_flows(ctx.needs)
        saved: list[Tensor] = []
        largest: list[Tensor] = []
        outputs: list[Tensor] = []
        for (layer, own), flow in zip(block.layers(key), ctx.flows, strict=True):
            run = LayerRun(layout, layer, own, flow)
            run.put(layout.inputs.values(), inputs)
            saved += run.forward()
            outputs = run.take(layout.outputs.values())
            if layout.grid is not None:
                largest.append(run.largest())
            inputs = block.next_inputs(inputs, outputs)
        outputs = block.in_range(outputs, largest)
        # autograd functions may not return an input as it is
        outputs = [o.clone() if any(o is t for t in tensors) else o for o in outputs]
        ctx.save_for_backward(*tensors[: len(layout.inputs)], *outputs, *([] if key is None else [key]))
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
        inputs, outputs = tensors[: len(layout.inputs)], tensors[len(layout.inputs) :]
        given = {name: x for name, x in zip(layout.inputs, inputs, strict=True) if name in layout.given}
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
                run = LayerRun(layout, layer, own, ctx.flows[at])
                gradients: list[Tensor | None] = [None] * layout.count
                for name, value in layout.outputs.items():
                    run.values[value] = known[name]
                    gradients[value] = accumulated(gradients[value], leaving.get(name))
                run.put(given_values, given.values())
                for value, gradient in zip(given_values, given_gradients, strict=True):
                    gradients[value] = accumulated(gradients[value], gradient)
                run.invert()
                for parameter, gradient in run.backward(gradients).items():
                    found[parameter] = accumulated(found.get(parameter), gradient)
                known = {name: run.values[layout.inputs[name]] for name in layout.streams} | given
                leaving = {name: gradients[layout.inputs[name]] for name in layout.streams}
                given_gradients = [gradients[value] for value in given_values]
            original = dict(zip(layout.inputs, ctx.block.snapped(inputs), strict=True))
            streams = [(known[name], original[name]) for name in layout.streams]
            if not ctx.block.within(_relative_error(*zip(*streams, strict=True)), drift_limit(ctx.autocast)):
                return (None,) * 4 + tuple(
                    ctx.block.recomputed_gradients(key, inputs, ctx.needs, ctx.parameters, arriving)
                )
        entering = leaving | dict(zip(layout.given, given_gradients, strict=True))
        return (None,) * 4 + (*(entering[name] for name in layout.inputs), *(found.get(p) for p in ctx.parameters))
