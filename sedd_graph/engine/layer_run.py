"""Forward evaluation and inversion of one layer, unit by unit.

A unit is a component or a nested block that is evaluated as a whole (:class:`sedd_graph.engine.layout.Unit`). A graph
value is a tensor that the layer computes or receives, identified by its index in the layout. Gradients of a layer are in
:mod:`sedd_graph.engine.layer_gradients`, and the autograd function that uses both in :mod:`sedd_graph.engine.reversible`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sedd_graph.component.counter_rng import fold
from sedd_graph.diffusion.grid import magnitude
from sedd_graph.engine.fixed_point import Iteration, Map
from sedd_graph.engine.fixed_point import solve as solve_fixed_point
from sedd_graph.engine.layout import Layout, Sum, Unit
from sedd_graph.engine.regions import RegionModule
from sedd_graph.inverse import Contraction, Forward, Solve

__all__ = ["LayerRun", "Tape", "Values"]

Values = list[Any]
"""Tensors that a layer computes or receives, at their indices in the :class:`Layout` (graph-value indices).

None where a tensor is not computed yet, or is already freed.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Tape:
    """One evaluation of a unit (a component or nested block) with gradients enabled, recorded for its backward pass.

    Attributes:
        leaves: Arguments in call order, detached from the surrounding autograd graph; None where an optional port is
            not connected.
        outputs: Outputs and saved activations computed from the leaves.
    """

    leaves: tuple[Any, ...]
    outputs: tuple[Tensor, ...]


class LayerRun:
    """Execution of one layer, forward from its inputs or inverted from its outputs, with all intermediate tensors.

    Args:
        layout: Layout of the layer: its graph values (the tensors that it computes or receives), its units (components,
            or nested blocks that are evaluated as a whole) and its inverse.
        layer: Module of the layer.
        key: Dropout key of each row b, int32 [b]; None turns dropout off.
        needs_grad: For each graph value, by index, whether it requires a gradient
            (:func:`sedd_graph.engine.layer_gradients.gradient_flow`). If given, each unit is evaluated on detached
            arguments, outside the surrounding autograd graph, and
            :func:`~sedd_graph.engine.layer_gradients.propagate` can be called. If None, units are evaluated in ordinary
            autograd.

    Attributes:
        values: Tensors by graph-value index; None where not computed yet, or freed.
        tapes: For each unit that is to be differentiated, its recorded evaluation.
    """

    def __init__(
        self, layout: Layout, layer: nn.Module, key: Tensor | None = None, needs_grad: Sequence[bool] | None = None
    ) -> None:
        self.layout, self.layer, self.key, self.needs_grad = layout, layer, key, needs_grad
        self.values: Values = [None] * layout.count
        self.tapes: dict[Unit, Tape] = {}
        self._largest: list[Tensor] = []

    def put(self, numbers: Iterable[int], tensors: Iterable[Tensor]) -> None:
        """Set tensors in :attr:`values`.

        Args:
            numbers: Graph-value indices of the tensors, such as ``layout.inputs.values()``.
            tensors: One tensor for each index; surplus tensors are ignored.
        """
        for number, tensor in zip(numbers, tensors, strict=False):
            self.values[number] = tensor

    def take(self, numbers: Iterable[int]) -> list[Tensor]:
        """Return the tensors with the given graph-value indices, such as ``layout.outputs.values()``."""
        return [self.values[number] for number in numbers]

    # -- evaluation -------------------------------------------------------------------------------------------------

    def arguments(self, unit: Unit, values: Values | None = None) -> list[Any]:
        """Return the arguments of a unit in call order; None where an optional port is not connected.

        Args:
            unit: The component or nested block.
            values: Tensors by graph-value index, from which the arguments are taken; None: those of the run
                (:attr:`values`).
        """
        known = self.values if values is None else values
        return [None if v < 0 else known[v] for v in unit.inputs]

    def evaluate(self, unit: Unit, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """Evaluate a unit in the forward direction.

        Args:
            unit: The component or nested block.
            arguments: Its arguments in call order.

        Returns:
            The outputs of the unit, followed by its saved activations.
        """
        module, layout = unit.module(self.layer), self.layout
        own: Tensor | None = None
        if module.keyed and self.key is not None:
            own = self.key
            for place in unit.places:
                own = fold(own, place)
        if unit.factors is not None and unit.outputs[0] in layout.on_grid:
            arguments = [self._snapped(v, x) for v, x in zip(unit.inputs, arguments, strict=True)]
            if len(arguments) > 2:  # partial sums may leave the range in which float32 is exact
                return (module(*[x.double() for x in arguments]).float(),)
        if isinstance(module, RegionModule):
            result = module(own, *arguments)
        else:
            result = module(*arguments, key=own) if module.keyed else module(*arguments)
        made = result if isinstance(result, tuple) else (result,)
        if layout.grid is not None and not layout.encoded.isdisjoint(unit.outputs):
            rounded = [
                layout.grid.snap(x) if v in layout.encoded else x for v, x in zip(unit.outputs, made, strict=False)
            ]
            made = (*rounded, *made[len(rounded) :])
        return made

    def forward(self) -> list[Tensor]:
        """Evaluate all units (components and nested blocks) in order, and return the saved activations.

        Set the layer's inputs with :meth:`put` before the call.

        Without ``needs_grad``, ordinary autograd differentiates the units, and each unit is passed views of its
        arguments. If several units read a tensor, autograd then first sums its gradients within each unit, and then
        over units. :meth:`backward` sums in the same order, so that its gradients are bitwise equal to those of
        autograd.

        Returns:
            The saved activations, in the order of :attr:`Layout.saved`.
        """
        values, saved, layout = self.values, {}, self.layout
        self._watch(layout.inputs[name] for name in layout.streams)
        for unit in layout.units:
            if self.needs_grad is None:
                views = [None if x is None else x.view_as(x) for x in self.arguments(unit)]
                made = self.evaluate(unit, views)
            else:
                made = tuple(t.detach() for t in self._taped(unit).outputs)
            self.put(unit.outputs, made)
            if unit.factors is not None or not layout.encoded.isdisjoint(unit.outputs):
                self._watch(unit.outputs)
            saved[".".join(unit.path)] = made[len(unit.outputs) :]
        return [saved[path][at] if path else values[at] for path, at in layout.saved]

    def _watch(self, values: Iterable[int]) -> None:
        """Include the graph values among ``values`` that are on the grid in :meth:`largest`."""
        for value in values:
            if value in self.layout.on_grid:
                self._largest.append(magnitude(self.values[value].detach()))

    def largest(self) -> Tensor:
        """Return the largest magnitude of the tensors on the fixed-point grid in :meth:`forward`, float32 [].

        These are the layer's input streams and sums of them. The result is NaN if an element is NaN. The layout must
        have a grid.
        """
        return torch.stack(self._largest).max()

    def _taped(self, unit: Unit) -> Tape:
        """Evaluate a unit with gradients, outside the autograd graph of its arguments."""
        needs_grad = self.needs_grad or [False] * self.layout.count
        leaves = [
            None if v < 0 else x.detach().requires_grad_() if needs_grad[v] else x.detach()
            for v, x in zip(unit.inputs, self.arguments(unit), strict=True)
        ]
        with torch.enable_grad():
            return Tape(tuple(leaves), self.evaluate(unit, leaves))

    def _snapped(self, value: int, x: Tensor) -> Tensor:
        """Round ``x`` to the grid, unless arithmetic is not exact or the graph value is on the grid already."""
        grid = self.layout.grid
        return x if grid is None or value in self.layout.on_grid else grid.snap(x)

    # -- the inverse ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def invert(self) -> None:
        """Reconstruct the layer's inputs from its outputs and conditioning inputs.

        Set the outputs and conditioning inputs with :meth:`put` before the call.

        If ``needs_grad`` was passed to the constructor, all tensors and the recorded evaluations are retained for
        the gradients. Otherwise each tensor is freed after its last use.
        """
        for step in self.layout.inverse:
            derivation = step.derivation
            if isinstance(derivation, Contraction):
                self._iterate(derivation)
            elif isinstance(derivation, Forward):
                self._call(derivation)
            elif isinstance(derivation, Solve):
                method = getattr(self.layout.by_path[derivation.path].module(self.layer), derivation.rule.method)
                made = method(*[None if v < 0 else self.values[v] for v in step.given])
                self.put(step.targets, made if isinstance(made, tuple) else (made,))
            else:
                self.put(step.targets, [self._sum(terms) for terms in step.sums])
            if self.needs_grad is None:
                for value in step.last_use:
                    self.values[value] = None

    def _call(self, call: Forward) -> None:
        unit = self.layout.by_path[call.path]
        if self.needs_grad is None:
            self._put_unknown(unit, self.evaluate(unit, self.arguments(unit)))
        else:
            self.record(unit)

    def record(self, unit: Unit) -> None:
        """Evaluate a unit with gradients, and add the evaluation to :attr:`tapes`."""
        self.tapes[unit] = tape = self._taped(unit)
        self._put_unknown(unit, tape.outputs)

    def _put_unknown(self, unit: Unit, made: Sequence[Tensor]) -> None:
        for value, tensor in zip(unit.outputs, made, strict=False):
            if self.values[value] is None:
                self.values[value] = tensor.detach()

    def _sum(self, terms: Sum) -> Tensor:
        if (
            len(terms) > 2 and self.layout.grid is not None
        ):  # partial sums may leave the range in which float32 is exact
            return torch.stack([self._snapped(v, self.values[v]).double() * f for v, f in terms]).sum(0).float()
        (value, factor), *others = terms
        x = self._snapped(value, self.values[value])
        total = x if factor == 1 else x * factor
        for value, factor in others:
            x = self._snapped(value, self.values[value])
            if abs(factor) != 1:
                total = torch.add(total, x, alpha=factor)
            else:
                total = total + x if factor > 0 else total - x
        return total

    def _iterate(self, found: Contraction) -> None:
        index = self.layout.index
        start = self.values[index[found.value]] / float(found.scale)
        solution = solve_fixed_point(self.remainder(found), start, Iteration(lipschitz=found.bound))
        self.values[index[found.target]] = solution.x
        for call in found.body:
            self._call(call)

    def remainder(self, found: Contraction) -> Map:
        """Return g(x) = r(x) / scale for a step of the inverse that solves ``value = scale * x + r(x)`` for x.

        The step is a fixed-point iteration, x <- value / scale - g(x), where g is a contraction.

        Args:
            found: The step. Its ``body`` computes ``value`` from x and from known tensors, which are taken from
                :attr:`values`.

        Returns:
            A function between tensors of the shape of x, [b, ...].
        """
        layout = self.layout
        scale, target, value = float(found.scale), layout.index[found.target], layout.index[found.value]
        units = [layout.by_path[call.path] for call in found.body]
        known = {layout.index[ref] for ref in found.known}

        def function(guess: Tensor) -> Tensor:
            trial = list(self.values)
            trial[target] = guess
            for unit in units:
                made = self.evaluate(unit, self.arguments(unit, trial))
                for at, tensor in zip(unit.outputs, made, strict=False):
                    if at not in known:
                        trial[at] = tensor
            result: Tensor = (trial[value] - scale * guess) / scale
            return result

        return function
