"""Test instances of one invertible block, with random weights and inputs, for verification of the derived inverse.

An instance has the graph, Configs and widths of the declared block; only batch size and length are small.

Axes: b rows, l length, n elements of one sequence (all tensors of one row, flattened and concatenated).
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
"""Number of rows, and number of positions per row, of a test instance."""
JACOBIAN = 1536
"""Largest number of rows (and columns) of a Jacobian that is computed."""


def _shape(found: PortType, batch: int, length: int) -> list[int]:
    return [d.size.evaluate({"batch": batch, "length": length}) for d in found.dims]


def batch_first(found: PortType) -> bool:
    """Return True if the first axis of a port type is the batch, and the size of no other axis depends on the batch."""
    places = [i for i, d in enumerate(found.dims) if "batch" in d.size.symbols]
    return places == [0] and found.dims[0].size == Size.of("batch")


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative error max_i norm(found_i - expected_i) / norm(expected_i), in the Euclidean norm.

    Args:
        found: The tensors to compare, of any shapes.
        expected: The reference tensors, of the same number and shapes.

    Returns:
        The error of the worst tensor; 0 if there are no tensors.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return max((float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs), default=0.0)


class BlockFixture:
    """Factory of test instances of one invertible block, which also runs and inverts them.

    Inputs of a block are of two sorts: *given* inputs, which are known at inversion, such as conditioning; and
    *streams*, which the inverse reconstructs.

    Args:
        region: The block.
        registry: The installed components, from which the block is built.

    Attributes:
        layout: Graph values and derived inverse of the block (:class:`~sedd_graph.engine.layout.Layout`).
        iterative: True if the inverse has a fixed-point iteration or another iterative rule.
        weights: Number of parameters of the block.
        chains: True if each output has the name and type of an input, so that copies of the block can be stacked.

    Raises:
        UserError: The block has no key ``invertible``, or no inverse can be derived.
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
        """Return an instance of the block with random weights, in training mode.

        Args:
            dtype: Data type of the weights.
            seed: Seed of the weights.
            repeat: Number of copies of the block that are stacked in one module; 0 for the block itself.
            running: Memory mode in training, such as ``Running("reversible")``; None stores all activations.
            spread: Factor on the random noise that is added to all initial weights, zeros included.
        """
        torch.manual_seed(seed)
        made = build_block(self.region, self.registry, repeat=repeat, running=running or Running())
        for parameter in made.parameters():
            size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.add_(torch.randn_like(parameter) * spread * size * (0.2 if parameter.any() else 1.0))
        return made.to(dtype).train()

    def inputs(self, dtype: torch.dtype, batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> list[Tensor]:
        """Return random inputs of the block, in the order of its ports.

        Args:
            dtype: Data type of float inputs, which are standard normal. Integer inputs are 0 or 1.
            batch: Number of rows.
            length: Number of positions. If it exceeds 1, boolean inputs are False at the last position of the last row.
            seed: Seed of the inputs.
        """
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
        """Return the inputs of one row expanded to ``n`` equal rows; inputs without a batch axis are unchanged."""
        types = self.region.inputs.values()
        return [x.expand(n, *x.shape[1:]) if batch_first(t) else x for x, t in zip(inputs, types, strict=True)]

    def key(self, batch: int = BATCH) -> Tensor:
        """Return a dropout key (the seed of each row), int32 [``batch``]."""
        return torch.arange(1, batch + 1, dtype=torch.int32) * 7919

    def initialised(self, layer: RegionModule, inputs: Sequence[Tensor]) -> RegionModule:
        """Return the layer after one forward pass, which initialises data-dependent components such as ActNorm."""
        layer(None, *inputs)
        return layer

    def streams(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the streams among ``inputs``, which are all inputs of the block in the order of its ports."""
        return [x for name, x in zip(self.region.inputs, inputs, strict=True) if name in self.layout.streams]

    def jacobian_size(self, types: Sequence[PortType]) -> tuple[int, int]:
        """Return the largest sequence length, out of 4, 2 and 1, whose Jacobian has at most :data:`JACOBIAN` rows.

        Args:
            types: Port types of the tensors whose elements, flattened and concatenated, are the rows of the Jacobian.

        Returns:
            The length, and the number of rows of the Jacobian. If even length 1 has too many rows, length 1 and that
            number, which exceeds :data:`JACOBIAN`.
        """
        counts = [(l, sum(math.prod(_shape(t, 1, l)) for t in types)) for l in (4, 2, 1)]
        return next(((l, n) for l, n in counts if n <= JACOBIAN), counts[-1])

    def chain(self, dtype: torch.dtype, count: int, *, device: torch.device, spread: float = 1.0) -> list[RegionModule]:
        """Return layers with different random weights, each initialised on the outputs of the previous one.

        Args:
            dtype: Data type of the weights.
            count: Number of layers.
            device: Device that the layers are moved to.
            spread: Factor on the random noise that is added to the weights, as for :meth:`layer`.
        """
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
        """Return a :class:`~sedd_graph.engine.layer_run.LayerRun` of a layer, with its inputs set, not yet evaluated.

        Args:
            layer: The layer.
            key: Dropout key, int32 [b]; None without dropout.
            inputs: All inputs of the block, in the order of its ports.
        """
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
        """Run the derived inverse of a layer and return the reconstructed streams.

        Args:
            layer: The layer.
            key: Dropout key of the forward pass, int32 [b]; None without dropout.
            inputs: All inputs of the block, in the order of its ports. Only the given ones are read, not the streams.
            outputs: Outputs of the forward pass.
            layout: Layout whose inverse is run, such as one with a fixed-point grid; None for :attr:`layout`.
        """
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
        """Run stacks of layers forward, and reconstruct their inputs by the derived inverse.

        Args:
            layers: Layers to stack. A stack with more layers than given repeats the given ones in order.
            depths: Numbers of layers of the stacks to run.
            dtype: Data type of the inputs.
            grid: Fixed-point grid for bit-exact inversion (:class:`Grid`); None for ordinary floating point.

        Yields:
            The depth, the relative error of the reconstructed inputs, and True if the reconstruction is bit-exact.
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
    """Return the Jacobian of a function of one sequence, float64 [n, n], computed with a single backward pass.

    Row i of the Jacobian is the gradient of output element i in the i-th of n equal copies of the sequence.

    Args:
        function: Maps inputs [n, ...] to outputs [n, ...] with n elements per row, independently for each row.
        rows: Inputs of ``function``, each [n, ...], with n equal rows.
        at: Indices in ``rows`` of the inputs to differentiate with respect to. They have n elements per row in total.
    """
    leaves = [x.detach().clone().requires_grad_(i in at) for i, x in enumerate(rows)]
    outputs = torch.cat([o.flatten(1) for o in function(leaves)], dim=1)
    eye = torch.eye(len(outputs), dtype=outputs.dtype)
    if not outputs.requires_grad:
        return torch.zeros_like(eye)
    made = torch.autograd.grad(outputs, [leaves[i] for i in at], eye, materialize_grads=True)
    return torch.cat([g.flatten(1) for g in made], dim=1).double()
