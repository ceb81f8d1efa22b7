"""Verification of a process on strings by enumeration of all short strings over a vocabulary of two tokens.

The kernel provides the enumeration, a :class:`~sedd_graph.diffusion.strings.kernel.StringTable`.

Axes: b rows, s strings of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.strings.kernel import TOKENS, StringTable
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.strings.sampler import StringSettings
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.noise import check_schedule, final_sigma
from sedd_graph.verify.total_variation import total_variation

__all__ = ["DRAWS", "check_frequencies", "check_string_sampler", "draws_distance", "prove_strings"]

DRAWS = 20_000
"""Number of draws in each comparison of frequencies with a distribution."""


def prove_strings(make: Callable[[int | None], StringParts], proof: Proof = "full") -> list[Check]:
    """Verify the components of a process on strings: schedule, kernel, objective and sampler. Takes seconds on a CPU.

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.

    Returns:
        The results of the checks.
    """
    declared = make(None).kernel
    parts = make(TOKENS + declared.states - declared.data_tokens)
    table = parts.kernel.table(one_length=parts.objective.one_length)
    end = final_sigma(parts.schedule)
    return [
        *check_schedule(parts.schedule),
        *table.check_kernel(end),
        *table.check_declared(declared, end),
        *table.check_objective(parts.objective, parts.schedule),
        *check_string_sampler(table, parts),
    ]


def check_string_sampler(table: StringTable, parts: StringParts) -> list[Check]:
    """Verify that samples drawn with a perfect network follow the distribution of the data, including string lengths.

    Args:
        table: Enumeration of short strings, which provides the data distribution and the outputs of the perfect
            network.
        parts: The components, constructed with :data:`~sedd_graph.diffusion.strings.kernel.TOKENS` data tokens.

    Returns:
        A check that samples are valid strings of data tokens, and one that their frequencies match the distribution.
    """
    kernel, schedule, objective, sampler = parts
    rows, steps = 8_000, None if sampler.steps is None else 64
    generator = torch.Generator().manual_seed(4)
    longest = table.clean if objective.one_length else table.longest
    noise = kernel.prior(rows, longest=longest, generator=generator, allowed=None)
    fixed = torch.zeros_like(noise.attend)
    fixed[:, 0] = True
    settings = StringSettings(
        fixed=fixed, shut=~noise.attend, longest=longest, kernel=kernel, schedule=schedule, generator=generator
    )

    def denoise(strings: Strings, sigma: Tensor) -> Mapping[str, Tensor]:
        return objective.rates(table.outputs(strings, sigma), strings, longest)

    out = sampler.run(denoise, noise, settings, steps=steps)
    data = bool((torch.where(out.attend, out.tokens, 0)[:, 1:] < TOKENS).all()) and bool((out.lengths <= longest).all())
    distance = total_variation(table.number(out), table.law)
    chance = math.sqrt(int((table.law > 0).sum()) / rows / 2)
    bias = 0.0 if steps is None else 2.5 / steps
    how = f"total variation, {rows:,} strings" + ("" if steps is None else f", {steps} steps")
    value = f"{distance:.4f} (chance alone: about {chance:.4f})"
    clean = "samples hold data tokens only, and no more than the maximum length"
    law = "with a perfect network samples follow the distribution of the data"
    return [
        Check("sampler.clean", clean, data, "yes" if data else "no", how),
        Check("sampler.law", law, distance < 2 * chance + bias + 0.002, value, how),
    ]


def check_frequencies(name: str, claim: str, distance: float) -> Check:
    """Return a check that holds if a total variation distance is below 0.03, the tolerance for :data:`DRAWS` draws.

    Args:
        name: Dotted name of the check.
        claim: Statement that is verified.
        distance: Total variation distance between the frequencies of the draws and a distribution.
    """
    return Check.below(name, claim, distance, 0.03, f"total variation, {DRAWS:,} draws", digits=".4f")


def draws_distance(
    table: StringTable,
    starts: Iterable[int],
    sample: Callable[..., Strings],
    law_at: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """Return the largest total variation distance of draws of x_t, at total noise 0.7, to their exact distribution.

    Args:
        table: Enumeration of short strings.
        starts: Indices of the clean strings x_0 to compare the draws for.
        sample: The kernel's method ``sample(batch, sigma, random=, width=)``, which draws x_t given x_0.
        law_at: Function that returns the exact distribution of noisy strings, float64 [1, s], given the total noise,
            float [1], and a distribution of clean strings, float64 [s].
    """
    worst, level = 0.0, torch.tensor([0.7])
    for x0 in starts:
        random = Randomness(torch.Generator().manual_seed(2))
        seen = sample(table.batch(torch.full((DRAWS,), x0)), level.expand(DRAWS), random=random, width=None)
        clean = F.one_hot(torch.tensor(x0), len(table.strings)).double()
        worst = max(worst, total_variation(table.number(seen), law_at(level, clean)[0]))
    return worst
