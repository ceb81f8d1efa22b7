"""Numerical verification of a blueprint: its diffusion process, and the inverses of its invertible blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sedd_graph.component.check import Check, Proof
from sedd_graph.engine.engine import Engine
from sedd_graph.errors import UserError
from sedd_graph.families.table import process_class
from sedd_graph.runs.check import Report
from sedd_graph.verify.inverse import prove_inverses
from sedd_graph.verify.margin import check_margins

__all__ = ["checks_text", "prove_all", "prove_network", "prove_student"]


def prove_all(
    report: Report, *, device: torch.device, proof: Proof, say: Callable[[str], None]
) -> tuple[list[Check], list[str]]:
    """Verify numerically the diffusion process of a blueprint, and the derived inverse of each invertible block.

    Args:
        report: Result of checking the blueprint.
        device: Device of the numerical checks of inverses.
        proof: Strength of the verification of the process: ``full``, or ``quick`` with fewer cases.
        say: Function that prints a line for the user.

    Returns:
        The results of all checks, and the paths of the blocks with ``on_failure: checkpoint`` whose inverse fails a
        check. These blocks use activation checkpointing instead.

    Raises:
        UserError: A check of the process, or of a block without ``on_failure: checkpoint``, fails.
    """
    plan = report.plan
    checks = process_class(plan.family).prove(plan, report.graph, report.registry, proof)
    certificates = prove_inverses(report.graph, report.registry, device=device)
    lenient = [c for c in certificates if c.broken and c.use.on_failure == "checkpoint"]
    failing = [("the process fails its proof", tuple(c for c in checks if c.holds is False))]
    failing += [
        (f"block {c.use.name!r} is not invertible as claimed", c.broken) for c in certificates if c not in lenient
    ]
    checks += [check for c in certificates for check in c.checks]
    if checks:
        say("\n" + checks_text(checks))
    broken = [f"{what}: {_failures(found)}" for what, found in failing if found]
    if broken:
        raise UserError("\n".join(broken))
    for c in lenient:
        say(f"warning     block {c.use.name!r} is checkpointed instead of reversible: {_failures(c.broken)}")
    return checks, [c.use.path for c in lenient]


def prove_student(report: Report, say: Callable[[str], None]) -> list[Check]:
    """Verify the distillation objective of a blueprint with its process; none if it declares none.

    Raises:
        UserError: A check fails.
    """
    part, plan = report.distillation, report.plan
    if part is None:
        return []
    objective = report.registry.component(part.contract.op)(part.config)
    checks = process_class(plan.family).prove_distillation(plan, report.registry, objective)
    if checks:
        say(checks_text(checks))
    if wrong := [c for c in checks if c.holds is False]:
        raise UserError(f"the distillation fails its proof: {_failures(wrong)}")
    return checks


def _failures(checks: Sequence[Check]) -> str:
    return "; ".join(f"{c.name}: {c.claim} ({c.value})" for c in checks)


def prove_network(engine: Engine) -> list[Check]:
    """Verify that the outputs of an untrained network fit its process, and return the results of all checks.

    They include the margin of each embedding table: half the least Euclidean distance of two embeddings. A vector whose
    distance from an embedding is below the margin is nearest to that embedding.

    Args:
        engine: The network and its process.

    Raises:
        UserError: The network does not fit the process, or a code does not decode its own codewords.
    """
    checks = engine.process.check_network(engine.network)
    if wrong := [c for c in checks if c.holds is False]:
        raise UserError(f"the network does not fit the process: {_failures(wrong)}")
    found = check_margins(engine.network)
    if wrong := [c for c in found if c.holds is False]:
        raise UserError(f"tokens cannot be decoded from their vectors: {_failures(wrong)}")
    return [*checks, *found]


def checks_text(checks: Sequence[Check]) -> str:
    """Return a text table of check results for the console, with one line per check."""
    width = max(len(c.name) for c in checks)
    marks = {True: "holds", False: "FAILS", None: "note "}
    return "\n".join(
        ["claims"] + [f"  {marks[c.holds]}  {c.name:<{width}}  {c.claim}: {c.value}  [{c.how}]" for c in checks]
    )
