"""Results of the inverse solver: a :class:`Program` (the inverse of a region) or a :class:`Refusal` (a diagnosis).

A value is a tensor of the flattened region, identified by a :class:`Ref`: ``Ref("", "x1")`` is an input of the region,
``Ref("trunk.3.attend.gate", "out")`` an output port of the component at that dotted path. The inputs and outputs of
nested blocks are not further values, but other names for the values connected to them. A program starts from the facts:
the region's outputs, the conditioning inputs and the stored values. It derives one value after another; each derivation
reads only earlier values, and each value is derived once. Values that the inverse does not need are left out. There are
four kinds of derivations:

- :class:`Forward`: evaluate a component, or a whole nested block, as the forward pass does.
- :class:`Solve`: call a component's inversion rule.
- :class:`Linear`: weighted sums of known values.
- :class:`Contraction`: iterate ``x <- x + (y - body(x)) / scale`` from ``x = y / scale`` until it converges.

Log-determinant: where every equation of the region is used exactly once, log |det d outputs / d inputs| is the sum over
derivations of log |det d out / d target| at the derived values (implicit function theorem; the Jacobian of the whole
system is block triangular in the order of derivation). The term of a ``Forward`` is zero.
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
"""Level of invertibility that the solver has proved for a region; :data:`LEVELS` defines the three levels."""

LEVELS: tuple[Level, ...] = ("injective", "bijective", "volume_preserving")
"""Levels of invertibility, from weak to strong.

``injective``: the inputs can be recovered from the outputs. ``bijective``: also, every equation is used exactly once,
so that inputs and outputs have the same number of elements and there is a log-determinant. ``volume_preserving``: also,
the log-determinant is zero.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """Derivation by forward evaluation of a component or of a whole nested block.

    Attributes:
        path: Dotted path of the component or block.
        step: Step of the graph whose ``body`` is the component or block.
        inputs: Values connected to each input port, by port name, in the order of the signature; optional ports that
            are not connected are absent.
        outputs: Value of each output port, by port name. Some outputs of a block may be known already, from an earlier
            derivation.
        cost: Number of component evaluations; weighted sums and rearrangements of elements count zero.
    """

    path: str
    step: Step
    inputs: Mapping[str, tuple[Ref, ...]]
    outputs: Mapping[str, Ref]
    cost: float

    @property
    def needs(self) -> tuple[Ref, ...]:
        """Values that the derivation reads."""
        return tuple(ref for refs in self.inputs.values() for ref in refs)

    @property
    def targets(self) -> tuple[Ref, ...]:
        """Values that the derivation computes, in the order of ``outputs``."""
        return tuple(self.outputs.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Solve:
    """Derivation by the inversion rule of a component: a method call that maps ``given`` to ``targets``.

    Attributes:
        path: Dotted path of the component.
        step: Step of the graph whose ``body`` is the component.
        rule: The inversion rule; ``rule.method`` is the name of the method.
        given: Values passed to the method, in the order of ``rule.given``; None for an optional port that is not
            connected.
        targets: Values that the method returns, in the order of ``rule.targets``; some may be known already, from an
            earlier derivation.
        inputs: Values connected to each input port of the component, by port name.
        log_det: ``"zero"``, or the name of the component's method that computes log |det d out / d target| from
            ``inputs``; None if the component declares none.
        cost: Cost of the call, as the rule declares it, in evaluations of the component.
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
        """Values that the derivation reads."""
        return tuple(ref for ref in self.given if ref is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """Derivation by weighted sums of known values: ``targets[i]`` is the sum of factor times value over ``terms[i]``.

    Attributes:
        targets: Values that the derivation computes.
        terms: For each target the pairs (value, factor) of its sum.
        paths: Dotted paths of the linear components whose equations are used.
        factor: Contribution to the log-determinant: log(factor) nats for each element of ``targets[0]`` (all targets
            have the same shape). It is the absolute determinant of the linear system from which the sums are solved. If
            several derivations compute the values of one system, the first one has the determinant and the others have
            1.
        cost: Number of component evaluations: 0.
    """

    targets: tuple[Ref, ...]
    terms: tuple[tuple[tuple[Ref, Fraction], ...], ...]
    paths: tuple[str, ...]
    factor: Fraction
    cost: float

    @property
    def needs(self) -> tuple[Ref, ...]:
        """Values that the derivation reads, without repetitions."""
        return tuple(dict.fromkeys(ref for row in self.terms for ref, _ in row))


@dataclasses.dataclass(frozen=True, eq=False)
class Contraction:
    """Derivation by fixed-point iteration: solves ``value = scale * target + r(target)`` for ``target``.

    The log-determinant of the derivation is log |det(scale * I + d r / d target)|.

    Attributes:
        target: The value that the derivation computes.
        value: The known value on the left-hand side of the equation.
        scale: Factor of ``target`` in the equation, not 0.
        body: Forward evaluations that compute ``value`` from an iterate of ``target`` and from known values. Their
            intermediate values are separate from those of the program.
        known: Known values other than ``value`` that the body reads or recomputes. They are constant during the
            iteration: if the body recomputes one of them from an iterate, the result is discarded.
        bound: Upper bound on the Lipschitz constant of r, divided by |scale|; less than 1. A plain (Picard) step
            reduces the error at least by this factor.
        iterations: Number of plain steps that reduce the error to 1e-6 of its initial value.
        cost: Number of component evaluations in ``iterations`` steps.
    """

    target: Ref
    value: Ref
    scale: Fraction
    body: tuple[Forward, ...]
    known: tuple[Ref, ...]
    bound: float
    iterations: int
    cost: float

    @property
    def needs(self) -> tuple[Ref, ...]:
        """References of the values that the derivation reads: :attr:`value`, and the known values that :attr:`body` reads."""
        own = {ref for call in self.body for ref in call.targets} | {self.target}
        outside = dict.fromkeys(ref for call in self.body for ref in call.needs if ref not in own)
        return (
            self.value,
            *(ref for ref in self.known if ref not in outside),
            *(o for o in outside if o != self.value),
        )

    @property
    def targets(self) -> tuple[Ref, ...]:
        """Values that the derivation computes: only ``target``."""
        return (self.target,)


Derivation = Forward | Solve | Linear | Contraction
"""One step of an inverse program, which computes its ``targets`` from its ``needs``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Inverse of a region, as a sequence of derivations.

    Attributes:
        region: The region.
        given: Names of the conditioning inputs, which are known at inversion.
        stored: Values that are stored in the forward pass, and known at inversion besides the outputs.
        outputs: Value of each output of the region, by name.
        derivations: Derivations in order of execution.
        types: Tensor type of each value.
        level: Proved level of invertibility.
        note: Reason why the level is not higher; empty at the highest level.
        mixed_rows: Reason why the log-determinant cannot be stated separately for each row of the batch, such as a
            component in which one row influences another; empty if it can.
    """

    region: Region
    given: tuple[str, ...]
    stored: tuple[Ref, ...]
    outputs: Mapping[str, Ref]
    derivations: tuple[Derivation, ...]
    types: Mapping[Ref, PortType]
    level: Level
    note: str
    mixed_rows: str

    @property
    def cost(self) -> float:
        """Cost of the inverse: total number of component evaluations. Weighted sums and rearrangements cost nothing."""
        return sum(d.cost for d in self.derivations)

    @property
    def discrete(self) -> bool:
        """True if no reconstructed input holds real numbers: the map is of finite sets, and has no log-determinant."""
        wanted = (found for name, found in self.region.inputs.items() if name not in self.given)
        return all(found.kind != "float" for found in wanted)

    @property
    def unmeasured(self) -> tuple[Solve, ...]:
        """Derivations by inversion rules of components that declare no log-determinant."""
        return tuple(d for d in self.derivations if isinstance(d, Solve) and d.log_det is None)


@dataclasses.dataclass(frozen=True)
class Lost:
    """Input of a region that cannot be recovered from the outputs.

    Attributes:
        input: Name of the input.
        through: Values, computed from the input, at which the derivation stops; they are unknown too.
    """

    input: str
    through: tuple[Ref, ...]


@dataclasses.dataclass(frozen=True)
class Blocker:
    """Component at which the derivation of the inverse stops.

    Attributes:
        path: Dotted path of the component.
        op: Name of the component's op, such as ``attention``.
        place: Location in the blueprint: file, line and column.
        reason: Reason as text for the user.
    """

    path: str
    op: str
    place: Position
    reason: str


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Set of values to store besides the outputs, so that all inputs of a region can be recovered.

    Attributes:
        values: The values to store; the cheapest set, if the search was exhaustive.
        bytes: Size of the set in bytes, symbolic in batch and length.
        total: Size of the set in bytes at ``sizes``.
        lower: Lower bound on the size in bytes of any such set; equal to ``total`` if the search was exhaustive.
        sizes: Sizes of the axes, by name, at which ``total`` and ``lower`` are computed, such as ``batch`` and
            ``length``.
    """

    values: tuple[Ref, ...]
    bytes: Size
    total: int
    lower: int
    sizes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Diagnosis of a region that is not invertible. :func:`sedd_graph.inverse.format.diagnosis` converts it to text.

    Attributes:
        region: The region.
        given: Names of the conditioning inputs.
        lost: Inputs that cannot be recovered.
        blockers: Components at which the derivation stops.
        remedy: Values to store so that all inputs can be recovered.
        rewrites: Possible changes to the blueprint, as text for the user.
        types: Tensor type of each value.
    """

    region: Region
    given: tuple[str, ...]
    lost: tuple[Lost, ...]
    blockers: tuple[Blocker, ...]
    remedy: Remedy
    rewrites: tuple[str, ...]
    types: Mapping[Ref, PortType]
