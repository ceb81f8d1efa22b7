"""Enumerable data sets with known distributions, and the perfect network for them: the reference of the proofs.

Axes: b rows, l positions, n states (the mask included), v data tokens, s sequences, u distinct rows, k selected
positions.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.tokens.block_diffusion import write_blocks
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.walk import Denoise, WalkSettings
from sedd_graph.engine.positionwise_suffix import take
from sedd_graph.errors import UserError

__all__ = ["ALONE", "PAIR", "TRIPLE", "Law", "Make", "Toy", "make_toy", "toy_parts"]

Make = Callable[[int | None], TokenParts]
"""Function that constructs the components of a process, called with a number of states, or None for the declared
number."""
MOST_SEQUENCES = 4096
"""Largest number of sequences that a toy enumerates."""


@dataclasses.dataclass(frozen=True)
class Law:
    """A distribution of short sequences.

    Attributes:
        tokens: Number of data tokens v.
        length: Positions per sequence l.
        seed: Seed of the probabilities.
        spread: Standard deviation of their logarithms; None for probabilities that are nearly even.
        shares: Probabilities of the tokens, if all positions are independent and have the same distribution.
    """

    tokens: int
    length: int
    seed: int = 7
    spread: float | None = None
    shares: tuple[float, ...] = ()

    def probabilities(self) -> Tensor:
        """Return the probability of each sequence, float64 [s], in lexicographic order."""
        count = self.tokens**self.length
        if self.shares:
            each = torch.tensor(self.shares, dtype=torch.float64)
            out = each
            for _ in range(self.length - 1):
                out = (out[:, None] * each).reshape(-1)
            return out
        generator = torch.Generator().manual_seed(self.seed)
        if self.spread is None:
            weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.05
        else:
            weights = torch.exp(self.spread * torch.randn(count, generator=generator, dtype=torch.float64))
        return weights / weights.sum()


PAIR = Law(3, 2)
"""Two positions of three tokens, weakly dependent."""
TRIPLE = Law(4, 3, seed=4, spread=1.5)
"""Three positions of four tokens, strongly dependent: the entropy is 2.82 nats, 0.95 below that of independent tokens."""
ALONE = Law(4, 2, shares=(0.6, 0.05, 0.25, 0.1))
"""Two positions of four tokens, independent: what each position draws can be seen by itself."""


class Toy:
    """Small data set with a known distribution, and a perfect network for it.

    The perfect network is a function that computes its outputs exactly from the distribution. For block diffusion, the
    sequences are two blocks, and the outputs at a block are given the clean blocks before it.

    Args:
        parts: Components of the process, constructed with the data tokens of ``law``.
        law: The distribution; its length is that of two blocks for block diffusion.
        whole: True to ignore blocks.

    Attributes:
        parts: Components of the process.
        states: Number of states n, the mask included.
        tokens: Number of data tokens v.
        law: Probability of each sequence, float64 [s].
        sequences: All sequences, int64 [s, l].
        length: Number of positions of a sequence, l.
        block: Positions per block; the whole length without blocks.
    """

    def __init__(self, parts: TokenParts, law: Law = PAIR, *, whole: bool = False) -> None:
        self.parts, self.states, self.tokens = parts, parts.kernel.states, law.tokens
        block = None if whole else parts.objective.block
        if block is not None:
            law = dataclasses.replace(law, length=2 * block)
        if law.tokens**law.length > MOST_SEQUENCES:
            raise UserError(f"the objective's toy() must reduce its blocks of {block} to a few positions")
        self.length, self.block = law.length, block or law.length
        self.law = law.probabilities()
        self.sequences = torch.tensor(list(itertools.product(range(self.tokens), repeat=self.length)))
        self._is = F.one_hot(self.sequences, self.tokens).double()

    @property
    def entropy(self) -> float:
        """Entropy of the data distribution, nats per sequence."""
        return float(-(self.law * self.law.log()).sum())

    def counts(self, rows: Tensor) -> Tensor:
        """Return how often each sequence occurs among rows of data tokens int64 [b, l], float64 [s]."""
        return torch.bincount(self.code(rows, self.tokens), minlength=len(self.law)).double()

    def distributed(self, law: Tensor) -> Toy:
        """Return a toy with the same sequences and other probabilities, float64 [s]."""
        other = copy.copy(self)
        other.law = law
        return other

    @staticmethod
    def code(rows: Tensor, base: int) -> Tensor:
        """Return the index of each row [b, l] among all rows of ``base`` states in lexicographic order, int64 [b]."""
        return (rows * base ** torch.arange(rows.shape[1]).flip(0)).sum(-1)

    def transition(self, sigma: Tensor) -> Tensor:
        """Return the transition matrix at each total noise ``sigma`` [b], float64 [b, n, n]; [z, y] is from y to z."""
        levels, of = torch.unique(sigma.double(), return_inverse=True)
        return self.parts.kernel.transition_matrix(levels)[of]

    def likelihood(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the probability of each noisy token given each clean token.

        Args:
            x: Noisy tokens, int64 [b, l].
            sigma: Total noise, [b] or [b, l].

        Returns:
            float64 [b, l, v].
        """
        each = sigma if sigma.dim() > 1 else sigma[:, None].expand(x.shape)
        levels, of = torch.unique(each.double(), return_inverse=True)
        return self.parts.kernel.transition_matrix(levels)[of, x][..., : self.tokens]

    def others(self, like: Tensor) -> Tensor:
        """Return the posterior of the clean token at each position given all other positions.

        Args:
            like: Probability of what is observed at each position given each clean token, float64 [b, l, v].

        Returns:
            float64 [b, l, v].
        """
        each = [like[:, i][:, self.sequences[:, i]] for i in range(self.length)]
        out = []
        for i in range(self.length):
            weights = self.law.expand(len(like), -1)
            for j in range(self.length):
                weights = weights * each[j] if j != i else weights
            out.append(weights @ self._is[:, i])
        law = torch.stack(out, 1)
        return law / law.sum(-1, keepdim=True).clamp(min=1e-300)

    def _exact(self, x: Tensor, sigma: Tensor, before: Tensor, name: str) -> Tensor:
        """Return log-scores or log-probabilities at the block ``x`` [u, l] given the clean tokens ``before`` [u, m]."""
        kernel, start, stop = self.parts.kernel, before.shape[1], before.shape[1] + x.shape[1]
        after = x.new_zeros(len(x), self.length - stop)
        like = [
            F.one_hot(before, self.tokens).double(),
            self.likelihood(x, sigma),
            F.one_hot(after, self.tokens) * 0 + 1.0,
        ]
        law = F.pad(self.others(torch.cat(like, 1))[:, start:stop], (0, self.states - self.tokens))
        if name == "log_score":
            law = (self.transition(sigma) @ law.transpose(1, 2)).transpose(1, 2)
            law = law / law.gather(-1, x[..., None])
        elif kernel.clamp_safe and kernel.mask is not None:
            law = torch.where((x == kernel.mask)[..., None], law, F.one_hot(x, self.states).double())
        return law.clamp(min=1e-300).log().clamp(min=-1e6)

    def outputs(
        self, x: Tensor, sigma: Tensor, name: str, at: Tensor | None = None, before: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the outputs of a perfect network for noisy rows, or for one noisy block of each row.

        Args:
            x: Noisy tokens, int64 [b, l].
            sigma: Total noise, float [b].
            name: Kind of output: ``log_score``, log(p(y) / p(x)) for each row y that differs from x in at most one
                position, p being the distribution of noisy rows; or ``log_x0``, the log-probabilities of the clean
                token given the other positions.
            at: Positions to evaluate, int64 [b, k]; None for all.
            before: Clean tokens before the block, int64 [b, m]; None for none.

        Returns:
            The output by name, float32 [b, l, n], or [b, k, n] with ``at``.
        """
        before = x[:, :0] if before is None else before
        levels, level = torch.unique(sigma.double(), return_inverse=True)
        code = self.code(torch.cat([before, x], 1), self.states) + level * self.states ** (before.shape[1] + x.shape[1])
        codes, row = torch.unique(code, return_inverse=True)
        first = torch.zeros_like(codes).scatter(0, row, torch.arange(len(x)))  # a row of each code
        exact = self._exact(x[first], levels[level[first]], before[first], name).float()[row]
        if at is not None:
            exact, x = take(exact, at, 1), x.gather(1, at)
        # to the kernel's own outputs and back, so that its translation is verified too
        kernel = self.parts.kernel
        return dict(kernel.translate(kernel.express({name: exact}, x, sigma), x, sigma))

    def outputs_for(self, draw: Draw, batch: Batch, name: str) -> dict[str, Tensor]:
        """Return the outputs of a perfect network for a draw of the forward process.

        Args:
            draw: Noisy rows x_t with their noise levels, one for each clean row.
            batch: The clean rows, which condition later blocks in block diffusion.
            name: Kind of output: ``log_score`` or ``log_x0``.

        Returns:
            The output by name, float32 [b, l, n].
        """
        sigma = draw.sigma.reshape(len(draw.xt), -1)
        blocks = [
            self.outputs(draw.xt[:, s : s + self.block], sigma[:, k], name, before=batch.tokens[:, :s])[name]
            for k, s in enumerate(range(0, self.length, self.block))
        ]
        return {name: torch.cat(blocks, dim=1)}

    def denoise(self, name: str, before: Tensor | None = None) -> Denoise:
        """Return the perfect network as the function from noisy rows and times to outputs that samplers call.

        Args:
            name: Kind of output: ``log_score`` or ``log_x0``.
            before: Clean tokens of each row before the block to denoise, int64 [b, m]; None for none.
        """

        def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> Mapping[str, Tensor]:
            given = None if before is None else before[rows]
            return self.outputs(x, self.parts.schedule.sigma(t), name, at, given)

        return denoise

    def sample(self, x: Tensor, name: str, settings: WalkSettings, steps: int | None) -> Tensor:
        """Draw samples with the sampler of the process and a perfect network.

        Args:
            x: Initial noise, int64 [b, l].
            name: Kind of the network's output: ``log_score`` or ``log_x0``.
            settings: Settings of the reverse process.
            steps: Number of sampler steps; None for the declared number, and for a sampler that has none.

        Returns:
            Samples, token ids int64 [b, l].
        """
        sampler = self.parts.sampler
        if self.block == self.length:
            return sampler.run(self.denoise(name), x, settings, steps=steps)
        return write_blocks(
            sampler, lambda before: self.denoise(name, before), x, settings, block=self.block, steps=steps
        )

    def entropy_given(self, sigma: float) -> float:
        """Return the entropy of the clean sequence given a noisy one at total noise ``sigma``, nats.

        In block diffusion each block is given the clean blocks before it.
        """
        p = self.parts.kernel.transition_matrix(sigma)[:, : self.tokens]
        total, width, left = 0.0, self.tokens**self.block, self.law.reshape(-1, self.tokens**self.block)
        while True:  # the last block given those before it, then the one before
            before = left.sum(1)
            joint = left / before[:, None]
            noised = joint.reshape(-1, *[self.tokens] * self.block)
            for axis in range(1, self.block + 1):
                noised = torch.movedim(torch.tensordot(noised, p, dims=([axis], [1])), -1, axis)
            law = noised.reshape(len(before), -1)
            seen = -torch.xlogy(p, p).sum(0)  # entropy of the noisy token given the clean one
            each = joint.reshape(-1, *[self.tokens] * self.block)
            hidden = sum(
                (each.sum([a for a in range(1, self.block + 1) if a != axis]) @ seen)
                for axis in range(1, self.block + 1)
            )
            given = -torch.xlogy(joint, joint).sum(1) + hidden + torch.xlogy(law, law).sum(1)
            total += float((before * given).sum())
            if len(before) == 1:
                return total
            left = before.reshape(-1, width)


def toy_parts(make: Make, tokens: int) -> TokenParts:
    """Construct the components with ``tokens`` data tokens, plus the mask if the kernel has one."""
    parts = make(tokens)
    return parts if parts.kernel.mask is None else make(tokens + 1)


def make_toy(make: Make, law: Law) -> Toy:
    """Return the toy of a process with the distribution ``law``."""
    return Toy(toy_parts(make, law.tokens), law)
