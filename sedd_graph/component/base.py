"""The base class of every component: one class, one frozen ``Config``, ports read off ``forward``.

The contract is checked when the class is defined, so that a mistake shows at import and not during training. Nothing here
depends on blueprints or graphs.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

from sedd_graph.component.axes import PortType, parse_port_type
from sedd_graph.component.contract import Algebra, ComponentConfig, Port, Rule, Signature
from sedd_graph.component.declared import Declared
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.kv_cache import Memory

__all__ = ["Component", "ComponentConfig", "Context", "solves"]

KEY = "key"
"""The argument of ``forward`` that is no port: the engine fills it with randomness (see :mod:`sedd_graph.component.counter_rng`)."""

_KIND_OF_DTYPES = {"Float": "float", "Int": "int", "Bool": "bool"}


@dataclasses.dataclass(frozen=True)
class Context:
    """The place of a component in a graph, passed to its constructor.

    ``axes`` maps the component's own axis names (those of ``forward``'s annotations) to sizes; ``batch`` and ``length``
    are not known before a step runs and are absent. Process components get ``n`` (states) and ``v`` (data tokens).
    ``connected`` holds the names of the input ports that an edge feeds; ``path`` is the node's dotted path.
    """

    axes: Mapping[str, int]
    connected: frozenset[str] = frozenset()
    path: str = ""


_Method = TypeVar("_Method", bound=Callable[..., Any])


def solves(
    target: str | tuple[str, ...],
    *,
    given: tuple[str, ...],
    cost: float = 1.0,
    iterative: bool = False,
    log_det: str | None = None,
) -> Callable[[_Method], _Method]:
    """Mark a method of a component as a rule for the solver: it gives the input ``target`` from the ports ``given``.

    The method is called with the values of ``given`` in that order, without gradients; for a tuple of targets it returns
    a tuple. ``log_det`` is ``"zero"`` or the
    name of a method called with all inputs of ``forward`` that gives log |det d out / d target|, nats, [b].

    >>> @solves("x", given=("out", "shift"), log_det="zero")
    ... def inverse(self, out, shift):
    ...     return out - shift
    """

    def mark(method: _Method) -> _Method:
        method.__solves__ = (Rule(target, tuple(given), method.__name__, cost, iterative), log_det)  # type: ignore[attr-defined]
        return method

    return mark


class Component(nn.Module, Declared):
    """Base class. Subclasses give ``kind``, a nested ``Config`` and, for graph nodes, an annotated ``forward``.

    >>> class Double(Component, kind="arithmetic"):
    ...     class Config(ComponentConfig):
    ...         by: float = 2.0
    ...     def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    ...         return x * self.config.by

    A component that draws at random (dropout) takes ``key: Tensor | None = None`` as ``forward``'s last argument. It is no
    port: the engine passes int32 [b], another key for each step, row and node, or None where nothing is to be drawn.
    :func:`sedd_graph.component.counter_rng.dropout` turns it into a mask.

    Raises :class:`TypeError` at class definition where the contract is broken (no ``Config``, unannotated port, unknown
    kind).
    """

    outputs: ClassVar[tuple[str, ...]] = ("out",)
    keyed: ClassVar[bool] = False
    """Whether ``forward`` takes a ``key``; read off its arguments."""
    positionwise: ClassVar[bool] = False
    """Whether an output at a position depends on inputs at that position alone (and on inputs without a length). Samplers then
    evaluate only the positions that move."""
    moves: ClassVar[bool] = False
    """Whether outputs are the numbers of the inputs in other places (see :class:`sedd_graph.component.contract.Algebra`)."""
    memory: Memory | None = None
    """The KV cache, set by the engine while text is generated block by block. A component whose positions attend to each other
    calls it with its keys and values where it is set; others ignore it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "kind") or cls.is_abstract():
            return
        cls.keyed = KEY in inspect.signature(cls.forward).parameters
        if KINDS[cls.kind].is_node and "signature" not in cls.__dict__:
            _signature_of_forward(cls)

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__()
        self.config: Any = config
        self.context = context

    @classmethod
    def signature(cls, config: Any, arity: Mapping[str, int]) -> Signature:
        """The ports under ``config``; override it only where they depend on the Config or on how many edges come in."""
        return _signature_of_forward(cls)

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        """What the solver may know: by default the methods marked with :func:`solves`.

        Override it (and extend what ``super()`` gives) for linear relations, Lipschitz bounds, or rules that depend on the
        Config.
        """
        marked = [m.__solves__ for n in dir(cls) if hasattr(m := inspect.getattr_static(cls, n), "__solves__")]
        return Algebra(
            rules=tuple(rule for rule, _ in marked),
            log_det={rule.target: log_det for rule, log_det in marked if log_det is not None},
            moves=cls.moves,
        )

    def with_log_det(self, method: str, *inputs: Any) -> tuple[Any, Any]:
        """What ``forward`` gives for all of its inputs, and what ``method`` of :func:`solves` does: nats, [b].

        Override it where the two have work in common.
        """
        return self(*inputs), getattr(self, method)(*inputs)

    def axis(self, name: str) -> int:
        """The size of one of this component's own axes; :class:`KeyError` if it is dynamic."""
        return self.context.axes[name]


def _port_type(annotation: Any, where: str) -> PortType:
    if not (isinstance(annotation, type) and hasattr(annotation, "dim_str")):
        raise TypeError(f"{where}: annotate with jaxtyping, such as Float[Tensor, 'b l d'] (found {annotation!r})")
    name = annotation.__name__.split("[")[0]
    if name not in _KIND_OF_DTYPES:
        raise TypeError(f"{where}: use Float, Int or Bool (found {name})")
    return parse_port_type(f"{_KIND_OF_DTYPES[name]} {annotation.dim_str}".strip())


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [a for a in typing.get_args(annotation) if a is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return annotation


def _signature_of_forward(cls: type[Component]) -> Signature:
    """Read the ports off ``forward``: jaxtyping annotations, ``| None = None`` for optional, ``*xs`` for variadic."""
    function = cls.forward
    hints = function.__annotations__
    inputs = []
    for name, parameter in list(inspect.signature(function).parameters.items())[1:]:
        if name == KEY:
            continue
        where = f"{cls.__qualname__}.forward({name})"
        if parameter.kind is parameter.KEYWORD_ONLY or parameter.kind is parameter.VAR_KEYWORD:
            raise TypeError(f"{where}: keyword-only arguments cannot be ports")
        if name not in hints:
            raise TypeError(f"{where}: annotate every port, such as {name}: Float[Tensor, 'b l d']")
        optional = parameter.default is None
        annotation = _without_none(hints[name]) if optional else hints[name]
        inputs.append(
            Port(
                name=name,
                type=_port_type(annotation, where),
                optional=optional,
                variadic=parameter.kind is parameter.VAR_POSITIONAL,
            )
        )
    where = f"{cls.__qualname__}.forward -> "
    if "return" not in hints:
        raise TypeError(f"{where}: annotate what forward returns")
    returned: Any = hints["return"]
    parts = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
    if len(parts) != len(cls.outputs):
        raise TypeError(f"{where}: {len(parts)} value(s) returned, but outputs = {cls.outputs}")
    outputs = tuple(Port(name=n, type=_port_type(a, where + n)) for n, a in zip(cls.outputs, parts, strict=True))
    return Signature(inputs=tuple(inputs), outputs=outputs)
