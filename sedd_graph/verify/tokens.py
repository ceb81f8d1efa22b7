"""Verification of a process on token rows: schedule, kernel, objective and sampler.

:mod:`sedd_graph.verify.noise` verifies schedule and kernel. :mod:`sedd_graph.verify.objective` and
:mod:`sedd_graph.verify.sampler` verify objective and sampler on the enumerated data of :mod:`sedd_graph.verify.toy`.
"""

from __future__ import annotations

import torch

from sedd_graph.component.check import Check, Proof
from sedd_graph.verify.guards import guarded
from sedd_graph.verify.noise import check_declared
from sedd_graph.verify.objective import prove_objective
from sedd_graph.verify.sampler import check_sampler, prove_sampler
from sedd_graph.verify.toy import PAIR, Make, Toy, toy_parts

__all__ = ["TOKENS", "Toy", "check_sampler", "prove_objective", "prove_parts", "prove_process", "prove_sampler"]

TOKENS = PAIR.tokens
"""Number of data tokens of the toy that schedule and kernel are verified with."""


def prove_process(make: Make, output: str, proof: Proof = "full") -> list[Check]:
    """Verify the components of a process on token rows: schedule, kernel, objective and sampler.

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        output: Kind of output that objective and sampler read: ``log_score`` or ``log_x0``.
        proof: Strength of the verification: ``full``, or ``quick`` with fewer cases.

    Returns:
        The results of the checks.
    """
    return [*prove_parts(make, proof), *prove_objective(make, output, proof), *prove_sampler(make, output, proof)]


@torch.no_grad()
def prove_parts(make: Make, proof: Proof = "full") -> list[Check]:
    """Verify the noise schedule and the token kernel of a process.

    Both are verified with a few states and with the declared number (:func:`~sedd_graph.verify.noise.check_declared`).

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        proof: Strength of the verification: ``full``, or ``quick`` with fewer cases.

    Returns:
        The results of the checks.
    """
    return guarded("kernel", lambda: check_declared(toy_parts(make, TOKENS), make, proof))
