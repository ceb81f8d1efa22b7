"""Verification of a process on vectors: schedule, kernel, objective and sampler, on a toy of known Gaussian mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Batch
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.engine.network import Network
from sedd_graph.engine.process import Process
from sedd_graph.verify.guards import guarded
from sedd_graph.verify.schedules import check_schedule
from sedd_graph.verify.vectors_flow import check_fitted, check_flow, check_order
from sedd_graph.verify.vectors_inverse import check_inverse
from sedd_graph.verify.vectors_kernel import check_kernel
from sedd_graph.verify.vectors_objective import check_objective
from sedd_graph.verify.vectors_sampler import check_sampler
from sedd_graph.verify.vectors_toy import TOKENS, Toy, placed

__all__ = ["Make", "check_vector_output", "prove_vectors"]

Make = Callable[[int | None], VectorParts]
"""Type of the functions that construct the components, called with a number of tokens, or None for the declared one."""


def prove_vectors(make: Make, output: str, proof: Proof = "full") -> list[Check]:
    """Verify the components of a process on vectors.

    Args:
        make: Function that constructs the components.
        output: Name of the network's output: ``x0`` or ``logits``.
        proof: Strength of the verification: ``full``, or ``quick`` with fewer cases.

    Returns:
        The results of the checks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # embeddings of the declared kernel are initialised at random
        declared, small = make(None), placed(make(TOKENS))
        checks = guarded("schedule", lambda: check_schedule(declared.schedule, proof))
        if any(check.holds is False for check in checks):
            return checks  # the others compare with the levels of the schedule
        groups = (
            lambda: check_kernel(small, declared, proof),
            lambda: check_objective(Toy(small), output, proof),
            lambda: check_sampler(small, output, proof),
            lambda: check_fitted(small, proof),
            lambda: check_flow(Toy(small, 2 if proof == "full" else 1), output, proof),
            lambda: check_order(Toy(small, 2), output),
            lambda: check_inverse(Toy(small, 2), output),
        )
        return [*checks, *(check for run in groups for check in guarded("vectors", run))]


@torch.no_grad()
def check_vector_output(network: Network, process: Process) -> Check:
    """Verify that the untrained network's loss is finite, and that its estimate depends on each noisy vector.

    Args:
        network: The network.
        process: The process on vectors.
    """
    device = network.device
    generator = torch.Generator(device).manual_seed(0)
    batch = Batch.of(torch.randint(0, process.plan.states, (2, 4), generator=generator, device=device))
    training = network.model.training
    network.model.eval()
    nats = process.bound_rows(network, batch, [range(len(batch))], seeds=[0])
    network.model.train(training)
    value = float(nats.mean()) / 4
    claim = "the bound of the untrained network is finite"
    return Check("vectors.output", claim, math.isfinite(value), f"{value:.4g} nats per token", "2 rows of 4 tokens")
