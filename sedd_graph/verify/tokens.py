"""Verification of a process on token rows by enumeration of all short sequences over a vocabulary of three tokens.

:mod:`sedd_graph.verify.noise` verifies schedule and kernel. This module verifies objective and sampler with a perfect
network, whose outputs are computed from a known distribution of all 9 sequences of two positions. For block diffusion
it is a distribution of all 81 sequences of four positions, in two blocks.

Axes: b rows, l positions, n states, s sequences, k selected positions.
"""

from __future__ import annotations

import dataclasses

import torch

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.verify.noise import check_kernel, check_precision, check_schedule, final_sigma
from sedd_graph.verify.objective import prove_objective
from sedd_graph.verify.sampler import check_sampler, prove_sampler
from sedd_graph.verify.toy import PAIR, Make, Toy, toy_parts

__all__ = ["TOKENS", "Toy", "check_sampler", "prove_objective", "prove_parts", "prove_process", "prove_sampler"]

TOKENS = PAIR.tokens
"""Number of data tokens of the toy that schedule and kernel are verified with."""


def prove_process(make: Make, output: str, proof: Proof = "full") -> list[Check]:
    """Verify the components of a process on token rows: schedule, kernel, objective and sampler.

    Objective and sampler are verified with a perfect network. Takes seconds on a CPU.

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        output: Kind of output that objective and sampler read: ``log_score`` or ``log_x0``.

    Returns:
        The results of the checks.
    """
    return [*prove_parts(make, proof), *prove_objective(make, output, proof), *prove_sampler(make, output, proof)]


@torch.no_grad()
def prove_parts(make: Make, proof: Proof = "full") -> list[Check]:
    """Verify the noise schedule and the token kernel of a process.

    The kernel is verified with a few states; float32 accuracy and convergence to the prior also with the declared
    number.

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.

    Returns:
        The results of the checks.
    """
    declared, small = make(None).kernel, toy_parts(make, TOKENS)
    end = final_sigma(small.schedule)
    return [
        *check_schedule(small.schedule),
        *check_kernel(small.kernel, end=end),
        dataclasses.replace(check_precision(declared), name="kernel.declared"),
        *_check_mixing(declared, end),
    ]


def _check_mixing(declared: Kernel, end: float) -> list[Check]:
    """Verify that the declared kernel reaches its prior at t = 1, if this depends on the number of states."""
    gap = declared.unmixed(end)
    if gap is None:
        return []
    claim = "noise at t = 1 is the prior at the declared number of states"
    how = f"total variation from the slowest tokens at total noise {end:.3g}; raise the noise at t = 1 if this fails"
    return [Check.below("kernel.mixed", claim, gap, 0.02, how, digits=".4f")]
