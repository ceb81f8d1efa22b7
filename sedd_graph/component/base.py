"""The base class of components that are modules: nodes of the network and parts of a process.

The ports of a node are read from the annotations of ``forward`` when its class is defined, so that a mistake shows at import
and not during training. Nothing here depends on blueprints or graphs.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

from sedd_graph.component.axes import PortType, parse_port_type
from sedd_graph.component.contract import Algebra, ComponentConfig, Port, Rule, Signature
from sedd_graph.component.declared import Declared
from sedd_graph.component.kinds import KINDS
from sedd_graph.component.kv_cache import KVCache
from sedd_graph.component.strict import branches

__all__ = ["Component", "ComponentConfig", "Context", "solves"]

KEY = "key"
"""Argument of ``forward`` that is not a port: the engine passes random keys in it (:mod:`sedd_graph.component.counter_rng`)."""

_KIND_OF_DTYPES = {"Float": "float", "Int": "int", "Bool": "bool"}


@dataclasses.dataclass(frozen=True)
class Context:
    """Sizes, connected ports and path of a component in its graph, passed to the constructor."""

    axes: Mapping[str, int]
    """Sizes by the component's own axis names (those in ``forward``'s annotations). The batch and the length are not known
    before a step runs and are absent. Parts of a process get ``n`` (states) and ``v`` (data tokens)."""
    connected: frozenset[str] = frozenset()
    """Names of the input ports that an edge feeds."""
    path: str = ""
    """Dotted path of the node, such as ``trunk.0.attend``."""


_Method = TypeVar("_Method", bound=Callable[..., Any])


def solves(
    target: str | tuple[str, ...],
    *,
    given: tuple[str, ...],
    cost: float = 1.0,
    iterative: bool = False,
    log_det: str | None = None,
) -> Callable[[_Method], _Method]:
    """Mark a method of a component as an inversion rule, which recovers the input ``target`` from the ports ``given``.

    The method is called with the values of ``given`` in that order, without gradients.

    >>> @solves("x", given=("out", "shift"), log_det="zero")
    ... def inverse(self, out, shift):
    ...     return out - shift

    Args:
        target: Name of the input; for several names the method returns a tuple.
        given: Names of outputs and of other inputs.
        cost: Cost of the method, in evaluations of ``forward``.
        iterative: True if the result is exact to a tolerance only, as by fixed-point iteration.
        log_det: The log-determinant of the Jacobian of the outputs with respect to ``target``: ``"zero"``, or the name of a
            method that is called with all inputs of ``forward`` and returns ``log |det d out / d target|``, nats, [b].
    """

    def mark(method: _Method) -> _Method:
        method.__solves__ = (Rule(target, tuple(given), method.__name__, cost, iterative), log_det)  # type: ignore[attr-defined]
        return method

    return mark


class Component(nn.Module, Declared):
    """Base class of components that are modules, with a ``kind`` and a nested ``Config``; nodes annotate their ``forward``.

    >>> class Double(Component, kind="arithmetic"):
    ...     class Config(ComponentConfig):
    ...         by: float = 2.0
    ...     config: Config
    ...     def forward(self, x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    ...         return x * self.config.by

    A component with randomness (dropout) takes ``key: Tensor | None = None`` as the last argument of ``forward``. It is not a
    port: the engine passes int32 [b], a different key for each step, row and node, or None to draw nothing (evaluation).
    :func:`sedd_graph.component.counter_rng.dropout` turns it into a mask.

    Raises:
        TypeError: When a subclass is defined without a ``Config``, with an unknown kind, or with a port that is not annotated.
    """

    outputs: ClassVar[tuple[str, ...]] = ("out",)
    """Names of the output ports, in the order in which ``forward`` returns them."""
    keyed: ClassVar[bool] = False
    """True if ``forward`` takes a ``key``; set from its arguments."""
    positionwise: ClassVar[bool] = False
    """True if an output at a position depends only on inputs at that position and on inputs without a length axis. Samplers
    then evaluate only the positions that change."""
    moves: ClassVar[bool] = False
    """True if outputs only rearrange the numbers of the inputs (see :class:`sedd_graph.component.contract.Algebra`)."""
    kv_cache: KVCache | None = None
    """KV cache, set by the engine while text is generated block by block. A component whose positions attend to each other
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
        self.config = config
        self.context = context

    @classmethod
    def signature(cls, config: Any, arity: Mapping[str, int]) -> Signature:
        """Return the ports under ``config``: by default those of ``forward``.

        Override it only where ports depend on the Config or on ``arity``, which maps each variadic port to its number of edges.
        """
        return _signature_of_forward(cls)

    @classmethod
    def algebra(cls, config: Any, signature: Signature) -> Algebra:
        """Return the algebra that the solver of inverses uses: by default the methods marked with :func:`solves`.

        Override it, and extend the result of ``super()``, for linear relations, Lipschitz bounds, or rules that depend on the
        Config.
        """
        marked = [m.__solves__ for n in dir(cls) if hasattr(m := inspect.getattr_static(cls, n), "__solves__")]
        return Algebra(
            rules=tuple(rule for rule, _ in marked),
            log_det={rule.target: log_det for rule, log_det in marked if log_det is not None},
            moves=cls.moves,
        )

    def with_log_det(self, method: str, *inputs: Any) -> tuple[Any, Any]:
        """Return the outputs of ``forward`` and the log-determinant by ``method`` (nats, [b]) for the same inputs.

        Override it where the two share computation.
        """
        return self(*inputs), getattr(self, method)(*inputs)

    def axis(self, name: str) -> int:
        """Return the size of one of this component's own axes. Raises :class:`KeyError` for the batch and the length."""
        return self.context.axes[name]


def _port_type(annotation: Any, where: str) -> PortType:
    if not (isinstance(annotation, type) and hasattr(annotation, "dim_str")):
        raise TypeError(f"{where}: annotate with jaxtyping, such as Float[Tensor, 'b l d'] (found {annotation!r})")
    name = annotation.__name__.split("[")[0]
    if name not in _KIND_OF_DTYPES:
        raise TypeError(f"{where}: use Float, Int or Bool (found {name})")
    return parse_port_type(f"{_KIND_OF_DTYPES[name]} {annotation.dim_str}".strip())


def _signature_of_forward(cls: type[Component]) -> Signature:
    """Read the ports from ``forward``: jaxtyping annotations, ``| None = None`` for optional, ``*xs`` for variadic."""
    hints = cls.forward.__annotations__
    inputs = []
    for name, parameter in list(inspect.signature(cls.forward).parameters.items())[1:]:
        if name == KEY:
            continue
        where = f"{cls.__qualname__}.forward({name})"
        if parameter.kind is parameter.KEYWORD_ONLY or parameter.kind is parameter.VAR_KEYWORD:
            raise TypeError(f"{where}: keyword-only arguments cannot be ports")
        if name not in hints:
            raise TypeError(f"{where}: annotate every port, such as {name}: Float[Tensor, 'b l d']")
        optional = parameter.default is None
        options = branches(hints[name]) if optional else []
        annotation = options[0] if len(options) == 1 else hints[name]
        variadic = parameter.kind is parameter.VAR_POSITIONAL
        inputs.append(Port(name, _port_type(annotation, where), optional, variadic))
    where = f"{cls.__qualname__}.forward -> "
    if "return" not in hints:
        raise TypeError(f"{where}: annotate what forward returns")
    returned: Any = hints["return"]
    parts = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
    if len(parts) != len(cls.outputs):
        raise TypeError(f"{where}: {len(parts)} value(s) returned, but outputs = {cls.outputs}")
    outputs = tuple(Port(n, _port_type(a, where + n)) for n, a in zip(cls.outputs, parts, strict=True))
    return Signature(inputs=tuple(inputs), outputs=outputs)
