"""Execution modes of blocks in training: stored activations, activation checkpointing, reversible or exact execution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sedd_graph.component.counter_rng import fold
from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.drift import DriftGuard
from sedd_graph.engine.layer_gradients import gradient_flow
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.range_guard import RangeGuard
from sedd_graph.engine.regions import Plan, RegionModule
from sedd_graph.engine.reversible import Pass, run_layer
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Region, Running

__all__ = ["RunningModule", "make_running"]


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
    if not 0 <= running.stored < max(1, region.repeat):
        raise UserError(
            f"block {layer.label!r} has {max(1, region.repeat)} layers, of which {running.stored} cannot be the last"
        )
    made = RunningModule(children, plan, layer, layout, running.memory, repeat=region.repeat, stored=running.stored)
    for stored, _ in made.keyed_layers(None)[0 if running.memory == "store" else made.bound :]:
        if isinstance(stored, RegionModule):
            stored.share = running.share
    return made


class RunningModule(RegionModule):
    """Module of a block, or of a chain of ``repeat`` layers, with a memory mode. Built by :func:`make_running`.

    The last ``stored`` layers save all activations whatever the mode. Their backward pass comes first, so that these
    activations are freed before those of the other layers are computed again.

    Attributes:
        layout: Static description of one layer, with its derived inverse (:class:`~sedd_graph.engine.layout.Layout`);
            None if the block does not claim to be invertible.
        bound: Number of layers that are run in the memory mode; those after them store activations.
        guard: Guard against inaccurate reconstruction, which has the block checkpointed.
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
        stored: int = 0,
    ) -> None:
        super().__init__(children, plan, repeat=repeat)
        self.label, self.layout, self._memory = layer.label, layout, memory
        self.bound = max(1, repeat) - stored
        self.input_names, self.output_names = tuple(layer.inputs), tuple(layer.outputs)
        self.guard = DriftGuard(layer.label)
        self._flows: tuple[object, list[list[bool]]] = (None, [])
        self._range = RangeGuard(self.grid, layer.label)

    @property
    def memory(self) -> str:
        """Memory mode, by what is saved for backward.

        ``store`` (all activations), ``checkpoint`` (each layer's inputs) or ``reversible`` (the first layer's inputs and the
        last layer's outputs). A reversible block that fell back is checkpointed.
        """
        return self._memory if self.fallback is None else "checkpoint"

    @property
    def drift(self) -> float | None:
        """Relative error of the inputs that the last backward pass reconstructed; None before. May wait for a device."""
        return self.guard.drift

    @property
    def fallback(self) -> float | None:
        """Relative error above the tolerance, at which the block fell back to checkpointing; None if it did not."""
        return self.guard.fallback

    @property
    def grid(self) -> Grid | None:
        """Fixed-point grid for bit-exact inversion; None for ordinary floating point."""
        return None if self.layout is None else self.layout.grid

    def keyed_layers(self, key: Tensor | None) -> list[tuple[nn.Module, Tensor | None]]:
        """Return the module of each layer with the layer's dropout key, int32 [b], or None without dropout.

        A block that is not a chain is one layer.

        Args:
            key: Dropout key of each row b for the whole chain, int32 [b]; None turns dropout off.
        """
        if not self.repeat:
            return [(self, key)]
        return [(child, None if key is None else fold(key, at)) for at, child in enumerate(self.children())]

    def layers(self) -> Iterator[nn.Module]:
        """Yield the modules whose weights are used together, see :meth:`RegionModule.layers`.

        A block that is not a chain, and runs reversibly or in exact arithmetic, is one layer.
        """
        if self.repeat or self.layout is None or (self.memory != "reversible" and self.grid is None):
            yield from super().layers()
        else:
            yield self

    @property
    def custom_backward(self) -> bool:
        """Whether the module runs layer by layer and cannot be compiled with its surroundings."""
        return self.memory != "store" or self.grid is not None

    def branches(self) -> Iterator[nn.Module]:
        """Yield the modules to compile.

        In reversible execution or exact arithmetic: the nested blocks that each layer evaluates as a whole, and layers that
        store activations in ordinary arithmetic. Otherwise:
        the same modules as for any region, see :meth:`RegionModule.branches`.
        """
        if self.layout is None or (self.memory != "reversible" and self.grid is None):
            yield from super().branches()
            return
        for at, (layer, _) in enumerate(self.keyed_layers(None)):
            if at >= self.bound and self.grid is None:
                yield layer
                continue
            modules = [unit.module(layer) for unit in self.layout.units]
            yield from (module for module in modules if isinstance(module, RegionModule))

    def forward(
        self, key: Tensor | None, *inputs: Tensor, evaluate: Callable[..., tuple[Tensor, ...]] | None = None
    ) -> tuple[Tensor, ...]:
        """Evaluate the block with its memory mode.

        Args:
            key: Dropout key of each row, int32 [b]; None turns dropout off.
            *inputs: Input tensors in the order of the region's inputs.
            evaluate: Function of the inputs that is evaluated instead, see :meth:`RegionModule.forward`.

        Returns:
            The outputs, followed by the saved activations.
        """
        training = torch.is_grad_enabled()
        if evaluate is not None or (self.grid is None and (self.memory == "store" or not training)):
            return super().forward(key, *inputs, evaluate=evaluate)
        if training:
            self.guard.read_late()
        if self.layout is not None and self.memory == "reversible" and training:
            flows = self.gradient_flows([x.requires_grad for x in inputs])
            if any(map(any, flows)):
                return self._reversibly(self.layout, key, inputs, flows)
        return self._layer_by_layer(key, inputs, checkpointed=self.memory == "checkpoint" and training)

    def _reversibly(
        self, layout: Layout, key: Tensor | None, inputs: Sequence[Tensor], flows: Sequence[Sequence[bool]]
    ) -> tuple[Tensor, ...]:
        """Run the layers as autograd functions that reconstruct their inputs."""
        values = self.snapped(inputs)
        bound = self.bound
        first = next((at for at, flow in enumerate(flows[:bound]) if any(flow)), bound)
        layers = [layer for layer, _ in self.keyed_layers(None)][:bound]
        shared = any(hasattr(p, "device_mesh") for p in self.parameters())
        run = Pass(layout, layers, self._keys, self.snapped, flows, self.guard, shared, first, key, inputs)
        saved: list[Tensor] = []
        largest: list[Tensor] = []
        outputs: Sequence[Tensor] = ()
        count = len(self.output_names)
        for at, (layer, own) in enumerate(self.keyed_layers(key)):
            if at == first:
                run.inputs = inputs if at == 0 else values
            threaded: dict[str, Tensor] = {}
            if at < bound:
                made = self._hooked(layer, None, partial(run_layer, run, at), values)
                threaded = dict(zip(run.threaded, made[count:], strict=False))
            else:
                made = self._run_layer(layer, own, *values)
            outputs, others = made[:count], list(made[count + len(threaded) :])
            if self.grid is not None:
                largest.append(others.pop())
            saved += others
            values = [threaded.get(n, x) for n, x in zip(self.input_names, values, strict=True)]
            values = self.next_inputs(values, outputs)
        return (*self._range.checked(outputs, largest), *saved)

    def _keys(self, key: Tensor) -> list[Tensor]:
        """Return the dropout key of each layer from that of the chain."""
        return [own for _, own in self.keyed_layers(key) if own is not None][: self.bound]

    def _hooked(
        self,
        layer: nn.Module,
        key: Tensor | None,
        function: Callable[..., tuple[Tensor, ...]] | None,
        inputs: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Evaluate a layer, by ``function`` if given, within the hooks of its module, such as those of FSDP."""
        if self.repeat:
            made: tuple[Tensor, ...] = layer(key, *inputs, evaluate=function)
            return made
        return super().forward(key, *inputs, evaluate=function)  # within the hooks of this module

    def _layer_by_layer(
        self, key: Tensor | None, inputs: Sequence[Tensor], *, checkpointed: bool
    ) -> tuple[Tensor, ...]:
        """Run the layers in ordinary autograd, which saves all activations or only those of one layer at a time."""
        saved: list[Tensor] = []
        largest: list[Tensor] = []
        outputs: Sequence[Tensor] = ()
        values = self.snapped(inputs)
        for at, (layer, own) in enumerate(self.keyed_layers(key)):
            function = partial(self._run_layer, layer, own)
            if checkpointed and at < self.bound:
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
        return (*self._range.checked(outputs, largest), *saved)

    def _run_layer(self, layer: nn.Module, key: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        exact = self.layout is not None and self.grid is not None
        return self._hooked(layer, key, partial(self._run_exactly, layer, key) if exact else None, inputs)

    def _run_exactly(self, layer: nn.Module, key: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.layout is None:
            raise TypeError("a block without an inverse has no exact arithmetic")
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
            for layer, _ in self.keyed_layers(None):
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
