"""Results of the solver: the inverse of a region as a :class:`Program`, or a :class:`Refusal` with the diagnosis.

A *value* is a :class:`Ref` within the flattened region: ``Ref("", "x1")`` is an input of the region,
``Ref("trunk.3.attend.gate", "out")`` a port of the component at that dotted path. Inputs and outputs of nested blocks are
not values of their own but other names for the values that feed them. A program starts from *facts* (the region's outputs,
the given inputs and the stored values) and derives one value after another; each derivation needs only earlier values, and
each value is derived once. Values that the inverse does not need are left out. There are four kinds of derivations:

- :class:`Forward`: evaluate a component, or a whole nested block, as the forward pass does.
- :class:`Solve`: call a component's inversion rule.
- :class:`Linear`: weighted sums of known values.
- :class:`Contraction`: iterate ``x <- x + (y - body(x)) / scale`` from ``x = y / scale`` until it converges.

Log-determinant: where every equation of the region is used exactly once, ``log |det d outputs / d inputs|`` is the sum over
derivations of ``log |det d out / d target|`` at the derived values (implicit function theorem; the Jacobian of the whole system
is block triangular in the order of derivation). ``Forward`` adds nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

from sedd_graph.component.axes import PortType, Size
from sedd_graph.component.contract import Rule
from sedd_graph.graph.model import Position, Ref, Region, Step

__all__ = [
    "LEVELS",
    "Blocker",
    "Contraction",
    "Derivation",
    "Forward",
    "Level",
    "Linear",
    "Lost",
    "Program",
    "Refusal",
    "Remedy",
    "Solve",
]

Level = Literal["injective", "bijective", "volume_preserving"]
"""Proved property of a region; see :data:`LEVELS`."""

LEVELS: tuple[Level, ...] = ("injective", "bijective", "volume_preserving")
"""From weak to strong. Injective: the inputs can be recovered. Bijective: also, every equation is used exactly once, so that
sizes are equal and there is a log-determinant. Volume preserving: also, the log-determinant is zero."""


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """Forward evaluation of the component or whole block at ``path``.

    ``inputs`` and ``outputs`` map its ports to values, in the order of its signature (an optional port that nothing
    feeds is absent). An output of a block may be known before.
    """

    path: str
    step: Step
    inputs: Mapping[str, tuple[Ref, ...]]
    outputs: Mapping[str, Ref]
    cost: float

    @property
    def needs(self) -> tuple[Ref, ...]:
        return tuple(ref for refs in self.inputs.values() for ref in refs)

    @property
    def targets(self) -> tuple[Ref, ...]:
        return tuple(self.outputs.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Solve:
    """Call of an inversion rule: ``rule.method`` of the component at ``path`` maps ``given`` to ``targets``.

    Attributes:
        given: Arguments in the order of ``rule.given``; None for an optional port that nothing feeds.
        targets: Results in the order of ``rule.targets``; some may be known before.
        inputs: Values of all ports of the component's ``forward``.
        log_det: ``"zero"``, the name of the method that computes ``log |det d out / d target|`` from ``inputs``, or None where
            none is declared.
    """

    path: str
    step: Step
    rule: Rule
    given: tuple[Ref | None, ...]
    targets: tuple[Ref, ...]
    inputs: Mapping[str, tuple[Ref, ...]]
    log_det: str | None
    cost: float

    @property
    def needs(self) -> tuple[Ref, ...]:
        return tuple(ref for ref in self.given if ref is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """Solution of a linear system: ``targets[i]`` is the sum of coefficient * value over the pairs in ``terms[i]``.

    All values have the same shape.

    Attributes:
        targets: The values that are derived.
        terms: For each target, pairs of a known value and its coefficient.
        paths: Linear components whose equations are solved.
        factor: ``|det|`` of the system. The log-determinant of the inverse grows by log(factor) nats per element of one target.
    """

    targets: tuple[Ref, ...]
    terms: tuple[tuple[tuple[Ref, Fraction], ...], ...]
    paths: tuple[str, ...]
    factor: Fraction
    cost: float

    @property
    def needs(self) -> tuple[Ref, ...]:
        return tuple(dict.fromkeys(ref for row in self.terms for ref, _ in row))


@dataclasses.dataclass(frozen=True, eq=False)
class Contraction:
    """Fixed-point iteration for ``target`` in ``value = scale * target + r(target)``.

    ``bound * |scale|`` is a Lipschitz constant of r, with ``bound`` < 1. ``body`` evaluates ``value`` from a guess of
    ``target`` and from known values; its intermediate values are separate from the program's own. The error shrinks by
    ``bound`` with each step; ``iterations`` steps reduce it to 1e-6 of its start. The derivation adds
    ``log |det(scale * I + d r / d target)|`` to the log-determinant.
    """

    target: Ref
    value: Ref
    scale: Fraction
    body: tuple[Forward, ...]
    bound: float
    iterations: int
    cost: float

    @property
    def needs(self) -> tuple[Ref, ...]:
        own = {ref for call in self.body for ref in call.targets} | {self.target}
        outside = dict.fromkeys(ref for call in self.body for ref in call.needs if ref not in own)
        return (self.value, *(ref for ref in outside if ref != self.value))

    @property
    def targets(self) -> tuple[Ref, ...]:
        return (self.target,)


Derivation = Forward | Solve | Linear | Contraction
"""One step of an inverse: it derives its ``targets`` from its ``needs``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Derived inverse of ``region``.

    Attributes:
        given: Inputs that are known at inversion.
        stored: Further known values.
        outputs: Value behind each output of the region.
        derivations: Steps in order of execution.
        types: Type of every value that occurs.
        level: Proved level.
        note: Reason why the level is not higher; empty at the highest.
    """

    region: Region
    given: tuple[str, ...]
    stored: tuple[Ref, ...]
    outputs: Mapping[str, Ref]
    derivations: tuple[Derivation, ...]
    types: Mapping[Ref, PortType]
    level: Level
    note: str

    @property
    def cost(self) -> float:
        """Number of component evaluations; weighted sums are free."""
        return sum(d.cost for d in self.derivations)

    @property
    def unmeasured(self) -> tuple[Solve, ...]:
        """Derivations whose component declares no log-determinant."""
        return tuple(d for d in self.derivations if isinstance(d, Solve) and d.log_det is None)


@dataclasses.dataclass(frozen=True)
class Lost:
    """Input that cannot be recovered, and the values between it and the outputs that stay unknown with it."""

    input: str
    through: tuple[Ref, ...]


@dataclasses.dataclass(frozen=True)
class Blocker:
    """Component where the derivation stops, and the reason."""

    path: str
    op: str
    place: Position
    reason: str


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Cheapest set of values to store, in addition to the outputs, so that every input of the region can be recovered.

    Attributes:
        values: The values to store.
        bytes: Their size in bytes, as a polynomial in batch and length.
        total: Their size in bytes, with the batch and length of ``sizes``.
        lower: Lower bound on the size in bytes of any such set; equal to ``total`` where the search was exhaustive.
        sizes: The batch and length that ``total`` and ``lower`` are computed for.
    """

    values: tuple[Ref, ...]
    bytes: Size
    total: int
    lower: int
    sizes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Diagnosis of a region that is not invertible. :func:`sedd_graph.inverse.format.diagnosis` writes it out."""

    region: Region
    given: tuple[str, ...]
    lost: tuple[Lost, ...]
    blockers: tuple[Blocker, ...]
    remedy: Remedy
    rewrites: tuple[str, ...]
    types: Mapping[Ref, PortType]
