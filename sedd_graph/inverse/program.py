"""What the solver hands over: the inverse of a region as a :class:`Program`, or a :class:`Refusal` that says why not.

A *value* is a :class:`Ref` within the region with all nested blocks and repeats laid flat: ``Ref("", "x1")`` is an input
of the region, ``Ref("trunk.3.attend.gate", "out")`` a port of a component at that dotted path. Inputs and outputs of
nested blocks are no values of their own: they are other names for what feeds them. A program starts from *facts* (the
values behind the region's outputs, the inputs that are given, and what was stored) and makes one value after another
known; each derivation needs only what stands before it, and each value is derived once. Only what the inverse needs is
in it. Interpreting one takes four cases:

- :class:`Forward`: evaluate a component, or a whole nested block, as the forward pass does.
- :class:`Solve`: call a component's rule.
- :class:`Linear`: weighted sums of known values.
- :class:`Contraction`: ``x <- x + (y - body(x)) / scale`` from ``x = y / scale``, until it stands still.

The change of volume: with every equation of the region used exactly once, log |det d outputs / d inputs| is the sum over
derivations of log |det d out / d target| at the derived values (implicit function theorem; the matrix of the whole system
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
"""What a region is proved to be; see :data:`LEVELS`."""

LEVELS: tuple[Level, ...] = ("injective", "bijective", "volume_preserving")
"""From weak to strong. Injective: the inputs can be had back. Bijective: and every equation is used exactly once, so the
sizes are equal and there is a log-determinant. Volume preserving: and that is zero."""


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """Evaluate what stands at ``path``, a component or a whole block, from known inputs.

    ``inputs`` and ``outputs`` map its ports to values, in the order of its signature (an optional port that nothing
    feeds is absent). An output of a block may be a value that was known before.
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
    """Call ``rule.method`` of the component at ``path`` with the values of ``given``: it gives ``targets``.

    ``given`` stands in the order of ``rule.given``, with None for an optional port that nothing feeds; ``targets`` in that
    of ``rule.targets`` (some may be known already). ``log_det`` is ``"zero"``, the name of the method that gives
    log |det d out / d target| from all of forward's inputs (``inputs``, ports to values), or None where none is declared.
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
    """``targets[i]`` is the sum of factor times value over ``terms[i]``; all of one shape.

    ``paths`` are the linear components whose equations were used. The derivation adds log(``factor``) nats for each number
    in one of its targets to the log-determinant: ``factor`` is |det| of the system that was solved.
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
    """``target`` from ``value = scale * target + r(target)``, where r moves at most ``bound * |scale|`` as fast as it.

    ``body`` evaluates ``value`` from a guess of ``target`` and from known values; what it computes on the way stands for
    itself, beside the program's own values. The error shrinks by ``bound`` < 1 with each iteration; ``iterations`` of them
    bring it to 1e-6 of where it started. It adds log |det(scale * I + d r / d target)| to the log-determinant.
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
"""One step of an inverse: it makes its ``targets`` known from its ``needs``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The derived inverse of ``region``: ``derivations`` in an order that can be run.

    ``outputs`` maps the region's outputs to the values that they are; ``given`` names inputs that are known beforehand;
    ``stored`` are further facts. ``types`` has the type of every value that occurs. ``note`` says why ``level`` is not
    higher, and is empty at the highest. ``cost`` counts evaluations of components (a weighted sum is free).
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
        return sum(d.cost for d in self.derivations)

    @property
    def unmeasured(self) -> tuple[Solve, ...]:
        """The derivations whose component declares no log-determinant."""
        return tuple(d for d in self.derivations if isinstance(d, Solve) and d.log_det is None)


@dataclasses.dataclass(frozen=True)
class Lost:
    """An input that cannot be had back, and the values on its way to the outputs that stay unknown with it."""

    input: str
    through: tuple[Ref, ...]


@dataclasses.dataclass(frozen=True)
class Blocker:
    """A node beyond which nothing more could be derived, and why."""

    path: str
    op: str
    place: Position
    reason: str


@dataclasses.dataclass(frozen=True)
class Remedy:
    """The cheapest set of values to store, beside the outputs, so that everything can be derived.

    ``bytes`` is symbolic in batch and length; ``total`` is its value at ``sizes``. ``lower`` is what any such set costs at
    least: equal to ``total`` where the search was exhaustive.
    """

    values: tuple[Ref, ...]
    bytes: Size
    total: int
    lower: int
    sizes: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a region cannot be undone. ``str()`` is the whole diagnosis, several lines long."""

    region: Region
    given: tuple[str, ...]
    lost: tuple[Lost, ...]
    blockers: tuple[Blocker, ...]
    remedy: Remedy
    rewrites: tuple[str, ...]
    types: Mapping[Ref, PortType]

    def __str__(self) -> str:
        from sedd_graph.inverse.format import diagnosis

        return diagnosis(self)
