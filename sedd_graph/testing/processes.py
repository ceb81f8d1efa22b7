"""Conformance tests of components of a diffusion process, such as kernels, objectives and samplers.

A component is combined with others to a process with few token states, which is verified as by the subcommand
``build``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch

from sedd_graph.component.base import Context
from sedd_graph.component.check import Check, Proof
from sedd_graph.component.outputs import LOG_X0
from sedd_graph.component.registry import Registry, installed
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.errors import BlueprintError
from sedd_graph.families import strings, tokens, vectors
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.testing.case import Case, Failures
from sedd_graph.verify import classifier, noise, vector_classifier
from sedd_graph.verify.tokens import prove_objective, prove_sampler

__all__ = [
    "check_classifier",
    "check_distillation",
    "check_kernel",
    "check_likelihood",
    "check_objective",
    "check_sampler",
    "check_schedule",
    "check_strings",
    "check_vector_classifier",
    "check_vectors",
]

STATES = 4
"""Number of states of the kernel or classifier under test."""
DECLARED_STATES = 10
"""Number of token states that a string process under test declares. Most of its verification uses a kernel with fewer
states."""
_SELF = "under_test"
_PARTNERS = {
    "kernel": ("absorb", "uniform", "power"),
    "objective": ("masked_count", "nelbo", "score_entropy", "genmd4"),
    "sampler": ("ancestral", "analytic"),
    "string_kernel": ("delete", "mask_delete", "edit_flow"),
    "string_objective": ("dise", "flexmdm", "edit_flow_loss"),
    "string_sampler": ("string_tau", "flexmdm_tau"),
    "vector_kernel": ("gaussian", "normalized_gaussian", "encoded_gaussian"),
    "vector_objective": ("diffusion_lm", "langflow", "elf"),
    "vector_sampler": ("ddpm", "ode"),
}
"""Names of the built-in components that a component under test is combined with, by kind, the simplest first."""


def check_schedule(case: Case) -> Failures:
    """Test that the total noise sigma(t) of a schedule increases, and that its rate is the derivative d sigma / dt.

    Args:
        case: Class and Config of the schedule.

    Returns:
        The failed checks; empty if all pass.
    """
    return _failed(noise.check_schedule(case.cls(case.config, Context({"n": STATES}))))


def check_kernel(case: Case) -> Failures:
    """Test that rates, transition probabilities, draws, losses and reverse steps of a token kernel are consistent.

    Args:
        case: Class and Config of the kernel, which is constructed with :data:`STATES` states.

    Returns:
        The failed checks; empty if all pass.
    """
    kernel = case.cls(case.cls.toy(case.config, STATES), Context({"n": STATES}))
    return _failed(noise.check_kernel(kernel, end=9.0))


def check_classifier(case: Case) -> Failures:
    """Test that label probabilities of a noisy classifier sum to 1, and that ``changes`` matches ``log_prob``.

    The method ``changes`` computes, for all changes of one token at once, the change in log p(label). It must equal the
    difference of two calls of ``log_prob``, unless the classifier declares it a first-order approximation.

    Args:
        case: Class and Config of the classifier, which is constructed with :data:`STATES` states.

    Returns:
        The failed checks; empty if all pass.
    """
    return _failed(classifier.check_classifier(case.cls(case.config, Context({"n": STATES})), STATES))


def check_likelihood(case: Case) -> Failures:
    """Test that ``draw`` and ``nats`` of the base density of a flow agree.

    The mean of q(z) / p(z) over draws z from the base density p must be 1 up to sampling error. Here q is a normal
    density, and p(z) is computed from ``nats``, -log p(z).

    Args:
        case: Class and Config of the base density, a component of kind ``likelihood``.

    Returns:
        The failed checks; empty if all pass.
    """
    base = case.cls(case.config, Context({}))
    z = base.draw((100_000, 2), generator=torch.Generator().manual_seed(0))
    nats = base.nats(z)
    if nats.shape != (len(z),):
        return [("nats", f"'nats' has the shape {list(nats.shape)}, not one number per row")]
    deviation = 0.7  # below that of the base, so that the variance of q / base is finite
    other = 0.5 * (z / deviation).square().sum(1) + 2 * math.log(deviation * math.sqrt(2 * math.pi))
    weight = (nats - other).exp().double()
    error = 5 * weight.std() / len(z) ** 0.5
    if not abs(weight.mean() - 1) <= error:
        return [
            ("density", f"'draw' and 'nats' are not of one density: an integral of 1 is {weight.mean():.4f} by them")
        ]
    return []


def check_objective(case: Case) -> Failures:
    """Test that the likelihood bound of a token objective equals the entropy of test data, given a perfect network.

    Args:
        case: Class and Config of the objective. It is combined with every kernel (partners or built-in) that it
            supports.

    Returns:
        The failed checks; empty if all pass.
    """
    return _tokens(case, prove_objective)


def check_sampler(case: Case) -> Failures:
    """Test that the samples of a token sampler follow the distribution of test data, given a perfect network.

    Args:
        case: Class and Config of the sampler. It is combined with every kernel (partners or built-in) that it supports.

    Returns:
        The failed checks; empty if all pass.
    """
    return _tokens(case, prove_sampler)


def check_distillation(case: Case) -> Failures:
    """Test a distillation objective on an enumerable toy of rows of tokens: its loss, its teacher and the optimum it claims.

    Args:
        case: Class and Config of the objective. It is combined with the kernels ``absorb`` and ``uniform``.

    Returns:
        The failed checks; empty if all pass.
    """
    registry, failures = _registry(case), Failures()
    for kernel in ("absorb", "uniform"):
        noise, schedule, loss, sampler = (_part(registry, n) for n in (kernel, "loglinear", "nelbo", "ancestral"))
        plan = ProcessPlan("tokens", noise, schedule, loss, sampler, STATES, (LOG_X0,))
        found = tokens.TokenProcess.prove_distillation(plan, registry, case.cls(case.config))
        failures += [(name, f"with {kernel}: {text}") for name, text in _failed(found)]
    return failures


def check_strings(case: Case) -> Failures:
    """Test a string kernel, string objective or string sampler in a process on short strings.

    Args:
        case: Class and Config of the component. It is combined with the first partners or built-in components that it
            fits.

    Returns:
        The failed checks; empty if all pass.
    """
    kinds = ("string_kernel", "string_objective", "string_sampler")
    registry, reasons = _registry(case), dict[str, None]()
    for kernel, objective, sampler in _combinations(case, kinds, registry):
        outputs = registry.component(kernel.contract.op).parametrizations(kernel.config)[0]
        schedule = _part(registry, "loglinear")
        plan = ProcessPlan("strings", kernel, schedule, objective, sampler, DECLARED_STATES, outputs)
        try:
            strings.make_parts(plan, registry)
        except BlueprintError as error:
            reasons |= dict.fromkeys(p.message for p in error.problems)
            continue
        return _failed(strings.prove(plan, registry))
    return _alone(reasons)


def check_vectors(case: Case) -> Failures:
    """Test a kernel, objective or sampler of vectors in a process on an enumerable toy.

    Args:
        case: Class and Config of the component. It is combined with the first partners or built-in components that it
            fits.

    Returns:
        The failed checks; empty if all pass.
    """
    kinds = ("vector_kernel", "vector_objective", "vector_sampler")
    registry, reasons = _registry(case), dict[str, None]()
    for kernel, objective, sampler in _combinations(case, kinds, registry):
        cls = registry.component(kernel.contract.op)
        for outputs in cls.parametrizations(kernel.config):
            plan = ProcessPlan("vectors", kernel, _part(registry, "stepwise"), objective, sampler, STATES, outputs)
            try:
                vectors.make_parts(plan, registry)
            except BlueprintError as error:
                reasons |= dict.fromkeys(p.message for p in error.problems)
                continue
            return _failed(vectors.prove(plan, registry, case.proof))
    return _alone(reasons)


def check_vector_classifier(case: Case) -> Failures:
    """Test that label probabilities of a classifier of vectors sum to 1, and that its gradient is that of ``log_prob``.

    Args:
        case: Class and Config of the classifier, which is constructed with :data:`STATES` tokens.

    Returns:
        The failed checks; empty if all pass.
    """
    kernel = installed().component("gaussian")
    made = kernel(kernel.Config(vocab=STATES, width=2), Context({"n": STATES}))
    return _failed(vector_classifier.check_classifier(case.cls(case.config, Context({"n": STATES})), made))


def _tokens(case: Case, prove: Callable[[Callable[..., TokenParts], str, Proof], list[Check]]) -> Failures:
    """Verify one combination of components for each kernel, and each of its outputs that the component reads.

    The first kernel is verified in full, the others with fewer cases.
    """
    registry, failures = _registry(case), Failures()
    reasons, proved = dict[str, None](), set[tuple[str, str]]()
    for kernel, objective, sampler in _combinations(case, ("kernel", "objective", "sampler"), registry):
        cls = registry.component(kernel.contract.op)
        schedule = _schedule(registry, kernel)
        for outputs in cls.parametrizations(kernel.config):
            plan = ProcessPlan("tokens", kernel, schedule, objective, sampler, STATES, outputs)
            key = (kernel.name, plan.output)
            if key in proved or (proved and kernel.name == "power"):  # power is only for parts that need it
                continue
            try:
                tokens.make_parts(plan, registry)
            except BlueprintError as error:
                reasons |= dict.fromkeys(p.message for p in error.problems)
                continue
            proof: Proof = "full" if all(name == kernel.name for name, _ in proved) else "quick"
            proved.add(key)
            found = _failed(prove(partial(tokens.make_parts, plan, registry), plan.output, proof))
            failures += [(name, f"with {' and '.join(key)}: {text}") for name, text in found]
    return failures if proved else _alone(reasons)


def _schedule(registry: Registry, kernel: Part) -> Part:
    """Return the schedule of a kernel in discrete time, or one that suits a kernel in continuous time."""
    cls = registry.component(kernel.contract.op)
    own = cls.own_schedule(kernel.config)
    if own is None:
        return _part(registry, "loglinear" if cls.clamp_safe else "geometric")
    part = _part(registry, own["op"])
    config = part.contract.config.model_validate({k: v for k, v in own.items() if k != "op"})
    return Part(part.contract, config)


def _alone(reasons: Iterable[str]) -> Failures:
    return [("partners", f"it fits none of the partners; pass others as partners=...: {'; '.join(reasons)}")]


def _registry(case: Case) -> Registry:
    partners = {f"partner{i}": cls for i, cls in enumerate(case.partners)}
    return Registry.of({_SELF: case.cls, **partners}) | installed()


def _part(registry: Registry, op: str) -> Part:
    contract = registry.contract(op)
    return Part(contract, contract.config.model_validate(getattr(registry.component(op), "example", {})))


def _combinations(case: Case, kinds: Sequence[str], registry: Registry) -> Iterator[tuple[Part, ...]]:
    """Return all combinations of the component with components of the other kinds, either partners or built-in ones."""

    def parts(kind: str) -> Iterable[Part]:
        if kind == case.cls.kind:
            return [Part(registry.contract(_SELF), case.config)]
        given = [f"partner{i}" for i, cls in enumerate(case.partners) if getattr(cls, "kind", None) == kind]
        return [_part(registry, op) for op in given or _PARTNERS[kind]]

    return itertools.product(*map(parts, kinds))


def _failed(checks: list[Check]) -> Failures:
    return [(c.name, f"{c.claim}: {c.value}") for c in checks if c.holds is False]
