"""The declared process that changes lengths, held to the toy that its kernel can be enumerated on."""

from __future__ import annotations

from sedd_graph.component.check import Check
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.strings.edit_flow import EditFlowKernel
from sedd_graph.diffusion.strings.flexmdm import FlexKernel
from sedd_graph.diffusion.strings.process import BirthDeath
from sedd_graph.errors import UserError
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.strings import make_string_process
from sedd_graph.verify.birth_death import prove_birth_death
from sedd_graph.verify.edit_flow import prove_edit_flow
from sedd_graph.verify.flexmdm import prove_flexmdm
from sedd_graph.verify.noise import check_schedule
from sedd_graph.verify.strings import TOKENS

__all__ = ["prove_strings"]


def prove_strings(plan: ProcessPlan, registry: Registry) -> list[Check]:
    """Every check of the declared combination. Takes some seconds on a CPU.

    Raises :class:`UserError` for a kernel of no kind that can be proved.
    """
    declared = make_string_process(plan, registry).kernel
    process = make_string_process(plan, registry, states=TOKENS + declared.states - declared.data_tokens)
    kernel = process.kernel
    checks = check_schedule(process.schedule)
    if isinstance(kernel, BirthDeath) and isinstance(declared, BirthDeath):
        return [*checks, *prove_birth_death(process, kernel, declared)]
    if isinstance(kernel, EditFlowKernel):
        return [*checks, *prove_edit_flow(process, kernel)]
    if isinstance(kernel, FlexKernel):
        return [*checks, *prove_flexmdm(process, kernel)]
    raise UserError(f"{plan.kernel.contract.name!r} is no kernel that there is a proof for: derive it from one that is")
