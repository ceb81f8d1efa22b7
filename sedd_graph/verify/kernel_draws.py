"""Verification of the random draws of a token kernel: noisy tokens and prior, and what callers rely on in them.

Notation: sigma total noise, P transition matrix. Axes: k noise levels, b rows, l positions, n states, m data tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.verify.guards import generators_state
from sedd_graph.verify.kernel_cases import HIGHEST, at_levels, noise_levels
from sedd_graph.verify.statistics import NEVER, binomial_tail, chi_square, correlated, dispersed, shifted
from sedd_graph.verify.worst import least

__all__ = ["GAP", "SETTLED", "check_allowed", "check_draws", "check_prior", "noised"]

DRAWS = {"full": 800_000, "quick": 300_000}
"""Approximate number of draws of noisy tokens with few states, over all noise levels and clean tokens; less with more."""
DRAW_LEVELS = {"full": 48, "quick": 16}
PRIOR_DRAWS = {"full": 2**17, "quick": 2**15}
SIDE = {"full": 256, "quick": 128}
"""Number of rows, and of positions, of the draws that are verified to be independent."""
TOGETHER = (0.05, 0.7, 3.0)
"""Values of total noise at which draws are verified to be independent."""
CALL = 2**22
"""Largest number of draws times states of one call."""
CELLS = 2**20
"""Largest number of levels times clean tokens times states whose draws are counted, with many states."""
SETTLED = 1e4
"""Total noise at which the transition matrix is taken to be that of endless noise."""
GAP = 0.01
"""Largest total variation distance between noise at t = 1 and the prior, which samples inherit; it is computed without error."""


def noised(
    kernel: Kernel, x0: Tensor, sigma: Tensor, generator: torch.Generator, corrupt: Tensor | None = None
) -> Tensor:
    """Draw noisy tokens x_t given clean tokens x_0.

    Args:
        kernel: The kernel.
        x0: Clean tokens, int64 [b, l].
        sigma: Total noise, [b].
        generator: Random number generator.
        corrupt: bool [b, l], positions that noise may change; None for all.

    Returns:
        Noisy tokens, int64 [b, l].
    """
    every = torch.ones_like(x0, dtype=torch.bool) if corrupt is None else corrupt
    return kernel.sample(x0, sigma, random=Randomness(generator), corrupt=every)


def check_draws(kernel: Kernel, proof: Proof) -> list[Check]:
    """Verify that ``kernel.sample`` draws x_t from P, independently at each row and position.

    Also verify that it leaves positions unchanged where noise is not allowed, uses no random generator but the one
    passed, and draws the same for a row however the batch is split.

    Args:
        kernel: Kernel with few states.
        proof: Strength of the verification.
    """
    law, corrupt = _marginals(kernel, proof)
    side = SIDE[proof]
    return [law, corrupt, _independent(kernel, side), check_seeds(kernel), check_split(kernel)]


def _marginals(kernel: Kernel, proof: Proof) -> tuple[Check, Check]:
    """Compare draws with P at many noise levels and all clean tokens; a share of the positions must not change."""
    m, n = kernel.data_tokens, kernel.states
    k = max(2, min(DRAW_LEVELS[proof], CELLS // (m * n)))
    sigma = _levels(kernel, k)
    copies = max(1, int(DRAWS[proof] / (1 + n / 16)) // (k * m))
    x0 = torch.arange(m).repeat(copies).expand(k, -1)
    generator = torch.Generator().manual_seed(2)
    counts, trials, held = torch.zeros(k, m, n), torch.zeros(k, m), True
    size = max(1, CALL // (k * n))
    level = torch.arange(k)[:, None]
    for part in x0.split(size, dim=1):
        corrupt = torch.rand(part.shape, generator=generator) < 0.9
        seen = noised(kernel, part, sigma, generator, corrupt)
        held = held and _valid(kernel, seen, part) and bool((seen == part)[~corrupt].all())
        cell = (level * m + part) * n + seen.clamp(0, n - 1)
        counts += torch.bincount(cell[corrupt], minlength=k * m * n).view(k, m, n)
        trials += torch.bincount((level * m + part)[corrupt], minlength=k * m).view(k, m)
    p = kernel.transition_matrix(sigma.double())[:, :, :m].transpose(1, 2)
    later = 1.01 * sigma.double() if kernel.steps is None else (sigma.double() + 1).clamp(max=kernel.steps)
    more = kernel.transition_matrix(later)[:, :, :m].transpose(1, 2)
    slope = torch.diagonal(more - p, dim1=1, dim2=2)
    stay = torch.diagonal(counts, dim1=1, dim2=2)
    chance = least(*_deviations(counts, trials, p), shifted(stay, trials, torch.diagonal(p, dim1=1, dim2=2), slope))
    claim, how = (
        "draws of x_t follow P",
        f"chi-square and binomial tests, {int(trials.sum()):,} draws at {k} noise levels",
    )
    value = f"probability by chance {chance:.1e}"
    claim_held = "positions that noise may not change keep their tokens"
    return (
        Check("kernel.sample", claim, chance > NEVER, value, how),
        Check("kernel.corrupt", claim_held, held, "kept" if held else "changed", "a tenth of the positions"),
    )


def _levels(kernel: Kernel, count: int) -> Tensor:
    """Return ``count`` levels of total noise for draws, float32 [k]; in discrete time an even grid of steps."""
    if kernel.steps is None:
        return noise_levels(count, end=HIGHEST, seed=41).float()
    return torch.linspace(1, kernel.steps, count).round()


def _deviations(counts: Tensor, trials: Tensor, p: Tensor) -> list[float]:
    """Return the probabilities by chance of deviations of ``counts`` [k, m, n] from ``p``, in several groupings.

    The groupings are: each level, token and state; all levels, by token and state; and by level and token, whether the
    token changed, and if so, to which state over all tokens.
    """
    expected = trials[..., None] * p
    stay = torch.diagonal(counts, dim1=1, dim2=2)  # [k, m]
    chance = torch.diagonal(p, dim1=1, dim2=2)
    levels = [chi_square(c, e) for c, e in zip(counts, expected, strict=True)]
    return [
        len(levels) * least(*levels),
        chi_square(counts, expected),
        chi_square(counts.sum(0), expected.sum(0)),
        chi_square(counts.sum(1), expected.sum(1)),
        binomial_tail(counts, trials[..., None], p),
        binomial_tail(stay, trials, chance),
        binomial_tail(stay.sum(0), trials.sum(0), _mean(chance, trials)),
        binomial_tail(stay.sum(1), trials.sum(1), _mean(chance.T, trials.T)),
    ]


def _mean(chance: Tensor, trials: Tensor) -> Tensor:
    """Return the mean chance over the first axis; the variance of a sum of binomial counts is below that at the mean."""
    return (chance * trials).sum(0) / trials.sum(0)


def _valid(kernel: Kernel, seen: Tensor, like: Tensor) -> bool:
    inside = bool(((seen >= 0) & (seen < kernel.states)).all())
    return inside and seen.shape == like.shape and seen.dtype == torch.int64


def _independent(kernel: Kernel, side: int) -> Check:
    """Verify that noise at different rows and positions is independent, for a square of one clean token."""
    chance = 1.0
    for number, sigma in enumerate(TOGETHER):
        token = (0, kernel.data_tokens - 1, kernel.data_tokens // 2)[number]
        x0 = torch.full((side, side), token)
        level = at_levels(kernel, torch.full((side,), sigma))
        seen = noised(kernel, x0, level, torch.Generator().manual_seed(51 + number))
        law = kernel.transition_matrix(float(level[0]) if kernel.steps else sigma)[:, token]
        chance = least(chance, *independence(seen, law, clean=token))
    claim = "noise at one row and position is independent of that at others"
    how = f"sums and correlations of {side} rows and {side} positions at {len(TOGETHER)} noise levels"
    return Check("kernel.independent", claim, chance > NEVER, f"probability by chance {chance:.1e}", how)


def independence(seen: Tensor, law: Tensor, *, clean: int | None = None) -> list[float]:
    """Return p-values of tests that draws at different rows and positions are independent.

    The tests reduce each draw to whether it is in a set of states. The sets are two random ones of about half the
    probability, and all states other than ``clean``.

    Args:
        seen: Draws, int64 [b, l].
        law: Distribution of each draw, float [n].
        clean: The clean token of all draws; None to test only the two random sets.

    Returns:
        p-values or upper bounds on them; 0 for a law that is not finite.
    """
    if not bool(law.isfinite().all()):
        return [0.0]
    every, found = torch.arange(len(law)), list[float]()
    sets = [_half(law, seed) for seed in (53, 54)]
    if clean is not None:
        sets.append(every != clean)
    for chosen in sets:
        chance = float(law[chosen].sum())
        if 0.02 < chance < 0.98:
            hits = chosen[seen.clamp(0, len(law) - 1)].double()
            found += [dispersed(hits, chance), correlated(hits, chance)]
    return found


def _half(law: Tensor, seed: int) -> Tensor:
    """Return a random set of states of about half the probability, bool [n]."""
    order = torch.randperm(len(law), generator=torch.Generator().manual_seed(seed))
    order = order[(law[order] > 0.25).argsort(descending=True, stable=True)]  # the likely states first
    chosen = torch.zeros(len(law), dtype=torch.bool)
    before = law[order].cumsum(0) - law[order]
    chosen[order[before + law[order] / 2 < 0.5]] = True
    return chosen


def check_seeds(kernel: Kernel) -> Check:
    """Verify that draws follow from the given generator alone: none from the global ones, nothing kept between draws."""
    m, n = kernel.data_tokens, kernel.states
    x0 = torch.arange(64).remainder(m).expand(16, -1).contiguous()
    sigma = at_levels(kernel, torch.linspace(0.5, 4.0, 16))
    corrupt = torch.ones_like(x0, dtype=torch.bool)
    inputs = (x0, sigma, corrupt)
    kept, before = [v.clone() for v in inputs], generators_state()

    def draws(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        first = kernel.sample(x0, sigma, random=Randomness(generator), corrupt=corrupt)
        again = kernel.sample(x0, sigma, random=Randomness(generator), corrupt=corrupt)
        return first, again, kernel.prior(16, 64, generator=torch.Generator().manual_seed(seed), allowed=None)

    one, two, same = draws(61), draws(62), draws(61)
    fixed = bool((one[2] == one[2][0, 0]).all())  # a prior of one state
    faults = {
        "the same seed gives other draws": not all(map(torch.equal, one, same)),
        "another seed gives the same draws": torch.equal(one[0], two[0]) or (not fixed and torch.equal(one[2], two[2])),
        "a generator gives the same draws twice": torch.equal(one[0], one[1]),
        "the global random generators are used": generators_state() != before,
        "the inputs are changed in place": not all(map(torch.equal, inputs, kept)),
        "the prior is not int64 [rows, length] of states": not _valid(kernel, one[2], x0),
    }
    wrong = [text for text, found in faults.items() if found]
    claim = "draws follow from the given generator alone"
    return Check("kernel.seed", claim, not wrong, "; ".join(wrong) or "they do", f"sample and prior, {n:,} states")


def check_split(kernel: Kernel) -> Check:
    """Verify that a row of a global batch gets the same draw however the batch is split over ranks and steps."""
    rows, length = 12, 32
    x0 = torch.arange(rows * length).remainder(kernel.data_tokens).view(rows, length)
    sigma = at_levels(kernel, torch.linspace(0.2, 4.0, rows))
    every = torch.ones_like(x0, dtype=torch.bool)

    def part(start: int, stop: int) -> Tensor:
        random = Randomness(torch.Generator().manual_seed(63), start=start, total=rows)
        return kernel.sample(x0[start:stop], sigma[start:stop], random=random, corrupt=every[start:stop])

    whole = part(0, rows)
    pieces = torch.cat([part(0, 5), part(5, 6), part(6, rows)])
    same, apart = torch.equal(whole, pieces), len({tuple(row) for row in (whole != x0).tolist()}) > 1
    claim = "a row's noise does not depend on how the batch is split, and ranks draw rows of their own"
    value = "the same" if same and apart else "other draws" if apart else "all rows are noised at the same positions"
    return Check("kernel.split", claim, same and apart, value, f"{rows} rows, whole and as 5, 1 and 6")


def check_prior(kernel: Kernel, *, end: float, proof: Proof = "full") -> list[Check]:
    """Verify that noised tokens at t = 1 have the distribution of the prior, which sampling starts from.

    The draws of the prior must follow a reference distribution, and for each clean token the exact distribution of the
    noised token at t = 1 must be close to it. The reference is the distribution after endless noise. If the draws do
    not follow that, as for a prior made for one schedule, it is the distribution at t = 1, averaged over clean tokens.

    Args:
        kernel: Kernel with few states.
        end: Total noise at t = 1.
        proof: Strength of the verification.
    """
    m = kernel.data_tokens
    last = kernel.transition_matrix(end)[:, :m]
    endless = kernel.transition_matrix(SETTLED)[:, :m].mean(1)
    return [*compare_prior(kernel, last, endless, proof), check_allowed(kernel)]


def compare_prior(kernel: Kernel, last: Tensor, endless: Tensor, proof: Proof) -> list[Check]:
    """Verify that draws of the prior are independent, and that noise at t = 1 has their distribution.

    Args:
        kernel: The kernel.
        last: Distribution of the noisy token at t = 1 given each clean token, float64 [n, m].
        endless: Distribution of the noisy token after endless noise, float64 [n].
        proof: Strength of the verification.
    """
    count, side = PRIOR_DRAWS[proof], SIDE["quick"]
    generator = torch.Generator().manual_seed(1)
    length = max(1, min(count // side, CALL // kernel.states))
    rows = [kernel.prior(side, length, generator=generator, allowed=None) for _ in range(count // side // length)]
    seen = torch.cat([r.reshape(-1) for r in rows])
    counts = torch.bincount(seen, minlength=kernel.states).double()
    gaps, chances = [], []
    for law in (endless, last.mean(1)):
        gaps.append(float((last - law[:, None]).abs().sum(0).max() / 2))
        chances.append(chi_square(counts, len(seen) * law))
    which = 0 if chances[0] > NEVER else 1
    gap, chance, law = gaps[which], chances[which], (endless, last.mean(1))[which]
    value = f"{gap:.4f}, prior by chance {chance:.1e}"
    how = f"total variation of P, the worst clean token, and chi-square of {len(seen):,} draws of the prior"
    square = rows[0][:, : SIDE["quick"]]
    apart = least(*independence(square, law))
    claim = "rows and positions of the prior are independent"
    return [
        Check("kernel.prior", "noise at t = 1 is the prior", gap < GAP and chance > NEVER, value, how),
        Check("kernel.prior_independent", claim, apart > NEVER, f"probability by chance {apart:.1e}", how),
    ]


def check_allowed(kernel: Kernel) -> Check:
    """Verify that draws of the prior are data tokens that are allowed, or the mask, and nothing else."""
    n, m, wrong = kernel.states, kernel.data_tokens, []
    some = torch.rand(m, generator=torch.Generator().manual_seed(64)) < 0.5
    tokens = {"the first token": [0], "the last token": [m - 1], "half of the tokens": some.nonzero()[:, 0].tolist()}
    for name, chosen in tokens.items():
        if not chosen:
            continue
        allowed = torch.zeros(n, dtype=torch.bool)
        allowed[chosen] = True
        given = allowed.clone()
        seen = kernel.prior(32, 32, generator=torch.Generator().manual_seed(65), allowed=given)
        inside = allowed.clone()
        if kernel.mask is not None:
            inside[kernel.mask] = True
        if not _valid(kernel, seen, seen) or not bool(inside[seen].all()) or not torch.equal(given, allowed):
            wrong.append(name)
    claim = "the prior holds allowed tokens only"
    value = f"others where only {' or '.join(wrong)} may be drawn" if wrong else "allowed tokens only"
    return Check("kernel.allowed", claim, not wrong, value, "the first, the last and half of the data tokens")
