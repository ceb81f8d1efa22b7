"""Evaluation, inversion and backward pass of one layer, unit by unit: the building blocks of reversible execution.

No autograd function here, and no choice of what is saved; see :mod:`sedd_graph.engine.reversible` for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sedd_graph.component.counter_rng import fold
from sedd_graph.engine.fixed_point import Iteration, Map
from sedd_graph.engine.fixed_point import solve as solve_fixed_point
from sedd_graph.engine.layout import Layout, Sum, Unit
from sedd_graph.engine.regions import RegionModule
from sedd_graph.inverse import Contraction, Forward, Solve

__all__ = ["LayerRun", "Values", "accumulated", "gradient_flow"]

Values = list[Any]
"""One tensor for each value of a region; None while it is unknown, or once it is freed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tape:
    """One evaluation with gradients: the detached arguments and the outputs computed from them."""

    leaves: tuple[Any, ...]
    outputs: tuple[Tensor, ...]


class LayerRun:
    """One layer and its values: filled by :meth:`forward` from the inputs, or by :meth:`invert` from the outputs.

    Args:
        layout: Layout of the layer's region.
        layer: Its module.
        key: Dropout key, int32 [b]; None for no dropout.
        needs_grad: For each value whether it needs a gradient (see :func:`gradient_flow`). With it, units are evaluated
            apart from the surrounding autograd graph, and :meth:`backward` can follow. Without it, evaluation is ordinary.
    """

    def __init__(
        self, layout: Layout, layer: nn.Module, key: Tensor | None = None, needs_grad: Sequence[bool] | None = None
    ) -> None:
        self.layout, self.layer, self.key, self.needs_grad = layout, layer, key, needs_grad
        self.values: Values = [None] * layout.count
        self.tapes: dict[Unit, Tape] = {}

    def put(self, numbers: Iterable[int], tensors: Iterable[Tensor]) -> None:
        """Set values, such as ``layout.inputs.values()``."""
        for number, tensor in zip(numbers, tensors, strict=False):
            self.values[number] = tensor

    def take(self, numbers: Iterable[int]) -> list[Tensor]:
        """Return values, such as ``layout.outputs.values()``."""
        return [self.values[number] for number in numbers]

    # -- evaluation -------------------------------------------------------------------------------------------------

    def arguments(self, unit: Unit, values: Values | None = None) -> list[Any]:
        """Return the arguments of a unit from ``values`` (the run's own by default)."""
        known = self.values if values is None else values
        return [None if v < 0 else known[v] for v in unit.inputs]

    def evaluate(self, unit: Unit, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return the outputs of a unit, then its saved activations."""
        module, layout = unit.module(self.layer), self.layout
        own: Tensor | None = None
        if module.keyed and self.key is not None:
            own = self.key
            for place in unit.places:
                own = fold(own, place)
        if unit.factors is not None and unit.outputs[0] in layout.on_grid:
            arguments = [self._snapped(v, x) for v, x in zip(unit.inputs, arguments, strict=True)]
        if isinstance(module, RegionModule):
            result = module(own, *arguments)
        else:
            result = module(*arguments, key=own) if module.keyed else module(*arguments)
        return result if isinstance(result, tuple) else (result,)

    def forward(self) -> list[Tensor]:
        """Compute all values from the inputs. Return the saved activations.

        Without ``needs_grad``, arguments pass through an identity, at which the gradients of their uses within the unit are
        summed. That is the order of sums in :meth:`backward`, so that both give the same gradients to the last bit.
        """
        values, saved = self.values, {}
        for unit in self.layout.units:
            if self.needs_grad is None:
                views = [None if x is None else x.view_as(x) for x in self.arguments(unit)]
                made = self.evaluate(unit, views)
            else:
                made = tuple(t.detach() for t in self._taped(unit).outputs)
            self.put(unit.outputs, made)
            saved[".".join(unit.path)] = made[len(unit.outputs) :]
        return [saved[path][at] if path else values[at] for path, at in self.layout.saved]

    def _taped(self, unit: Unit) -> Tape:
        """Evaluate a unit with gradients, apart from the graph that its arguments belong to."""
        needs_grad = self.needs_grad or [False] * self.layout.count
        leaves = [
            None if v < 0 else x.detach().requires_grad_() if needs_grad[v] else x.detach()
            for v, x in zip(unit.inputs, self.arguments(unit), strict=True)
        ]
        with torch.enable_grad():
            return Tape(tuple(leaves), self.evaluate(unit, leaves))

    def _snapped(self, value: int, x: Tensor) -> Tensor:
        """Round ``x`` to the grid, with exact arithmetic only and unless the value is on the grid already."""
        grid = self.layout.grid
        return x if grid is None or value in self.layout.on_grid else grid.snap(x)

    # -- the inverse ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def invert(self) -> None:
        """Compute the streams from the outputs and the given inputs.

        With ``needs_grad``, all values and the evaluations on the way are retained for :meth:`backward`; otherwise each
        value is freed after its last use.
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
            self._record(unit)

    def _record(self, unit: Unit) -> None:
        """Evaluate a unit with gradients for :meth:`backward`."""
        self.tapes[unit] = tape = self._taped(unit)
        self._put_unknown(unit, tape.outputs)

    def _put_unknown(self, unit: Unit, made: Sequence[Tensor]) -> None:
        for value, tensor in zip(unit.outputs, made, strict=False):
            if self.values[value] is None:
                self.values[value] = tensor.detach()

    def _sum(self, terms: Sum) -> Tensor:
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
        """Return x -> r(x) / scale of a contraction ``value = scale * x + r(x)``, with all else as in ``values``."""
        layout = self.layout
        scale, target, value = float(found.scale), layout.index[found.target], layout.index[found.value]
        units = [layout.by_path[call.path] for call in found.body]

        def function(guess: Tensor) -> Tensor:
            trial = list(self.values)
            trial[target] = guess
            for unit in units:
                made = self.evaluate(unit, self.arguments(unit, trial))
                for at, tensor in zip(unit.outputs, made, strict=False):
                    trial[at] = tensor
            result: Tensor = (trial[value] - scale * guess) / scale
            return result

        return function

    # -- gradients --------------------------------------------------------------------------------------------------

    def backward(self, gradients: list[Any]) -> dict[nn.Parameter, Tensor]:
        """Propagate gradients from the outputs to the inputs.

        Units that :meth:`invert` has not evaluated are evaluated here.

        Args:
            gradients: One for each value, or None; updated in place.

        Returns:
            Gradients of the layer's parameters.
        """
        for unit in self.layout.units:  # in forward order, so that arguments are known
            known = unit.factors is not None and all(self.values[v] is not None for v in unit.outputs)
            if unit not in self.tapes and not known:
                self._record(unit)
        found: dict[nn.Parameter, Tensor] = {}
        for unit in reversed(self.layout.units):
            tape = self.tapes.pop(unit, None)
            arriving = [gradients[v] for v in unit.outputs]
            if all(g is None for g in arriving):
                continue
            if unit.factors is not None:
                for value, factor in zip(unit.inputs, unit.factors, strict=True):
                    if self.needs_grad and self.needs_grad[value] and factor:
                        gradient = arriving[0] if factor == 1 else arriving[0] * float(factor)
                        gradients[value] = accumulated(gradients[value], gradient)
            elif tape is not None:
                self._backward_unit(unit, tape, gradients, found)
        return found

    def _backward_unit(self, unit: Unit, tape: Tape, gradients: list[Any], found: dict[nn.Parameter, Tensor]) -> None:
        leaves = [
            (v, leaf)
            for v, leaf in zip(unit.inputs, tape.leaves, strict=True)
            if v >= 0 and self.needs_grad and self.needs_grad[v]
        ]
        parameters = [p for p in unit.module(self.layer).parameters() if p.requires_grad]
        arriving = [gradients[v] for v in unit.outputs]
        pairs = [(o, g) for o, g in zip(tape.outputs, arriving, strict=False) if g is not None and o.requires_grad]
        if not pairs or not (leaves or parameters):
            return
        made = torch.autograd.grad(
            [o for o, _ in pairs],
            [leaf for _, leaf in leaves] + parameters,
            [g.to(o.dtype) for o, g in pairs],
            allow_unused=True,
        )
        for (value, _), gradient in zip(leaves, made, strict=False):
            gradients[value] = accumulated(gradients[value], gradient)
        for parameter, gradient in zip(parameters, made[len(leaves) :], strict=True):
            if gradient is not None:
                found[parameter] = gradient


def accumulated(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients; None stands for zero."""
    return gradient if total is None else total if gradient is None else total + gradient


def gradient_flow(layout: Layout, layer: nn.Module, inputs: Sequence[bool]) -> list[bool]:
    """Return for each value whether it needs a gradient, given which inputs of the region need one."""
    found = [False] * layout.count
    for value, needed in zip(layout.inputs.values(), inputs, strict=True):
        found[value] = needed
    for unit in layout.units:
        flows = any(v >= 0 and found[v] for v in unit.inputs) or any(
            p.requires_grad for p in unit.module(layer).parameters()
        )
        for value in unit.outputs:
            found[value] = flows and layout.flat.types[value].kind == "float"
    return found
