"""Static layout of an invertible block for reversible execution: its graph values, units and inverse steps. No tensors.

A graph value is a tensor that the block computes or receives, identified by its index in
:class:`sedd_graph.inverse.flat.Flat`. A unit is a component, or a nested block that the inverse evaluates forward as a
whole; such a block is compiled as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

from torch import nn

from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.regions import last_use
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Ref, Region
from sedd_graph.inverse import Contraction, Derivation, Forward, Linear, Program, Refusal, Solve, solve
from sedd_graph.inverse.flat import Block, flatten, steady
from sedd_graph.inverse.format import diagnosis

__all__ = ["InverseStep", "Layout", "Sum", "Unit"]

Sum = tuple[tuple[int, float], ...]
"""Weighted sum of tensors of a block, as pairs (index of the tensor in the :class:`Layout`, factor)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """Part of a layer that is evaluated with one call: a component, or a nested block as a whole.

    Graph-value indices are the indices of the layer's tensors in the :class:`Layout`.

    Attributes:
        path: Names of the submodules that lead from the layer's module to the unit's module.
        inputs: Graph-value indices of the arguments, in call order; -1 where an optional port is not connected.
        outputs: Graph-value indices of the outputs.
        places: For each name in ``path``, the position of that submodule in the evaluation order of the block around
            it. Folded into the layer's dropout key one after the other, they give the unit's dropout key.
        factors: Factor of each argument if the unit is a weighted sum, whose backward pass needs no evaluation;
            otherwise None.
        moves: Whether the unit only rearranges elements, without arithmetic.
    """

    path: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    places: tuple[int, ...]
    factors: tuple[Fraction, ...] | None = None
    moves: bool = False

    def module(self, layer: nn.Module) -> Any:
        """Return the module of the unit.

        Args:
            layer: Module of the layer that contains the unit.
        """
        found: Any = layer
        for name in self.path:
            found = found._modules[name]
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class InverseStep:
    """One step of the inverse of a layer, which computes some of the layer's tensors from tensors known before.

    Tensors are identified by their indices in the layer's :class:`Layout`.

    Attributes:
        derivation: What the step executes: the forward evaluation of a component or block, a component's inversion
            rule, weighted sums, or a fixed-point iteration.
        targets: Indices of the tensors that the step computes.
        last_use: Indices of the tensors that can be freed after the step.
        given: For an inversion rule, the indices of its arguments in call order; -1 where an optional port is not
            connected. Empty for other steps.
        sums: For weighted sums, the sum that computes each target, as pairs (index of a tensor, factor), positive
            factors first. The first term is thus negated only if all factors are negative. Empty for other steps.
    """

    derivation: Derivation
    targets: tuple[int, ...]
    last_use: tuple[int, ...]
    given: tuple[int, ...] = ()
    sums: tuple[Sum, ...] = ()


class Layout:
    """Static description of an invertible block: its graph values, its units and its derived inverse.

    A graph value is a tensor that the block computes or receives. A unit is a component, or a nested block that is
    evaluated as a whole.

    Args:
        region: The block.
        given: Names of the conditioning inputs, which are known at inversion. The other inputs are the streams.
        grid: Fixed-point grid for bit-exact inversion (:class:`Grid`); None for ordinary floating point.

    Raises:
        UserError: The block is not invertible with the conditioning inputs ``given``, or its inverse would round in
            spite of ``grid``, since it is not only sums, differences and rearrangements.

    Attributes:
        program: The derived inverse.
        flat: The flattened block.
        index: Index of each graph value by its reference (:class:`Ref`).
        count: Number of graph values.
        inputs: Graph-value index of each input by name.
        outputs: Graph-value index of each output by name.
        given: Names of the conditioning inputs.
        streams: Names of the inputs that the inverse reconstructs.
        units: Units in order of forward evaluation.
        by_path: Units by dotted path.
        saved: Location of each saved activation: (path of a unit, index among the unit's saved activations), or ("",
            graph-value index).
        log_dets: For each unit, the name of the component's method that computes its log-determinant. None where the
            term is zero, unknown, or not computed by a method of a component.
        last_use: For each unit, indices of the graph values that can be freed after its forward evaluation. Outputs,
            and the values that a log-determinant depends on, are never freed.
        inverse: Steps of the inverse, in order.
        on_grid: Indices of the graph values that are multiples of the spacing of ``grid``; empty without a grid.
        encoded: Indices of the graph values from which an inversion rule decodes integers, such as the codewords of tokens,
            and which are rounded to ``grid``; empty without a grid.
    """

    def __init__(self, region: Region, given: Sequence[str], grid: Grid | None = None) -> None:
        self.region, self.grid = region, grid
        found = solve(region, given=given)
        if isinstance(found, Refusal):
            raise UserError(f"block {region.label!r} cannot be run reversibly:\n{diagnosis(found)}")
        self.program: Program = found
        self.flat = flatten(region)
        self.index = self.flat.index
        self.count = len(self.flat.refs)
        self.inputs, self.outputs = dict(self.flat.inputs), dict(self.flat.outputs)
        self.given = tuple(name for name in region.inputs if name in given)
        self.streams = tuple(name for name in region.inputs if name not in given)
        whole = {call.path for call in self._calls() if isinstance(call.step.body, Region)}
        self.units = tuple(self._units(self.flat.members, whole))
        self.by_path = {".".join(unit.path): unit for unit in self.units}
        self.saved = tuple(self._saved(region, ""))
        log_dets = {d.path: d.log_det for d in found.derivations if isinstance(d, Solve) and d.log_det != "zero"}
        self.log_dets = tuple(log_dets.get(path) for path in self.by_path)
        retained = set(self.outputs.values())
        for d in found.derivations:
            if isinstance(d, Linear | Contraction):
                retained.update(self.index[ref] for ref in (*d.needs, *d.targets))
        self.last_use = last_use([unit.inputs for unit in self.units], retained)
        self.inverse = tuple(self._inverse())
        self.encoded = self._encoded()
        self.on_grid = self._grid_values()
        if grid is not None:
            self._check_exact()

    # -- structure --------------------------------------------------------------------------------------------------

    def _calls(self) -> Iterator[Forward]:
        for derivation in self.program.derivations:
            if isinstance(derivation, Forward):
                yield derivation
            elif isinstance(derivation, Contraction):
                yield from derivation.body

    def _units(self, members: Sequence[int | Block], whole: set[str]) -> Iterator[Unit]:
        for member in members:
            if isinstance(member, int):
                node = self.flat.nodes[member]
                arguments: list[int] = []
                factors: list[Fraction] = []
                linear = node.algebra.linear.get("out") if len(node.outputs) == 1 else None
                for port in node.op.signature.inputs:
                    fed = node.inputs.get(port.name, ())
                    arguments += list(fed) if fed or port.variadic else [-1]
                    factors += [Fraction((linear or {}).get(port.name, 0))] * len(fed)
                known = tuple(factors) if linear else None
                yield self._unit(node.path, arguments, node.outputs.values(), known, node.algebra.moves)
            elif member.path in whole:
                yield self._unit(member.path, [fed[0] for fed in member.inputs.values()], member.outputs.values())
            else:
                yield from self._units(member.members, whole)

    def _unit(
        self,
        path: str,
        inputs: Iterable[int],
        outputs: Iterable[int],
        factors: tuple[Fraction, ...] | None = None,
        moves: bool = False,
    ) -> Unit:
        names, places, inside = path.split("."), [], self.region
        for name in names:
            place = next(i for i, step in enumerate(inside.steps) if step.name == name)
            places.append(place)
            body = inside.steps[place].body
            inside = body if isinstance(body, Region) else inside
        return Unit(tuple(names), tuple(inputs), tuple(outputs), tuple(places), factors, moves)

    def _saved(self, region: Region, prefix: str) -> Iterator[tuple[str, int]]:
        for step in region.steps:
            path = f"{prefix}{step.name}"
            if isinstance(step.body, Region):
                if path in self.by_path:
                    yield from ((path, k) for k in range(_count_saved(step.body)))
                else:
                    yield from self._saved(step.body, f"{path}.")
            if step.save is not None:
                block = self.flat.blocks.get(path)
                yield from (("", block.outputs[p] if block else self.index[Ref(path, p)]) for p in step.save.ports)

    def _inverse(self) -> Iterator[InverseStep]:
        number, derivations = self.index, self.program.derivations
        needs = [[number[ref] for ref in d.needs] for d in derivations]
        for d, last in zip(derivations, last_use(needs, self.inputs.values()), strict=True):
            targets = tuple(number[ref] for ref in d.targets)
            if isinstance(d, Solve):
                yield InverseStep(d, targets, last, given=tuple(-1 if r is None else number[r] for r in d.given))
            elif isinstance(d, Linear):
                ordered = (sorted(terms, key=lambda term: term[1] < 0) for terms in d.terms)
                sums = tuple(tuple((number[ref], float(factor)) for ref, factor in terms) for terms in ordered)
                yield InverseStep(d, targets, last, sums=sums)
            else:
                yield InverseStep(d, targets, last)

    # -- exact arithmetic -------------------------------------------------------------------------------------------

    def _encoded(self) -> frozenset[int]:
        """Return the real outputs of components from which their rules recover integers."""
        found: set[int] = set()
        for step in self.inverse if self.grid is not None else ():
            d = step.derivation
            if isinstance(d, Solve) and all(self.flat.types[v].kind != "float" for v in step.targets):
                made = {value for v, value in zip(d.rule.given, step.given, strict=True) if v not in d.inputs}
                found.update(v for v in made if v >= 0 and self.flat.types[v].kind == "float")
        return frozenset(found)

    def _grid_values(self) -> frozenset[int]:
        """Return the values that stay on the grid: streams, codewords of integers, and their sums and rearrangements."""
        if self.grid is None:
            return frozenset()
        found = {v for name in self.streams if self.flat.types[v := self.inputs[name]].kind == "float"} | self.encoded
        for unit in self.units:
            fed = [v for v in unit.inputs if v >= 0]
            plain = unit.factors is not None and all(abs(f) == 1 for f in unit.factors)
            if (plain and any(v in found for v in fed)) or (unit.moves and all(v in found for v in fed)):
                found.update(unit.outputs)
        return frozenset(found)

    def _check_exact(self) -> None:
        refused = f"block {self.region.label!r} cannot run with exact arithmetic"
        fixed = steady(self.flat, [self.inputs[name] for name in self.given])
        for name, value in self.outputs.items():
            if value not in self.on_grid and value not in fixed and self.flat.types[value].kind == "float":
                raise UserError(
                    f"{refused}: its output {name!r} is no sum or rearrangement of its streams "
                    f"({', '.join(self.streams)}); use add, sub and rearrangements for them"
                )
        for step in self.inverse:
            d = step.derivation
            if isinstance(d, Linear):
                fine = all(abs(f) == 1 for row in d.terms for _, f in row) and self.on_grid.issuperset(step.targets)
            else:
                whole = all(self.flat.types[v].kind != "float" for v in step.targets)
                fine = isinstance(d, Forward) or (isinstance(d, Solve) and (whole or self.by_path[d.path].moves))
            if not fine:
                what = d.path if isinstance(d, Solve) else ", ".join(str(t) for t in d.targets)
                raise UserError(f"{refused}: inverting {what} rounds; additive couplings and rearrangements are exact")


def _count_saved(region: Region) -> int:
    return sum(
        (_count_saved(step.body) if isinstance(step.body, Region) else 0)
        + (len(step.save.ports) if step.save is not None else 0)
        for step in region.steps
    )
