"""Verification of token kernels with too many states for matrices over all pairs of states, and a report on stiffness.

Rates and probabilities are computed at a few states from the kernel's own methods, and compared with each other and
with draws. The distribution of a noisy token given a clean one is derived from the score that a prediction of
probability 1 for the clean token implies; rates into a state are reverse rates at scores of 1.

Axes: k noise levels, c tokens or pairs, n states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.walk import T_MIN
from sedd_graph.verify.kernel_draws import (
    GAP,
    SETTLED,
    check_allowed,
    check_seeds,
    check_split,
    compare_prior,
    independence,
    noised,
)
from sedd_graph.verify.statistics import NEVER, binomial_tail, chi_square, shifted
from sedd_graph.verify.worst import least, worst

__all__ = ["MANY", "check_mixing", "check_size", "check_stiffness"]

MANY = 64
"""Largest number of states for which every check enumerates all pairs of states."""
TABLE = 1024
"""Largest number of states whose rate matrix is computed for the fastest rate."""
LEVELS = (5e-3, 0.3, 2.0)
"""Values of total noise of the comparisons."""
TOKENS = {"full": 6, "quick": 2}
"""Number of random tokens, beside the first and the last."""
CALLS = {"full": 16, "quick": 4}
"""Number of calls of ``sample``, of 4,096 draws each at every noise level."""


@torch.no_grad()
def check_size(kernel: Kernel, *, end: float, proof: Proof) -> list[Check]:
    """Verify draws, prior, losses and steps of a kernel with any number of states, at a few of its states.

    Args:
        kernel: Kernel with its declared number of states.
        end: Total noise at t = 1.
        proof: Strength of the verification.
    """
    m = kernel.data_tokens
    some = torch.randperm(m, generator=torch.Generator().manual_seed(71))[: TOKENS[proof]]
    tokens = torch.cat([torch.tensor([0, m - 1]), some]).unique()
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    columns = _columns(kernel, tokens, sigma)
    last = _columns(kernel, tokens, torch.tensor([end], dtype=torch.float64))[0].T
    endless = _columns(kernel, tokens[:1], torch.tensor([SETTLED], dtype=torch.float64))[0, 0]
    contracts = [*compare_prior(kernel, last, endless, proof), check_allowed(kernel), check_seeds(kernel)]
    checks = [
        *_draws(kernel, tokens, sigma, columns, proof),
        *contracts,
        check_split(kernel),
        _losses(kernel, tokens, sigma, columns),
        *_steps(kernel, tokens, sigma, columns),
    ]
    return [_renamed(check, kernel.states) for check in checks]


def _renamed(check: Check, states: int) -> Check:
    name = check.name.replace("kernel.", "declared.")
    size = f"{states:,} states"
    how = check.how if size in check.how else f"{check.how}, {size}"
    return Check(name, check.claim, check.holds, check.value, how)


def _certain(kernel: Kernel, tokens: Tensor, levels: int) -> Tensor:
    """Return log-predictions that are certain of each of ``tokens`` [c], float64 [k, c, n]."""
    one = F.one_hot(tokens, kernel.states).double().log().clamp(min=-1e6)
    return one.expand(levels, -1, -1)


def _places(kernel: Kernel, tokens: Tensor, levels: int) -> Tensor:
    """Return a state at which the kernel's scores are read, for each token, int64 [k, c]: the mask if scores need one."""
    masked = kernel.clamp_safe and kernel.mask is not None
    at = torch.full_like(tokens, kernel.require_mask()) if masked else tokens
    return at.expand(levels, -1).contiguous()


def _columns(kernel: Kernel, tokens: Tensor, sigma: Tensor) -> Tensor:
    """Return the distribution of a noisy token given each of ``tokens`` [c] at ``sigma`` [k], float64 [k, c, n]."""
    k = len(sigma)
    score = kernel.log_score(_certain(kernel, tokens, k), _places(kernel, tokens, k), sigma)
    return score.double().softmax(-1)


def _draws(kernel: Kernel, tokens: Tensor, sigma: Tensor, columns: Tensor, proof: Proof) -> list[Check]:
    """Compare draws with ``columns`` [k, c, n], also where some positions must not change, and test independence."""
    k, c, rows, length = len(sigma), len(tokens), 16, 256
    generator = torch.Generator().manual_seed(72)
    counts, held, apart = torch.zeros(k, c, kernel.states, dtype=torch.float64), True, 1.0
    which = torch.arange(length).remainder(c).expand(rows, -1)
    x0 = tokens[which]
    for _ in range(CALLS[proof]):
        for level in range(k):
            corrupt = torch.rand(x0.shape, generator=generator) < 0.9
            seen = noised(kernel, x0, sigma[level].float().expand(rows), generator, corrupt)
            held = held and bool((seen == x0)[~corrupt].all()) and seen.dtype == torch.int64
            cell = (which * kernel.states + seen.clamp(0, kernel.states - 1))[corrupt]
            counts[level] += torch.bincount(cell, minlength=c * kernel.states).view(c, -1)
    for level, token in ((1, 0), (2, c - 1)):
        square = noised(kernel, tokens[token].expand(128, 128).clone(), sigma[level].float().expand(128), generator)
        apart = least(apart, *independence(square, columns[level, token], clean=int(tokens[token])))
    trials = counts.sum(-1)
    stay = counts.gather(-1, tokens.expand(k, -1)[..., None])[..., 0]
    chance = columns.gather(-1, tokens.expand(k, -1)[..., None])[..., 0]
    more = _columns(kernel, tokens, 1.01 * sigma).gather(-1, tokens.expand(k, -1)[..., None])[..., 0]
    tails = [chi_square(counts, trials[..., None] * columns), binomial_tail(stay, trials, chance)]
    tails.append(shifted(stay, trials, chance, more - chance))
    tails += [chi_square(counts[i, j], trials[i, j] * columns[i, j]) for i in range(k) for j in range(c)]
    probability = least(*tails)
    how = f"chi-square of {int(trials.sum()):,} draws of the first, the last and random tokens at {k} noise levels"
    claim = "draws of x_t follow the distribution that the kernel's scores imply"
    return [
        Check("kernel.sample", claim, probability > NEVER, f"probability by chance {probability:.1e}", how),
        Check(
            "kernel.corrupt",
            "positions that noise may not change keep their tokens",
            held,
            "kept" if held else "changed",
            "a tenth of the positions",
        ),
        Check(
            "kernel.independent",
            "noise at one row and position is independent of that at others",
            apart > NEVER,
            f"probability by chance {apart:.1e}",
            "sums and correlations of 128 rows and 128 positions",
        ),
    ]


def _pairs(kernel: Kernel, tokens: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of a noisy state and the index of its clean token, int64 [k, 2c] each.

    For each token they are the likeliest state and the likeliest one after it, or the token itself.
    """
    likely = columns.topk(2, dim=-1)
    second = torch.where(likely.values[..., 1] > 1e-6, likely.indices[..., 1], likely.indices[..., 0])
    z = torch.cat([likely.indices[..., 0], second], dim=1)
    return z, torch.arange(len(tokens)).repeat(2).expand(len(columns), -1)


def _of(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(1, index[..., None].expand(-1, -1, table.shape[-1]))


def _guess(kernel: Kernel, tokens: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return predictions over ``tokens`` [c] alone: weights [k, p, c], and log-probabilities [k, p, n], float64."""
    logits = 3 * torch.randn(*shape, len(tokens), generator=torch.Generator().manual_seed(73), dtype=torch.float64)
    weights = logits.softmax(-1)
    log_x0 = torch.full((*shape, kernel.states), -1e6, dtype=torch.float64)
    log_x0[..., tokens] = weights.log()
    return weights, log_x0


def _visible(kernel: Kernel, z: Tensor) -> Tensor:
    """Return where scores and predictions at ``z`` are ignored, as at visible tokens of a kernel that only masks."""
    return (z < kernel.data_tokens) & kernel.clamp_safe


def _losses(kernel: Kernel, tokens: Tensor, sigma: Tensor, columns: Tensor) -> Check:
    """Compare both losses with the definition of score entropy, rates and ratios taken from the kernel's methods."""
    z, which = _pairs(kernel, tokens, columns)
    x0 = tokens[which]
    ones = torch.ones(*z.shape, kernel.states, dtype=torch.float64)
    rates = kernel.reverse_rate(ones, z, sigma)
    seen = _of(columns, which)
    ratio = seen / seen.gather(-1, z[..., None])
    log_score = 2 * torch.randn(ones.shape, generator=torch.Generator().manual_seed(74), dtype=torch.float64)
    _, log_x0 = _guess(kernel, tokens, z.shape)
    implied = kernel.log_score(log_x0, z, sigma)
    error = 0.0
    found = (
        kernel.score_entropy(log_score.scatter(-1, z[..., None], 0.0), z, x0, sigma),
        kernel.nelbo(log_x0, z, x0, sigma),
    )
    for loss, head in zip(found, (log_score, implied), strict=True):
        head = torch.where(rates > 0, head, 0.0)
        terms = rates * (head.exp() - ratio * head + torch.xlogy(ratio, ratio) - ratio)
        scale = rates * (head.exp() + ratio * head.abs() + torch.xlogy(ratio, ratio).abs() + ratio)
        gap = (loss - terms.sum(-1)).abs() / (scale.sum(-1) + 1e-12)
        error = worst(error, float(torch.where(_visible(kernel, z), loss.abs(), gap).nan_to_num(nan=math.inf).max()))
    claim = "both losses are the score entropy, with the kernel's own rates and scores"
    return Check.below("kernel.loss", claim, error, 1e-7, f"{z.numel()} pairs of the first, the last and random tokens")


def _steps(kernel: Kernel, tokens: Tensor, sigma: Tensor, columns: Tensor) -> list[Check]:
    """Verify that scores are linear in the prediction, that both reverse steps agree, and the forward equation."""
    z, _ = _pairs(kernel, tokens, columns)
    z = torch.where(_visible(kernel, z), kernel.states - 1, z)
    weights, log_x0 = _guess(kernel, tokens, z.shape)
    mixed = torch.einsum("kpc,kcn->kpn", weights, columns)
    here = mixed.gather(-1, z[..., None])
    score = kernel.log_score(log_x0, z, sigma).exp()
    read = (kernel.reverse_rate(torch.ones_like(score), z, sigma) > 0) & (here > 1e-6)
    apart = ((score - mixed / here).abs() / (mixed / here + 0.01 + 1e-7 / here)).nan_to_num(nan=math.inf)
    linear = float(torch.where(read, apart, 0.0).max())
    below = 0.7 * sigma
    posterior = kernel.posterior(log_x0.exp(), z, sigma, below)
    tweedie = kernel.analytic(score.scatter(-1, z[..., None], 1.0), z, sigma, below)
    gap = (posterior - tweedie).abs().nan_to_num(nan=math.inf)
    step = float(torch.where((here > 1e-6) & (sigma[:, None, None] < 1), gap, 0.0).max())
    total = float((posterior.sum(-1) - 1).abs().max())
    how = f"{z.numel()} states, predictions of the first, the last and random tokens"
    claim = "the score of a prediction is that of the mixture of its tokens"
    agree = "the ancestral step and Tweedie's step agree, and sum to 1"
    return [
        Check.below("kernel.log_score", claim, linear, 1e-7, how),
        Check.below("kernel.steps", agree, worst(step, total), 1e-6, how),
        _forward(kernel, tokens, sigma, columns),
    ]


def _forward(kernel: Kernel, tokens: Tensor, sigma: Tensor, columns: Tensor) -> Check:
    """Verify Kolmogorov's forward equation at some states: the rate of leaving that it implies is one for all tokens."""
    z = columns.argmax(-1)
    z = torch.cat([z, columns.mean(1).topk(2, dim=-1).indices], dim=1)
    into = kernel.reverse_rate(torch.ones(*z.shape, kernel.states, dtype=torch.float64), z, sigma)
    h = 1e-3 * sigma
    near, far = (_columns(kernel, tokens, sigma + i * h) - _columns(kernel, tokens, sigma - i * h) for i in (1, 2))
    slope = (8 * near - far) / (12 * h[:, None, None])

    def at(table: Tensor) -> Tensor:  # [k, c, n] at z, [k, p, c]
        return table.gather(-1, z[:, None].expand(-1, table.shape[1], -1)).transpose(1, 2)

    here = at(columns)
    arriving = torch.einsum("kpn,kcn->kpc", into, columns)
    leaving = (arriving - at(slope)) / here
    known = here > 1e-7
    size = torch.where(known, leaving.abs() + arriving / here, 0.0).amax(-1) + 1e-3
    high = torch.where(known, leaving, -math.inf).amax(-1)
    low = torch.where(known, leaving, math.inf).amin(-1)
    spread = torch.where(known.any(-1), (high - low) / size, 0.0)
    negative = torch.where(known.any(-1), (-low / size).clamp(min=0), 0.0)
    error = float(torch.maximum(spread, negative).nan_to_num(nan=math.inf).max())
    claim = "the kernel's distributions solve the forward equation with its rates"
    how = "central differences; the rate of leaving a state is one for all tokens, and not negative"
    return Check.below("kernel.forward", claim, error, 1e-5, how)


def check_mixing(declared: Kernel, end: float) -> list[Check]:
    """Verify that the declared kernel reaches its prior at t = 1, if this depends on the number of states."""
    gap = declared.unmixed(end)
    if gap is None:
        return []
    claim = "noise at t = 1 is the prior at the declared number of states"
    how = f"total variation from the slowest tokens at total noise {end:.3g}; raise the noise at t = 1 if this fails"
    return [Check.below("kernel.mixed", claim, gap, GAP, how, digits=".4f")]


@torch.no_grad()
def check_stiffness(kernel: Kernel, schedule: Schedule, steps: int | None) -> list[Check]:
    """Report how stiff the declared kernel is: its fastest rate, and that rate times the longest step of the sampler.

    The result is a note, which cannot fail. Kernels of general rate matrices scale their rates so that the slowest mode
    decays as exp(-sigma); other modes can be much faster. Where a token would change many times in one step, steps by
    scores are clamped (Euler, tau-leaping) or amplify the errors of the network (Tweedie).

    Args:
        kernel: Kernel with its declared number of states.
        schedule: Noise schedule of the process.
        steps: Number of steps of the sampler; None for a sampler without a number of steps.

    Returns:
        One check; an empty list if the fastest rate is not known.
    """
    times = torch.linspace(1.0, T_MIN, (steps or 1) + 1, dtype=torch.float64)
    sigma = schedule.sigma(times)
    longest = (sigma[:-1] - sigma[1:]).topk(min(8, len(sigma) - 1))
    ends = sigma[1:][longest.indices]
    fastest = _fastest(kernel, ends if steps else sigma[:1])
    if fastest is None:
        return []
    claim = "the fastest rate of the kernel times the longest step of the sampler, in moves of a token"
    rate = float(fastest.max())
    if steps is None:
        return [Check("kernel.stiff", claim, None, f"fastest rate {rate:.3g}", "the sampler has no number of steps")]
    product = float((fastest * longest.values).max())
    value = f"{rate:.3g} per unit of total noise, {product:.3g} in a step"
    how = f"{kernel.states:,} states, {steps:,} steps, the longest of {float(longest.values.max()):.3g} in total noise"
    if product > 20:
        how += "; the kernel is stiff: Euler steps are clamped and long Tweedie steps refused, ancestral steps are exact for one token"
    return [Check("kernel.stiff", claim, None, value, how)]


def _fastest(kernel: Kernel, sigma: Tensor) -> Tensor | None:
    """Return the largest rate at which any state is left at each of ``sigma`` [k]; None if it is not known."""
    if kernel.states <= TABLE:
        return torch.stack([-kernel.rate_matrix(s).diagonal().min() for s in sigma.tolist()])
    if kernel.mask is not None:
        return None
    little = torch.tensor([1e-6], dtype=torch.float64)
    tokens = torch.randperm(kernel.states, generator=torch.Generator().manual_seed(75))[:8]
    stay = _columns(kernel, tokens, little)[0].gather(-1, tokens[:, None])
    return (-stay.log() / little).max().expand(len(sigma))
