"""The check of components that stand as nodes of a graph.

Axes: b batch, l length; others are the component's own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sedd_graph.component.axes import AxisError, PortType
from sedd_graph.component.base import Component, Context
from sedd_graph.component.contract import Signature, size_fields
from sedd_graph.engine.positionwise_suffix import length_dim, take
from sedd_graph.testing.algebra import check_algebra
from sedd_graph.testing.case import Case, Failures

__all__ = ["check_node"]

_DYNAMIC = ("b", "l")


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


def check_node(case: Case) -> Failures:
    """Evaluate a node at random inputs: shapes, dtypes, gradients, padding, algebra, and compilation if asked for."""
    cls, config, failures = case.cls, case.config, Failures()
    try:
        signature = cls.signature(config, {"*": 2})
    except (TypeError, ValueError, AxisError) as error:
        return [("ports", str(error))]
    symbols = sorted({s for p in (*signature.inputs, *signature.outputs) for s in p.type.symbols})
    own = {n: v for n, v in config.model_dump().items() if n in size_fields(cls.Config) and n in symbols and v}
    sizes = {s: case.axes.get(s, own.get(s, 8)) for s in symbols} | {"b": 2, "l": 6}
    ports = [p for p in signature.inputs if not p.optional or p.name in case.connected]
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
        return [*failures, ("construction", f"{type(error).__name__}: {error}")]
    trial = Trial(component, signature, sizes, case.connected)
    for b, l in ((2, 6), (3, 4)):
        failures += _run(dataclasses.replace(trial, sizes={**sizes, "b": b, "l": l}))
    if not failures:
        failures += _gradients(trial)
    if not failures:
        failures += check_algebra(component, config, signature, sizes, case.connected)
    if cls.positionwise and not failures:
        failures += _positionwise(trial)
    if any(p.name == "attend" for p in signature.inputs):
        failures += _padding(trial)
    if case.compile and not failures:
        arguments = trial.arguments()
        expected = component(*arguments)
        found = torch.compile(component, fullgraph=True, dynamic=False)(*arguments)
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(_tuple(expected), _tuple(found), strict=True)):
            failures.append(("compile", "compiled and eager results differ"))
    return failures


@dataclasses.dataclass(frozen=True)
class Trial:
    """A component with the sizes of all axes and the optional ports that are fed."""

    component: Component
    signature: Signature
    sizes: Mapping[str, int]
    connected: tuple[str, ...]

    def arguments(self, *more: str) -> list[Any]:
        """Return random arguments of ``forward``; ``more`` are optional ports to feed besides."""
        generator = torch.Generator().manual_seed(0)
        arguments: list[Any] = []
        for port in self.signature.inputs:
            if port.variadic:
                arguments += [_make(port.type, self.sizes, generator) for _ in range(2)]
            else:
                wanted = not port.optional or port.name in (*self.connected, *more)
                arguments.append(_make(port.type, self.sizes, generator) if wanted else None)
        return arguments


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _run(trial: Trial) -> Iterator[tuple[str, str]]:
    """Compare two evaluations with the declared ports and with each other."""
    arguments = trial.arguments()
    before = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    try:
        with torch.no_grad():
            first, second = (_tuple(trial.component(*arguments)) for _ in range(2))
    except Exception as error:  # whatever a component raises is the finding
        yield "forward", f"{type(error).__name__}: {error}"
        return
    if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(arguments, before, strict=True)):
        yield "purity", "forward changes its inputs"
    ports = trial.signature.outputs
    if len(first) != len(ports):
        yield "ports", f"{len(first)} outputs, but {len(ports)} are declared"
        return
    for port, value, again in zip(ports, first, second, strict=True):
        shape = _shape(port.type, trial.sizes)
        if list(value.shape) != shape:
            yield "shape", f"output {port.name!r} is declared {port.type}, so {shape}, but is {list(value.shape)}"
        kinds = {
            "float": value.is_floating_point(),
            "bool": value.dtype == torch.bool,
            "int": value.dtype == torch.int64,
        }
        if not kinds[port.type.kind]:
            yield "dtype", f"output {port.name!r} is declared {port.type.kind}, but is {value.dtype}"
        if value.is_floating_point() and not bool(value.isfinite().all()):
            yield "finite", f"output {port.name!r} has values that are not finite"
        if not torch.equal(value, again):
            yield "determinism", f"output {port.name!r} differs between two evaluations"


def _gradients(trial: Trial) -> Iterator[tuple[str, str]]:
    """Check that a gradient reaches every parameter, all moved off their initial values."""
    component = trial.component
    parameters = list(component.named_parameters())
    if not parameters:
        return
    # zero-initialised parameters would hide those behind them
    state = {k: v.clone() for k, v in component.state_dict().items()}
    with torch.no_grad():
        for _, p in parameters:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    outputs = [o for o in _tuple(component(*trial.arguments())) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    parts = [(o.clamp(-1e3, 1e3) * torch.rand(o.shape, generator=generator)).sum() for o in outputs]
    torch.stack(parts).sum().backward()
    silent = [n for n, p in parameters if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    if silent:
        yield "gradient", f"no gradient reaches {', '.join(silent)}"
    component.zero_grad(set_to_none=True)
    component.load_state_dict(state)


def _positionwise(trial: Trial) -> Iterator[tuple[str, str]]:
    """Compare outputs at some positions, in another order, with those of a whole evaluation."""
    arguments, inputs = trial.arguments(), trial.signature.inputs
    ports = [p for p in inputs for _ in range(2 if p.variadic else 1)]
    chosen = torch.tensor([[3, 0, 5], [1, 1, 4]])

    def some(value: Tensor | None, found: PortType) -> Tensor | None:
        at = 1 if any(d.variadic for d in found.dims) else length_dim(found)
        return value if at is None or value is None else take(value, chosen, at)

    with torch.no_grad():
        every = _tuple(trial.component(*arguments))
        few = _tuple(trial.component(*[some(a, p.type) for a, p in zip(arguments, ports, strict=True)]))
    for port, whole, part in zip(trial.signature.outputs, every, few, strict=True):
        expected = some(whole, port.type)
        if expected is None or expected.shape != part.shape or not torch.allclose(expected, part, atol=1e-5):
            yield "positionwise", f"output {port.name!r} at a position depends on other positions"


def _padding(trial: Trial) -> Iterator[tuple[str, str]]:
    """Check that values at padded positions do not change outputs at the others."""
    arguments, sizes = trial.arguments("attend"), trial.sizes
    names = [p.name for p in trial.signature.inputs]
    attend = torch.ones(sizes["b"], sizes["l"], dtype=torch.bool)
    attend[:, -2:] = False
    arguments[names.index("attend")] = attend
    others = list(arguments)
    for index in range(len(names)):
        value = others[index]
        if isinstance(value, Tensor) and value.is_floating_point() and list(value.shape[:2]) == [*attend.shape]:
            others[index] = value.clone()
            noise = torch.randn(value[:, -2:].shape, generator=torch.Generator().manual_seed(3))
            others[index][:, -2:] += noise
    with torch.no_grad():
        pairs = itertools.zip_longest(*(_tuple(trial.component(*a)) for a in (arguments, others)))
        reached = any(not torch.allclose(a[:, :-2], b[:, :-2], atol=1e-5) for a, b in pairs if a.dim() >= 3)
    if reached:
        yield "padding", "values where 'attend' is false reach other positions"
