"""Numerical verification of the :class:`~sedd_graph.component.contract.Algebra` that a component declares.

All evaluations are in float64, at random inputs of several scales and sizes, some with masked positions. Parameters are
perturbed from their initial values. Jacobians are computed for one short sequence (batch 1, length 2).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sedd_graph.component.axes import Dim, PortType, Size
from sedd_graph.component.contract import Algebra, ComponentConfig, Port, Rule, Signature
from sedd_graph.testing.case import Failures, Found, Trial, shape_of
from sedd_graph.testing.integers import check_integers

__all__ = ["check_algebra"]

_CLOSED, _ITERATIVE, _LOG_DET = 1e-9, 1e-5, 1e-8
"""Tolerances: relative errors of inverses in closed form and by iteration, and of log-determinants."""
_SCALES = (1.0, 0.1, 4.0)
"""Standard deviations of the random inputs, one random point for each."""


def check_algebra(trial: Trial, config: ComponentConfig) -> Failures:
    """Verify the declared algebra of a component numerically.

    The checks are ``algebra`` (fails if the method ``algebra`` raises, or names unknown ports or methods), ``float64``
    (fails if the component cannot be evaluated in float64), ``inverse`` (inversion rules), and ``log_det``, ``linear``,
    ``lipschitz``, ``rounding`` and ``moves``, each for the field of :class:`~sedd_graph.component.contract.Algebra` of this name.

    Args:
        trial: The component with the sizes of its axes. The component's parameters are not changed.
        config: Config of the component.

    Returns:
        The first failure of each check, as (name of the check, what is wrong); empty if all pass.
    """
    try:
        algebra = type(trial.component).algebra(config, _sized(trial))
    except Exception as error:  # whatever a component raises is the finding
        return [("algebra", f"{type(error).__name__}: {error}")]
    wrong = [("algebra", text) for text in _names(trial, algebra)]
    if wrong or algebra == Algebra():
        return wrong
    exact = copy.deepcopy(trial.component).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    failures: Failures = []
    short = {**trial.sizes, "b": 1, "l": 2}
    failures.extend(check_integers(exact, trial.signature, algebra))
    for seed, scale in enumerate(_SCALES):
        for sizes, checks in ((trial.sizes, _CHECKS), (short, _JACOBIAN_CHECKS)):
            try:
                point = _Point(dataclasses.replace(trial, component=exact, sizes=sizes), seed, scale, algebra.integers)
                for check in checks:
                    failures.extend(check(point, algebra))
            except Exception as error:
                failures.append(("float64", f"cannot be evaluated in float64: {type(error).__name__}: {error}"))
    return list({name: (name, text) for name, text in reversed(failures)}.values())


def _sized(trial: Trial) -> Signature:
    """Return the signature with every axis replaced by its size, as in a graph of static sizes."""

    def sized(port: Port) -> Port:
        dims = tuple(Dim(Size.of(size)) for size in shape_of(port.type, trial.sizes))
        return dataclasses.replace(port, type=PortType(port.type.kind, dims))

    return Signature(tuple(map(sized, trial.signature.inputs)), tuple(map(sized, trial.signature.outputs)))


def _names(trial: Trial, algebra: Algebra) -> Iterator[str]:
    """Yield a sentence for each name in the algebra that is not a port or method."""
    inputs, outputs = {p.name: p for p in trial.signature.inputs}, {p.name for p in trial.signature.outputs}
    for rule in algebra.rules:
        for target in rule.targets:
            if target not in inputs:
                yield f"rule {rule.method!r} gives {target!r}, which is not an input; inputs: {', '.join(inputs)}"
        for name in rule.given:
            if name not in inputs and name not in outputs:
                yield f"rule {rule.method!r} is given {name!r}, which is not a port"
            elif name in rule.targets or (name in inputs and inputs[name].variadic):
                yield f"rule {rule.method!r} is given {name!r}, which is its target or a variadic port"
        if not callable(getattr(trial.component, rule.method, None)):
            yield f"rule {rule.method!r} is not a method"
    for of, method in algebra.log_det.items():
        if of not in {rule.target for rule in algebra.rules}:
            yield f"log_det of {of!r}, which no rule gives"
        if method != "zero" and not callable(getattr(trial.component, method, None)):
            yield f"log_det {method!r} of {of!r} is neither 'zero' nor a method"
    for source, out in [
        *algebra.lipschitz,
        *algebra.rounding,
        *((i, o) for o, row in algebra.linear.items() for i in row),
    ]:
        if source not in inputs or out not in outputs:
            yield f"({source!r}, {out!r}) is not a pair of an input and an output"


class _Point:
    """Random float64 inputs of a component, and the outputs of the component for these inputs.

    ``values`` maps each connected port to its tensor, a variadic port to a list of tensors. With ``seed`` 0 some
    entries of ``attend`` and other masks are False.
    """

    def __init__(self, trial: Trial, seed: int, scale: float, integers: Mapping[str, int]) -> None:
        self.component, self.signature = trial.component, trial.signature
        generator = torch.Generator().manual_seed(seed)

        def draw(type_: PortType) -> Tensor:
            shape = shape_of(type_, trial.sizes)
            if type_.kind == "float":
                return torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            if type_.kind == "int":
                return torch.randint(0, 2, shape, generator=generator)
            mask = torch.rand(shape, generator=generator) < (0.6 if seed == 0 else 1.1)
            mask[..., 0] = True
            return mask

        self.values = {name: value for name, value in trial.values(draw) if value is not None}
        for name, values in integers.items():
            if name in self.values:
                self.values[name] = torch.randint(0, values, self.values[name].shape, generator=generator)
        with torch.no_grad():
            self.values.update(self.outputs({}))

    def arguments(self, changed: Mapping[str, Any]) -> list[Any]:
        """Return the arguments of ``forward``: random inputs, replaced by those in ``changed`` (by port name)."""
        found: list[Any] = []
        for port in self.signature.inputs:
            value = changed.get(port.name, self.values.get(port.name))
            found += value if port.variadic else [value]
        return found

    def outputs(self, changed: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return outputs by port name, for the random inputs replaced by those in ``changed`` (by port name)."""
        result = self.component(*self.arguments(changed))
        return dict(zip([p.name for p in self.signature.outputs], _tuple(result), strict=True))

    def jacobian(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Tensor:
        """Return the Jacobian of ``outputs`` with respect to ``inputs``, [output elements, input elements].

        Of a variadic input only the first tensor is varied.
        """
        start = tuple(_list(self.values[name])[0] for name in inputs)

        def function(*moved: Tensor) -> Tensor:
            changed = {
                name: [value, *self.values[name][1:]] if isinstance(self.values[name], list) else value
                for name, value in zip(inputs, moved, strict=True)
            }
            found = self.outputs(changed)
            return torch.cat([found[name].flatten() for name in outputs])

        parts = torch.autograd.functional.jacobian(function, start)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def has(self, *names: str) -> bool:
        """Return True if all ports ``names`` are connected."""
        return all(name in self.values for name in names)

    def solved_from(self, rule: Rule) -> tuple[str, ...]:
        """Return the names of the outputs among the arguments of an inversion rule."""
        outputs = {p.name for p in self.signature.outputs}
        return tuple(name for name in rule.given if name in outputs)


def _round_trips(point: _Point, algebra: Algebra) -> Found:
    for rule in algebra.rules:
        if not point.has(*rule.targets):
            continue
        with torch.no_grad():
            found = getattr(point.component, rule.method)(*[point.values.get(name) for name in rule.given])
        for name, value in zip(rule.targets, found if isinstance(rule.target, tuple) else (found,), strict=True):
            expected = point.values[name]
            if not expected.is_floating_point():
                continue  # check_integers compares all values
            text = f"{rule.method!r} gives {name!r} from {', '.join(point.solved_from(rule))}"
            if value.shape != expected.shape or value.dtype != expected.dtype:
                yield "inverse", f"{text} as {value.dtype} {list(value.shape)}, not as the input was"
                continue
            error = float((value.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
            if not error <= (_ITERATIVE if rule.iterative else _CLOSED):
                yield "inverse", f"{text} with a relative error of {error:.1e}"


def _log_dets(point: _Point, algebra: Algebra) -> Found:
    for rule in algebra.rules:
        method = algebra.log_det.get(rule.target)
        if method is None or not point.has(*rule.targets):
            continue
        if not all(point.values[name].is_floating_point() for name in rule.targets):
            continue
        jacobian = point.jacobian(rule.targets, point.solved_from(rule))
        if jacobian.shape[0] != jacobian.shape[1]:
            shape = " x ".join(map(str, jacobian.shape))
            yield "log_det", f"of {rule.target!r}: the Jacobian of the outputs that it is reconstructed from is {shape}"
            continue
        expected = float(torch.linalg.slogdet(jacobian).logabsdet)
        found = torch.zeros(1, dtype=torch.float64)
        if method != "zero":
            arguments = point.arguments({})
            with torch.no_grad():
                found = getattr(point.component, method)(*arguments)
                apart, together = point.component(*arguments), point.component.with_log_det(method, *arguments)
            if not _same((apart, found), together):
                yield "log_det", f"'with_log_det' gives other values than 'forward' and {method!r} apart"
        if found.shape != (1,):
            yield "log_det", f"{method!r} gives {list(found.shape)}, not one number of nats for each sequence"
        elif not abs(float(found) - expected) <= _LOG_DET * max(1.0, abs(expected)):
            yield "log_det", f"of {rule.target!r} is {float(found):.6g} nats, but {expected:.6g} by the Jacobian"


def _linear(point: _Point, algebra: Algebra) -> Found:
    for out, row in algebra.linear.items():
        expected = torch.zeros_like(point.values[out])
        for name, factor in row.items():
            for value in _list(point.values[name]):
                expected = expected + float(factor) * value
        error = float((expected - point.values[out]).norm() / expected.norm().clamp(min=1e-30))
        if not error <= _CLOSED:
            text = " + ".join(f"{factor} {name}" for name, factor in row.items())
            yield "linear", f"{out!r} is not {text}: relative difference {error:.1e}"


def _lipschitz(point: _Point, algebra: Algebra) -> Found:
    for (source, out), bound in algebra.lipschitz.items():
        if point.has(source):
            slope = float(torch.linalg.matrix_norm(point.jacobian((source,), (out,)), 2))
            if not slope <= bound * (1 + 1e-9):
                yield "lipschitz", f"{out!r} moves {slope:.6g} times as far as {source!r}, not at most {bound:g}"


def _rounding(point: _Point, algebra: Algebra) -> Found:
    """Compare outputs and inverses computed in float32 with those in float64, and the output at zero with zero."""
    if not algebra.rounding:
        return
    single = copy.deepcopy(point.component).float()
    exact = copy.deepcopy(single).double()  # the parameters that float32 has
    inputs = {n: v.float() if v.is_floating_point() else v for n, v in point.values.items() if isinstance(v, Tensor)}
    for (source, out), bound in algebra.rounding.items():
        if (source, out) not in algebra.lipschitz:
            yield "rounding", f"{out!r} of {source!r} has a rounding bound without a Lipschitz bound"
            continue
        names = [p.name for p in point.signature.inputs]
        place = [p.name for p in point.signature.outputs].index(out)
        with torch.no_grad():
            for scale in (1.0, 0.0):
                given = [inputs[n] * scale if n == source else inputs.get(n) for n in names]
                wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given]
                found, wanted = _tuple(single(*given))[place], _tuple(exact(*wide))[place]
                pairs = [(inputs[source] * scale, found, wanted)]
                for rule in algebra.rules if scale else ():
                    if rule.targets == (source,) and out in rule.given:
                        known = {**inputs, out: found}
                        narrow = [known.get(n) for n in rule.given]
                        back = getattr(single, rule.method)(*narrow)
                        wider = [v.double() if v is not None and v.is_floating_point() else v for v in narrow]
                        pairs.append((found, back, getattr(exact, rule.method)(*wider)))
                for start, computed, right in pairs:
                    error = float((computed.double() - right).flatten(1).norm(dim=1).max())
                    allowed = bound * 2.0**-24 * float(start.double().flatten(1).norm(dim=1).max())
                    if not error <= allowed:
                        yield "rounding", f"{out!r} of {source!r} is off by {error:.2e}, more than {allowed:.2e}"


def _moves(point: _Point, algebra: Algebra) -> Found:
    values = [v for p in point.signature.inputs for v in _list(point.values.get(p.name, []))]
    known = torch.cat([v.flatten() for v in values if v.is_floating_point()] or [torch.zeros(0)])
    for port in point.signature.outputs if algebra.moves else ():
        if port.type.kind == "float" and not bool(torch.isin(point.values[port.name], known).all()):
            yield "moves", f"{port.name!r} has numbers that no input has"


_Check = Callable[[_Point, Algebra], Found]
_CHECKS: tuple[_Check, ...] = (_round_trips, _linear, _moves, _rounding)
_JACOBIAN_CHECKS: tuple[_Check, ...] = (_round_trips, _log_dets, _lipschitz)


def _list(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _same(one: Any, other: Any) -> bool:
    """Return True if two nested tuples of tensors are equal up to rounding."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.allclose(one, other, rtol=1e-10, atol=1e-10)
