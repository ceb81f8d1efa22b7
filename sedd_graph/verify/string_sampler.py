"""Verification of samplers of strings with a perfect network, whose samples must follow the distribution of the data.

The error of a sampler that takes steps is of first order in their length. It is removed by extrapolation from two
numbers of steps, so that the tolerance is that of the draws alone.

Axes: b rows, s strings, g noise levels of a grid, w positions of a padded string, v data tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.strings.kernel import StringTable
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.strings.sampler import StringSettings
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.guards import generators_state
from sedd_graph.verify.statistics import deviation
from sedd_graph.verify.string_steps import check_string_steps
from sedd_graph.verify.worst import worst

__all__ = ["check_string_sampler"]

LIMIT = 5.0
"""Largest accepted number of standard deviations."""
RESIDUE = 0.004
"""Total variation distance that is allowed for the error of second order in the step, which extrapolation leaves."""


class GridNetwork:
    """A perfect network, interpolated between noise levels of a grid.

    Args:
        table: The enumeration, whose outputs are evaluated once for each string and noise level of the grid.
        end: Largest total noise.
        count: Number of noise levels, evenly spaced in log sigma from 1e-6.
    """

    def __init__(self, table: StringTable, end: float, count: int) -> None:
        self.table, self._low = table, math.log(1e-6)
        self._step = (math.log(end) - self._low) / (count - 1)
        levels = torch.exp(self._low + self._step * torch.arange(count, dtype=torch.float64))
        rows, size = table.rows(torch.arange(len(table.strings))), len(table.strings)
        each = [table.outputs(rows, level.expand(size)) for level in levels]
        self.values = {name: torch.stack([found[name] for found in each]) for name in each[0]}

    def __call__(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name, float32, for b strings at total noise ``sigma`` [b]."""
        index = self.table.number(strings).clamp(max=len(self.table.strings) - 1)
        place = (sigma.double().clamp(min=1e-6).log() - self._low) / self._step
        count = len(next(iter(self.values.values())))
        below = place.floor().long().clamp(0, count - 2)
        share = (place - below).clamp(0, 1).float()
        width, found = strings.tokens.shape[1], {}
        one = bool((sigma == sigma[0]).all())
        for name, value in self.values.items():
            if one:
                made = torch.lerp(value[below[0]], value[below[0] + 1], share[0])[index]
            else:
                rest = [1] * (value.dim() - 2)
                made = torch.lerp(value[below, index], value[below + 1, index], share.view(-1, *rest))
            made = made[:, :width]
            found[name] = F.pad(made, (0, 0) * (made.dim() - 2) + (0, width - made.shape[1]))
        return found


def _run(
    table: StringTable, parts: StringParts, network: GridNetwork, rows: int, steps: int | None, seed: int
) -> Strings:
    """Draw strings with a perfect network."""
    kernel, schedule, objective, sampler = parts
    generator = torch.Generator().manual_seed(seed)
    longest = table.clean if objective.one_length else table.longest
    noise = kernel.prior(rows, longest=longest, generator=generator, allowed=None)
    fixed = torch.zeros_like(noise.attend)
    fixed[:, 0] = True
    settings = StringSettings(
        fixed=fixed,
        shut=~noise.attend,
        longest=longest,
        one_length=objective.one_length,
        kernel=kernel,
        schedule=schedule,
        generator=generator,
    )

    def denoise(strings: Strings, sigma: Tensor) -> Mapping[str, Tensor]:
        return objective.rates(network(strings, sigma), strings, longest)

    return sampler.run(denoise, noise, settings, steps=steps)


def check_string_sampler(table: StringTable, parts: StringParts, proof: Proof = "full") -> list[Check]:
    """Verify that samples drawn with a perfect network follow the distribution of the data, including string lengths.

    Args:
        table: Enumeration of short strings, which provides the data distribution and the outputs of the perfect
            network.
        parts: The components, constructed with the data tokens of the table.
        proof: Strength of the verification.

    Returns:
        Checks of the samples, of single edits, of given tokens, and of random numbers.
    """
    large, sampler = table.kernel.data_tokens == max(table.kernel.toys), parts.sampler
    full = proof == "full" and large
    end = float(parts.schedule.sigma(torch.ones(1, dtype=torch.float64)))
    network = GridNetwork(table, end, 160 if full else 96)
    runs: list[tuple[int | None, int, float]]
    if sampler.steps is None:
        runs = [(None, 12_000 if full else 5_000, 1.0)]
    else:
        runs = [(32, 5_000, -0.5), (96, 14_000, 1.5)] if full else [(24, 3_000, -0.5), (72, 6_000, 1.5)]
    count = len(table.strings)
    law, found, variance, clean = torch.cat([table.law, torch.zeros(1)]), torch.zeros(count + 1).double(), 0.0, True
    outside = 0.0
    for steps, rows, share in runs:
        out = _run(table, parts, network, rows, steps, 4)
        data = torch.where(out.attend, out.tokens, 0)[:, 1:] < table.kernel.data_tokens
        limit = table.clean if parts.objective.one_length else table.longest
        clean &= bool(data.all()) and bool((out.lengths <= limit).all())
        clean &= not parts.objective.one_length or bool((out.lengths == limit).all())
        each = torch.bincount(table.number(out), minlength=count + 1)[: count + 1].double() / rows
        found += share * each
        variance += share**2 / rows
        outside += share**2 * float(each[law == 0].sum()) / rows
    size = 1 / variance
    how = " and ".join(f"{rows:,} strings" + ("" if steps is None else f" in {steps} steps") for steps, rows, _ in runs)
    how += "" if sampler.steps is None else ", extrapolated to many steps"
    valid = "samples hold data tokens only, and no more than the maximum length"
    if parts.objective.one_length:
        valid = "samples hold data tokens only, and have the one length"
    return [
        Check("sampler.clean", valid, clean, "yes" if clean else "no", how),
        *_laws(table, law, found, size, outside, how, 0.0 if sampler.steps is None else RESIDUE),
        *(check_string_steps(table, parts, proof) if large else []),
        *_check_kept(table, parts, network),
        _check_contract(table, parts, network),
    ]


def _laws(
    table: StringTable, law: Tensor, found: Tensor, size: float, outside: float, how: str, residue: float
) -> list[Check]:
    """Return checks of the frequencies ``found`` [s + 1] of all strings, of lengths, and of the mean of -log p.

    Args:
        table: The enumeration.
        law: Expected frequencies, float64 [s + 1].
        found: Frequencies, float64 [s + 1]; where they are extrapolated, some can be negative.
        size: Number of independent draws with the same variance.
        outside: Variance of the frequency of strings that have no probability.
        how: How the frequencies were measured.
        residue: Total variation distance that the sampler's error leaves.
    """
    support = law > 0
    lost = float(found[~support].sum())
    here = found[support]
    whole = deviation(here * size + lost * size * law[support], law[support] * size)
    free = int(support.sum())
    # what a distance of `residue`, spread as the law, adds to chi-square
    whole -= size * (2 * residue) ** 2 / math.sqrt(2 * free)
    stray = (lost - residue) / math.sqrt(outside + 9 / size**2)
    distance = float((found - law).abs().sum() / 2)
    lengths = torch.tensor([float(len(s)) for s in table.strings], dtype=torch.float64)
    each = {"length": lengths, "-log p": -table.law.clamp(min=1e-12).log()}
    values, off = [], 0.0
    for name, x in each.items():
        x = x[support[:-1]]
        mean = float(law[support] @ x)
        spread = math.sqrt(float(law[support] @ (x - mean) ** 2) / size)
        wide = float((x - mean).abs().max())
        measured = float(here @ x) + lost * mean
        gap = worst(0.0, abs(measured - mean) - residue * wide / 2)
        off = worst(off, 0.0 if spread <= 1e-9 else gap / spread)
        values.append(f"{name} {measured:.4f} against {mean:.4f} +- {spread:.4f}")
    claim = "with a perfect network samples follow the distribution of the data"
    counts = f"total variation {distance:.4f}; {worst(whole, stray):.1f} standard deviations (at most {LIMIT:g})"
    moments = "with a perfect network samples are as long and as probable as the data, on average"
    return [
        Check("sampler.law", claim, worst(whole, stray) < LIMIT, counts, how),
        Check("sampler.moments", moments, off < LIMIT, "; ".join(values), how),
    ]


def _settings(table: StringTable, parts: StringParts, rows: int, seed: int) -> tuple[Strings, StringSettings]:
    """Return given strings 0 1 0, in which the gap behind the first token is open, and the settings that keep them."""
    kernel = parts.kernel
    tokens = torch.tensor([[kernel.start, 0, 1, 0]]).repeat(rows, 1)
    every = torch.ones_like(tokens, dtype=torch.bool)
    shut = every.clone()
    shut[:, 1] = False
    settings = StringSettings(
        fixed=every.clone(),
        shut=shut,
        longest=6,
        kernel=kernel,
        schedule=parts.schedule,
        generator=torch.Generator().manual_seed(seed),
        allowed=torch.arange(kernel.data_tokens) == 1,
    )
    return Strings(tokens, every), settings


def _noisy(table: StringTable, network: GridNetwork, strings: Strings) -> dict[str, Tensor]:
    """Return arbitrary outputs of a wrong network, of the shapes of the perfect one's."""
    found, (rows, width) = {}, strings.tokens.shape
    generator = torch.Generator().manual_seed(int(strings.attend.sum()) % 1000)
    for name, value in network.values.items():
        shape = (rows, width, *value.shape[3:])
        found[name] = torch.randn(shape, generator=generator) - 1.0
        if name == "log_x0":
            found[name][..., table.kernel.data_tokens :] = -1e6
            found[name] = found[name].log_softmax(-1)
    return found


def _check_kept(table: StringTable, parts: StringParts, network: GridNetwork) -> list[Check]:
    """Verify that given tokens stay, nothing is inserted behind shut positions, and only allowed tokens are.

    Returns:
        One check; [] if the kernel cannot hold tokens.
    """
    if parts.kernel.refuses_prompts() is not None:
        return []
    claim = "given tokens stay, nothing is inserted between them, and only allowed tokens are inserted"
    how = "an arbitrary network, 400 strings with three given tokens and one hole"
    strings, settings = _settings(table, parts, 400, 3)

    def rates(now: Strings, sigma: Tensor) -> Mapping[str, Tensor]:
        return _noisy(table, network, now)

    out = parts.sampler.run(rates, strings, settings, steps=None if parts.sampler.steps is None else 16)
    wrong = 0
    for tokens, length in zip(out.tokens.tolist(), out.lengths.tolist(), strict=True):
        row = tokens[1 : length + 1]
        kept = row[:1] == [0] and row[-2:] == [1, 0] and 3 <= len(row) <= 6
        wrong += not (kept and set(row[1:-2]) <= {1} and tokens[0] == parts.kernel.start)
    filled = float((out.lengths > 3).double().mean())
    holds = not wrong and filled > 0.02
    return [Check("sampler.kept", claim, holds, f"{wrong} strings wrong; the hole of {filled:.0%} is filled", how)]


def _check_contract(table: StringTable, parts: StringParts, network: GridNetwork) -> Check:
    """Verify that samples depend on the given generator alone."""
    steps = None if parts.sampler.steps is None else 8
    before, wrong = generators_state(), []
    first = _run(table, parts, network, 200, steps, 5)
    other = _run(table, parts, network, 200, steps, 6)
    again = _run(table, parts, network, 200, steps, 5)
    if not (torch.equal(first.tokens, again.tokens) and torch.equal(first.attend, again.attend)):
        wrong.append("samples with the same seed differ")
    if torch.equal(table.number(first), table.number(other)):
        wrong.append("samples with another seed are the same")
    if len(torch.unique(table.number(first))) < 2:
        wrong.append("all rows are the same")
    if generators_state() != before:
        wrong.append("a global random number generator is used")
    claim = "samples depend on the given random number generator alone"
    return Check(
        "sampler.contract", claim, not wrong, "; ".join(wrong) or "kept", "seeds, global generators, repeated runs"
    )
