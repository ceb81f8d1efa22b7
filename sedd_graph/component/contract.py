"""What a component promises, as plain data: its name, ports, Config, kind, and where it comes from.

The graph layers see components only through this file. No torch here: a contract is read off a class by
:mod:`sedd_graph.component.registry` and can be made by hand in a test.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any

import pydantic

from sedd_graph.component.axes import PortType
from sedd_graph.component.strict import Strict

__all__ = [
    "Algebra",
    "ComponentConfig",
    "Contract",
    "Port",
    "Rule",
    "Signature",
    "SizeField",
    "SizeMark",
    "no_algebra",
    "no_signature",
    "size_fields",
]


class ComponentConfig(Strict):
    """Base of every component's nested ``Config``: frozen, unknown keys refused, no NaN or infinity."""

    model_config = pydantic.ConfigDict(validate_default=True)


@dataclasses.dataclass(frozen=True)
class SizeMark:
    """Marks a Config field whose YAML value may be an axis expression such as ``v`` or ``4*d``."""


SizeField = Annotated[int, pydantic.Field(gt=0, lt=2**40), SizeMark()]
"""A positive size. In a blueprint it may be written as an integer or as an expression over axes."""


@dataclasses.dataclass(frozen=True)
class Port:
    """One named input or output. ``variadic`` inputs take any number (>= 1) of edges."""

    name: str
    type: PortType
    optional: bool = False
    variadic: bool = False


@dataclasses.dataclass(frozen=True)
class Signature:
    """The typed inputs and outputs of one component under one Config, in the order of ``forward``."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way to undo a component: the input ``target`` from the ports in ``given``, by calling ``method`` with them.

    Several targets make a tuple, and the method then returns one. The outputs in ``given`` must fix the targets whatever
    their values are. ``cost`` counts evaluations of the component's ``forward``. ``iterative``: to a tolerance instead of
    in closed form.
    """

    target: str | tuple[str, ...]
    given: tuple[str, ...]
    method: str
    cost: float = 1.0
    iterative: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target


@dataclasses.dataclass(frozen=True)
class Algebra:
    """What the solver may know of a component under one Config.

    ``linear`` says that an output is a sum of inputs with constant factors, ``{"out": {"x": 1, "y": -1}}`` (of a
    variadic port, each value with the same factor). ``lipschitz`` maps (input, output) to a bound on how much the
    output moves when that input alone moves, in the Euclidean norm of a whole sequence; a pair that is absent has none.
    ``log_det``: for each rule's target, ``"zero"`` where undoing it changes no volume, or the name of the method that
    gives log |det d out / d target| in nats, [b]; a target that is absent has none. ``moves``: outputs are the numbers of
    the inputs in other places, with no arithmetic done to them.
    """

    rules: tuple[Rule, ...] = ()
    linear: Mapping[str, Mapping[str, Fraction]] = dataclasses.field(default_factory=dict)
    lipschitz: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    log_det: Mapping[str | tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    moves: bool = False


def no_signature(config: ComponentConfig, arity: Mapping[str, int]) -> Signature:
    """Return the signature of a component that is no node of a graph: no ports."""
    return Signature((), ())


def no_algebra(config: ComponentConfig, signature: Signature) -> Algebra:
    """The algebra of a component that promises nothing."""
    return Algebra()


@dataclasses.dataclass(frozen=True)
class Contract:
    """Everything the blueprint and graph layers may know of a component.

    ``signature(config, arity)`` gives the ports; ``arity`` maps a variadic port to how many edges feed it.
    ``algebra(config, signature)`` gives the rules by which the solver may undo it; there, the types of the signature's
    connected ports are those of the graph, so that a rule may depend on sizes (``port.type.dims[-1].size.constant``).
    ``positionwise``: an output at a position follows from the inputs at that position, and from those without a length.
    """

    name: str
    version: int
    kind: str
    config: type[ComponentConfig]
    signature: Callable[[ComponentConfig, Mapping[str, int]], Signature]
    summary: str = ""
    algebra: Callable[[ComponentConfig, Signature], Algebra] = no_algebra
    positionwise: bool = False
    distribution: str = ""

    @property
    def op(self) -> str:
        """The pinned name, ``attention.v1``."""
        return f"{self.name}.v{self.version}"


def size_fields(config: type[ComponentConfig]) -> frozenset[str]:
    """The Config fields that may be written as axis expressions."""

    def marked(annotation: Any, metadata: tuple[Any, ...] = ()) -> bool:
        if any(isinstance(m, SizeMark) for m in metadata):
            return True
        extra = getattr(annotation, "__metadata__", ())
        return any(isinstance(m, SizeMark) for m in extra) or any(marked(a) for a in typing.get_args(annotation))

    return frozenset(n for n, f in config.model_fields.items() if marked(f.annotation, tuple(f.metadata)))
