"""Everything that is installed, combined: which kernels, schedules, heads, objectives and samplers go together, and how surely.

An objective knows nothing of the sampler, nor a sampler of the objective, and both meet the schedule as total noise alone:
so a combination is as sound as its three pairs, kernel and schedule, kernel and objective, kernel and sampler (the last
two with the output of the head). Each pair is proved on the toy of :mod:`sedd_graph.verify.tokens`, is a declared
heuristic, or is refused with its reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
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
from sedd_graph.verify.noise import check_prior, check_schedule
from sedd_graph.verify.tokens import TOKENS, prove_objective, prove_sampler

__all__ = ["Cell", "cells", "matrix"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One pair: ``row`` is a kernel (and an output), ``column`` what it meets. ``state`` is proved, heuristic, refused or
    broken (a proof fails: no blueprint of it builds); ``value`` the number it rests on, ``why`` the reason."""

    table: str
    row: str
    column: str
    state: str
    value: str = ""
    why: str = ""


def _parts(registry: Registry, kind: str) -> list[Part]:
    found = []
    for contract in registry.contracts():
        if contract.kind == kind:
            cls = registry.component(contract.op)
            found.append(Part(contract, contract.config.model_validate(getattr(cls, "example", {}))))
    return found


@torch.no_grad()
def _schedules(kernels: Sequence[Part], schedules: Sequence[Part], registry: Registry) -> Iterator[Cell]:
    """Does the noise reach the kernel's prior by t = 1, and is the schedule one?"""
    for schedule in schedules:
        made = registry.component(schedule.contract.op)(schedule.config, Context({"n": TOKENS}))
        assert isinstance(made, Schedule)
        wrong = [c for c in check_schedule(made) if c.holds is False]
        end = float(made.sigma(torch.tensor([1.0], dtype=torch.float64)))
        for kernel in kernels:
            cls = registry.component(kernel.contract.op)
            assert issubclass(cls, Kernel)
            small = cls(cls.toy(kernel.config, TOKENS + 1), Context({"n": TOKENS + 1}))
            failing = wrong or [c for c in [check_prior(small, end=end)] if c.holds is False]
            yield Cell(
                "schedule",
                kernel.contract.name,
                schedule.contract.name,
                "broken" if failing else "proved",
                f"sigma(1) = {end:.3g}",
                "; ".join(f"{c.name}: {c.value}" for c in failing),
            )


def cells(registry: Registry, *, prove: bool = True) -> Iterator[Cell]:
    """Every pair of what is installed. Without ``prove`` what is not refused is ``allowed``, and nothing is computed."""
    kinds = {kind: _parts(registry, kind) for kind in ("kernel", "schedule", "objective", "sampler")}
    if prove:
        yield from _schedules(kinds["kernel"], kinds["schedule"], registry)
    loglinear = next(p for p in kinds["schedule"] if p.contract.name == "loglinear")
    for kernel in kinds["kernel"]:
        for (output,) in registry.component(kernel.contract.op).parametrizations(kernel.config):
            for table in ("objective", "sampler"):
                for part in kinds[table]:
                    yield _pair(kernel, loglinear, output, table, part, kinds, registry, prove=prove)


def _pair(
    kernel: Part,
    schedule: Part,
    output: Output,
    table: str,
    part: Part,
    kinds: dict[str, list[Part]],
    registry: Registry,
    *,
    prove: bool,
) -> Cell:
    """``part`` with ``kernel`` and any part of the other kind that goes with them."""
    row, why = f"{kernel.contract.name}, {output.name}", ""
    for other in kinds["sampler" if table == "objective" else "objective"]:
        objective, sampler = (part, other) if table == "objective" else (other, part)
        plan = ProcessPlan("tokens", kernel, schedule, objective, sampler, TOKENS + 1, (output,))
        try:
            process = make_parts(plan, registry)
        except BlueprintError as error:
            key = "objective" if table == "objective" else "sample"
            own = [p.message for p in error.problems if p.path == key]
            if own:
                return Cell(table, row, part.contract.name, "refused", why=own[0])
            why = error.problems[0].message
            continue
        if table == "sampler" and process.objective.block is not None:
            continue  # it would run block by block; another objective goes with whatever this one does
        told = process.sampler.heuristic() if table == "sampler" else None
        if not prove:
            return Cell(table, row, part.contract.name, "allowed" if told is None else "heuristic", why=told or "")
        prove_pair = prove_objective if table == "objective" else prove_sampler
        found = prove_pair(partial(make_parts, plan, registry), plan.output)
        failing = [c for c in found if c.holds is False]
        state = "broken" if failing else "proved" if told is None else "heuristic"
        law = next((c for c in found if c.name in ("sampler.law", "sampler.heuristic")), found[0])
        return Cell(table, row, part.contract.name, state, law.value, told or "; ".join(c.name for c in failing))
    return Cell(table, row, part.contract.name, "refused", why=f"nothing goes with it: {why}")


_TITLES = {
    "schedule": "Kernels and schedules",
    "objective": "Kernels, heads and objectives",
    "sampler": "Kernels, heads and samplers",
}


def matrix(found: Iterable[Cell]) -> str:
    """The three tables in Markdown, and the reasons below each."""
    every, lines = list(found), []
    for table, title in _TITLES.items():
        of = [c for c in every if c.table == table]
        if not of:
            continue
        rows, columns = (list(dict.fromkeys(getattr(c, side) for c in of)) for side in ("row", "column"))
        state = {(c.row, c.column): c.state for c in of}
        lines += [f"## {title}", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        lines += [f"| {row} | {' | '.join(state[row, column] for column in columns)} |" for row in rows]
        reasons: dict[str, list[str]] = {}
        for c in of:
            if c.why:
                # who it is not for is said behind
                why = re.sub(r", not '\w+'$", "", c.why)
                reasons.setdefault(f"{c.state}: {why}", []).append(f"{c.row} with {c.column}")
        lines += [""] + [f"- {why} ({_shortly(pairs)})" for why, pairs in reasons.items()] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _shortly(pairs: Sequence[str]) -> str:
    return ", ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
