"""A block as units that are evaluated one by one, forward and back: what reversible execution is made of.

A unit is a component, or a whole nested block where the inverse evaluates all of it forward (which is what the compiler
is given). Values are numbered as in :class:`sedd_graph.inverse.flat.Flat`. No autograd function here, and no policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from sedd_graph.component.counter_rng import fold
from sedd_graph.engine.fixed_point import solve as solve_fixed_point
from sedd_graph.engine.grid import Grid
from sedd_graph.engine.regions import RegionModule, spent
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Op, Ref, Region, Step
from sedd_graph.inverse import Contraction, Derivation, Forward, Linear, Program, Refusal, Solve, solve
from sedd_graph.inverse.format import diagnosis
from sedd_graph.inverse.flat import Block, flatten

__all__ = ["Layout", "Tape", "Unit", "Values"]

Values = list[Any]
"""One tensor (or None while it is not known) for each value of a region."""
Row = tuple[tuple[int, float], ...]
"""A sum of values times factors."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """``inputs`` are values in the order of the call (-1: nothing is fed); ``places`` lead from the layer's key to its own.

    ``factors`` are those of the arguments where the unit is a weighted sum, which needs no evaluation to be gone through
    backward.
    """

    path: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    places: tuple[int, ...]
    factors: tuple[Fraction, ...] | None
    moves: bool

    def module(self, layer: nn.Module) -> Any:
        for name in self.path:
            layer = layer._modules[name]  # type: ignore[assignment]
        return layer


@dataclasses.dataclass(frozen=True, eq=False)
class Tape:
    """One evaluation with gradients: the detached arguments and what came out of them."""

    leaves: tuple[Any, ...]
    outputs: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Undoing:
    """A derivation in numbers of values.

    ``past`` are the values that nothing needs afterwards. What is solved is so from ``given`` (-1: nothing is fed); each of
    ``rows`` is a sum of value times factor, the positive first: a sum that begins with a difference needs no negation.
    """

    derivation: Derivation
    targets: tuple[int, ...]
    past: tuple[int, ...]
    given: tuple[int, ...]
    rows: tuple[Row, ...]


class Layout:
    """A region's units, its inverse in terms of them, and how its values are numbered.

    ``constants`` are the inputs that are known at inversion; the others are ``streams``. Raises :class:`UserError` where
    there is no inverse under them, or none that is exact where ``grid`` is given.
    """

    def __init__(self, region: Region, constants: Sequence[str], grid: Grid | None = None) -> None:
        self.region, self.grid = region, grid
        found = solve(region, given=constants)
        if isinstance(found, Refusal):
            raise UserError(f"block {region.label!r} cannot be rebuilt from its outputs:\n{diagnosis(found)}")
        self.program: Program = found
        self.flat = flatten(region)
        self.index = {ref: number for number, ref in enumerate(self.flat.refs)}
        self.count = len(self.flat.refs)
        self.inputs = dict(self.flat.inputs)
        self.outputs = dict(self.flat.outputs)
        self.constants = tuple(name for name in region.inputs if name in constants)
        self.streams = tuple(name for name in region.inputs if name not in constants)
        whole = {d.path for d in self._calls() if isinstance(d.step.body, Region)}
        self.units = tuple(self._units(self.flat.members, whole))
        self.by_path = {".".join(unit.path): unit for unit in self.units}
        self.taps = tuple(self._taps(region, ""))
        log_dets = {d.path: d.log_det for d in self.program.derivations if isinstance(d, Solve) and d.log_det != "zero"}
        self.log_dets = tuple(log_dets.get(".".join(unit.path)) for unit in self.units)
        """For each unit, the method that gives its log-determinant, or None where it has none."""
        self.spent = self._spent()
        """For each unit, the values that nothing needs once it has been evaluated: not outputs, not what the log-determinant
        of the whole is taken at."""
        self.back = tuple(self._back())
        self.on_grid = self._on_grid() if grid is not None else frozenset()

    def _spent(self) -> tuple[tuple[int, ...], ...]:
        kept = set(self.outputs.values())
        for d in self.program.derivations:
            if isinstance(d, Linear | Contraction):
                kept.update(self.index[ref] for ref in (*d.needs, *d.targets))
        return spent([u.inputs for u in self.units], kept)

    def _back(self) -> Iterator[_Undoing]:
        number = self.index
        needs = [[number[ref] for ref in d.needs] for d in self.program.derivations]
        for d, past in zip(self.program.derivations, spent(needs, self.inputs.values()), strict=True):
            targets = tuple(number[ref] for ref in d.targets)
            given: tuple[int, ...] = ()
            rows: tuple[Row, ...] = ()
            if isinstance(d, Solve):
                given = tuple(-1 if ref is None else number[ref] for ref in d.given)
            elif isinstance(d, Linear):
                rows = tuple(
                    tuple((number[ref], float(factor)) for ref, factor in sorted(terms, key=lambda term: term[1] < 0))
                    for terms in d.terms
                )
            yield _Undoing(d, targets, past, given, rows)

    def _calls(self) -> Iterator[Forward]:
        for derivation in self.program.derivations:
            if isinstance(derivation, Forward):
                yield derivation
            elif isinstance(derivation, Contraction):
                yield from derivation.body

    def _units(self, members: Sequence[int | Block], whole: set[str]) -> Iterator[Unit]:
        for member in members:
            if isinstance(member, Block) and member.path not in whole:
                yield from self._units(member.members, whole)
            elif isinstance(member, Block):
                arguments = [member.inputs[name][0] for name in member.step.body.inputs]  # type: ignore[union-attr]
                yield self._unit(member.path, arguments, member.outputs.values())
            else:
                node = self.flat.nodes[member]
                arguments, factors = [], []
                linear = node.algebra.linear.get("out") if len(node.outputs) == 1 else None
                for port in node.op.signature.inputs:
                    fed = node.inputs.get(port.name, ())
                    arguments += list(fed) if fed or port.variadic else [-1]
                    factors += [Fraction((linear or {}).get(port.name, 0))] * len(fed)
                yield self._unit(
                    node.path, arguments, node.outputs.values(), tuple(factors) if linear else None, node.algebra.moves
                )

    def _unit(
        self, path: str, inputs: Any, outputs: Any, factors: tuple[Fraction, ...] | None = None, moves: bool = False
    ) -> Unit:
        places, inside = [], self.region
        for name in path.split("."):
            at = [step.name for step in inside.steps].index(name)
            places.append(at)
            body = inside.steps[at].body
            inside = body if isinstance(body, Region) else inside
        return Unit(tuple(path.split(".")), tuple(inputs), tuple(outputs), tuple(places), factors, moves)

    def _taps(self, region: Region, prefix: str) -> Iterator[tuple[str, int]]:
        """Where each saved port is found: (path of a unit, which of its taps), or ("", value)."""
        for step in region.steps:
            path = f"{prefix}{step.name}"
            if isinstance(step.body, Region):
                if path in self.by_path:
                    yield from ((path, k) for k in range(_count_taps(step.body)))
                else:
                    yield from self._taps(step.body, f"{path}.")
            if step.save is not None:
                yield from (("", self._value(step, path, port)) for port in step.save.ports)

    def _value(self, step: Step, path: str, port: str) -> int:
        if isinstance(step.body, Op):
            return self.index[Ref(path, port)]
        members: Sequence[int | Block] = self.flat.members
        while True:
            block = next(m for m in members if isinstance(m, Block) and f"{path}.".startswith(f"{m.path}."))
            if block.path == path:
                return block.outputs[port]
            members = block.members

    # -- exact arithmetic -------------------------------------------------------------------------------------------

    def _on_grid(self) -> frozenset[int]:
        """The values that are kept on the grid: streams, and their sums and rearrangements."""
        found = {self.inputs[name] for name in self.streams}
        for unit in self.units:
            fed = [v for v in unit.inputs if v >= 0]
            plain = unit.factors is not None and all(abs(f) == 1 for f in unit.factors)
            if (plain and any(v in found for v in fed)) or (unit.moves and all(v in found for v in fed)):
                found.update(unit.outputs)
        label = self.region.label
        for name, value in self.outputs.items():
            if value not in found:
                raise UserError(
                    f"block {label!r} cannot be run with exact arithmetic: its output {name!r} is no sum of its streams "
                    f"({', '.join(self.streams)}); use add, sub and rearrangements for them"
                )
        for d in self.program.derivations:
            if isinstance(d, Forward):
                continue
            fine = (
                all(abs(f) == 1 for row in d.terms for _, f in row) and all(self.index[t] in found for t in d.targets)
                if isinstance(d, Linear)
                else isinstance(d, Solve) and self.by_path[d.path].moves
            )
            if not fine:
                what = d.path if isinstance(d, Solve) else ", ".join(str(t) for t in d.targets)
                raise UserError(
                    f"block {label!r} cannot be run with exact arithmetic: undoing {what} rounds; additive couplings and "
                    "rearrangements are exact"
                )
        return frozenset(found)

    def snapped(self, value: int, x: Tensor) -> Tensor:
        """``x`` on the grid, where there is one and it is not there already."""
        return x if self.grid is None or value in self.on_grid else self.grid.snap(x)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(
        self, unit: Unit, layer: nn.Module, key: Tensor | None, arguments: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        """What the unit gives: its outputs, then its taps."""
        module = unit.module(layer)
        own: Tensor | None = None
        if module.keyed and key is not None:
            own = key
            for place in unit.places:
                own = fold(own, place)
        if self.grid is not None and unit.factors is not None and unit.outputs[0] in self.on_grid:
            arguments = [self.snapped(v, x) for v, x in zip(unit.inputs, arguments, strict=True)]
        if isinstance(module, RegionModule):
            result = module(own, *arguments)
        else:
            result = module(*arguments, key=own) if module.keyed else module(*arguments)
        return result if isinstance(result, tuple) else (result,)

    def taped(self, unit: Unit, layer: nn.Module, key: Tensor | None, values: Values, wanted: Sequence[bool]) -> Tape:
        """Evaluate with gradients, apart from whatever graph the values belong to."""
        leaves = [
            None if v < 0 else values[v].detach().requires_grad_() if wanted[v] else values[v].detach()
            for v in unit.inputs
        ]
        with torch.enable_grad():
            return Tape(tuple(leaves), self.evaluate(unit, layer, key, leaves))

    def forward(
        self, layer: nn.Module, key: Tensor | None, values: Values, wanted: Sequence[bool] | None = None
    ) -> list[Tensor]:
        """Fill in all values from the region's inputs; returns the taps. With ``wanted`` nothing of it stays in a graph.

        Without, each unit's arguments pass through an identity, where the gradients of their uses within it are summed:
        the order in which :meth:`backward` sums them, so that both give the same to the last bit.
        """
        kept: dict[str, tuple[Tensor, ...]] = {}
        for unit in self.units:
            if wanted is None:
                arguments = [None if v < 0 else values[v].view_as(values[v]) for v in unit.inputs]
                made = self.evaluate(unit, layer, key, arguments)
            else:
                made = tuple(t.detach() for t in self.taped(unit, layer, key, values, wanted).outputs)
            for value, tensor in zip(unit.outputs, made, strict=False):
                values[value] = tensor
            kept[".".join(unit.path)] = made[len(unit.outputs) :]
        return [values[at] if not path else kept[path][at] for path, at in self.taps]

    def wanted(self, layer: nn.Module, inputs: Sequence[bool]) -> list[bool]:
        """Which values a gradient passes through, ``inputs`` telling it of the region's inputs."""
        found = [False] * self.count
        for value, flag in zip(self.inputs.values(), inputs, strict=True):
            found[value] = flag
        for unit in self.units:
            grows = any(v >= 0 and found[v] for v in unit.inputs) or any(
                p.requires_grad for p in unit.module(layer).parameters()
            )
            for value in unit.outputs:
                found[value] = grows and self.flat.types[value].kind == "float"
        return found

    # -- the inverse ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def undo(
        self, layer: nn.Module, key: Tensor | None, values: Values, wanted: Sequence[bool] | None = None
    ) -> dict[Unit, Tape]:
        """Fill in the region's streams from its outputs and constants.

        With ``wanted``, all other values are kept for :meth:`backward`, and the evaluations made on the way are returned.
        """
        tapes: dict[Unit, Tape] = {}
        for step in self.back:
            derivation = step.derivation
            if isinstance(derivation, Contraction):
                self._contract(derivation, layer, key, values, wanted, tapes)
            elif isinstance(derivation, Forward):
                self._call(derivation, layer, key, values, wanted, tapes)
            else:
                if isinstance(derivation, Solve):
                    method = getattr(self.by_path[derivation.path].module(layer), derivation.rule.method)
                    made = method(*[None if v < 0 else values[v] for v in step.given])
                    made = made if isinstance(made, tuple) else (made,)
                else:
                    made = tuple([self._sum(row, values) for row in step.rows])
                for value, tensor in zip(step.targets, made, strict=True):
                    values[value] = tensor
            if wanted is None:
                for value in step.past:
                    values[value] = None
        return tapes

    def _call(
        self,
        call: Forward,
        layer: nn.Module,
        key: Tensor | None,
        values: Values,
        wanted: Sequence[bool] | None,
        tapes: dict[Unit, Tape],
    ) -> None:
        unit = self.by_path[call.path]
        if wanted is None:
            made = self.evaluate(unit, layer, key, [None if v < 0 else values[v] for v in unit.inputs])
        else:
            tapes[unit] = tape = self.taped(unit, layer, key, values, wanted)
            made = tape.outputs
        for value, tensor in zip(unit.outputs, made, strict=False):
            if values[value] is None:
                values[value] = tensor.detach()

    def _sum(self, row: Row, values: Values) -> Tensor:
        total: Tensor | None = None
        for value, factor in row:
            x = self.snapped(value, values[value])
            if total is None:
                total = x if factor == 1 else x * factor
            else:
                total = torch.add(total, x, alpha=factor) if abs(factor) != 1 else total + x if factor > 0 else total - x  # fmt: skip
        assert total is not None
        return total

    def remainder(
        self, found: Contraction, layer: nn.Module, key: Tensor | None, values: Values
    ) -> Callable[[Tensor], Tensor]:
        """x -> r(x) / scale, where the contraction's value = scale x + r(x), with all else as in ``values``."""
        scale, target, value = float(found.scale), self.index[found.target], self.index[found.value]
        calls = [self.by_path[call.path] for call in found.body]

        def function(guess: Tensor) -> Tensor:
            trial = list(values)
            trial[target] = guess
            for unit in calls:
                made = self.evaluate(unit, layer, key, [None if v < 0 else trial[v] for v in unit.inputs])
                for at, tensor in zip(unit.outputs, made, strict=False):
                    trial[at] = tensor
            result: Tensor = (trial[value] - scale * guess) / scale
            return result

        return function

    def _contract(
        self,
        found: Contraction,
        layer: nn.Module,
        key: Tensor | None,
        values: Values,
        wanted: Sequence[bool] | None,
        tapes: dict[Unit, Tape],
    ) -> None:
        remainder = self.remainder(found, layer, key, values)
        start = values[self.index[found.value]] / float(found.scale)
        values[self.index[found.target]] = solve_fixed_point(remainder, start, lipschitz=found.bound).x
        for call in found.body:
            self._call(call, layer, key, values, wanted, tapes)

    # -- gradients --------------------------------------------------------------------------------------------------

    def backward(
        self,
        layer: nn.Module,
        key: Tensor | None,
        values: Values,
        tapes: dict[Unit, Tape],
        gradients: list[Any],
        wanted: Sequence[bool],
    ) -> dict[nn.Parameter, Tensor]:
        """Carry ``gradients`` (one for each value, or None) from the outputs to the inputs, in place.

        Returns the gradients of the layer's parameters. What the inverse has not evaluated is evaluated here.
        """
        for unit in self.units:  # in the order of the forward pass, so that what a unit needs is there
            if unit in tapes or (unit.factors is not None and all(values[v] is not None for v in unit.outputs)):
                continue
            tapes[unit] = tape = self.taped(unit, layer, key, values, wanted)
            for value, tensor in zip(unit.outputs, tape.outputs, strict=False):
                if values[value] is None:
                    values[value] = tensor.detach()
        found: dict[nn.Parameter, Tensor] = {}
        for unit in reversed(self.units):
            tape = tapes.pop(unit, None)  # type: ignore[arg-type]
            arriving = [gradients[v] for v in unit.outputs]
            if all(g is None for g in arriving):
                continue
            if unit.factors is not None:
                for value, factor in zip(unit.inputs, unit.factors, strict=True):
                    if wanted[value] and factor:
                        _add(gradients, value, arriving[0] if factor == 1 else arriving[0] * float(factor))
                continue
            assert tape is not None
            leaves = [(v, leaf) for v, leaf in zip(unit.inputs, tape.leaves, strict=True) if v >= 0 and wanted[v]]
            parameters = [p for p in unit.module(layer).parameters() if p.requires_grad]
            pairs = [(o, g) for o, g in zip(tape.outputs, arriving, strict=False) if g is not None and o.requires_grad]
            if not pairs or not (leaves or parameters):
                continue
            made = torch.autograd.grad(
                [o for o, _ in pairs],
                [leaf for _, leaf in leaves] + parameters,
                [g.to(o.dtype) for o, g in pairs],
                allow_unused=True,
            )
            for (value, _), gradient in zip(leaves, made, strict=False):
                if gradient is not None:
                    _add(gradients, value, gradient)
            for parameter, gradient in zip(parameters, made[len(leaves) :], strict=True):
                if gradient is not None:
                    found[parameter] = gradient
        return found


def _add(gradients: list[Any], value: int, gradient: Tensor) -> None:
    held = gradients[value]
    gradients[value] = gradient if held is None else held + gradient


def _count_taps(region: Region) -> int:
    return sum(
        (_count_taps(step.body) if isinstance(step.body, Region) else 0)
        + (len(step.save.ports) if step.save is not None else 0)
        for step in region.steps
    )
