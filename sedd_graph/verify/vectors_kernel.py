"""Verification of kernels of vectors: noise, embeddings, rounding, and the posterior by Bayes' rule on a grid.

Axes: b batch, l length, d width of a vector, v tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.vectors.gaussian import log_snr, posterior, spread
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.verify.vectors_context import check_context, check_decoding
from sedd_graph.verify.vectors_toy import TOKENS, Toy, level
from sedd_graph.verify.worst import worst

__all__ = ["check_kernel"]


def check_kernel(small: VectorParts, declared: VectorParts, proof: Proof) -> list[Check]:
    """Verify a kernel of vectors.

    Args:
        small: Components with few tokens.
        declared: Components with the declared number of tokens.
        proof: Strength of the verification.
    """
    times = _times(declared.kernel.steps, 400 if proof == "full" else 60)
    return [
        _check_noise(declared, times),
        _check_start(declared),
        *_check_tokens(small, declared),
        _check_posterior(small, times),
    ]


def _times(steps: int | None, count: int) -> Tensor:
    """Return times in (0, 1], multiples of 1 / steps in discrete time, float64; both ends included."""
    if steps is None:
        return torch.cat([torch.logspace(-4, 0, count, dtype=torch.float64)])
    index = torch.logspace(0, math.log10(steps), count, dtype=torch.float64).round().unique()
    times: Tensor = torch.cat([torch.tensor([1.0, 2.0, steps - 1.0], dtype=torch.float64), index]).unique() / steps
    return times


@torch.no_grad()
def _check_noise(parts: VectorParts, times: Tensor) -> Check:
    """Verify that x_t is sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise at the schedule's level, and log-SNR falls."""
    kernel, schedule = parts.kernel, parts.schedule
    rows = len(times)
    one, zero = (
        torch.ones(rows, 1, kernel.width, dtype=torch.float64),
        torch.zeros(rows, 1, kernel.width, dtype=torch.float64),
    )
    sigma = kernel.sigma(schedule, times)
    signal, noise = (v[:, 0, 0] for v in (kernel.noised(one, sigma, zero), kernel.noised(zero, sigma, one)))
    bar = torch.tensor([level(schedule, float(t)) for t in times], dtype=torch.float64)
    inputs = kernel.inputs(one, times, sigma)
    ratio = 2 * (signal.log() - noise.log())
    error = worst(
        float((signal.square() + noise.square() - 1).abs().max()),
        float((signal.square() - bar).abs().max()),
        float(((log_snr(sigma) - ratio) / (1 + ratio.abs())).abs().max()),
        float(((inputs["log_snr"].double() - ratio) / (1 + ratio.abs())).abs().max()) / 1e5,  # float32
        float((inputs["t"].double() - times).abs().max()) / 1e5,
    )
    if not bool((ratio.diff() < 0).all()) or not bool((signal > 0).all()) or not bool((noise > 0).all()):
        error = math.inf
    claim = "alpha^2 + sigma^2 = 1 at the level of the schedule, and the log-SNR falls with time"
    return Check.below("vectors.noise", claim, error, 1e-9, f"{rows} times, by the noise of known vectors")


@torch.no_grad()
def _check_start(parts: VectorParts) -> Check:
    """Verify that clean vectors spread around the embeddings with the declared sigma_0."""
    kernel, schedule = parts.kernel, parts.schedule
    tokens = torch.arange(min(kernel.data_tokens, 64))[None]
    noise = torch.randn(1, tokens.shape[1], kernel.width, generator=torch.Generator().manual_seed(21))
    found = kernel.start(tokens, schedule, noise).double()
    table = kernel.embed(tokens).double()
    deviation = kernel.declared_start(schedule)
    error = float((found - table - deviation * noise.double()).abs().max()) / (1 + float(table.abs().max()))
    error = worst(error, abs(kernel.start_variance(schedule) - deviation**2))
    claim = "x_0 is the embedding plus noise of the declared standard deviation sigma_0"
    return Check.below("vectors.start", claim, error, 1e-6, f"sigma_0 = {deviation:.6g}")


def _check_tokens(small: VectorParts, declared: VectorParts) -> list[Check]:
    """Return the checks of the embeddings: of a table, or of vectors that depend on the whole row."""
    if declared.kernel.contextual:
        return [check_context(declared), check_decoding(small)]
    return [_check_table(declared), _check_nearest(declared), _check_rounding(small)]


@torch.no_grad()
def _check_table(parts: VectorParts) -> Check:
    """Verify that the table has a finite vector for each token, that no two are equal, and that ``embed`` reads it."""
    kernel = parts.kernel
    table = kernel.table()
    shape = (kernel.data_tokens, kernel.width)
    tokens = torch.arange(kernel.data_tokens)[None]
    holds = tuple(table.shape) == shape and bool(table.isfinite().all())
    holds = holds and bool(torch.equal(kernel.embed(tokens)[0], table)) and len(table.unique(dim=0)) == len(table)
    claim = "every token has an embedding of its own"
    return Check("vectors.table", claim, holds, f"{shape[0]:,} vectors of {shape[1]}", "the declared number of tokens")


@torch.no_grad()
def _check_nearest(parts: VectorParts) -> Check:
    """Verify that the nearest embedding is that of the smallest Euclidean distance, in float64 and under a mask."""
    kernel = parts.kernel
    generator = torch.Generator().manual_seed(22)
    table = kernel.table().double()
    x = torch.randn(8, 5, kernel.width, generator=generator) * (1 + table.std())
    away = torch.cdist(x.double().view(1, -1, kernel.width), table[None], compute_mode="donot_use_mm_for_euclid_dist")
    away = away.view(8, 5, -1)
    allowed = torch.rand(kernel.data_tokens, generator=generator) < 0.5
    allowed[0] = True
    largest = 0.0
    for mask in (None, allowed):
        found = kernel.nearest(x, mask)
        distance = away if mask is None else away.masked_fill(~mask, math.inf)
        largest = worst(largest, float((distance.gather(-1, found[..., None])[..., 0] - distance.amin(-1)).max()))
    claim = "the nearest embedding has the least Euclidean distance, also among allowed tokens"
    return Check.below("vectors.nearest", claim, largest, 1e-5, "40 random vectors, distances in float64")


@torch.no_grad()
def _check_rounding(parts: VectorParts) -> Check:
    """Verify that rounding returns each token at its own embedding, a maximum of ``logits``, and obeys a mask."""
    kernel = parts.kernel
    tokens = torch.arange(TOKENS)[None]
    x = kernel.embed(tokens)
    logits = kernel.logits(x)
    wrong = []
    if not torch.equal(kernel.round(x), tokens):
        wrong.append("an embedding is rounded to another token")
    if tuple(logits.shape) != (1, TOKENS, TOKENS) or not torch.equal(logits.argmax(-1), kernel.round(x)):
        wrong.append("rounding is not the most likely token")
    only = torch.zeros(TOKENS, dtype=torch.bool)
    only[1] = True
    if not bool((kernel.round(x, only) == 1).all()):
        wrong.append("a token that is not allowed is returned")
    claim = "rounding recovers each token from its embedding, and returns allowed tokens alone"
    return Check("vectors.rounding", claim, not wrong, "; ".join(wrong) or "all", f"{TOKENS} tokens at known places")


@torch.no_grad()
def _check_posterior(parts: VectorParts, times: Tensor) -> Check:
    """Verify q(x_s | x_t) with numerical integration of Bayes' rule on a grid, given x_0 and given the token."""
    schedule, error = parts.schedule, 0.0
    toy = Toy(parts)
    for t in times[:: max(1, len(times) // 12)].tolist():
        steps = parts.kernel.steps
        for s in {t / 2 if steps is None else math.floor(t * steps / 2) / steps, t - 1 / (steps or 1000)}:
            if not 0 < s < t:
                continue
            for variance in (0.0, toy.start_variance):
                error = worst(error, _grid_error(level(schedule, s), level(schedule, t), variance))
    claim = "the posterior of x_s given x_t is that of Bayes' rule, given x_0 and given the token"
    how = "mean and variance against numerical integration on a grid of 4,001 points"
    return Check.below("vectors.posterior", claim, error, 1e-6, how)


def _grid_error(below: float, above: float, variance: float) -> float:
    """Return the error of mean and variance of q(x_s | x_t), relative to its standard deviation.

    Args:
        below: alpha_bar at s.
        above: alpha_bar at t.
        variance: Variance of x_0.
    """
    start, xt = 0.7, -0.4
    lower, sigma = (torch.tensor([-math.log(v)], dtype=torch.float64) for v in (below, above))
    found = posterior(lower, sigma, variance)
    wide = math.sqrt(float(spread(lower, variance)))
    mean: float = float(found.start) * start + float(found.noisy) * xt
    deviation = math.sqrt(float(found.variance))
    grid = mean + deviation * torch.linspace(-12, 12, 4001, dtype=torch.float64)
    step = above / below
    log = -((grid - below**0.5 * start) ** 2) / (2 * wide**2) - (xt - step**0.5 * grid) ** 2 / (2 * (1 - step))
    weight = log.softmax(0)
    average = float((weight * grid).sum())
    moment = float((weight * (grid - average) ** 2).sum())
    return worst(abs(average - mean) / deviation, abs(moment / deviation**2 - 1))
