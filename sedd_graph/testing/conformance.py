"""For authors of components: ``check_component`` holds a class to everything its contract says.

>>> from sedd_graph.testing.conformance import check_component
>>> check_component(MyAttention, {"heads": 2}, axes={"r": 8})
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.axes import AxisError, PortType
from sedd_graph.component.base import Component, Context
from sedd_graph.component.contract import NODE_KINDS, ComponentConfig, Signature, size_fields
from sedd_graph.diffusion.likelihood import Likelihood
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.classifier import NoisyClassifier
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.engine.positionwise_suffix import length_dim, take
from sedd_graph.testing.algebra import check_algebra

__all__ = ["ConformanceError", "check_component"]

_DYNAMIC = ("b", "l")


class ConformanceError(AssertionError):
    """Every promise that was not kept. ``failures`` is a tuple of (name of the check, what was seen)."""

    def __init__(self, cls: type, failures: list[tuple[str, str]]) -> None:
        super().__init__(f"{cls.__qualname__}: " + "; ".join(f"{name}: {text}" for name, text in failures))
        self.failures = tuple(failures)


def check_component(
    cls: type[Component],
    config: Mapping[str, Any] | None = None,
    *,
    axes: Mapping[str, int] | None = None,
    connected: tuple[str, ...] = (),
    compile: bool = False,
) -> None:
    """Check one component under one Config.

    ``axes`` gives the sizes of its own static axes (8 where it is silent), ``connected`` the optional ports to feed.
    Axes named ``b`` and ``l`` are batch and length and are tried at two sizes; integers are drawn below ``v`` where the
    component has such an axis (the mask, its last state, among them), else below 2. ``compile`` also compiles ``forward``.
    Raises :class:`ConformanceError` with every failure at once.
    """
    failures: list[tuple[str, str]] = []
    made = _config(cls, config or {}, failures)
    if made is not None:
        if cls.kind in NODE_KINDS:
            _node(cls, made, dict(axes or {}), connected, compile, failures)
        elif issubclass(cls, Schedule):
            from sedd_graph.verify.noise import check_schedule

            failures += [
                (c.name, f"{c.claim}: {c.value}") for c in check_schedule(cls(made, Context({"n": 4}))) if not c.holds
            ]
        elif issubclass(cls, Kernel):
            from sedd_graph.verify.noise import check_kernel

            kernel = cls(cls.toy(made, 4), Context({"n": 4}))
            failures += [(c.name, f"{c.claim}: {c.value}") for c in check_kernel(kernel, end=9.0) if not c.holds]
        elif issubclass(cls, NoisyClassifier):
            from sedd_graph.verify.classifier import check_classifier

            classifier = cls(made, Context({"n": 4}))
            failures += [(c.name, f"{c.claim}: {c.value}") for c in check_classifier(classifier, 4) if c.holds is False]
        elif issubclass(cls, Likelihood):
            failures += _likelihood(cls(made, Context({})))
    if failures:
        raise ConformanceError(cls, failures)


def _likelihood(base: Likelihood) -> list[tuple[str, str]]:
    """Whether the density is the one that is drawn from: the mean of q / base over draws is the integral of a density q."""
    z = base.draw((100_000, 2), generator=torch.Generator().manual_seed(0))
    nats = base.nats(z)
    if nats.shape != (len(z),):
        return [("nats", f"'nats' gives {list(nats.shape)}, not one number for each row")]
    narrow = 0.7  # of a deviation below that of the base, so that the mean exists
    other = 0.5 * (z / narrow).square().sum(1) + 2 * math.log(narrow * math.sqrt(2 * math.pi))
    weight = (nats - other).exp().double()
    error = 5 * weight.std() / len(z) ** 0.5
    if not abs(weight.mean() - 1) <= error:
        text = f"'draw' and 'nats' are not of one density: an integral that is 1 comes out as {weight.mean():.4f}"
        return [("density", text)]
    return []


def _config(cls: type[Component], values: Mapping[str, Any], failures: list[tuple[str, str]]) -> ComponentConfig | None:
    model = cls.Config
    if not model.model_config.get("frozen") or model.model_config.get("extra") != "forbid":
        failures.append(("config", "Config must stay frozen and refuse unknown keys"))
    try:
        model.model_validate({**values, "no_such_key": 1})
        failures.append(("config", "Config takes a key that it does not know"))
    except pydantic.ValidationError:
        pass
    try:
        made = model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        failures.append(("config", f"the given config is refused: {error.errors()[0]['msg']}"))
        return None
    if model.model_validate_json(made.model_dump_json()) != made:
        failures.append(("config", "Config does not survive JSON: the lock file could not hold it"))
    return made


def _shape(found: PortType, sizes: Mapping[str, int]) -> list[int]:
    shape: list[int] = []
    for dim in found.dims:
        shape += [sizes["b"], sizes["l"]] if dim.variadic else [dim.size.evaluate(sizes)]
    return shape


def _make(found: PortType, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = _shape(found, sizes)
    if found.kind == "float":
        return torch.rand(shape, generator=generator) + 0.1
    if found.kind == "bool":
        return torch.ones(shape, dtype=torch.bool)
    return torch.randint(0, sizes.get("v", 2), shape, generator=generator)


def _node(
    cls: type[Component],
    config: ComponentConfig,
    axes: dict[str, int],
    connected: tuple[str, ...],
    compile: bool,
    failures: list[tuple[str, str]],
) -> None:
    try:
        signature = cls.signature(config, {"*": 2})
    except (TypeError, ValueError, AxisError) as error:
        failures.append(("ports", str(error)))
        return
    symbols = sorted({s for p in (*signature.inputs, *signature.outputs) for s in p.type.symbols})
    own = {n: v for n, v in config.model_dump().items() if n in size_fields(cls.Config) and n in symbols and v}
    sizes = {s: axes.get(s, own.get(s, 8)) for s in symbols} | {"b": 2, "l": 6}
    ports = [p for p in signature.inputs if not p.optional or p.name in connected]
    context = Context(
        {s: v for s, v in sizes.items() if s not in _DYNAMIC}, frozenset(p.name for p in ports), "under_test"
    )
    try:
        with torch.device("meta"):
            cls(config, context)
    except Exception as error:  # whatever a component raises is the finding
        failures.append(("meta", f"cannot be made on the meta device (shapes only): {type(error).__name__}: {error}"))
    torch.manual_seed(0)
    try:
        component = cls(config, context).eval()
    except Exception as error:
        failures.append(("construction", f"{type(error).__name__}: {error}"))
        return
    for b, l in ((2, 6), (3, 4)):
        _run(component, signature, {**sizes, "b": b, "l": l}, connected, failures)
    _gradients(component, signature, sizes, connected, failures)
    if not failures:
        failures += check_algebra(component, config, signature, sizes, connected)
    if cls.positionwise and not failures:
        _positionwise(component, signature, sizes, connected, failures)
    if any(p.name == "attend" for p in signature.inputs):
        _padding(component, signature, sizes, connected, failures)
    if compile and not failures:
        arguments = _arguments(signature, sizes, connected)
        expected = component(*arguments)
        found = torch.compile(component, fullgraph=True, dynamic=False)(*arguments)
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(_tuple(expected), _tuple(found), strict=True)):
            failures.append(("compile", "compiled and eager results differ"))


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _arguments(signature: Signature, sizes: Mapping[str, int], connected: tuple[str, ...]) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    arguments: list[Any] = []
    for port in signature.inputs:
        if port.variadic:
            arguments += [_make(port.type, sizes, generator) for _ in range(2)]
        else:
            wanted = not port.optional or port.name in connected
            arguments.append(_make(port.type, sizes, generator) if wanted else None)
    return arguments


def _run(
    component: Component,
    signature: Signature,
    sizes: Mapping[str, int],
    connected: tuple[str, ...],
    failures: list[tuple[str, str]],
) -> None:
    arguments = _arguments(signature, sizes, connected)
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    try:
        with torch.no_grad():
            first, second = _tuple(component(*arguments)), _tuple(component(*arguments))
    except Exception as error:
        failures.append(("forward", f"{type(error).__name__}: {error}"))
        return
    if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(arguments, before, strict=True)):
        failures.append(("purity", "forward changes its inputs"))
    if len(first) != len(signature.outputs):
        failures.append(("ports", f"{len(first)} outputs, but {len(signature.outputs)} are declared"))
        return
    for port, value, again in zip(signature.outputs, first, second, strict=True):
        shape = _shape(port.type, sizes)
        if list(value.shape) != shape:
            failures.append(
                ("shape", f"output {port.name!r} is declared {port.type}, so {shape}, but is {list(value.shape)}")
            )
        kinds = {
            "float": value.is_floating_point(),
            "bool": value.dtype == torch.bool,
            "int": value.dtype == torch.int64,
        }
        if not kinds[port.type.kind]:
            failures.append(("dtype", f"output {port.name!r} is declared {port.type.kind}, but is {value.dtype}"))
        if value.is_floating_point() and not bool(value.isfinite().all()):
            failures.append(("finite", f"output {port.name!r} has values that are not finite"))
        if not torch.equal(value, again):
            failures.append(("determinism", f"output {port.name!r} differs between two evaluations"))


def _gradients(
    component: Component,
    signature: Signature,
    sizes: Mapping[str, int],
    connected: tuple[str, ...],
    failures: list[tuple[str, str]],
) -> None:
    parameters = list(component.named_parameters())
    if not parameters or failures:
        return
    # zero-initialised parameters would hide those behind them
    state = {k: v.clone() for k, v in component.state_dict().items()}
    with torch.no_grad():
        for _, p in parameters:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    outputs = [o for o in _tuple(component(*_arguments(signature, sizes, connected))) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    sum((o.clamp(-1e3, 1e3) * torch.rand(o.shape, generator=generator)).sum() for o in outputs).backward()  # type: ignore[union-attr]
    silent = [n for n, p in parameters if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    if silent:
        failures.append(("gradient", f"no gradient reaches {', '.join(silent)}"))
    component.zero_grad(set_to_none=True)
    component.load_state_dict(state)


def _positionwise(
    component: Component,
    signature: Signature,
    sizes: Mapping[str, int],
    connected: tuple[str, ...],
    failures: list[tuple[str, str]],
) -> None:
    """Some positions, in another order, give the same as all of them."""
    arguments = _arguments(signature, sizes, connected)
    ports = [p for p in signature.inputs for _ in range(2 if p.variadic else 1)]
    chosen = torch.tensor([[3, 0, 5], [1, 1, 4]])

    def some(value: Tensor | None, found: PortType) -> Tensor | None:
        at = 1 if any(d.variadic for d in found.dims) else length_dim(found)
        return value if at is None or value is None else take(value, chosen, at)

    with torch.no_grad():
        every = _tuple(component(*arguments))
        few = _tuple(component(*[some(a, p.type) for a, p in zip(arguments, ports, strict=True)]))
    for port, whole, part in zip(signature.outputs, every, few, strict=True):
        expected = some(whole, port.type)
        if expected is None or expected.shape != part.shape or not torch.allclose(expected, part, atol=1e-5):
            failures.append(("positionwise", f"output {port.name!r} at a position depends on other positions"))


def _padding(
    component: Component,
    signature: Signature,
    sizes: Mapping[str, int],
    connected: tuple[str, ...],
    failures: list[tuple[str, str]],
) -> None:
    """What stands at hidden positions must not reach the others."""
    arguments = _arguments(signature, sizes, (*connected, "attend"))
    names = [p.name for p in signature.inputs]
    attend = torch.ones(sizes["b"], sizes["l"], dtype=torch.bool)
    attend[:, -2:] = False
    arguments[names.index("attend")] = attend
    others = list(arguments)
    for index, port in enumerate(signature.inputs):
        value = others[index]
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and list(value.shape[:2]) == [sizes["b"], sizes["l"]]
        ):
            others[index] = value.clone()
            others[index][:, -2:] += torch.randn(
                others[index][:, -2:].shape, generator=torch.Generator().manual_seed(3)
            )
        del port
    with torch.no_grad():
        pairs = list(itertools.zip_longest(_tuple(component(*arguments)), _tuple(component(*others))))
    if any(not torch.allclose(a[:, :-2], b[:, :-2], atol=1e-5) for a, b in pairs if a.dim() >= 3):
        failures.append(("padding", "what stands where 'attend' is false reaches other positions"))
