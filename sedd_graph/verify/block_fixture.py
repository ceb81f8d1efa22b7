"""A block by itself, made small: random weights, random inputs, and its inverse run on them.

It keeps its graph, its Configs and its widths; batch and length are shrunk. Axes: b rows, l length, n numbers of one
sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from sedd_graph.component.axes import PortType, Size
from sedd_graph.component.registry import Registry
from sedd_graph.engine.construct import build_block, count_parameters
from sedd_graph.engine.grid import Grid
from sedd_graph.engine.regions import RegionModule
from sedd_graph.engine.units import Layout, Values
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Region, Running
from sedd_graph.inverse import Contraction, Solve

__all__ = ["BATCH", "JACOBIAN", "LENGTH", "BlockFixture", "by_rows", "jacobian", "off"]

BATCH, LENGTH = 2, 6  # of the tiny instance
JACOBIAN = 1536
"""The largest Jacobian that is made, numbers a side."""


def _shape(found: PortType, batch: int, length: int) -> list[int]:
    return [d.size.evaluate({"batch": batch, "length": length}) for d in found.dims]


def by_rows(found: PortType) -> bool:
    """Whether the first axis is the batch, and no other is."""
    places = [i for i, d in enumerate(found.dims) if "batch" in d.size.symbols]
    return places == [0] and found.dims[0].size == Size.of("batch")


def off(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return max((float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs), default=0.0)


class BlockFixture:
    """One claimed block. Raises :class:`UserError` where it claims nothing, or has no inverse."""

    def __init__(self, region: Region, registry: Registry) -> None:
        if region.claim is None:
            raise UserError(f"block {region.label!r} claims no inverse: give it an 'invertible' key")
        self.region, self.registry = region, registry
        self.layout = Layout(region, region.claim.given)
        self.iterative = any(
            isinstance(d, Contraction) or (isinstance(d, Solve) and d.rule.iterative)
            for d in self.layout.program.derivations
        )
        with torch.device("meta"):
            self.weights = count_parameters(build_block(region, registry))
        self.chains = region.outputs.keys() <= region.inputs.keys() and all(
            found == region.inputs[name] for name, found in region.output_types.items()
        )
        """Whether its outputs can be fed to it again."""

    # -- instances --------------------------------------------------------------------------------------------------

    def layer(
        self,
        dtype: torch.dtype,
        seed: int = 0,
        *,
        repeat: int = 0,
        running: Running | None = None,
        moved: float = 1.0,
    ) -> RegionModule:
        """The block with random weights; gates and couplings that start at zero are ``moved`` off it, wide open at 1."""
        torch.manual_seed(seed)
        made = build_block(self.region, self.registry, repeat=repeat, running=running or Running())
        for parameter in made.parameters():
            size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.add_(torch.randn_like(parameter) * moved * size * (0.2 if parameter.any() else 1.0))
        return made.to(dtype).train()

    def inputs(self, dtype: torch.dtype, batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> list[Tensor]:
        """Random inputs in order; of a mask the last row's last position is hidden."""
        generator = torch.Generator().manual_seed(seed)

        def draw(found: PortType) -> Tensor:
            shape = _shape(found, batch, length)
            if found.kind == "float":
                return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if found.kind == "int":
                return torch.randint(0, 2, shape, generator=generator)
            shown = torch.ones(shape, dtype=torch.bool)
            if length > 1:
                shown[(-1,) * len(shape)] = False
            return shown

        return [draw(t) for t in self.region.inputs.values()]

    def copies(self, inputs: Sequence[Tensor], n: int) -> list[Tensor]:
        """``n`` copies of inputs of one row."""
        types = self.region.inputs.values()
        return [x.expand(n, *x.shape[1:]) if by_rows(t) else x for x, t in zip(inputs, types, strict=True)]

    def key(self, batch: int = BATCH) -> Tensor:
        """int32 [b]: with it, dropout is on."""
        return torch.arange(1, batch + 1, dtype=torch.int32) * 7919

    def started(self, layer: RegionModule, inputs: Sequence[Tensor]) -> RegionModule:
        """The layer once it has seen a batch: what starts from data (ActNorm) has started."""
        layer(None, *inputs)
        return layer

    def streams(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Those of ``inputs`` that are not given."""
        by_name = dict(zip(self.region.inputs, inputs, strict=True))
        return [by_name[name] for name in self.layout.streams]

    def short(self, types: Sequence[PortType]) -> tuple[int, int]:
        """The length of a sequence, and how many numbers of ``types`` are in it, that a Jacobian can be made of."""
        counts = [(l, sum(math.prod(_shape(t, 1, l)) for t in types)) for l in (4, 2, 1)]
        return next(((l, n) for l, n in counts if n <= JACOBIAN), counts[-1])

    def chain(self, dtype: torch.dtype, count: int, *, device: torch.device, moved: float = 1.0) -> list[RegionModule]:
        """``count`` different layers on ``device``, each started from what the one before puts out."""
        layers, now = [], self.inputs(dtype)
        for seed in range(count):
            layer = self.layer(dtype, seed, moved=moved)
            made = dict(zip(self.region.outputs, layer(None, *now), strict=False))
            if self.chains:
                now = [made.get(name, x) for name, x in zip(self.region.inputs, now, strict=True)]
            layers.append(layer.to(device))
        return layers

    # -- forward and back -------------------------------------------------------------------------------------------

    def fed(self, inputs: Sequence[Tensor]) -> Values:
        """The inputs, and all other values not known yet."""
        values: Values = [None] * self.layout.count
        for value, x in zip(self.layout.inputs.values(), inputs, strict=True):
            values[value] = x
        return values

    def filled(self, layer: RegionModule, key: Tensor | None, inputs: Sequence[Tensor]) -> Values:
        """All values, from the inputs."""
        values = self.fed(inputs)
        self.layout.forward(layer, key, values)
        return values

    def undone(
        self,
        layer: RegionModule,
        key: Tensor | None,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        layout: Layout | None = None,
    ) -> list[Tensor]:
        """The streams, rebuilt from outputs and those of ``inputs`` that are given."""
        layout = layout or self.layout
        values: Values = [None] * layout.count
        for name, x in zip(layout.inputs, inputs, strict=True):
            if name in layout.constants:
                values[layout.inputs[name]] = x
        for value, x in zip(layout.outputs.values(), outputs, strict=False):
            values[value] = x
        layout.undo(layer, key, values)
        return [values[layout.inputs[name]] for name in layout.streams]

    def rebuilt(
        self,
        layers: Sequence[RegionModule],
        depths: Collection[int],
        *,
        dtype: torch.dtype = torch.float32,
        grid: Grid | None = None,
    ) -> Iterator[tuple[int, float, bool]]:
        """Chains of the ``layers``, in turn, as deep as ``depths``: depth, error and equality of what the inverse gives back.

        Streams go in as ``dtype``. The error is relative; equality is to the last bit.
        """
        device = next((p.device for p in layers[0].parameters()), torch.device("cpu"))
        layout = self.layout if grid is None else Layout(self.region, self.layout.constants, grid)
        given = [x.to(device) for x in self.inputs(dtype)]
        if grid is not None:
            given = [grid.snap(x) if n in layout.streams else x for n, x in zip(layout.inputs, given, strict=True)]
        key, now = self.key().to(device), given
        states = []
        for at in range(max(depths)):
            values: Values = [None] * layout.count
            for value, x in zip(layout.inputs.values(), now, strict=True):
                values[value] = x
            layout.forward(layers[at % len(layers)], key + at, values)
            known = {name: values[v] for name, v in layout.outputs.items()}
            if grid is not None:
                grid.hold(list(known.values()), f"block {self.region.label!r}")
            states.append(now)
            now = [known.get(name, x) for name, x in zip(layout.inputs, now, strict=True)]
            if at + 1 not in depths:
                continue
            for below in reversed(range(at + 1)):
                outputs = [known[name] for name in layout.outputs]
                found = self.undone(layers[below % len(layers)], key + below, states[below], outputs, layout)
                known = dict(zip(layout.streams, found, strict=True))
            expected = self.streams(given)
            yield at + 1, off(found, expected), all(map(torch.equal, found, expected))


@torch.enable_grad()
def jacobian(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]], rows: Sequence[Tensor], at: Collection[int]
) -> Tensor:
    """The Jacobian [n, n] of one sequence, of which all n rows are copies: one backward pass with another number each."""
    leaves = [x.detach().clone().requires_grad_(i in at) for i, x in enumerate(rows)]
    outputs = torch.cat([o.flatten(1) for o in function(leaves)], dim=1)
    eye = torch.eye(len(outputs), dtype=outputs.dtype)
    if not outputs.requires_grad:
        return torch.zeros_like(eye)
    made = torch.autograd.grad(outputs, [leaves[i] for i in at], eye, materialize_grads=True)
    return torch.cat([g.flatten(1) for g in made], dim=1).double()
