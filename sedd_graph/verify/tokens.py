"""Verification of a process on token rows by enumeration of all short sequences over a vocabulary of three tokens.

:mod:`sedd_graph.verify.noise` verifies schedule and kernel. This module verifies objective and sampler with a perfect
network, whose outputs are computed from a known distribution of all 9 sequences of two positions. For block diffusion
it is a distribution of all 81 sequences of four positions, in two blocks.

Axes: b rows, l positions, n states, s sequences, k selected positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.tokens.block_diffusion import write_blocks
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.walk import Denoise, WalkSettings
from sedd_graph.engine.positionwise_suffix import take
from sedd_graph.verify.noise import check_declared
from sedd_graph.verify.total_variation import total_variation

__all__ = ["TOKENS", "Toy", "check_sampler", "prove_objective", "prove_parts", "prove_process", "prove_sampler"]

TOKENS, LENGTH = 3, 2
"""Vocabulary size of the enumerated distribution, and number of positions per sequence, or per block for block
diffusion."""
_MIN_LOG_SIGMA = -25.0
"""Logarithm of the lowest total noise in the table of transition matrices."""
_PER_UNIT = 10_000
"""Entries of the table of transition matrices per unit of log sigma: neighbouring noise levels differ by 0.01 %."""


class Toy:
    """Small data set with a known distribution, and a perfect network for it: the reference of the checks.

    The distribution is over all sequences of two positions and three tokens. The perfect network is a function that
    computes its outputs exactly from this distribution.

    Args:
        parts: Components of the process, constructed with :data:`TOKENS` data tokens.

    Attributes:
        parts: Components of the process.
        states: Number of states n, the mask included.
        law: Probability of each sequence, float64 [s].
        sequences: All sequences, int64 [s, l].
        length: Number of positions of a sequence, l.
        rows: Number of samples that a sampler is verified with.
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
        """Entropy of the data distribution, nats per sequence."""
        return float(-(self.law * self.law.log()).sum())

    def distance(self, rows: Tensor) -> float:
        """Return the total variation distance between the frequencies of samples and the data distribution.

        Args:
            rows: Samples, token ids int64 [b, l].
        """
        code = (rows.clamp(max=TOKENS - 1) * TOKENS ** torch.arange(self.length).flip(0)).sum(-1)
        return total_variation(code, self.law)

    def _transition(self, sigma: Tensor) -> Tensor:
        """Return the transition matrix P at the tabulated noise level nearest to each ``sigma`` [b], float64 [b, n, n].

        Matrices are cached by level, since the rows of a sampler can each have a different time.
        """
        levels = ((sigma.double().log() - _MIN_LOG_SIGMA) * _PER_UNIT).round().long().clamp(0, len(self._table) - 1)
        new = torch.unique(levels[~self._filled[levels]])
        self._table[new] = self.parts.kernel.transition_matrix(torch.exp(new / _PER_UNIT + _MIN_LOG_SIGMA).double())
        self._filled[new] = True
        return self._table[levels]

    def outputs(self, x: Tensor, sigma: Tensor, name: str, at: Tensor | None = None) -> dict[str, Tensor]:
        """Return the output of a perfect network for noisy rows.

        Args:
            x: Noisy rows, int64 [b, 2].
            sigma: Total noise, float [b].
            name: Kind of output: ``log_score``, which is log(p(y) / p(x)) for each row y that differs from x in at most
                one position, p being the distribution of noisy rows; or ``log_x0``, the log-probabilities of the clean
                token.
            at: Positions to evaluate, int64 [b, k]; None for both.

        Returns:
            The output by name, float32 [b, 2, n], or [b, k, n] with ``at``.
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
        """Return the output of a perfect network for a draw of the forward process.

        Args:
            draw: Noisy rows x_t with their noise levels.
            batch: The clean rows, which condition later blocks in block diffusion.
            name: Kind of output: ``log_score`` or ``log_x0``.

        Returns:
            The output by name, float32 [b, l, n].
        """
        return self.outputs(draw.xt, draw.sigma, name)

    def sample(self, x: Tensor, name: str, settings: WalkSettings, steps: int | None) -> Tensor:
        """Draw samples with the sampler of the process and a perfect network.

        Args:
            x: Initial noise, int64 [b, l].
            name: Kind of the network's output: ``log_score`` or ``log_x0``.
            settings: Settings of the reverse process.
            steps: Number of sampler steps; None for a sampler that chooses its own times.

        Returns:
            Samples, token ids int64 [b, l].
        """
        sampler, schedule = self.parts.sampler, self.parts.schedule

        def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
            return self.outputs(x, schedule.sigma(t), name, at)

        return sampler.run(denoise, x, settings, steps=steps)


class BlockToy(Toy):
    """Variant of :class:`Toy` for block diffusion: sequences of two blocks, the second given the clean first."""

    length, rows = 2 * LENGTH, 100_000

    def _prepare(self) -> None:
        # distributions of the first block [1, 3, 3] and of the second given the first [9, 3, 3]
        joint = self.law.view(TOKENS**LENGTH, TOKENS, TOKENS)
        self._laws = (joint.sum((1, 2)).view(1, TOKENS, TOKENS), joint / joint.sum((1, 2), keepdim=True))

    def _log_x0(self, x: Tensor, before: Tensor) -> Tensor:
        """Return log p(clean token | other token of the block, previous blocks), float32 [b, 2, n].

        Args:
            x: The noisy block, int64 [b, 2].
            before: The previous clean blocks, int64 [b, 0] or [b, 2].
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
"""Function that constructs the components of a process, called with a number of states, or None for the declared
number."""


def prove_process(make: Make, output: str, proof: Proof = "full") -> list[Check]:
    """Verify the components of a process on token rows: schedule, kernel, objective and sampler.

    Objective and sampler are verified with a perfect network. Takes seconds on a CPU.

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        output: Kind of output that objective and sampler read: ``log_score`` or ``log_x0``.

    Returns:
        The results of the checks.
    """
    return [*prove_parts(make, proof), *prove_objective(make, output, proof), *prove_sampler(make, output, proof)]


@torch.no_grad()
def prove_parts(make: Make, proof: Proof = "full") -> list[Check]:
    """Verify the noise schedule and the token kernel of a process.

    Both are verified with a few states and with the declared number (:func:`~sedd_graph.verify.noise.check_declared`).

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        proof: Strength of the verification: ``full``, or ``quick`` with fewer cases.

    Returns:
        The results of the checks.
    """
    return check_declared(_toy_parts(make), make, proof)


@torch.no_grad()
def prove_objective(make: Make, output: str, proof: Proof = "full") -> list[Check]:
    """Verify that with a perfect network the likelihood bound of the objective equals the entropy of the data.

    For a block objective, which may clip noise levels in training, the noise draws of evaluation are verified too.

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        output: Kind of output that the objective reads: ``log_score`` or ``log_x0``.

    Returns:
        The results of the checks.
    """
    toy = _make_toy(make)
    checks = [_check_bound(toy, output)]
    return checks if toy.parts.objective.block is None else [*checks, _check_bound(toy, output, evaluated=True)]


@torch.no_grad()
def prove_sampler(make: Make, output: str, proof: Proof = "full") -> list[Check]:
    """Verify that samples drawn with a perfect network follow the distribution of the data.

    Args:
        make: Function that constructs the components, called with a number of states, or None for the declared number.
        output: Kind of output that the sampler reads: ``log_score`` or ``log_x0``.

    Returns:
        The results of the checks (:func:`check_sampler`).
    """
    return check_sampler(_make_toy(make), output)


def _toy_parts(make: Make) -> TokenParts:
    """Construct the components with :data:`TOKENS` data tokens, plus the mask if the kernel has one."""
    parts = make(TOKENS)
    return parts if parts.kernel.mask is None else make(TOKENS + 1)


def _make_toy(make: Make) -> Toy:
    parts = _toy_parts(make)
    return Toy(parts) if parts.objective.block is None else BlockToy(parts)


def _check_bound(toy: Toy, output: str, *, evaluated: bool = False) -> Check:
    """Verify that with a perfect network the likelihood bound is the entropy of the data.

    Transposed matrices, missing terms and wrong factors make the check fail. ``evaluated`` uses the noise draws of
    evaluation instead of those of training.
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
    """Verify that samples drawn with a perfect network follow the distribution of the data.

    Samplers with a number of steps take 2 steps if they are exact, else 64. For a heuristic sampler the distance to the
    data distribution is only reported.

    Args:
        toy: Data distribution, perfect network and components.
        output: Kind of output that the sampler reads: ``log_score`` or ``log_x0``.

    Returns:
        The results of the checks; for an exact sampler also that no transition probability was out of range.
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
    if sampler.heuristic() is not None:
        found.append(Check("sampler.heuristic", sampler.claim(), None, value, how))
    else:
        found.append(Check("sampler.law", sampler.claim(), distance < 2 * chance + bias, value, how))
    if sampler.exact:
        how = f"{sampler.evaluations:,} evaluations"
        claim = "every probability of a move is in range"
        found.append(Check("sampler.bound", claim, sampler.clamped == 0, f"{sampler.clamped} out of range", how))
    return found
