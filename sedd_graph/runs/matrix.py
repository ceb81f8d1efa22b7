"""Combination matrix: which installed kernels, schedules, network outputs, objectives and samplers work together.

An objective does not depend on the sampler, a sampler does not depend on the objective, and both depend on the schedule
only through the total noise sigma. A combination is therefore valid if three pairs are valid: (kernel, schedule),
(kernel, objective) and (kernel, sampler), the last two for each network output. Each pair is verified exactly on the
small example of :mod:`sedd_graph.verify.tokens`, is a declared heuristic, or is refused with a reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from sedd_graph.component.base import Context
from sedd_graph.component.outputs import Output
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.errors import BlueprintError
from sedd_graph.families.plan import Part, ProcessPlan
from sedd_graph.families.tokens import make_parts
from sedd_graph.verify.noise import check_prior, check_schedule, final_sigma
from sedd_graph.verify.tokens import TOKENS, prove_objective, prove_sampler

__all__ = ["Cell", "cells", "matrix"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Cell of the combination matrix: the result for one pair of components.

    Attributes:
        table: Kind of the component in the column: ``schedule``, ``objective`` or ``sampler``.
        row: Name of the kernel; for objectives and samplers, followed by the name of the network output.
        column: Name of the schedule, objective or sampler.
        state: ``proved`` (numerically verified), ``heuristic`` (the sampler declares itself approximate), ``refused``
            (incompatible), ``broken`` (a verification fails, so that no blueprint with the pair can be built), or
            ``allowed`` (compatible; verification was skipped).
        value: Measured value of the verification, as text; empty without verification.
        why: Reason for a state other than ``proved``.
    """

    table: str
    row: str
    column: str
    state: str
    value: str = ""
    why: str = ""


def cells(registry: Registry, *, prove: bool = True) -> Iterator[Cell]:
    """Yield the cells of the combination matrix, one for each pair of components.

    Args:
        registry: Registry of the components.
        prove: True to verify the pairs, which takes minutes. Otherwise, the (kernel, schedule) pairs are omitted,
            and each other pair is ``refused``, ``heuristic`` or ``allowed``.
    """
    parts = {kind: _parts(registry, kind) for kind in ("kernel", "schedule", "objective", "sampler")}
    if prove:
        yield from _schedule_cells(parts["kernel"], parts["schedule"], registry)
    loglinear = next(p for p in parts["schedule"] if p.name == "loglinear")
    for kernel in parts["kernel"]:
        schedule = _own_schedule(kernel, registry) or loglinear
        for (output,) in registry.component(kernel.contract.op).parametrizations(kernel.config):
            for table in ("objective", "sampler"):
                for part in parts[table]:
                    cell = Cell(table, f"{kernel.name}, {output.name}", part.name, "refused")
                    plans = _plans(kernel, schedule, output, part, parts)
                    yield _pair_cell(cell, plans, registry, prove=prove)


def _parts(registry: Registry, kind: str) -> list[Part]:
    """Return the installed components of a kind, with their example Configs."""
    contracts = [contract for contract in registry.contracts() if contract.kind == kind]
    configs = (getattr(registry.component(contract.op), "example", {}) for contract in contracts)
    return [Part(c, c.config.model_validate(config)) for c, config in zip(contracts, configs, strict=True)]


def _own_schedule(kernel: Part, registry: Registry) -> Part | None:
    """Return the schedule of a kernel in discrete time; None for a kernel that takes any schedule."""
    declared = registry.component(kernel.contract.op).own_schedule(kernel.config)
    if declared is None:
        return None
    contract = next(c for c in registry.contracts() if c.kind == "schedule" and c.name == declared["op"])
    return Part(contract, contract.config.model_validate({k: v for k, v in declared.items() if k != "op"}))


@torch.no_grad()
def _schedule_cells(kernels: Sequence[Part], schedules: Sequence[Part], registry: Registry) -> Iterator[Cell]:
    """Verify each schedule, and that its noise at t = 1 is each kernel's prior."""
    for schedule in schedules:
        made: Schedule = registry.component(schedule.contract.op)(schedule.config, Context({"n": TOKENS}))
        wrong = [c for c in check_schedule(made, "quick") if c.holds is False]
        end = final_sigma(made)
        for kernel in kernels:
            own = _own_schedule(kernel, registry)
            if own is not None and own.name != schedule.name:
                why = "a kernel in discrete time has its own schedule"
                yield Cell("schedule", kernel.name, schedule.name, "refused", why=why)
                continue
            cls: type[Kernel] = registry.component(kernel.contract.op)
            small = cls(cls.toy(kernel.config, TOKENS + 1), Context({"n": TOKENS + 1}))
            failing = wrong or [c for c in check_prior(small, end=end, proof="quick") if c.holds is False]
            state, why = "broken" if failing else "proved", "; ".join(f"{c.name}: {c.value}" for c in failing)
            value = f"sigma(1) = {end:.3g}"
            yield Cell("schedule", kernel.name, schedule.name, state, value, why)


def _plans(
    kernel: Part, schedule: Part, output: Output, part: Part, parts: Mapping[str, Sequence[Part]]
) -> list[ProcessPlan]:
    """Return the plans of ``kernel`` with ``part``, an objective or a sampler: one for each component of the other
    kind.
    """
    if part.contract.kind == "objective":
        pairs = [(part, sampler) for sampler in parts["sampler"]]
    else:
        pairs = [(objective, part) for objective in parts["objective"]]
    return [ProcessPlan("tokens", kernel, schedule, *pair, TOKENS + 1, (output,)) for pair in pairs]


def _pair_cell(cell: Cell, plans: Sequence[ProcessPlan], registry: Registry, *, prove: bool) -> Cell:
    """Return ``cell`` with its state, by the first of ``plans`` that is not refused."""
    why = ""
    for plan in plans:
        try:
            process = make_parts(plan, registry)
        except BlueprintError as error:
            key = "objective" if cell.table == "objective" else "sample"
            if own := [p.message for p in error.problems if p.path == key]:
                return dataclasses.replace(cell, why=own[0])
            why = error.problems[0].message
            continue
        if cell.table == "sampler" and process.objective.block is not None:
            continue  # the sampler would run block by block; other objectives accept the same samplers
        heuristic = process.sampler.heuristic() if cell.table == "sampler" else None
        if not prove:
            return dataclasses.replace(cell, state="allowed" if heuristic is None else "heuristic", why=heuristic or "")
        prove_pair = prove_objective if cell.table == "objective" else prove_sampler
        checks = prove_pair(partial(make_parts, plan, registry), plan.output)
        failing = [c for c in checks if c.holds is False]
        state = "broken" if failing else "proved" if heuristic is None else "heuristic"
        law = next((c for c in checks if c.name in ("sampler.law", "sampler.heuristic")), checks[0])
        return dataclasses.replace(
            cell, state=state, value=law.value, why=heuristic or "; ".join(c.name for c in failing)
        )
    other = "sampler" if cell.table == "objective" else "objective"
    return dataclasses.replace(cell, why=f"no {other} works with this kernel and output: {why}")


_TITLES = {
    "schedule": "Kernels and schedules",
    "objective": "Kernels, heads and objectives",
    "sampler": "Kernels, heads and samplers",
}


def matrix(found: Iterable[Cell]) -> str:
    """Return the combination matrix as Markdown: a table for each kind of column, with the reasons for states below."""
    every, lines = list(found), []
    for table, title in _TITLES.items():
        chosen = [c for c in every if c.table == table]
        if not chosen:
            continue
        rows, columns = (list(dict.fromkeys(getattr(c, side) for c in chosen)) for side in ("row", "column"))
        state = {(c.row, c.column): c.state for c in chosen}
        lines += [f"## {title}", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        lines += [f"| {row} | {' | '.join(state[row, column] for column in columns)} |" for row in rows]
        reasons: dict[str, list[str]] = {}
        for c in chosen:
            if c.why:
                why = re.sub(r", not '\w+'$", "", c.why)  # the kernel is named behind the reason
                reasons.setdefault(f"{c.state}: {why}", []).append(f"{c.row} with {c.column}")
        lines += [""] + [f"- {why} ({_first_three(pairs)})" for why, pairs in reasons.items()] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _first_three(pairs: Sequence[str]) -> str:
    return ", ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
