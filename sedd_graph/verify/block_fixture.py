"""Test instances of one invertible block, with random weights and inputs, for verification of the derived inverse.

An instance has the graph, Configs and widths of the declared block; only batch size and length are small.

Axes: b rows, l length, n elements of one sequence (all tensors of one row, flattened and concatenated).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from sedd_graph.component.axes import PortType, Size
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.construct import build_block, count_parameters
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.regions import RegionModule
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Region, Running
from sedd_graph.inverse import Contraction, Solve
from sedd_graph.inverse.flat import steady
from sedd_graph.verify.worst import worst

__all__ = ["BATCH", "JACOBIAN", "LENGTH", "BlockFixture", "batch_axis", "relative_error"]

NO_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({})
BATCH, LENGTH = 2, 6
"""Number of rows, and number of positions per row, of a test instance."""
JACOBIAN = 1536
"""Largest number of rows (and columns) of a Jacobian that is computed."""


def _shape(found: PortType, batch: int, length: int) -> list[int]:
    return [d.size.evaluate({"batch": batch, "length": length}) for d in found.dims]


def batch_axis(found: PortType) -> int | None:
    """Return the index of the batch axis of a port type; None if no axis depends on the batch.

    Raises:
        ValueError: The batch is merged with another axis, as in ``float batch*length d``.
    """
    places = [i for i, d in enumerate(found.dims) if "batch" in d.size.symbols]
    if not places:
        return None
    if len(places) > 1 or found.dims[places[0]].size != Size.of("batch"):
        raise ValueError(f"{found} merges the batch with another axis")
    return places[0]


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative error max_i norm(found_i - expected_i) / norm(expected_i), in the Euclidean norm.

    Args:
        found: The tensors to compare, of any shapes.
        expected: The reference tensors, of the same number and shapes.

    Returns:
        The error of the worst tensor; infinite if one has NaN; 0 if there are no tensors. Of integers and booleans it is
        0 if all are equal, and 1 otherwise.
    """

    def error(a: Tensor, b: Tensor) -> float:
        if not b.is_floating_point():
            return 0.0 if torch.equal(a, b) else 1.0
        return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))

    return worst(*map(error, found, expected))


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
        integers: For each integer input whose values a component declares, their number, by name.
        weights: Number of parameters of the block.
        chains: True if each output has the name and type of an input, so that copies of the block can be stacked, and
            no copy changes a given input.
        moved: Names of the outputs that depend on the streams; one name only for outputs that are the same graph value.

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
        flat, given = self.layout.flat, self.layout.given
        self.integers: dict[str, int] = {}
        for name, v in flat.inputs.items():
            for node in (flat.nodes[index] for index in flat.users[v]):
                for values in (n for port, n in node.algebra.integers.items() if v in node.inputs.get(port, ())):
                    self.integers[name] = min(values, self.integers.get(name, values))
        with torch.device("meta"):
            self.weights = count_parameters(build_block(region, registry))
        fixed = steady(flat, [flat.inputs[name] for name in given])
        self.moved = tuple({v: name for name, v in flat.outputs.items() if v not in fixed}.values())
        self.chains = region.outputs.keys() <= region.inputs.keys() and all(
            found == region.inputs[name] and (name not in given or flat.outputs[name] == flat.inputs[name])
            for name, found in region.output_types.items()
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
        factor: float = 1.0,
    ) -> RegionModule:
        """Return an instance of the block with random weights, in training mode.

        Args:
            dtype: Data type of the weights.
            seed: Seed of the weights.
            repeat: Number of copies of the block that are stacked in one module; 0 for the block itself.
            running: Memory mode in training, such as ``Running("reversible")``; None stores all activations.
            spread: Factor on the random noise that is added to all initial weights, zeros included.
            factor: Factor on all weights, after the noise.
        """
        torch.manual_seed(seed)
        made = build_block(self.region, self.registry, repeat=repeat, running=running or Running())
        for parameter in made.parameters():
            size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.add_(torch.randn_like(parameter) * spread * size * (0.2 if parameter.any() else 1.0)).mul_(factor)
        return made.to(dtype).train()

    def inputs(
        self,
        dtype: torch.dtype,
        batch: int = BATCH,
        length: int = LENGTH,
        seed: int = 1,
        dtypes: Mapping[str, torch.dtype] = NO_DTYPES,
    ) -> list[Tensor]:
        """Return random inputs of the block, in the order of its ports.

        Args:
            dtype: Data type of float inputs, which are standard normal. Integer inputs are 0 or 1; those whose values
                a component declares (:attr:`Algebra.integers`) are a random permutation of all values, repeated or cut
                to the size of the input.
            batch: Number of rows.
            length: Number of positions. If it exceeds 1, boolean inputs are False at the last position of the last row.
            seed: Seed of the inputs.
            dtypes: Data types of float inputs that differ from ``dtype``, by name.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(name: str, found: PortType) -> Tensor:
            shape = _shape(found, batch, length)
            if found.kind == "float":
                return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtypes.get(name, dtype))
            if found.kind == "int":
                if (values := self.integers.get(name)) is not None:
                    order, size = torch.randperm(values, generator=generator), math.prod(shape)
                    return order.repeat(-(-size // values))[:size].reshape(shape)
                return torch.randint(0, 2, shape, generator=generator)
            shown = torch.ones(shape, dtype=torch.bool)
            if length > 1:
                shown[(-1,) * len(shape)] = False
            return shown

        return [draw(name, found) for name, found in self.region.inputs.items()]

    def row(self, inputs: Sequence[Tensor], at: int, copies: int = 1) -> list[Tensor]:
        """Return the inputs of row ``at``, repeated ``copies`` times; inputs without a batch axis are unchanged.

        Args:
            inputs: All inputs of the block, in the order of its ports.
            at: Index of the row.
            copies: Number of equal rows to return.

        Raises:
            ValueError: An input merges the batch with another axis.
        """
        axes = [batch_axis(found) for found in self.region.inputs.values()]
        chosen = torch.full((copies,), at)
        return [x if axis is None else x.index_select(axis, chosen) for x, axis in zip(inputs, axes, strict=True)]

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

    @staticmethod
    def elements(types: Sequence[PortType], length: int) -> int:
        """Return the number of elements of tensors of the given port types, for one row of ``length`` positions."""
        return sum(math.prod(_shape(t, 1, length)) for t in types)

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
        dtypes: Mapping[str, torch.dtype] = NO_DTYPES,
    ) -> Iterator[tuple[int, float, bool]]:
        """Run stacks of layers forward, and reconstruct their inputs by the derived inverse.

        Args:
            layers: Layers to stack. A stack with more layers than given repeats the given ones in order.
            depths: Numbers of layers of the stacks to run.
            dtype: Data type of the inputs.
            grid: Fixed-point grid for bit-exact inversion (:class:`Grid`); None for ordinary floating point.
            dtypes: Data types of float inputs that differ from ``dtype``, by name.

        Yields:
            The depth, the relative error of the reconstructed inputs, and True if the reconstruction is bit-exact.
        """
        device = next((p.device for p in layers[0].parameters()), torch.device("cpu"))
        layout = self.layout if grid is None else Layout(self.region, self.layout.given, grid)
        inputs = [x.to(device) for x in self.inputs(dtype, dtypes=dtypes)]
        if grid is not None:
            snapped = [
                n in layout.streams and x.is_floating_point() for n, x in zip(layout.inputs, inputs, strict=True)
            ]
            inputs = [grid.snap(x) if snap else x for snap, x in zip(snapped, inputs, strict=True)]
        key, now = self.key().to(device), inputs
        states = []
        for at in range(max(depths)):
            run = LayerRun(layout, layers[at % len(layers)], key + at)
            run.put(layout.inputs.values(), now)
            run.forward()
            known = dict(zip(layout.outputs, run.take(layout.outputs.values()), strict=True))
            if grid is not None:
                floats = [x for x in known.values() if x.is_floating_point()]
                grid.check_range(floats, f"block {self.region.label!r}")
            states.append(now)
            now = [known.get(name, x) for name, x in zip(layout.inputs, now, strict=True)]
            if at + 1 not in depths:
                continue
            for below in reversed(range(at + 1)):
                outputs = [known[name] for name in layout.outputs]
                found = self.reconstruct(layers[below % len(layers)], key + below, states[below], outputs, layout)
                known = dict(zip(layout.inputs, states[below], strict=True)) | dict(
                    zip(layout.streams, found, strict=True)
                )
            expected = self.streams(inputs)
            yield at + 1, relative_error(found, expected), all(map(torch.equal, found, expected))
