"""Conformance tests of graph nodes, the components that a network is built from.

Axes: b batch, l length. All other axes are declared by the component.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from sedd_graph.component.axes import AxisError, PortType
from sedd_graph.component.base import Context
from sedd_graph.component.contract import size_fields
from sedd_graph.engine.positionwise_suffix import length_dim, take
from sedd_graph.testing.algebra import check_algebra
from sedd_graph.testing.case import Case, Failures, Found, Trial, shape_of

__all__ = ["check_node"]

_DYNAMIC = ("b", "l")


def check_node(case: Case) -> Failures:
    """Test shapes, dtypes, gradients, padding, algebra and, if requested, ``torch.compile`` of a graph node.

    Args:
        case: Class, Config, axis sizes and connected ports of the node.

    Returns:
        The failed checks; empty if all pass.
    """
    cls, config, failures = case.cls, case.config, Failures()
    try:
        signature = cls.signature(config, {"*": 2})
    except (TypeError, ValueError, AxisError) as error:
        return [("ports", str(error))]
    symbols = sorted({s for p in (*signature.inputs, *signature.outputs) for s in p.type.symbols})
    own = {n: v for n, v in config.model_dump().items() if n in size_fields(cls.Config) and n in symbols and v}
    sizes = {s: case.axes.get(s, own.get(s, 8)) for s in symbols} | {"b": 2, "l": 6}
    ports = [p for p in signature.inputs if not p.optional or p.name in case.connected]
    static = {s: v for s, v in sizes.items() if s not in _DYNAMIC}
    context = Context(static, frozenset(p.name for p in ports), "under_test")
    try:
        with torch.device("meta"):
            cls(config, context)
    except Exception as error:  # whatever a component raises is the finding
        text = f"cannot be constructed on the meta device (shapes only): {type(error).__name__}: {error}"
        failures.append(("meta", text))
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
        failures += check_algebra(trial, config)
    if cls.positionwise and not failures:
        failures += _positionwise(trial)
    if any(p.name == "attend" for p in signature.inputs):
        failures += _padding(trial)
    if case.compile and not failures:
        arguments = _arguments(trial)
        expected = component(*arguments)
        found = torch.compile(component, fullgraph=True, dynamic=False)(*arguments)
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(_tuple(expected), _tuple(found), strict=True)):
            failures.append(("compile", "compiled and eager results differ"))
    return failures


def _arguments(trial: Trial, *more: str) -> list[Any]:
    """Return random arguments of ``forward``; ``more`` names optional ports to connect besides those of the trial."""
    generator = torch.Generator().manual_seed(0)

    def draw(type_: PortType) -> Tensor:
        shape = shape_of(type_, trial.sizes)
        if type_.kind == "float":
            return torch.rand(shape, generator=generator) + 0.1
        if type_.kind == "bool":
            return torch.ones(shape, dtype=torch.bool)
        return torch.randint(0, trial.sizes.get("v", 2), shape, generator=generator)

    values = (value for _, value in trial.values(draw, *more))
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _run(trial: Trial) -> Found:
    """Check that outputs have the declared shapes and dtypes, are finite, and are equal in a second evaluation."""
    arguments = _arguments(trial)
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
        shape = shape_of(port.type, trial.sizes)
        if list(value.shape) != shape:
            yield "shape", f"output {port.name!r} is declared {port.type}, so {shape}, but is {list(value.shape)}"
        kind = "float" if value.is_floating_point() else {torch.bool: "bool", torch.int64: "int"}.get(value.dtype)
        if kind != port.type.kind:
            yield "dtype", f"output {port.name!r} is declared {port.type.kind}, but is {value.dtype}"
        if value.is_floating_point() and not bool(value.isfinite().all()):
            yield "finite", f"output {port.name!r} has values that are not finite"
        if not torch.equal(value, again):
            yield "determinism", f"output {port.name!r} differs between two evaluations"


def _gradients(trial: Trial) -> Found:
    """Check that every parameter gets a non-zero gradient, after all are perturbed from their initial values."""
    component = trial.component
    parameters = list(component.named_parameters())
    if not parameters:
        return
    # parameters that are initialised to zero would cut off the gradients of those before them
    state = {k: v.clone() for k, v in component.state_dict().items()}
    with torch.no_grad():
        for _, p in parameters:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    outputs = [o for o in _tuple(component(*_arguments(trial))) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    parts = [(o.clamp(-1e3, 1e3) * torch.rand(o.shape, generator=generator)).sum() for o in outputs]
    torch.stack(parts).sum().backward()
    silent = [n for n, p in parameters if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    if silent:
        yield "gradient", f"no gradient reaches {', '.join(silent)}"
    component.zero_grad(set_to_none=True)
    component.load_state_dict(state)


def _positionwise(trial: Trial) -> Found:
    """Check that outputs at selected positions, in another order, equal those of an evaluation at all positions."""
    arguments, inputs = _arguments(trial), trial.signature.inputs
    ports = [p for p in inputs for _ in range(2 if p.variadic else 1)]
    chosen = torch.tensor([[3, 0, 5], [1, 1, 4]])

    def select(value: Tensor | None, type_: PortType) -> Tensor | None:
        dim = 1 if any(d.variadic for d in type_.dims) else length_dim(type_)
        return value if dim is None or value is None else take(value, chosen, dim)

    with torch.no_grad():
        every = _tuple(trial.component(*arguments))
        some = _tuple(trial.component(*[select(a, p.type) for a, p in zip(arguments, ports, strict=True)]))
    for port, whole, part in zip(trial.signature.outputs, every, some, strict=True):
        expected = select(whole, port.type)
        if expected is None or expected.shape != part.shape or not torch.allclose(expected, part, atol=1e-5):
            yield "positionwise", f"output {port.name!r} at a position depends on other positions"


def _padding(trial: Trial) -> Found:
    """Check that float inputs at padded positions do not affect outputs at the other positions."""
    arguments, sizes = _arguments(trial, "attend"), trial.sizes
    attend = torch.ones(sizes["b"], sizes["l"], dtype=torch.bool)
    attend[:, -2:] = False
    arguments[[p.name for p in trial.signature.inputs].index("attend")] = attend
    others = list(arguments)
    for index, value in enumerate(arguments):
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:2] == attend.shape:
            others[index] = value.clone()
            noise = torch.randn(value[:, -2:].shape, generator=torch.Generator().manual_seed(3))
            others[index][:, -2:] += noise
    with torch.no_grad():
        pairs = itertools.zip_longest(*(_tuple(trial.component(*a)) for a in (arguments, others)))
        reached = any(not torch.allclose(a[:, :-2], b[:, :-2], atol=1e-5) for a, b in pairs if a.dim() >= 3)
    if reached:
        yield "padding", "values where 'attend' is false affect other positions"
