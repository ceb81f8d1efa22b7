"""Verification of a token process on an enumerable toy: the declared components on sequences of three tokens.

:mod:`sedd_graph.verify.noise` verifies schedule and kernel. This module verifies objective and sampler with a perfect network:
its outputs are computed from the distribution of all nine sequences of two positions, or all 81 of four positions if text is
written in blocks (of two). Axes: b rows, l positions, n states.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.tokens.block_diffusion import write_blocks
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.walk import Denoise, WalkSettings
from sedd_graph.engine.positionwise_suffix import take
from sedd_graph.verify.noise import check_kernel, check_precision, check_schedule, final_sigma
from sedd_graph.verify.total_variation import total_variation

__all__ = ["TOKENS", "Toy", "check_sampler", "prove_objective", "prove_parts", "prove_process", "prove_sampler"]

TOKENS, LENGTH = 3, 2
"""Tokens and positions of the toy."""
_MIN_LOG_SIGMA = -25.0
"""Logarithm of the least noise in the table of transition matrices."""
_PER_UNIT = 10_000
"""Entries of that table per unit of log sigma: levels are 0.01 % apart."""


class Toy:
    """A distribution of all sequences of two tokens, and the outputs of a perfect network for it under a process.

    Attributes:
        parts: The components, made for :data:`TOKENS` tokens.
        law: float64 [s], the probability of each sequence.
        sequences: int64 [s, l], all sequences.
        length: Positions of a sequence, l.
        rows: Rows that samplers are verified on.
    """

    length, rows = LENGTH, 20_000

    def __init__(self, parts: TokenParts) -> None:
        self.parts, self.states = parts, parts.kernel.states
        generator = torch.Generator().manual_seed(7)
        weights = torch.rand(TOKENS**self.length, generator=generator, dtype=torch.float64) + 0.05
        self.law = weights / weights.sum()
        self.sequences = torch.tensor(list(itertools.product(range(TOKENS), repeat=self.length)))
        self._prepare()

    def _prepare(self) -> None:
        self._joint = torch.zeros(self.states, self.states, dtype=torch.float64)
        self._joint[self.sequences[:, 0], self.sequences[:, 1]] = self.law
        self._table = torch.zeros(35 * _PER_UNIT, self.states, self.states, dtype=torch.float64)
        self._filled = torch.zeros(len(self._table), dtype=torch.bool)

    @property
    def entropy(self) -> float:
        """Entropy of the distribution, nats per sequence."""
        return float(-(self.law * self.law.log()).sum())

    def distance(self, rows: Tensor) -> float:
        """Return the total variation between the frequencies of ``rows`` int64 [b, l] and the distribution."""
        code = (rows.clamp(max=TOKENS - 1) * TOKENS ** torch.arange(self.length).flip(0)).sum(-1)
        return total_variation(code, self.law)

    def _transition(self, sigma: Tensor) -> Tensor:
        """Return P at the table's level nearest to each ``sigma`` [b], float64 [b, n, n].

        Rows of a sampler can each have their own time, so each level is computed once.
        """
        levels = ((sigma.double().log() - _MIN_LOG_SIGMA) * _PER_UNIT).round().long().clamp(0, len(self._table) - 1)
        new = torch.unique(levels[~self._filled[levels]])
        self._table[new] = self.parts.kernel.transition_matrix(torch.exp(new / _PER_UNIT + _MIN_LOG_SIGMA).double())
        self._filled[new] = True
        return self._table[levels]

    def outputs(self, x: Tensor, sigma: Tensor, name: str, at: Tensor | None = None) -> dict[str, Tensor]:
        """Return the outputs of a perfect network, float32.

        Args:
            x: int64 [b, 2], noisy rows.
            sigma: [b], total noise.
            name: The standard output, ``log_score`` or ``log_x0``.
            at: int64 [b, k], the positions to return; None: all.
        """
        kernel, rows = self.parts.kernel, torch.arange(len(x))
        p = self._transition(sigma)
        if name == "log_score":
            law = p @ self._joint @ p.transpose(1, 2)
            given = [law[rows, :, x[:, 1]], law[rows, x[:, 0]]]  # one position jointly with the other's state
            exact = torch.stack([g / g.gather(1, x[:, i, None]) for i, g in enumerate(given)], dim=1)
        else:
            # the posterior of the clean token given the other position alone, which the bounds of kernels that move data tokens
            # ask for; at a mask it is the full posterior, and a token that is surely clean is carried over
            exact = torch.stack([p[rows, x[:, 1]] @ self._joint.T, p[rows, x[:, 0]] @ self._joint], dim=1)
            exact = exact / exact.sum(-1, keepdim=True)
            if kernel.clamp_safe and kernel.mask is not None:
                exact = torch.where((x == kernel.mask)[..., None], exact, F.one_hot(x, self.states).double())
        if at is not None:
            exact, x = exact.gather(1, at[..., None].expand(-1, -1, self.states)), x.gather(1, at)
        outputs = {name: exact.clamp(min=1e-300).log().clamp(min=-1e6).float()}
        # to the kernel's own outputs and back, so that its translation is verified too
        return dict(kernel.translate(kernel.express(outputs, x, sigma), x, sigma))

    def outputs_for(self, draw: Draw, batch: Batch, name: str) -> dict[str, Tensor]:
        """Return the outputs of a perfect network for a draw of the forward process."""
        return self.outputs(draw.xt, draw.sigma, name)

    def sample(self, x: Tensor, name: str, settings: WalkSettings, steps: int | None) -> Tensor:
        """Run the sampler from noise ``x`` int64 [b, l] with a perfect network; return its rows, int64 [b, l]."""
        sampler, schedule = self.parts.sampler, self.parts.schedule

        def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
            return self.outputs(x, schedule.sigma(t), name, at)

        return sampler.run(denoise, x, settings, steps=steps)


class BlockToy(Toy):
    """A distribution of all sequences of two blocks of two tokens, each block given the one before it."""

    length, rows = 2 * LENGTH, 100_000

    def _prepare(self) -> None:
        # distributions of the first block [1, 3, 3] and of the second given the first [9, 3, 3]
        joint = self.law.view(TOKENS**LENGTH, TOKENS, TOKENS)
        self._laws = (joint.sum((1, 2)).view(1, TOKENS, TOKENS), joint / joint.sum((1, 2), keepdim=True))

    def _log_x0(self, x: Tensor, before: Tensor) -> Tensor:
        """Return log p(clean token | other token of the block, blocks before), float32 [b, 2, n].

        Args:
            x: int64 [b, 2], the noisy block.
            before: int64 [b, 0 or 2], the clean blocks before it.
        """
        mask, rows = TOKENS, torch.arange(len(x))
        given = before[:, 0] * TOKENS + before[:, 1] if before.shape[1] else torch.zeros_like(rows)
        pair = self._laws[before.shape[1] // LENGTH][given]
        pair = torch.cat([pair, pair.sum(1, keepdim=True)], dim=1)  # the last entry: the other token is masked
        pair = torch.cat([pair, pair.sum(2, keepdim=True)], dim=2)
        law = torch.stack([pair[rows, :, x[:, 1]], pair[rows, x[:, 0]]], dim=1)
        law = law.index_fill(-1, torch.tensor([mask]), 0.0)
        law = law / law.sum(-1, keepdim=True)
        carried = F.one_hot(x, TOKENS + 1).double()
        return torch.where((x == mask)[..., None], law, carried).log().clamp(min=-1e6).float()

    def outputs_for(self, draw: Draw, batch: Batch, name: str) -> dict[str, Tensor]:
        blocks = [self._log_x0(draw.xt[:, s : s + LENGTH], batch.tokens[:, :s]) for s in (0, LENGTH)]
        return {name: torch.cat(blocks, dim=1)}

    def sample(self, x: Tensor, name: str, settings: WalkSettings, steps: int | None) -> Tensor:
        def denoise_after(before: Tensor) -> Denoise:
            def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
                log_x0 = self._log_x0(x, before[rows])
                return {name: log_x0 if at is None else take(log_x0, at, 1)}

            return denoise

        return write_blocks(self.parts.sampler, denoise_after, x, settings, block=LENGTH, steps=steps)


Make = Callable[[int | None], TokenParts]
"""Makes the declared components, for the declared number of states (None) or another."""


def prove_process(make: Make, output: str) -> list[Check]:
    """Verify the declared components: schedule and kernel each by itself, objective and sampler with a perfect network.

    Takes a few seconds on a CPU.

    Args:
        make: Makes the components, for the declared number of states (None) or another.
        output: Name of the graph's standard output, ``log_score`` or ``log_x0``.
    """
    return [*prove_parts(make), *prove_objective(make, output), *prove_sampler(make, output)]


@torch.no_grad()
def prove_parts(make: Make) -> list[Check]:
    """Verify the schedule, and the kernel at the toy's and (in float32) the declared number of states."""
    declared, small = make(None).kernel, _toy_parts(make)
    end = final_sigma(small.schedule)
    return [
        *check_schedule(small.schedule),
        *check_kernel(small.kernel, end=end),
        dataclasses.replace(check_precision(declared), name="kernel.declared"),
        *_check_mixing(declared, end),
    ]


def _check_mixing(declared: Kernel, end: float) -> list[Check]:
    """Verify that the declared kernel reaches its prior, if the time this takes depends on the number of states."""
    gap = declared.unmixed(end)
    if gap is None:
        return []
    claim = "noise at t = 1 is the prior at the declared number of states"
    how = f"total variation from the slowest tokens at total noise {end:.3g}; raise the noise at t = 1 if this fails"
    return [Check.below("kernel.mixed", claim, gap, 0.02, how, digits=".4f")]


@torch.no_grad()
def prove_objective(make: Make, output: str) -> list[Check]:
    """Verify the bound with a perfect network. A block objective can train with clipped draws, so the form that evaluation uses
    is verified too."""
    toy = _make_toy(make)
    checks = [_check_bound(toy, output)]
    return checks if toy.parts.objective.block is None else [*checks, _check_bound(toy, output, evaluated=True)]


@torch.no_grad()
def prove_sampler(make: Make, output: str) -> list[Check]:
    """Verify the distribution of samples with a perfect network."""
    return check_sampler(_make_toy(make), output)


def _toy_parts(make: Make) -> TokenParts:
    """Return the declared components for :data:`TOKENS` tokens, and the mask if there is one."""
    parts = make(TOKENS)
    return parts if parts.kernel.mask is None else make(TOKENS + 1)


def _make_toy(make: Make) -> Toy:
    parts = _toy_parts(make)
    return Toy(parts) if parts.objective.block is None else BlockToy(parts)


def _check_bound(toy: Toy, output: str, *, evaluated: bool = False) -> Check:
    """Verify that with a perfect network the bound is the entropy of the data.

    Transposed matrices, missing terms and wrong factors fail. ``evaluated`` takes the form that evaluation uses.
    """
    (kernel, schedule, objective, *_), rows = toy.parts, 30_000
    generator = torch.Generator().manual_seed(3)
    chosen = torch.multinomial(toy.law, rows, replacement=True, generator=generator)
    batch = Batch.of(toy.sequences[chosen])
    random, bound = Randomness(generator), objective.bound()
    if evaluated:
        bound, draw = bound.bound_draw(batch, kernel, schedule, random=random)
    else:
        draw = bound.corrupt(batch, kernel, schedule, random=random)
    nats = bound.loss(toy.outputs_for(draw, batch, output), draw, batch, kernel, schedule).double()
    # subtracting -log p(x0), whose mean is the entropy, reduces the variance
    gap = nats + toy.law[chosen].log()
    mean, error = float(gap.mean()), float(gap.std() / math.sqrt(rows))
    # bias: the prior term and the noise below t_min, and in discrete time also two positions that move in the same step, which
    # the reverse step treats as independent
    steps = getattr(bound.config, "steps", None)
    bias = (0.0 if evaluated else 0.01 * toy.entropy) + (0.0 if steps is None else 1.5 / steps)
    return Check(
        "objective.evaluated" if evaluated else "objective.tight",
        "with a perfect network the bound is the entropy of the data",
        abs(mean) < 5 * error + bias,
        f"{toy.entropy + mean:.4f} +- {error:.4f} against {toy.entropy:.4f} nats",
        f"{rows:,} draws on {len(toy.law)} sequences",
    )


def check_sampler(toy: Toy, output: str) -> list[Check]:
    """Verify that with a perfect network the samples follow the distribution of the data.

    An exact sampler takes as few steps as it can, another 64. A heuristic one is measured only.

    Args:
        toy: The distribution and the components.
        output: Name of the standard output, ``log_score`` or ``log_x0``.
    """
    (kernel, schedule, _, sampler, _), rows = toy.parts, toy.rows
    generator = torch.Generator().manual_seed(4)
    steps = None if sampler.steps is None else 2 if sampler.exact else 64
    x = kernel.prior(rows, toy.length, generator=generator, allowed=None)
    free = torch.ones_like(x, dtype=torch.bool)
    settings = WalkSettings(free=free, kernel=kernel, schedule=schedule, generator=generator)
    out = toy.sample(x, output, settings, steps)
    clean = bool((out < TOKENS).all())
    distance, chance = toy.distance(out), math.sqrt(len(toy.law) / rows / 2)
    # two positions that move in the same step are drawn independently: an error of the order of 1 / steps
    bias = 0.0 if sampler.exact or steps is None else 1.5 / steps
    taken = f"{steps} steps" if steps else f"{sampler.evaluations / rows:.1f} evaluations a row"
    value, how = f"{distance:.4f} (chance alone: about {chance:.4f})", f"total variation, {taken}, {rows:,} rows"
    found = [Check("sampler.clean", "samples hold no mask", clean, "0 masks" if clean else "masks", f"{rows:,} rows")]
    if (reason := sampler.heuristic()) is not None:
        found.append(Check("sampler.heuristic", f"samples do not follow the model: {reason}", None, value, how))
    else:
        claim = "with a perfect network samples follow the distribution of the data"
        found.append(Check("sampler.law", claim, distance < 2 * chance + bias, value, how))
    if sampler.exact:
        how = f"{sampler.evaluations:,} evaluations"
        claim = "every probability of a move is in range"
        found.append(Check("sampler.bound", claim, sampler.clamped == 0, f"{sampler.clamped} out of range", how))
    return found
