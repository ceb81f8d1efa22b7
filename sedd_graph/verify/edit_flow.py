"""Table of strings for Edit Flows (arXiv 2506.09018), and the verification of their kernels.

Every pair of a noise string and a clean string is enumerated with every choice of the alignment's columns that are clean already.
The mean edits that remain, given the noisy string, are the rates of a perfect network; applied to the strings themselves they
must transport noise to data. Axes: b rows, s strings, e cases (a pair and a choice), c columns, w positions, v = 2 data tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.columns import BLANK, Columns, partway
from sedd_graph.diffusion.strings.edit_flow import EditFlowKernel
from sedd_graph.diffusion.strings.kernel import LEAST, TOKENS, StringObjective, StringTable
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.strings import DRAWS, check_frequencies
from sedd_graph.verify.total_variation import total_variation

__all__ = ["EditFlowTable"]

LEVELS = (0.02, 0.3, 1.0, 3.0)
"""Total noise at which transport is verified."""
NODES = 96
"""Nodes of the quadrature of the bound."""


class EditFlowTable(StringTable):
    """All pairs of noise and clean strings, with every choice of clean columns.

    Attributes:
        noisy: Maximum length of noise strings.
        first: float64 [s], the distribution of noise strings.
        ends: Indices of the noise string and the clean string of each pair.
        columns: The alignments of the pairs.
        count: Columns of an alignment, c.
        there: The noisy string of each case.
        left: The edits that turn the noisy string of each case into the clean one.
        pairs: float64 [e], the probability of each case's pair.
        moved: int64 [e], how many columns of each case are clean.
        here: int64 [e], the index of each case's noisy string.
        mass: float64 [s, c + 1], the probability of the pairs of each noisy string's cases, by the number of clean columns.
        todo: The same for each edit that leads from that string to the clean one, by output name, float64 [s, c + 1, w] or [s, c + 1, w, v].
    """

    kernel: EditFlowKernel

    def __init__(self, kernel: EditFlowKernel) -> None:
        if kernel.spread and kernel.longest is None:
            raise ValueError("the table of an Edit Flow needs noise strings of a maximum length")
        self.noisy, clean = (kernel.longest or 0, 2) if kernel.spread else (0, 3)
        super().__init__(kernel, longest=self.noisy + clean, clean=clean)
        noise = [i for i, s in enumerate(self.strings) if len(s) <= self.noisy]
        self.first = torch.zeros(len(self.strings), dtype=torch.float64)
        for i in noise:
            self.first[i] = math.prod(kernel.spread * float(kernel.law[v]) for v in self.strings[i])
        self.first /= self.first.sum()
        self.ends = list(itertools.product(noise, [i for i, s in enumerate(self.strings) if len(s) <= clean]))
        a, b = torch.tensor(self.ends).T
        self.columns = kernel.align(self._unpadded(a, self.noisy), self._unpadded(b, clean))
        self.count = self.columns.noise.shape[1]
        choices = torch.tensor(list(itertools.product((False, True), repeat=self.count)))
        every = [x.repeat_interleave(len(choices), 0) for x in self.columns]
        moved = choices.repeat(len(a), 1)
        self.there, self.left = partway(Columns(*every), moved, start=kernel.start)
        self.pairs = (self.first[a] * self.law[b]).repeat_interleave(len(choices))
        self.moved = moved.sum(-1)
        self.here = self.number(self.there)
        shape = (len(self.strings), self.count + 1, self.longest + 1)
        self.mass = self._sum(shape[:2], torch.arange(len(moved)))
        self.todo = {
            "log_insert": self._edits((*shape, TOKENS), self.left.insert, self.left.token),
            "log_delete": self._edits(shape, self.left.delete),
            "log_substitute": self._edits((*shape, TOKENS), self.left.substitute, self.left.token),
        }

    def _unpadded(self, index: Tensor, width: int) -> Tensor:
        """Return the strings with the indices ``index`` [k], without the start state and blank behind their ends, int64 [k, width]."""
        strings = self.rows(index)
        return torch.where(strings.attend, strings.tokens, BLANK)[:, 1 : width + 1]

    def _sum(self, shape: tuple[int, ...], case: Tensor, *more: Tensor) -> Tensor:
        """Sum the pair probabilities of the cases ``case`` [k] by noisy string, clean columns and further indices [k]."""
        at = (self.here[case], self.moved[case], *more)
        return torch.zeros(shape, dtype=torch.float64).index_put_(at, self.pairs[case], accumulate=True)

    def _edits(self, shape: tuple[int, ...], which: Tensor, *token: Tensor) -> Tensor:
        """Sum the pair probabilities of the edits that ``which`` bool [e, c] marks, by position and token [e, c]."""
        at = which.nonzero(as_tuple=True)
        return self._sum(shape, at[0], self.left.place[at], *(x[at] for x in token))

    def basis(self, sigma: Tensor) -> Tensor:
        """Return the probability of any one choice with 0 to c clean columns, float64 [b, c + 1], at total noise ``sigma`` [b]."""
        kappa, many = torch.exp(-sigma.double())[:, None], torch.arange(self.count + 1)
        return kappa**many * (-torch.expm1(-sigma.double()))[:, None] ** (self.count - many)

    def change(self, sigma: Tensor) -> Tensor:
        """Return the derivative of :meth:`basis` with respect to kappa = exp(-sigma), for 0 to c clean columns, float64 [b, c + 1]."""
        kappa, many = torch.exp(-sigma.double())[:, None], torch.arange(self.count + 1)
        rest = self.count - many
        up = many * kappa ** (many - 1).clamp(min=0) * (1 - kappa) ** rest
        return up - rest * kappa**many * (1 - kappa) ** (rest - 1).clamp(min=0)

    def at(self, sigma: Tensor) -> Tensor:
        """Return the distribution of noisy strings at total noise ``sigma`` [b], float64 [b, s]."""
        return self.basis(sigma) @ self.mass.T

    def expected(self, name: str, sigma: Tensor) -> Tensor:
        """Return the joint probability of each noisy string and each edit that leads from it to the clean one, float64 [b, s, w] or [b, s, w, v].

        Args:
            name: The output whose edits are meant, such as ``log_insert``.
            sigma: [b], total noise.
        """
        return torch.einsum("ba,sa...->bs...", self.basis(sigma), self.todo[name])

    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        index, basis = self.number(strings).clamp(max=len(self.strings) - 1), self.basis(sigma)
        mass = (basis * self.mass[index]).sum(-1).clamp(min=1e-300)
        found, width = {}, strings.tokens.shape[1]
        for name in self.kernel.reads:
            mean = torch.einsum("ba,ba...->b...", basis, self.todo[name][index])
            mean = mean / mass.view(-1, *[1] * (mean.dim() - 1))
            mean = mean.clamp(min=1e-30).log().float()[:, :width]
            found[name] = F.pad(mean, (0, 0) * (mean.dim() - 2) + (0, width - mean.shape[1]))
        return found

    def flow(self, sigma: Tensor) -> Tensor:
        """Return the probability that the rates carry into each string minus that out of it, per unit of kappa, float64 [b, s].

        Edits are applied to tuples here, without the kernel's own arithmetic of positions.
        """
        index = {s: i for i, s in enumerate(self.strings)}
        unit = self.kernel.weights(sigma.double()) * torch.exp(sigma.double())[:, None]
        net = torch.zeros(len(sigma), len(self.strings), dtype=torch.float64)
        for kind, name in enumerate(("log_insert", "log_delete", "log_substitute")):
            rate = self.expected(name, sigma)
            for case in (rate.abs().sum(0) > 0).nonzero().tolist():
                i, place, *token = case
                s, before = self.strings[i], place - (kind > 0)
                to = index.get((*s[:before], *token, *s[before + (kind > 0) :]))
                carried = unit[:, kind] * rate[(slice(None), *case)]
                net[:, i] -= carried
                if to is not None:  # else the string is too long for the table: its mass is lost and the check fails
                    net[:, to] += carried
        return net

    def bound(self, least: float) -> float:
        """Return the bound of a perfect network, nats per string: the mean of -log u over the edits from the noisy strings to the clean ones.

        Args:
            least: The share of noise columns to start from; the bound covers all more noisy strings.
        """
        nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(NODES))
        u = (nodes + 1) / 2
        hit = least + (1 - least) * u**3
        sigma = -torch.log1p(-hit)
        law, total = self.at(sigma), torch.zeros(len(u), dtype=torch.float64)
        for name in self.kernel.reads:
            found = self.expected(name, sigma)
            share = found / law.view(*law.shape, *[1] * (found.dim() - 2)).clamp(min=1e-300)
            total -= torch.xlogy(found, share).flatten(1).sum(-1)
        # d kappa / (1 - kappa) in terms of u
        return float((weights / 2 * total * (1 - least) * 3 * u**2 / hit).sum())

    def check_kernel(self, end: float) -> list[Check]:
        """Verify alignments, rates, draws and prior against the enumeration.

        Args:
            end: Total noise at t = 1.
        """
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        edge = torch.tensor([60.0, 0.0], dtype=torch.float64)
        ends = float((self.at(edge) - torch.stack([self.first, self.law])).abs().max())
        change = float((self.change(levels) @ self.mass.T - self.flow(levels)).abs().max())
        all_noise = "with no column clean the strings are noise, and with all clean they are data"
        transport = "the rates of a perfect network transport the distribution of noise to that of data"
        how = f"Kolmogorov's forward equation on {len(self.strings)} strings, {len(LEVELS)} noise levels"
        cases = f"{len(self.ends)} pairs, {len(self.pairs):,} cases"
        drawn, prior = self._draws(end)
        return [
            self._check_columns(),
            Check.below("strings.ends", all_noise, ends, 1e-9, cases),
            Check.below("strings.transport", transport, change, 1e-9, how),
            check_frequencies("strings.sample", "draws of x_t follow the enumerated distribution", drawn),
            check_frequencies("strings.prior", "noise at t = 1 is the prior", prior),
        ]

    def _check_columns(self) -> Check:
        """Verify that the columns of each pair spell both strings, and count the edits above the Levenshtein distance."""
        wrong, more = 0, 0

        @functools.cache
        def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
            if not a or not b:
                return len(a) + len(b)
            return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

        for (a, b), noise, clean in zip(self.ends, *(x.tolist() for x in self.columns), strict=True):
            spelled = [tuple(v for v in row if v != BLANK) for row in (noise, clean)]
            wrong += spelled != [self.strings[a], self.strings[b]]
            more += sum(x != y for x, y in zip(noise, clean, strict=True)) - distance(self.strings[a], self.strings[b])
        claim = "columns without their blanks are the noise string and the clean string"
        how = f"every pair; {more} edits more than the Levenshtein distances"
        return Check("strings.columns", claim, not wrong and more >= 0, f"{wrong} of {len(self.ends)} wrong", how)

    def _draws(self, end: float) -> tuple[float, float]:
        """Return the total variation of draws of x_t and of the prior from their enumerated distributions."""
        generator = torch.Generator().manual_seed(2)
        level = torch.full((DRAWS,), 0.7)
        chosen = torch.multinomial(self.law, DRAWS, replacement=True, generator=generator)
        seen, _ = self.kernel.sample(self.batch(chosen), level, random=Randomness(generator), width=None)
        noise = self.kernel.prior(DRAWS, longest=self.noisy, generator=generator, allowed=None)
        return (
            total_variation(self.number(seen), self.at(level[:1])[0]),
            total_variation(self.number(noise), self.at(torch.tensor([end]))[0]),
        )

    def check_objective(self, objective: StringObjective[Any, Any], schedule: Schedule) -> list[Check]:
        """Verify the bound, and note how often its weight is capped in training and with what it must not be compared."""
        claim, capped = "share of training times whose weight is capped", objective.capped(self.kernel, schedule)
        notes = [Check("objective.capped", claim, None, f"{capped:.3f}", "times near clean text; see max_weight")]
        if (caveat := objective.caveat(self.kernel)) is not None:
            notes.append(Check("objective.loose", caveat, None, "see objective.bound", "by how much, on the toy"))
        return [*notes, self.check_bound(objective, schedule)]

    def check_bound(self, objective: StringObjective[Any, Any], schedule: Schedule) -> Check:
        """Verify that the mean loss of a perfect network equals :meth:`bound`, which is at least the entropy of the data."""
        rows = 40_000
        _, nats = self.perfect(objective, schedule, rows)
        mean, error = float(nats.mean()), float(nats.std() / math.sqrt(rows))
        drawn, whole = self.bound(LEAST), self.bound(0.0)
        return Check(
            "objective.bound",
            "with a perfect network the bound is the enumerated one, and not below the entropy of the data",
            abs(mean - drawn) < 5 * error + 0.01 * drawn and whole > self.entropy - 1e-5,
            f"{mean:.4f} +- {error:.4f} against {drawn:.4f} nats; with all noise {whole - self.entropy:.4f} above the entropy",
            f"{rows:,} draws on {int((self.law > 0).sum())} strings",
        )
