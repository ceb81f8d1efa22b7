"""The checks of parts of a process: each is proved on the enumerable toy that ``build`` uses, with sound partners."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch

from sedd_graph.component.base import Context
from sedd_graph.component.check import Check
from sedd_graph.component.registry import Registry, installed
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.errors import BlueprintError
from sedd_graph.families import strings, tokens
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.testing.case import Case, Failures
from sedd_graph.verify import classifier, noise
from sedd_graph.verify.tokens import prove_objective, prove_sampler

__all__ = [
    "check_classifier",
    "check_kernel",
    "check_likelihood",
    "check_objective",
    "check_sampler",
    "check_schedule",
    "check_strings",
]

STATES = 4
"""States of a kernel or classifier that is checked by itself."""
DECLARED_STATES = 10
"""States of the declared string process, whose proof cuts it down."""
_SELF = "under_test"
_PARTNERS = {
    "kernel": ("absorb", "uniform", "power"),
    "objective": ("masked_count", "nelbo", "score_entropy", "genmd4"),
    "sampler": ("ancestral", "analytic"),
    "string_kernel": ("delete", "mask_delete", "edit_flow"),
    "string_objective": ("dise", "flexmdm", "edit_flow_loss"),
    "string_sampler": ("string_tau", "flexmdm_tau"),
}
"""Sound partners of each kind, the simplest first."""


def check_schedule(case: Case) -> Failures:
    """Check that total noise rises from 0 and that its derivative is right."""
    return _failed(noise.check_schedule(case.cls(case.config, Context({"n": STATES}))))


def check_kernel(case: Case) -> Failures:
    """Compare rates, transitions, draws, losses and steps of a kernel cut down to a few states with each other."""
    kernel = case.cls(case.cls.toy(case.config, STATES), Context({"n": STATES}))
    return _failed(noise.check_kernel(kernel, end=9.0))


def check_classifier(case: Case) -> Failures:
    """Check that chances of labels sum to 1, and that changes agree with differences."""
    return _failed(classifier.check_classifier(case.cls(case.config, Context({"n": STATES})), STATES))


def check_likelihood(case: Case) -> Failures:
    """Check that the density is that of the draws: the mean of q / base over draws is the integral of a density q, 1."""
    base = case.cls(case.config, Context({}))
    z = base.draw((100_000, 2), generator=torch.Generator().manual_seed(0))
    nats = base.nats(z)
    if nats.shape != (len(z),):
        return [("nats", f"'nats' gives {list(nats.shape)}, not one number per row")]
    narrow = 0.7  # of a deviation below that of the base, so that the mean exists
    other = 0.5 * (z / narrow).square().sum(1) + 2 * math.log(narrow * math.sqrt(2 * math.pi))
    weight = (nats - other).exp().double()
    error = 5 * weight.std() / len(z) ** 0.5
    if not abs(weight.mean() - 1) <= error:
        text = f"'draw' and 'nats' are not of one density: an integral of 1 comes out as {weight.mean():.4f}"
        return [("density", text)]
    return []


def check_objective(case: Case) -> Failures:
    """Prove that the bound with a perfect network is the entropy of the data."""
    return _tokens(case, prove_objective)


def check_sampler(case: Case) -> Failures:
    """Prove that samples drawn with a perfect network follow the distribution of the data."""
    return _tokens(case, prove_sampler)


def check_strings(case: Case) -> Failures:
    """Prove a kernel, objective or sampler of strings within a whole process."""
    kinds = ("string_kernel", "string_objective", "string_sampler")
    registry, reasons = _registry(case), dict[str, None]()
    for kernel, objective, sampler in _combinations(case, kinds, registry):
        outputs = registry.component(kernel.contract.op).parametrizations(kernel.config)[0]
        plan = ProcessPlan(
            "strings", kernel, _part(registry, "loglinear"), objective, sampler, DECLARED_STATES, outputs
        )
        try:
            strings.make_parts(plan, registry)
        except BlueprintError as error:
            reasons |= dict.fromkeys(p.message for p in error.problems)
            continue
        return _failed(strings.prove(plan, registry))
    return _alone(reasons)


def _tokens(case: Case, prove: Callable[[Callable[..., TokenParts], str], list[Check]]) -> Failures:
    """Prove one combination for each kernel and each of its outputs that the component reads."""
    registry, failures = _registry(case), Failures()
    reasons, proved = dict[str, None](), set[tuple[str, str]]()
    for kernel, objective, sampler in _combinations(case, ("kernel", "objective", "sampler"), registry):
        cls = registry.component(kernel.contract.op)
        schedule = _part(registry, "loglinear" if cls.clamp_safe else "geometric")
        for outputs in cls.parametrizations(kernel.config):
            plan = ProcessPlan("tokens", kernel, schedule, objective, sampler, STATES, outputs)
            key = (kernel.name, plan.output)
            if key in proved or (proved and kernel.name == "power"):  # power is for what works with it alone
                continue
            try:
                tokens.make_parts(plan, registry)
            except BlueprintError as error:
                reasons |= dict.fromkeys(p.message for p in error.problems)
                continue
            proved.add(key)
            found = _failed(prove(partial(tokens.make_parts, plan, registry), plan.output))
            failures += [(name, f"with {' and '.join(key)}: {text}") for name, text in found]
    return failures if proved else _alone(reasons)


def _alone(reasons: Iterable[str]) -> Failures:
    return [("partners", f"none of the partners goes with it, pass others as partners=...: {'; '.join(reasons)}")]


def _registry(case: Case) -> Registry:
    partners = {f"partner{i}": cls for i, cls in enumerate(case.partners)}
    return Registry.of({_SELF: case.cls, **partners}) | installed()


def _part(registry: Registry, op: str) -> Part:
    contract = registry.contract(op)
    return Part(contract, contract.config.model_validate(getattr(registry.component(op), "example", {})))


def _combinations(case: Case, kinds: Sequence[str], registry: Registry) -> Iterator[tuple[Part, ...]]:
    """Yield the component with partners of the other kinds: those that were passed, or the built-in ones."""

    def parts(kind: str) -> Iterable[Part]:
        if kind == case.cls.kind:
            return [Part(registry.contract(_SELF), case.config)]
        given = [f"partner{i}" for i, cls in enumerate(case.partners) if getattr(cls, "kind", None) == kind]
        return [_part(registry, op) for op in given or _PARTNERS[kind]]

    return itertools.product(*map(parts, kinds))


def _failed(checks: list[Check]) -> Failures:
    return [(c.name, f"{c.claim}: {c.value}") for c in checks if c.holds is False]
