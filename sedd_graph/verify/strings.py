"""Strings of two tokens, all of them up to a length, and what proofs of processes that change lengths share.

Axes: b rows, s strings, w positions, v = 2 tokens.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.strings.process import StringKernel, Strings
from sedd_graph.families.strings import StringProcess

__all__ = ["TOKENS", "StringTable", "check_bound", "check_string_sampler", "wide"]

TOKENS = 2
"""Data tokens of the toys."""


class StringTable(ABC):
    """All strings of at most ``longest`` of ``symbols`` states by number, a law of clean ones (of at most ``clean``), and what a perfect
    network would say of them."""

    def __init__(
        self, kernel: StringKernel, *, longest: int, clean: int, one_length: bool = False, symbols: int = TOKENS
    ) -> None:
        self.kernel, self.longest, self.clean, self.symbols = kernel, longest, clean, symbols
        self.strings = [s for n in range(longest + 1) for s in itertools.product(range(symbols), repeat=n)]
        weights = torch.rand(len(self.strings), generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.2
        lengths = torch.tensor([len(s) for s in self.strings])
        weights *= (lengths == clean) if one_length else (lengths <= clean)
        weights *= torch.tensor([max(s, default=0) < TOKENS for s in self.strings])
        self.law = weights / weights.sum()

    @property
    def entropy(self) -> float:
        return float(-torch.xlogy(self.law, self.law).sum())

    def rows(self, index: Tensor) -> Strings:
        """Strings by their number, padded to the longest there is."""
        table = torch.full((len(self.strings), self.longest + 1), self.kernel.start)
        for i, s in enumerate(self.strings):
            table[i, 1 : len(s) + 1] = torch.tensor(s, dtype=torch.int64)
        lengths = torch.tensor([len(s) for s in self.strings])[index]
        return Strings(table[index], torch.arange(self.longest + 1) <= lengths[:, None])

    def batch(self, index: Tensor) -> Batch:
        """Clean strings by their number."""
        strings = self.rows(index)
        tokens, real = strings.tokens[:, 1 : self.clean + 1], strings.attend[:, 1 : self.clean + 1]
        return Batch(torch.where(real, tokens, 0), real, real, real)

    def number(self, strings: Strings) -> Tensor:
        """The number of each string, int64 [b]; one past the last where it is too long."""
        lengths = strings.lengths
        value = torch.zeros_like(lengths)
        for column in range(1, strings.tokens.shape[1]):
            value = torch.where(strings.attend[:, column], value * self.symbols + strings.tokens[:, column], value)
        found = (self.symbols**lengths - 1) // (self.symbols - 1) + value
        return torch.where(lengths <= self.longest, found, len(self.strings))

    @abstractmethod
    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        """What a perfect network would put out, float32."""


def wide(x: Tensor, width: int) -> Tensor:
    """``x`` [b, w, ...] cut or padded to ``width``."""
    x = x[:, :width]
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, width - x.shape[1]))


def check_bound(toy: StringTable, process: StringProcess) -> Check:
    """With a perfect network the bound is the entropy of the data: catches missing terms and wrong factors."""
    rows = 60_000
    kernel, schedule, objective, _ = process
    generator = torch.Generator().manual_seed(3)
    chosen = torch.multinomial(toy.law, rows, replacement=True, generator=generator)
    batch = toy.batch(chosen)
    draw = objective.bound_draw(batch, kernel, schedule, random=Randomness(generator))
    strings = Strings(draw.xt, draw.attend)
    nats = objective.loss(toy.outputs(strings, draw.sigma), draw, kernel).double()
    # of strings of one known length, the objective is told the length
    gap = nats + toy.law[chosen].log()
    mean, error = float(gap.mean()), float(gap.std() / math.sqrt(rows))
    return Check(
        "objective.tight",
        "with a perfect network the bound is the entropy of the data",
        abs(mean) < 5 * error + 0.01 * toy.entropy,
        f"{toy.entropy + mean:.4f} +- {error:.4f} against {toy.entropy:.4f} nats",
        f"{rows:,} draws on {int((toy.law > 0).sum())} strings",
    )


def check_string_sampler(toy: StringTable, process: StringProcess) -> list[Check]:
    """With a perfect network the sampler gives back the law of the data, lengths included."""
    rows, steps = 8_000, None if process.sampler.steps is None else 64
    kernel, schedule, objective, sampler = process
    generator = torch.Generator().manual_seed(4)
    longest = toy.clean if objective.one_length else toy.longest
    noise = kernel.prior(rows, longest=longest, generator=generator, allowed=None)
    fixed = torch.zeros_like(noise.attend)
    fixed[:, 0] = True
    out = sampler.run(
        lambda strings, sigma: objective.rates(toy.outputs(strings, sigma), strings, longest),
        noise,
        fixed=fixed,
        shut=~noise.attend,
        longest=longest,
        kernel=kernel,
        schedule=schedule,
        generator=generator,
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
