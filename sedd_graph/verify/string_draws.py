"""Verification of random draws of strings against enumerated distributions.

Every comparison counts standard deviations, so that its tolerance follows its own error: a draw fails if it is further
off than chance allows.

Axes: r draws, b noise levels, s strings of a table, c clean strings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.strings.kernel import StringKernel
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.statistics import bernstein, deviation, two_samples
from sedd_graph.verify.string_table import EnumeratedTable
from sedd_graph.verify.worst import worst

__all__ = [
    "LIMIT",
    "check_draws",
    "check_prior",
    "check_prior_is_noise",
    "check_spared",
    "misfit",
]

LIMIT = 6.0
"""Largest accepted number of standard deviations. By chance alone a normal variable exceeds it once in 500 million."""
NOISE = 60.0
"""Total noise at which nothing is left of the clean string, for a process whose slowest rate is 1."""
ROOMY = 12
"""Width of the clean rows that are noised: padding is added, so that no objective cuts a noisy string of a table."""
Sample = Callable[[Batch, Tensor, Randomness], Strings]
"""Type of the functions that draw noisy strings of clean rows at total noise [r]."""


def misfit(table: EnumeratedTable, strings: Strings, sigma: Tensor, groups: int) -> tuple[float, float]:
    """Compare noisy strings with their enumerated distribution, over all noise levels together and in groups of them.

    Args:
        table: The enumeration.
        strings: r noisy strings of clean strings that were drawn from the table's law.
        sigma: Total noise of each, float64 [r].
        groups: Number of groups of rows, by noise level.

    Returns:
        Standard deviations of the counts of all strings, and the largest standard deviations of the mean length and of
        the mean of -log p, over the groups.
    """
    levels, level = torch.unique(sigma, return_inverse=True)
    law = table.at(levels).clamp(min=0)
    number, count = table.number(strings), len(table.strings)
    found = torch.bincount(number, minlength=count + 1)[: count + 1].double()
    expected = (torch.bincount(level, minlength=len(levels)).double() @ law).clamp(min=0)
    beyond = (len(sigma) - expected.sum()).clamp(min=0) + 1e-9 * len(sigma)
    whole = deviation(found, torch.cat([expected, beyond[None]]))
    lengths = torch.tensor([float(len(s)) for s in table.strings], dtype=torch.float64)
    inside = number < count
    at, level = number[inside], level[inside]
    order = torch.argsort(sigma[inside], stable=True)
    group = torch.empty_like(order)
    group[order] = torch.arange(len(order)) * groups // max(1, len(order))
    means = 0.0
    for each in (lengths.expand_as(law), -law.clamp(min=1e-12).log()):
        mean = (law * each).sum(-1)
        spread = (law * (each - mean[:, None]) ** 2).sum(-1)
        largest = ((each - mean[:, None]).abs() * (law > 1e-7)).amax(-1)
        sums = [
            torch.zeros(groups, dtype=torch.float64).index_add(0, group, x)
            for x in (each[level, at] - mean[level], spread[level])
        ]
        most = torch.zeros(groups, dtype=torch.float64).scatter_reduce(0, group, largest[level], "amax")
        every = bernstein(sums[0].sum(), sums[1].sum(), most.max())
        means = worst(means, float(bernstein(sums[0], sums[1], most).max()), float(every))
    return whole, means


def _wide(table: EnumeratedTable, index: Tensor) -> Batch:
    """Return clean strings as rows of :data:`ROOMY` positions, so that nothing of their noisy strings is cut."""
    batch = table.batch(index)
    size = (0, ROOMY - batch.width)
    return Batch(*(torch.nn.functional.pad(x, size) for x in (batch.tokens, batch.attend, batch.corrupt, batch.loss)))


def check_draws(
    name: str, claim: str, table: EnumeratedTable, sample: Sample, sigma: Tensor, proof: Proof, *, many: int = 10
) -> Check:
    """Verify that draws of x_t follow the enumerated distribution, given each clean string and at each noise level.

    Args:
        name: Dotted name of the check.
        claim: Statement that is verified.
        table: The enumeration.
        sample: Draws noisy strings.
        sigma: Noise levels, float64 [b].
        proof: Strength of the verification.
        many: Factor on the number of draws where total noise is between 0.1 and 4.
    """
    few = 250 if proof == "quick" else 800
    # most draws where noise changes the strings most
    rows = torch.where((sigma > 0.1) & (sigma < 4), many * few, few)
    generator = torch.Generator().manual_seed(2)
    levels = sigma.repeat_interleave(rows)
    chosen = torch.multinomial(table.law, len(levels), replacement=True, generator=generator)
    strings = sample(_wide(table, chosen), levels, Randomness(generator))
    whole, means = misfit(table, strings, levels, len(sigma))
    clean = table.clean_strings
    parts = zip(sigma.split(8), rows.double().split(8), strict=True)
    pairs = torch.stack([torch.einsum("b,bcs->cs", n, table.conditional(x)) for x, n in parts]).sum(0)
    pairs = pairs * table.law[clean, None]
    number, count = table.number(strings), len(table.strings)
    inside = number < count
    cell = torch.searchsorted(clean, chosen)[inside] * count + number[inside]
    found = torch.bincount(cell, minlength=pairs.numel()).double()
    beyond = torch.stack([(~inside).sum().double(), (len(levels) - pairs.sum()).clamp(min=0) + 1e-9 * len(levels)])
    each = deviation(torch.cat([found, beyond[:1]]), torch.cat([pairs.flatten(), beyond[1:]]))
    off = worst(whole, each, means)
    value = f"{off:.1f} standard deviations (at most {LIMIT:g})"
    how = f"chi-square, lengths and log-probabilities of {len(levels):,} draws at {len(sigma)} noise levels"
    return Check(name, claim, off < LIMIT, value, how)


def check_prior(table: EnumeratedTable, end: float, longest: int) -> Check:
    """Verify that strings drawn from the prior follow the distribution of noisy strings at the end of the process.

    The prior is tested three times: with strings of at most ``longest`` tokens; of at most one token; and with token 0
    disallowed.

    Args:
        table: Enumeration of all short strings, and of their distribution at each noise level.
        end: Total noise at which noisy strings no longer depend on the clean string.
        longest: Number of tokens of the longest string to draw, at most that of the table.
    """
    rows, kernel = 200_000, table.kernel
    law = table.at(torch.tensor([end], dtype=torch.float64))[0].clamp(min=0)
    lengths = torch.tensor([len(s) for s in table.strings])
    off = 0.0
    for most, allowed in ((longest, None), (min(1, longest), None), (longest, torch.arange(kernel.data_tokens) > 0)):
        generator = torch.Generator().manual_seed(1)
        noise = kernel.prior(rows, longest=most, generator=generator, allowed=allowed)
        expected = law * (lengths <= most)
        if allowed is not None:
            expected = _restricted(table, expected, allowed)
        expected = torch.where(expected > 1e-9, expected, 0.0)
        found = torch.bincount(table.number(noise), minlength=len(law) + 1)[: len(law) + 1].double()
        expected = torch.cat([expected / expected.sum(), expected.new_zeros(1)]) * rows
        off = worst(off, deviation(found, expected))
    value = f"{off:.1f} standard deviations (at most {LIMIT:g})"
    how = f"chi-square of {rows:,} strings, also of at most one token, and with a token that is not allowed"
    return Check(
        "strings.prior",
        "noise of which nothing is left is the prior: its lengths and its tokens",
        off < LIMIT,
        value,
        how,
    )


def _restricted(table: EnumeratedTable, law: Tensor, allowed: Tensor) -> Tensor:
    """Return ``law`` [s] of independent tokens with the same lengths and the tokens ``allowed`` alone."""
    fits = torch.tensor([all(bool(allowed[v]) for v in s if v < len(allowed)) for s in table.strings])
    lengths = torch.tensor([len(s) for s in table.strings])
    found = torch.zeros_like(law)
    for length in range(int(lengths.max()) + 1):
        here = lengths == length
        total = (law * here * fits).sum()
        found += law * here * fits * ((law * here).sum() / total if total > 0 else 0.0)
    return found


def check_spared(table: EnumeratedTable, sample: Sample) -> list[Check]:
    """Verify that noise does not change the tokens of prompts (``Batch.corrupt`` false), nor their positions.

    Args:
        table: Enumeration of short strings, of which only the kernel is used.
        sample: Function that draws noisy strings.

    Returns:
        One check; none if the kernel does not support prompts (:attr:`StringKernel.supports_prompts`).
    """
    kernel = table.kernel
    if not kernel.supports_prompts:
        return []
    rows, wrong = 2_000, 0
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(kernel.data_tokens, (rows, 6), generator=generator)
    real = torch.arange(6) < torch.randint(3, 7, (rows, 1), generator=generator)
    kept = torch.arange(6) < torch.randint(0, 4, (rows, 1), generator=generator)
    free = real & ~kept
    for sigma in (0.05, 1.0, 9.0):
        level = torch.full((rows,), sigma, dtype=torch.float64)
        strings = sample(Batch(torch.where(real, tokens, 0), real, free, free), level, Randomness(generator))
        width = min(strings.tokens.shape[1] - 1, 6)
        same = (strings.tokens[:, 1 : width + 1] == tokens[:, :width]) | ~kept[:, :width]
        wrong += int((~same).any(-1).sum()) + int((strings.lengths < kept.sum(-1)).sum())
    claim = "tokens of a prompt, which are not to be corrupted, stay as they are and where they are"
    return [
        Check(
            "strings.spared",
            claim,
            not wrong,
            f"{wrong} rows changed",
            f"{3 * rows:,} rows with prompts, three noise levels",
        )
    ]


def check_prior_is_noise(declared: StringKernel, sample: Sample, sigma: float, mean: float) -> Check:
    """Verify that samples of the prior have the same distribution as random text after maximal noise.

    Their lengths, and their first, last and random tokens, are compared by two-sample tests, at the vocabulary size
    that the blueprint declares.

    Args:
        declared: The kernel as declared in the blueprint.
        sample: Function that draws noisy strings by this kernel.
        sigma: Total noise at which noisy strings no longer depend on the text.
        mean: Approximate mean length of a sample of the prior, tokens; more draws are made if it is small.
    """
    rows, tokens = int(max(500, min(40_000, 400_000 / (1 + mean)))), declared.data_tokens
    generator = torch.Generator().manual_seed(11)
    text = torch.randint(tokens, (rows, 8), generator=generator)
    level = torch.full((rows,), sigma, dtype=torch.float64)
    noise = sample(Batch.of(text), level, Randomness(generator))
    prior = declared.prior(rows, longest=int(64 * (1 + mean)), generator=generator, allowed=None)
    bins = max(1, int(64 * (1 + mean)) // 512)
    places = "first", "last", "random"
    off = worst(
        two_samples(*(torch.bincount(x.lengths // bins, minlength=1024).double()[:1024] for x in (noise, prior)))
    )
    for place in places:
        counts = []
        for strings in (noise, prior):
            lengths, some = strings.lengths, strings.lengths > 0
            u = torch.rand(rows, generator=generator)
            at = {"first": torch.ones_like(lengths), "last": lengths, "random": 1 + (u * lengths).long()}[place]
            at = at.clamp(max=strings.tokens.shape[1] - 1)
            counts.append(torch.bincount(strings.tokens.gather(1, at[:, None])[some, 0], minlength=tokens).double())
        off = worst(off, two_samples(*counts))
    value = f"{off:.1f} standard deviations (at most {LIMIT:g})"
    how = f"chi-square of lengths and of first, last and random tokens, {rows:,} draws of each, {tokens:,} tokens"
    return Check(
        "strings.declared",
        "under the declared kernel the prior is what noise leaves of random text",
        off < LIMIT,
        value,
        how,
    )
