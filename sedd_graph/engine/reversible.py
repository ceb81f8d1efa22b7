"""Running blocks without keeping their activations, and the other ways to run them.

``reversible``: the forward pass keeps the outputs of the last layer, the inputs that are given, and a key; the backward
pass walks the derived inverse layer by layer, and each branch evaluated on the way serves reconstruction and gradient
alike. Parameters and given inputs are explicit inputs of one autograd function, so their gradients arrive once (which is
what DDP counts on); randomness comes from the key, so dropout drops the same; autocast is as it was. A checksum of what
went in is compared with what was rebuilt, and where they drift apart the block is demoted to checkpointing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from sedd_graph.component.counter_rng import fold
from sedd_graph.engine.grid import Grid
from sedd_graph.engine.regions import Plan, RegionModule
from sedd_graph.engine.units import Layout
from sedd_graph.graph.model import Region, Running

__all__ = ["DriftWarning", "RunningModule", "make_running"]

DRIFT = 1e-3
"""The largest relative change of a stream's sum and power, over the square root of its size, that is let pass."""


class DriftWarning(UserWarning):
    """What a block rebuilt in the backward pass is not what went in."""


def make_running(
    region: Region, children: Mapping[str, nn.Module], plan: Plan, returned: tuple[int, ...], running: Running
) -> RunningModule:
    """The module of a step whose block is not simply run. Raises :class:`UserError` where it cannot be run so."""
    layer = region.steps[0].body if region.repeat else region
    assert isinstance(layer, Region)
    layout = None
    if layer.claim is not None:
        given = set(layer.claim.given)
        if region.repeat:  # what no layer changes is known to all of them
            given |= set(layer.inputs) - set(layer.outputs)
        constants = [name for name in layer.inputs if name in given]
        layout = Layout(layer, constants, Grid() if running.exact else None)
    return RunningModule(children, plan, returned, layer, region.repeat, layout, running)


class RunningModule(RegionModule):
    """A block, or a chain of ``repeat`` of them, with a choice of what is kept for the backward pass (``memory``)."""

    def __init__(
        self,
        children: Mapping[str, nn.Module],
        plan: Plan,
        returned: tuple[int, ...],
        layer: Region,
        repeat: int,
        layout: Layout | None,
        running: Running,
    ) -> None:
        super().__init__(children, plan, returned, repeat=repeat)
        self.label, self.ports = layer.label, (tuple(layer.inputs), tuple(layer.outputs))
        self.layout, self.memory = layout, running.memory
        self.grid = None if layout is None else layout.grid
        self.drift: Tensor | None = None
        """How far the last backward pass was off, where there was one."""

    def layers(self, key: Tensor | None) -> list[tuple[nn.Module, Tensor | None]]:
        """Each layer with its key."""
        if not self.repeat:
            return [(self, key)]
        return [(child, None if key is None else fold(key, at)) for at, child in enumerate(self._modules.values())]  # type: ignore[misc]

    @property
    def inseparable(self) -> bool:  # type: ignore[override]
        return self.memory != "store" or self.grid is not None

    def branches(self) -> Iterator[nn.Module]:
        """Whole layers, or where layers are rebuilt, the nested blocks that are evaluated as wholes."""
        if self.layout is None or (self.memory != "reversible" and self.grid is None):
            yield from super().branches()
            return
        for layer, _ in self.layers(None):
            modules = [unit.module(layer) for unit in self.layout.units]
            yield from (module for module in modules if isinstance(module, RegionModule))

    def forward(self, key: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        self._guard()
        training = torch.is_grad_enabled()
        if self.grid is None and (self.memory == "store" or not training):
            return super().forward(key, *inputs)
        if self.memory == "reversible" and training:
            assert self.layout is not None
            parameters = [p for p in self.parameters() if p.requires_grad]
            made: tuple[Tensor, ...] = _Rebuild.apply(self, key, parameters, *inputs, *parameters)
            return made
        return self._one_by_one(key, inputs, kept=self.memory != "checkpoint" or not training)

    def _one_by_one(self, key: Tensor | None, inputs: Sequence[Tensor], *, kept: bool) -> tuple[Tensor, ...]:
        """Layer by layer in ordinary autograd, with all activations ``kept`` or those of one layer at a time."""
        taps: list[Tensor] = []
        values = self._enter(list(inputs))
        for layer, own in self.layers(key):
            run = self._layer(layer, own)
            made = run(*values) if kept else checkpoint(run, *values, use_reentrant=False, preserve_rng_state=False)
            count = len(self.ports[1])
            outputs = made[:count]
            taps += made[count:]
            values = self._advanced(values, outputs)
        if self.grid is not None:
            self.grid.hold(list(outputs), f"block {self.label!r}")
        return (*outputs, *taps)

    def _layer(self, layer: nn.Module, key: Tensor | None) -> Any:
        layout = self.layout
        if layout is None or layout.grid is None:
            return lambda *values: layer(key, *values) if self.repeat else RegionModule.forward(self, key, *values)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            values = _values(layout, inputs)
            taps = layout.forward(layer, key, values)
            return (*(values[v] for v in layout.outputs.values()), *taps)

        return run

    def _enter(self, inputs: list[Tensor]) -> list[Tensor]:
        """Streams are put on the grid where there is one."""
        if self.grid is None or self.layout is None:
            return inputs
        streams = self.layout.streams
        return [self.grid.snap(x) if name in streams else x for name, x in zip(self.layout.inputs, inputs, strict=True)]

    def _advanced(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
        """The next layer's inputs: outputs take the place of the inputs of their name."""
        if not self.repeat:
            return list(inputs)
        new = dict(zip(self.ports[1], outputs, strict=True))
        return [new.get(name, x) for name, x in zip(self.ports[0], inputs, strict=True)]

    def _guard(self) -> None:
        """Look at the drift of the last backward pass (here, where its value has long been there)."""
        if self.drift is None:
            return
        drift, self.drift = float(self.drift), None
        if self.memory == "reversible" and not drift <= DRIFT:
            self.memory = "checkpoint"
            warnings.warn(
                f"block {self.label!r}: what was rebuilt in the backward pass is off by {drift:.1e} of its "
                f"size (at most {DRIFT:g} is let pass); from here on it is checkpointed instead. Fewer layers, "
                "'arithmetic: exact' or float32 streams keep it reversible",
                DriftWarning,
                stacklevel=2,
            )


def _values(layout: Layout, inputs: Sequence[Tensor]) -> list[Any]:
    values: list[Any] = [None] * layout.count
    for value, tensor in zip(layout.inputs.values(), inputs, strict=True):
        values[value] = tensor
    return values


def _checksum(streams: Sequence[Tensor]) -> Tensor:
    """float64 [streams, 3]: sum, power and size of each."""
    return torch.stack(
        [
            torch.stack([x.sum(dtype=torch.float64), x.square().sum(dtype=torch.float64), x.new_tensor(x.numel(), dtype=torch.float64)])
            for x in streams
        ]
    )  # fmt: skip


def _drift(before: Tensor, after: Tensor) -> Tensor:
    total, power, size = before.unbind(1)
    power = power.clamp(min=1e-30)
    shift = (after[:, 0] - total).abs() / (size * power).sqrt()
    growth = (after[:, 1] - power).abs() / power
    return torch.maximum(shift, growth).nan_to_num(torch.inf).max()


class _Rebuild(torch.autograd.Function):
    """All layers of a :class:`RunningModule` at once: inputs and parameters in, outputs and taps out."""

    @staticmethod
    def forward(
        ctx: Any, run: RunningModule, key: Tensor | None, parameters: list[nn.Parameter], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        layout = run.layout
        assert layout is not None
        inputs = run._enter(list(tensors[: len(layout.inputs)]))
        layers = run.layers(key)
        needs = ctx.needs_input_grad[3 : 3 + len(layout.inputs)]
        # the first layer's streams may need no gradient; the next ones' do
        ctx.wanted = [
            layout.wanted(layers[0][0], needs),
            layout.wanted(layers[-1][0], [need or n in layout.streams for n, need in zip(layout.inputs, needs, strict=True)]),
        ]  # fmt: skip
        stream_of = {name: x for name, x in zip(layout.inputs, inputs, strict=True) if name in layout.streams}
        ctx.checksum = _checksum(list(stream_of.values()))
        taps: list[Tensor] = []
        for at, (layer, own) in enumerate(layers):
            values = _values(layout, inputs)
            taps += layout.forward(layer, own, values, ctx.wanted[at > 0])
            outputs = [values[v] for v in layout.outputs.values()]
            inputs = run._advanced(inputs, outputs)
        if layout.grid is not None:
            layout.grid.hold(outputs, f"block {run.label!r}")
        # a tensor that came in may not go out as it is
        outputs = [o.clone() if any(o is t for t in tensors) else o for o in outputs]
        constants = [x for name, x in zip(layout.inputs, inputs, strict=True) if name in layout.constants]
        ctx.save_for_backward(*outputs, *constants, *([] if key is None else [key]))
        ctx.run, ctx.parameters, ctx.keyed = run, parameters, key is not None
        kind = outputs[0].device.type
        plain = kind == "meta" or not torch.is_autocast_enabled(kind)
        ctx.autocast = None if plain else torch.get_autocast_dtype(kind)
        taps = [tap.detach().clone() for tap in taps]
        ctx.mark_non_differentiable(*taps)
        return (*outputs, *taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arriving: Tensor) -> tuple[Any, ...]:
        run: RunningModule = ctx.run
        layout = run.layout
        assert layout is not None
        saved = list(ctx.saved_tensors)
        key = saved.pop() if ctx.keyed else None
        outputs, constants = saved[: len(layout.outputs)], dict(zip(layout.constants, saved[len(layout.outputs) :], strict=True))  # fmt: skip
        # once per step, whatever other branches of the graph are doing: the values of the layer above, and its gradients
        known = dict(zip(layout.outputs, outputs, strict=True))
        leaving: dict[str, Any] = dict(zip(layout.outputs, arriving, strict=False))
        given: dict[str, Any] = dict.fromkeys(layout.constants)
        found: dict[nn.Parameter, Tensor] = {}
        layers = run.layers(key)
        with torch.autocast(
            outputs[0].device.type, ctx.autocast, enabled=ctx.autocast is not None, cache_enabled=False
        ):
            for at in reversed(range(len(layers))):
                layer, own = layers[at]
                wanted = ctx.wanted[at > 0]
                values: list[Any] = [None] * layout.count
                gradients: list[Any] = [None] * layout.count
                for name, value in layout.outputs.items():
                    values[value] = known[name]
                    if leaving[name] is not None:
                        held = gradients[value]
                        gradients[value] = leaving[name] if held is None else held + leaving[name]
                for name, tensor in constants.items():
                    values[layout.inputs[name]] = tensor
                    gradients[layout.inputs[name]] = given[name]  # goes on where the layer above left off
                tapes = layout.undo(layer, own, values, wanted)
                for parameter, gradient in layout.backward(layer, own, values, tapes, gradients, wanted).items():
                    held = found.get(parameter)
                    found[parameter] = gradient if held is None else held + gradient
                known = {name: values[layout.inputs[name]] for name in layout.streams}
                leaving = {name: gradients[layout.inputs[name]] for name in layout.streams}
                given = {name: gradients[layout.inputs[name]] for name in layout.constants}
        run.drift = _drift(ctx.checksum, _checksum(list(known.values())))
        entering = [given[name] if name in given else leaving[name] for name in layout.inputs]
        return (None, None, None, *entering, *(found.get(p) for p in ctx.parameters))
