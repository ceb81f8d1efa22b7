"""Verification of a process on strings by enumeration of all short strings over vocabularies of two and three tokens.

The kernel provides each enumeration, a :class:`~sedd_graph.diffusion.strings.kernel.StringTable`. Of a table that
enumerates the noise too (:class:`~sedd_graph.verify.string_table.EnumeratedTable`), means of losses are sums; of others
they are estimated by draws.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.strings.kernel import StringTable
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.verify.bitstream import check_string_bitstream
from sedd_graph.verify.guards import guarded, merged
from sedd_graph.verify.noise import check_schedule, final_sigma
from sedd_graph.verify.string_contracts import check_minimum, check_objective_contract, check_objective_draws
from sedd_graph.verify.string_objective import check_enumerated, notes
from sedd_graph.verify.string_sampler import check_string_sampler
from sedd_graph.verify.string_table import EnumeratedTable

__all__ = ["check_string_objective", "prove_strings"]


def prove_strings(make: Callable[[int | None], StringParts], proof: Proof = "full") -> list[Check]:
    """Verify the components of a process on strings: schedule, kernel, objective and sampler. Takes seconds on a CPU.

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        proof: Strength of the verification. ``quick`` verifies the objective on the smallest vocabulary and the
            sampler on the largest, with fewer cases.

    Returns:
        The results of the checks.
    """
    declared = make(None)
    kernels, objectives, samplers = list[Check](), list[Check](), list[Check]()
    sizes = sorted(declared.kernel.toys)

    def tables(tokens: int) -> list[Check]:
        parts = make(tokens + declared.kernel.states - declared.kernel.data_tokens)
        table, end = parts.kernel.table(one_length=parts.objective.one_length), final_sigma(declared.schedule)
        if isinstance(table, EnumeratedTable):
            table.proof = proof
        found = guarded("strings", partial(table.check_kernel, end))
        if isinstance(table, EnumeratedTable):
            found += guarded("strings", partial(check_string_bitstream, table, proof))
        if tokens == sizes[0]:
            found += guarded("strings", partial(table.check_declared, declared.kernel, end))
        if proof == "full" or tokens == sizes[0]:
            objectives.extend(guarded("objective", partial(check_string_objective, table, parts, proof)))
        if proof == "full" or tokens == sizes[-1]:
            samplers.extend(guarded("sampler", partial(check_string_sampler, table, parts, proof)))
        return found

    for tokens in sizes:
        kernels += guarded("strings", partial(tables, tokens))
    checks = [x for part in (kernels, objectives, samplers) for x in merged(part)]
    return [*guarded("schedule", partial(check_schedule, declared.schedule)), *checks]


def check_string_objective(table: StringTable, parts: StringParts, proof: Proof = "full") -> list[Check]:
    """Verify the objective of a process on strings on one table.

    Args:
        table: An enumerable instance of the kernel.
        parts: The components, constructed with the data tokens of the table.
        proof: Strength of the verification.
    """
    _, schedule, objective, _ = parts
    contract = check_objective_contract(table, objective, schedule)
    if not isinstance(table, EnumeratedTable):
        return [*table.check_objective(objective, schedule), check_minimum(table, objective, schedule), contract]
    return [
        *notes(table.kernel, objective, schedule),
        *check_enumerated(table, objective, schedule, proof),
        *check_objective_draws(table, objective, schedule, proof),
        contract,
    ]
