"""Compares a component's :class:`~sedd_graph.component.contract.Algebra` with numbers.

Called by :func:`sedd_graph.testing.conformance.check_component`. Everything is done in float64 at random points of several sizes, some
with hidden positions, with the parameters moved off their start; whole Jacobians are those of one short sequence.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sedd_graph.component.axes import Dim, Size
from sedd_graph.component.base import Component
from sedd_graph.component.contract import Algebra, ComponentConfig, Port, Signature

__all__ = ["check_algebra"]

Failures = list[tuple[str, str]]
_CLOSED, _ITERATIVE, _LOG_DET = 1e-9, 1e-5, 1e-8
_SCALES = (1.0, 0.1, 4.0)
"""How large the random inputs are: one point at each."""


def check_algebra(
    component: Component,
    config: ComponentConfig,
    signature: Signature,
    sizes: Mapping[str, int],
    connected: tuple[str, ...],
) -> Failures:
    """Return what is wrong with the algebra of ``component``, as (name of the check, what was found).

    The names are ``algebra`` (it cannot be read), ``float64``, ``inverse``, ``log_det``, ``linear``, ``lipschitz`` and ``moves``.
    ``sizes`` gives every axis, ``connected`` the optional ports that are fed.
    """
    try:
        algebra = type(component).algebra(config, _sized(signature, sizes))
    except Exception as error:  # whatever a component raises is the finding
        return [("algebra", f"{type(error).__name__}: {error}")]
    wrong = [("algebra", text) for text in _names(component, algebra, signature)]
    if wrong or algebra == Algebra():
        return wrong
    exact = copy.deepcopy(component).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    failures: Failures = []
    for seed, scale in enumerate(_SCALES):
        try:
            many = _Point(exact, signature, sizes, connected, seed, scale)
            one = _Point(exact, signature, {**sizes, "b": 1, "l": 2}, connected, seed, scale)
            failures += _round_trips(many, algebra) + _round_trips(one, algebra) + _linear(many, algebra)
            failures += _log_dets(one, algebra) + _lipschitz(one, algebra) + _moves(many, algebra)
        except Exception as error:
            failures.append(("float64", f"cannot be evaluated in float64: {type(error).__name__}: {error}"))
    return list(dict(reversed(failures)).items())[::-1]  # of each check the first finding


def _sized(signature: Signature, sizes: Mapping[str, int]) -> Signature:
    """The signature with every axis replaced by its size, as the solver sees it in a graph of static sizes."""

    def sized(port: Port) -> Port:
        dims: list[Dim] = []
        for dim in port.type.dims:
            stands = [sizes["b"], sizes["l"]] if dim.variadic else [dim.size.evaluate(sizes)]
            dims += [Dim(Size.of(s)) for s in stands]
        return dataclasses.replace(port, type=dataclasses.replace(port.type, dims=tuple(dims)))

    return Signature(tuple(map(sized, signature.inputs)), tuple(map(sized, signature.outputs)))


def _names(component: Component, algebra: Algebra, signature: Signature) -> Iterator[str]:
    """Yield a sentence for each name in the algebra that is no port or method."""
    inputs, outputs = {p.name: p for p in signature.inputs}, {p.name for p in signature.outputs}
    for rule in algebra.rules:
        for target in rule.targets:
            if target not in inputs:
                yield f"rule {rule.method!r} gives {target!r}, which is no input; inputs: {', '.join(inputs)}"
        for name in rule.given:
            if name not in inputs and name not in outputs:
                yield f"rule {rule.method!r} is given {name!r}, which is no port"
            elif name in rule.targets or (name in inputs and inputs[name].variadic):
                yield f"rule {rule.method!r} is given {name!r}, which is its target or takes any number of values"
        if not callable(getattr(component, rule.method, None)):
            yield f"rule {rule.method!r} is no method"
    targets = {rule.target for rule in algebra.rules}
    for of, method in algebra.log_det.items():
        if of not in targets:
            yield f"log_det of {of!r}, which no rule gives"
        if method != "zero" and not callable(getattr(component, method, None)):
            yield f"log_det {method!r} of {of!r} is neither 'zero' nor a method"
    pairs = [*algebra.lipschitz, *((i, o) for o, row in algebra.linear.items() for i in row)]
    for source, out in pairs:
        if source not in inputs or out not in outputs:
            yield f"({source!r}, {out!r}) is no pair of an input and an output"


class _Point:
    """Random float64 inputs of a component, and its outputs there.

    ``values`` maps every fed port to its value, a variadic one to a list. Of ``attend`` and other masks the first point
    (``seed`` 0) hides some.
    """

    def __init__(
        self,
        component: Component,
        signature: Signature,
        sizes: Mapping[str, int],
        connected: tuple[str, ...],
        seed: int,
        scale: float,
    ) -> None:
        self.component, self.signature = component, signature
        generator = torch.Generator().manual_seed(seed)
        self.values: dict[str, Any] = {}
        for port in _sized(signature, sizes).inputs:
            shape = [int(str(d.size)) for d in port.type.dims]

            def draw() -> Tensor:
                if port.type.kind == "float":
                    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale
                if port.type.kind == "int":
                    return torch.randint(0, 2, shape, generator=generator)
                shown = torch.rand(shape, generator=generator) < (0.6 if seed == 0 else 1.1)
                shown[..., 0] = True
                return shown

            if not port.optional or port.name in connected:
                self.values[port.name] = [draw(), draw()] if port.variadic else draw()
        with torch.no_grad():
            outputs = self.outputs({})
        self.values.update(outputs)

    def arguments(self, changed: Mapping[str, Any]) -> list[Any]:
        """The arguments of ``forward``, some of them changed."""
        found: list[Any] = []
        for port in self.signature.inputs:
            value = changed.get(port.name, self.values.get(port.name))
            found += value if port.variadic else [value]
        return found

    def outputs(self, changed: Mapping[str, Any]) -> dict[str, Tensor]:
        result = self.component(*self.arguments(changed))
        result = result if isinstance(result, tuple) else (result,)
        return dict(zip([p.name for p in self.signature.outputs], result, strict=True))

    def jacobian(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Tensor:
        """d outputs / d inputs, all numbers of each side in one row. Inputs that are variadic move by their first value."""
        start = [v[0] if isinstance(v := self.values[name], list) else v for name in inputs]

        def function(*moved: Tensor) -> Tensor:
            changed = {
                name: [value, *self.values[name][1:]] if isinstance(self.values[name], list) else value
                for name, value in zip(inputs, moved, strict=True)
            }
            found = self.outputs(changed)
            return torch.cat([found[name].flatten() for name in outputs])

        parts = torch.autograd.functional.jacobian(function, tuple(start))
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def has(self, *names: str) -> bool:
        return all(name in self.values for name in names)


def _round_trips(point: _Point, algebra: Algebra) -> Failures:
    failures: Failures = []
    outputs = {p.name for p in point.signature.outputs}
    for rule in algebra.rules:
        if not point.has(*rule.targets):
            continue
        with torch.no_grad():
            found = getattr(point.component, rule.method)(*[point.values.get(name) for name in rule.given])
        found = found if isinstance(rule.target, tuple) else (found,)
        for name, value in zip(rule.targets, found, strict=True):
            expected = point.values[name]
            what = f"{rule.method!r} gives {name!r} from {', '.join(n for n in rule.given if n in outputs)}"
            if value.shape != expected.shape or value.dtype != expected.dtype:
                failures.append(("inverse", f"{what} as {value.dtype} {list(value.shape)}, not as it went in"))
                continue
            error = float((value.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
            if not error <= (_ITERATIVE if rule.iterative else _CLOSED):
                failures.append(("inverse", f"{what} with a relative error of {error:.1e}"))
    return failures


def _log_dets(point: _Point, algebra: Algebra) -> Failures:
    failures: Failures = []
    outputs = {p.name for p in point.signature.outputs}
    for rule in algebra.rules:
        method = algebra.log_det.get(rule.target)
        if method is None or not point.has(*rule.targets):
            continue
        if not all(point.values[name].is_floating_point() for name in rule.targets):
            continue
        jacobian = point.jacobian(rule.targets, tuple(n for n in rule.given if n in outputs))
        if jacobian.shape[0] != jacobian.shape[1]:
            shape = " x ".join(map(str, jacobian.shape))
            failures.append(
                ("log_det", f"of {rule.target!r}: the Jacobian of the outputs that it is reconstructed from is {shape}")
            )
            continue
        expected = torch.linalg.slogdet(jacobian).logabsdet
        found = torch.zeros(1, dtype=torch.float64)
        if method != "zero":
            arguments = point.arguments({})
            with torch.no_grad():
                found = getattr(point.component, method)(*arguments)
                apart, together = point.component(*arguments), point.component.with_log_det(method, *arguments)
            if not _same((apart, found), together):
                failures.append(("log_det", f"'with_log_det' gives other values than 'forward' and {method!r} apart"))
        if found.shape != (1,):
            failures.append(
                ("log_det", f"{method!r} gives {list(found.shape)}, not one number of nats for each sequence")
            )
        elif not abs(float(found - expected)) <= _LOG_DET * max(1.0, abs(float(expected))):
            failures.append(
                ("log_det", f"of {rule.target!r} is {float(found):.6g} nats, but {float(expected):.6g} by the Jacobian")
            )
    return failures


def _linear(point: _Point, algebra: Algebra) -> Failures:
    failures: Failures = []
    for out, row in algebra.linear.items():
        expected = torch.zeros_like(point.values[out])
        for name, factor in row.items():
            value = point.values[name]
            for one in value if isinstance(value, list) else [value]:
                expected = expected + float(factor) * one
        error = float((expected - point.values[out]).norm() / expected.norm().clamp(min=1e-30))
        if not error <= _CLOSED:
            text = " + ".join(f"{factor} {name}" for name, factor in row.items())
            failures.append(("linear", f"{out!r} is not {text}: relative difference {error:.1e}"))
    return failures


def _lipschitz(point: _Point, algebra: Algebra) -> Failures:
    failures: Failures = []
    for (source, out), bound in algebra.lipschitz.items():
        if not point.has(source):
            continue
        slope = float(torch.linalg.matrix_norm(point.jacobian((source,), (out,)), 2))
        if not slope <= bound * (1 + 1e-9):
            failures.append(
                ("lipschitz", f"{out!r} moves {slope:.6g} times as far as {source!r}, not at most {bound:g}")
            )
    return failures


def _moves(point: _Point, algebra: Algebra) -> Failures:
    if not algebra.moves:
        return []
    values = [v for p in point.signature.inputs for v in _several(point.values.get(p.name))]
    known = torch.cat([v.flatten() for v in values if v.is_floating_point()] or [torch.zeros(0)])
    strange = [
        port.name
        for port in point.signature.outputs
        if port.type.kind == "float" and not bool(torch.isin(point.values[port.name], known).all())
    ]
    return [("moves", f"{name!r} holds numbers that did not come in") for name in strange]


def _several(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _same(one: Any, other: Any) -> bool:
    """Whether two trees of tuples hold the same numbers, but for rounding."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10)
