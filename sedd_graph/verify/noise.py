"""Verification of noise schedules and token kernels by methods that do not use their closed forms.

A schedule is compared with its own integral; a kernel with matrix exponentials, sums over all states and Bayes' rule.
These comparisons are in float64. Losses and schedules are then also evaluated in float32 and compared with float64.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable

import torch

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.verify.bitstream import check_bitstream
from sedd_graph.verify.guards import guarded, merged
from sedd_graph.verify.kernel_cases import Cases
from sedd_graph.verify.kernel_chain import check_chain
from sedd_graph.verify.kernel_draws import check_draws, check_prior
from sedd_graph.verify.kernel_formulas import check_losses, check_steps
from sedd_graph.verify.kernel_precision import check_precision, check_pure
from sedd_graph.verify.kernel_size import MANY, check_mixing, check_size, check_stiffness
from sedd_graph.verify.kernel_steps import check_own_schedule, check_step_kernel
from sedd_graph.verify.schedules import check_schedule, final_sigma

__all__ = [
    "check_declared",
    "check_kernel",
    "check_precision",
    "check_prior",
    "check_schedule",
    "final_sigma",
]

BETWEEN = 17
"""Number of states of a third size, for kernels whose declared size is not enumerated."""


@torch.no_grad()
def check_kernel(kernel: Kernel, *, end: float, proof: Proof = "full") -> list[Check]:
    """Verify that rates, transition probabilities, draws, prior, losses and reverse steps of a kernel are consistent.

    Args:
        kernel: Kernel with few states, since every pair of states is evaluated.
        end: Total noise at t = 1; ignored for a kernel in discrete time, where it is the number of steps.
        proof: Strength of the verification: ``quick`` takes fewer noise levels and draws.

    Returns:
        The results of the checks.
    """
    if kernel.steps is not None:
        return check_step_kernel(kernel, proof)
    return [*_enumerated(kernel, end=end, proof=proof), check_precision(kernel)]


def _enumerated(kernel: Kernel, *, end: float, proof: Proof) -> list[Check]:
    """Return the checks of a kernel that enumerate its states; those with trained parameters at other values too."""
    cases = Cases.of(kernel, end=end, proof=proof)
    checks = [
        *check_chain(cases),
        *check_draws(kernel, proof),
        *check_prior(kernel, end=end, proof=proof),
        *check_bitstream(kernel, proof),
        *check_losses(cases),
        *check_steps(cases),
        check_pure(kernel),
    ]
    if not kernel.learned:
        return checks
    other = copy.deepcopy(kernel)
    generator = torch.Generator().manual_seed(14)
    for parameter in other.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    cases = Cases.of(other, end=end, proof="quick")
    return merged([*checks, *check_chain(cases), *check_losses(cases), *check_steps(cases)])


@torch.no_grad()
def check_declared(small: TokenParts, make: Callable[[int | None], TokenParts], proof: Proof) -> list[Check]:
    """Verify the noise schedule and token kernel of a process, with few states and with the declared number of states.

    Checks that enumerate all states are run with few states, and with the declared number if it is at most 64. A larger
    kernel is also enumerated with 17 states (only if ``proof`` is ``full``), and at its declared size its draws, prior,
    losses and steps are verified for a selection of states. A kernel in discrete time is enumerated at its declared
    size, whatever that is.

    Args:
        small: Components of the process constructed with few states.
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        proof: Strength of the verification: ``full``, or ``quick`` with fewer cases.
    """
    declared = make(None)
    kernel = declared.kernel

    def schedules() -> list[Check]:
        few = _failing(check_schedule(small.schedule, "quick"))
        return merged([*check_schedule(declared.schedule, proof), *few])

    def sizes() -> dict[int, Kernel]:
        """Return the kernels to verify, by number of states: the small one, and the declared one or one between."""
        kernels = {small.kernel.states: small.kernel}
        if kernel.steps is not None or kernel.states <= MANY:
            kernels[kernel.states] = kernel
        elif proof == "full":
            kernels[BETWEEN] = make(BETWEEN).kernel
        return kernels

    def stepwise() -> list[Check]:
        found = [_of_states(c, n) for n, k in sizes().items() for c in check_step_kernel(k, proof)]
        return merged([*found, check_own_schedule(kernel, final_sigma(declared.schedule))])

    def enumerated() -> list[Check]:
        end = final_sigma(declared.schedule)
        found = [_of_states(c, n) for n, k in sizes().items() for c in _enumerated(k, end=end, proof=proof)]
        precise = dataclasses.replace(check_precision(kernel), name="kernel.declared")
        return [*merged(found), check_precision(small.kernel), precise]

    def declared_size() -> list[Check]:
        end = final_sigma(declared.schedule)
        size = [] if kernel.states <= MANY else check_size(kernel, end=end, proof=proof)
        steps = declared.sampler.steps
        return [*size, *check_mixing(kernel, end), *check_stiffness(kernel, declared.schedule, steps)]

    groups = [("schedule", schedules), ("kernel", enumerated), ("declared", declared_size)]
    if kernel.steps is not None:
        groups = [("schedule", schedules), ("kernel", stepwise)]
    return [check for name, run in groups for check in guarded(name, run)]


def _failing(checks: Iterable[Check]) -> list[Check]:
    return [check for check in checks if check.holds is False]


def _of_states(check: Check, states: int) -> Check:
    return dataclasses.replace(check, value=f"{check.value} with {states} states")
