"""Verification of a process on strings by enumeration of all short strings over vocabularies of two and three tokens.

The kernel provides each enumeration, a :class:`~sedd_graph.diffusion.strings.kernel.StringTable`. Of a table that
enumerates the noise too (:class:`~sedd_graph.verify.string_table.EnumeratedTable`), means of losses are sums; of others
they are estimated by draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.strings.kernel import StringTable
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.verify.noise import check_schedule, final_sigma
from sedd_graph.verify.string_contracts import check_minimum, check_objective_contract, check_objective_draws
from sedd_graph.verify.string_objective import check_enumerated, notes
from sedd_graph.verify.string_sampler import check_string_sampler
from sedd_graph.verify.string_table import EnumeratedTable
from sedd_graph.verify.tape import check_string_tape

__all__ = ["check_string_objective", "merged", "prove_strings"]


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
    extra = declared.kernel.states - declared.kernel.data_tokens
    end = final_sigma(declared.schedule)
    kernels, objectives, samplers = list[Check](), list[Check](), list[Check]()
    sizes = sorted(declared.kernel.toys)
    for tokens in sizes:
        parts = make(tokens + extra)
        table = parts.kernel.table(one_length=parts.objective.one_length)
        if isinstance(table, EnumeratedTable):
            table.proof = proof
        kernels += _guarded("strings", partial(table.check_kernel, end))
        if isinstance(table, EnumeratedTable):
            kernels += _guarded("strings", partial(check_string_tape, table, proof))
        if tokens == sizes[0]:
            kernels += _guarded("strings", partial(table.check_declared, declared.kernel, end))
        if proof == "full" or tokens == sizes[0]:
            objectives += _guarded("objective", partial(check_string_objective, table, parts, proof))
        if proof == "full" or tokens == sizes[-1]:
            samplers += _guarded("sampler", partial(check_string_sampler, table, parts, proof))
    checks = [x for part in (kernels, objectives, samplers) for x in merged(part)]
    return [*check_schedule(declared.schedule), *checks]


def _guarded(room: str, checks: Callable[[], list[Check]]) -> list[Check]:
    """Return checks, or one that fails if a component raises an error."""
    try:
        return checks()
    except Exception as error:  # whatever a component does wrong is a finding
        value = f"{type(error).__name__}: {error}"
        return [Check(f"{room}.run", "the component runs on the toy", False, value, "an error was raised")]


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


def merged(checks: Iterable[Check]) -> list[Check]:
    """Merge checks that have the same name into one; names keep the order of their first occurrence.

    If any check of a name fails, the first failed one is returned. Otherwise the first is returned, with the texts
    ``value`` and ``how`` of the others appended where they differ.
    """
    found: dict[str, Check] = {}
    for check in checks:
        seen = found.get(check.name)
        if seen is None or (check.holds is False and seen.holds is not False):
            found[check.name] = check
        elif seen.holds is not False and (check.value, check.how) != (seen.value, seen.how):
            value = seen.value if check.value == seen.value else f"{seen.value}; {check.value}"
            how = seen.how if check.how == seen.how else f"{seen.how}; {check.how}"
            found[check.name] = dataclasses.replace(seen, value=value, how=how)
    return list(found.values())
