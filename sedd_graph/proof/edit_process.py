"""The declared process that changes lengths, held to the toy that its kernel can be enumerated on."""

from __future__ import annotations

from sedd_graph.diffusion.edit_flow import EditFlowKernel
from sedd_graph.diffusion.edits import BirthDeath
from sedd_graph.diffusion.flexmdm import FlexKernel
from sedd_graph.engine.edits import make_edit_process
from sedd_graph.errors import UserError
from sedd_graph.graph.process import ProcessPlan
from sedd_graph.plugins import Registry
from sedd_graph.proof.check import Check
from sedd_graph.proof.edit_flow import prove_edit_flow
from sedd_graph.proof.edits import prove_births
from sedd_graph.proof.flexmdm import prove_flexmdm
from sedd_graph.proof.noise import check_schedule
from sedd_graph.proof.strings import TOKENS

__all__ = ["prove_edits"]


def prove_edits(plan: ProcessPlan, registry: Registry) -> list[Check]:
    """Every check of the declared combination. Takes some seconds on a CPU.

    Raises :class:`UserError` for a kernel of no kind that can be proved.
    """
    declared = make_edit_process(plan, registry).kernel
    process = make_edit_process(plan, registry, states=TOKENS + declared.states - declared.data_tokens)
    kernel = process.kernel
    checks = check_schedule(process.schedule)
    if isinstance(kernel, BirthDeath) and isinstance(declared, BirthDeath):
        return [*checks, *prove_births(process, kernel, declared)]
    if isinstance(kernel, EditFlowKernel):
        return [*checks, *prove_edit_flow(process, kernel)]
    if isinstance(kernel, FlexKernel):
        return [*checks, *prove_flexmdm(process, kernel)]
    raise UserError(f"{plan.kernel.contract.name!r} is no kernel that there is a proof for: derive it from one that is")
