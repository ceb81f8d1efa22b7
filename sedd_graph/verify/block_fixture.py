"""Small instance of one block, with random weights and inputs, on which its derived inverse is run.

The block keeps its graph, its Configs and its widths; batch and length are small. Axes: b rows, l length, n numbers of one
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
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.regions import RegionModule
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Region, Running
from sedd_graph.inverse import Contraction, Solve

__all__ = ["BATCH", "JACOBIAN", "LENGTH", "BlockFixture", "batch_first", "jacobian", "relative_error"]

BATCH, LENGTH = 2, 6
"""Rows, and positions of each, of the small instance."""
JACOBIAN = 1536
"""Largest Jacobian that is computed, numbers per side."""


def _shape(found: PortType, batch: int, length: int) -> list[int]:
    return [d.size.evaluate({"batch": batch, "length": length}) for d in found.dims]


def batch_first(found: PortType) -> bool:
    """Return whether the first axis is the batch, and no other depends on it."""
    places = [i for i, d in enumerate(found.dims) if "batch" in d.size.symbols]
    return places == [0] and found.dims[0].size == Size.of("batch")


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative error of any tensor, in the Euclidean norm."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return max((float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs), default=0.0)


class BlockFixture:
    """One block that claims an inverse. Raises :class:`UserError` where it claims none, or has none.

    Attributes:
        layout: Layout of the block.
        iterative: True if its inverse takes fixed-point iterations.
        weights: Number of its parameters.
        chains: True if its outputs can be its inputs, so that layers can be chained.
    """

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

    # -- instances --------------------------------------------------------------------------------------------------

    def layer(
        self,
        dtype: torch.dtype,
        seed: int = 0,
        *,
        repeat: int = 0,
        running: Running | None = None,
        spread: float = 1.0,
    ) -> RegionModule:
        """Return the block with random weights. Weights that start at zero get a deviation of about ``spread`` / 2."""
        torch.manual_seed(seed)
        made = build_block(self.region, self.registry, repeat=repeat, running=running or Running())
        for parameter in made.parameters():
            size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.add_(torch.randn_like(parameter) * spread * size * (0.2 if parameter.any() else 1.0))
        return made.to(dtype).train()

    def inputs(self, dtype: torch.dtype, batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> list[Tensor]:
        """Return random inputs in order. A mask hides the last position of the last row."""
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
        """Return ``n`` copies of inputs of one row."""
        types = self.region.inputs.values()
        return [x.expand(n, *x.shape[1:]) if batch_first(t) else x for x, t in zip(inputs, types, strict=True)]

    def key(self, batch: int = BATCH) -> Tensor:
        """Return a dropout key, int32 [b]."""
        return torch.arange(1, batch + 1, dtype=torch.int32) * 7919

    def initialised(self, layer: RegionModule, inputs: Sequence[Tensor]) -> RegionModule:
        """Return the layer after one batch, from which components such as ActNorm initialise themselves."""
        layer(None, *inputs)
        return layer

    def streams(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return those of ``inputs`` that are not given."""
        return [x for name, x in zip(self.region.inputs, inputs, strict=True) if name in self.layout.streams]

    def jacobian_size(self, types: Sequence[PortType]) -> tuple[int, int]:
        """Return the largest length of 4, 2 or 1 whose Jacobian can be computed, and its numbers per side."""
        counts = [(l, sum(math.prod(_shape(t, 1, l)) for t in types)) for l in (4, 2, 1)]
        return next(((l, n) for l, n in counts if n <= JACOBIAN), counts[-1])

    def chain(self, dtype: torch.dtype, count: int, *, device: torch.device, spread: float = 1.0) -> list[RegionModule]:
        """Return ``count`` different layers on ``device``, each initialised from the outputs of the one before."""
        layers, now = [], self.inputs(dtype)
        for seed in range(count):
            layer = self.layer(dtype, seed, spread=spread)
            made = dict(zip(self.region.outputs, layer(None, *now), strict=False))
            if self.chains:
                now = [made.get(name, x) for name, x in zip(self.region.inputs, now, strict=True)]
            layers.append(layer.to(device))
        return layers

    # -- forward and inverse ----------------------------------------------------------------------------------------

    def run(self, layer: RegionModule, key: Tensor | None, inputs: Sequence[Tensor]) -> LayerRun:
        """Return a run of the layer with its inputs set."""
        run = LayerRun(self.layout, layer, key)
        run.put(self.layout.inputs.values(), inputs)
        return run

    def reconstruct(
        self,
        layer: RegionModule,
        key: Tensor | None,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        layout: Layout | None = None,
    ) -> list[Tensor]:
        """Return the streams, reconstructed from ``outputs`` and those of ``inputs`` that are given."""
        layout = layout or self.layout
        run = LayerRun(layout, layer, key)
        for (name, value), x in zip(layout.inputs.items(), inputs, strict=True):
            if name in layout.given:
                run.values[value] = x
        run.put(layout.outputs.values(), outputs)
        run.invert()
        return run.take(layout.inputs[name] for name in layout.streams)

    def round_trips(
        self,
        layers: Sequence[RegionModule],
        depths: Collection[int],
        *,
        dtype: torch.dtype = torch.float32,
        grid: Grid | None = None,
    ) -> Iterator[tuple[int, float, bool]]:
        """Run chains of the ``layers``, used in turn, forward and back.

        Args:
            layers: Different layers.
            depths: Depths of the chains.
            dtype: Type of the inputs.
            grid: Grid of exact arithmetic, or None.

        Yields:
            Depth, relative error of the reconstructed inputs, and whether they are equal to the last bit.
        """
        device = next((p.device for p in layers[0].parameters()), torch.device("cpu"))
        layout = self.layout if grid is None else Layout(self.region, self.layout.given, grid)
        inputs = [x.to(device) for x in self.inputs(dtype)]
        if grid is not None:
            inputs = [grid.snap(x) if n in layout.streams else x for n, x in zip(layout.inputs, inputs, strict=True)]
        key, now = self.key().to(device), inputs
        states = []
        for at in range(max(depths)):
            run = LayerRun(layout, layers[at % len(layers)], key + at)
            run.put(layout.inputs.values(), now)
            run.forward()
            known = dict(zip(layout.outputs, run.take(layout.outputs.values()), strict=True))
            if grid is not None:
                grid.check_range(list(known.values()), f"block {self.region.label!r}")
            states.append(now)
            now = [known.get(name, x) for name, x in zip(layout.inputs, now, strict=True)]
            if at + 1 not in depths:
                continue
            for below in reversed(range(at + 1)):
                outputs = [known[name] for name in layout.outputs]
                found = self.reconstruct(layers[below % len(layers)], key + below, states[below], outputs, layout)
                known = dict(zip(layout.streams, found, strict=True))
            expected = self.streams(inputs)
            yield at + 1, relative_error(found, expected), all(map(torch.equal, found, expected))


@torch.enable_grad()
def jacobian(
    function: Callable[[Sequence[Tensor]], Sequence[Tensor]], rows: Sequence[Tensor], at: Collection[int]
) -> Tensor:
    """Return the Jacobian [n, n] of one sequence with respect to the inputs ``at``, float64.

    All n rows are copies of the sequence: one backward pass computes row i of the Jacobian from copy i.
    """
    leaves = [x.detach().clone().requires_grad_(i in at) for i, x in enumerate(rows)]
    outputs = torch.cat([o.flatten(1) for o in function(leaves)], dim=1)
    eye = torch.eye(len(outputs), dtype=outputs.dtype)
    if not outputs.requires_grad:
        return torch.zeros_like(eye)
    made = torch.autograd.grad(outputs, [leaves[i] for i in at], eye, materialize_grads=True)
    return torch.cat([g.flatten(1) for g in made], dim=1).double()
