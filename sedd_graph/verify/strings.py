"""Processes that change lengths, verified on the enumerable toy that their kernel brings.

Axes: b rows, s strings, w positions, v = 2 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sedd_graph.component.check import Check
from sedd_graph.diffusion.strings.kernel import TOKENS, StringTable
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.strings.sampler import StringSettings
from sedd_graph.verify.noise import check_schedule

__all__ = ["check_string_sampler", "prove_strings"]


def prove_strings(make: Callable[[int | None], StringParts]) -> list[Check]:
    """Verify the declared combination; ``make`` makes it for the declared number of states (None) or another.

    Takes some seconds on a CPU.
    """
    declared = make(None).kernel
    parts = make(TOKENS + declared.states - declared.data_tokens)
    table = parts.kernel.table(one_length=parts.objective.one_length)
    end = float(parts.schedule.sigma(torch.tensor([1.0], dtype=torch.float64)))
    return [
        *check_schedule(parts.schedule),
        *table.check_kernel(end),
        *table.check_declared(declared, end),
        *table.check_objective(parts.objective, parts.schedule),
        *check_string_sampler(table, parts),
    ]


def check_string_sampler(toy: StringTable, process: StringParts) -> list[Check]:
    """With a perfect network the sampler gives back the law of the data, lengths included."""
    rows, steps = 8_000, None if process.sampler.steps is None else 64
    kernel, schedule, objective, sampler = process
    generator = torch.Generator().manual_seed(4)
    longest = toy.clean if objective.one_length else toy.longest
    noise = kernel.prior(rows, longest=longest, generator=generator, allowed=None)
    fixed = torch.zeros_like(noise.attend)
    fixed[:, 0] = True
    settings = StringSettings(
        fixed=fixed, shut=~noise.attend, longest=longest, kernel=kernel, schedule=schedule, generator=generator
    )
    out = sampler.run(
        lambda strings, sigma: objective.rates(toy.outputs(strings, sigma), strings, longest),
        noise,
        settings,
        steps=steps,
    )
    data = bool((torch.where(out.attend, out.tokens, 0)[:, 1:] < TOKENS).all()) and bool((out.lengths <= longest).all())
    count = len(toy.strings)
    found = torch.bincount(toy.number(out), minlength=count + 1)[:count].double() / rows
    distance = float((found - toy.law).abs().sum() / 2)
    floor = math.sqrt(int((toy.law > 0).sum()) / rows / 2)
    allowance = 0.0 if steps is None else 2.5 / steps
    how = f"total variation, {rows:,} strings" + ("" if steps is None else f", {steps} steps")
    return [
        Check("sampler.clean", "only data tokens come out, no more than asked for", data, "yes" if data else "no", how),
        Check(
            "sampler.law",
            "with a perfect network the sampler gives back the law of the data",
            distance < 2 * floor + allowance + 0.002,
            f"{distance:.4f} (chance alone: about {floor:.4f})",
            how,
        ),
    ]
