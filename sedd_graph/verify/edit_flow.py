"""Edit Flows held to an enumerable toy: every pair of noise and text of two tokens, every choice of columns that have moved.

What the kernel says is left to do is averaged over all of it: the rates of a perfect network. They are then put to work on
the strings themselves. Axes: b rows, s strings, e cases (a pair and a choice), c columns, w positions, v = 2 tokens.
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

__all__ = ["ColumnToy", "check_columns"]

LEVELS = (0.02, 0.3, 1.0, 3.0)
NODES = 96


class ColumnToy(StringTable):
    """The enumeration, for a kernel whose ``longest`` noise is of few tokens. ``pairs`` float64 [e] is the chance of each case's pair, ``moved`` int64 [e] how many columns have moved,
    ``here`` int64 [e] the string that is there, ``left`` what is left to do."""

    kernel: EditFlowKernel

    def __init__(self, kernel: EditFlowKernel) -> None:
        assert kernel.longest is not None or not kernel.spread
        self.noisy, clean = (kernel.longest or 0, 2) if kernel.spread else (0, 3)
        super().__init__(kernel, longest=self.noisy + clean, clean=clean)
        noise = [i for i, s in enumerate(self.strings) if len(s) <= self.noisy]
        self.first = torch.zeros(len(self.strings), dtype=torch.float64)
        for i in noise:
            self.first[i] = math.prod(kernel.spread * float(kernel.law[v]) for v in self.strings[i])
        self.first /= self.first.sum()
        text = [i for i, s in enumerate(self.strings) if len(s) <= clean]
        self.ends = [(a, b) for a, b in itertools.product(noise, text)]
        a, b = torch.tensor(self.ends).T
        self.columns = kernel.align(self._blank(a, self.noisy), self._blank(b, clean))
        self.count = self.columns.noise.shape[1]
        choices = torch.tensor(list(itertools.product((False, True), repeat=self.count)))
        every = [x.repeat_interleave(len(choices), 0) for x in self.columns]
        moved = choices.repeat(len(a), 1)
        self.there, self.left = partway(Columns(*every), moved, start=kernel.start)
        self.pairs = (self.first[a] * self.law[b]).repeat_interleave(len(choices))
        self.moved = moved.sum(-1)
        self.here = self.number(self.there)
        shape = (len(self.strings), self.count + 1, self.longest + 1)
        # by string and number of columns that have moved: how likely, and each edit's share
        self.mass = torch.zeros(shape[:2], dtype=torch.float64).index_put_(
            (self.here, self.moved), self.pairs, accumulate=True
        )
        self.todo = {
            "log_insert": self._gather((*shape, TOKENS), self.left.insert, self.left.token),
            "log_delete": self._gather(shape, self.left.delete),
            "log_substitute": self._gather((*shape, TOKENS), self.left.substitute, self.left.token),
        }

    def _blank(self, index: Tensor, width: int) -> Tensor:
        """Strings by their number, without the start, int64 [., width], blank behind their ends."""
        strings = self.rows(index)
        return torch.where(strings.attend, strings.tokens, BLANK)[:, 1 : width + 1]

    def _gather(self, shape: tuple[int, ...], which: Tensor, token: Tensor | None = None) -> Tensor:
        case, column = which.nonzero(as_tuple=True)
        at = [self.here[case], self.moved[case], self.left.place[case, column]]
        at += [] if token is None else [token[case, column]]
        return torch.zeros(shape, dtype=torch.float64).index_put_(tuple(at), self.pairs[case], accumulate=True)

    def basis(self, sigma: Tensor) -> Tensor:
        """The chance of each choice by how many of its columns have moved, float64 [b, c + 1]."""
        kappa, many = torch.exp(-sigma.double())[:, None], torch.arange(self.count + 1)
        return kappa**many * (-torch.expm1(-sigma.double()))[:, None] ** (self.count - many)

    def change(self, sigma: Tensor) -> Tensor:
        """The derivative of ``basis`` by kappa."""
        kappa, many = torch.exp(-sigma.double())[:, None], torch.arange(self.count + 1)
        rest = self.count - many
        up = many * kappa ** (many - 1).clamp(min=0) * (1 - kappa) ** rest
        return up - rest * kappa**many * (1 - kappa) ** (rest - 1).clamp(min=0)

    def at(self, sigma: Tensor) -> Tensor:
        """The law of the strings at each of ``sigma`` [b], float64 [b, s]."""
        return self.basis(sigma) @ self.mass.T

    def expected(self, name: str, sigma: Tensor) -> Tensor:
        """The chance of each string together with each edit being left to do there, float64 [b, s, w(, v)]."""
        return torch.einsum("ba,sa...->bs...", self.basis(sigma), self.todo[name])

    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        index, basis = self.number(strings).clamp(max=len(self.strings) - 1), self.basis(sigma)
        mass = (basis * self.mass[index]).sum(-1).clamp(min=1e-300)
        found, width = {}, strings.tokens.shape[1]
        for name in self.kernel.reads:
            said = torch.einsum("ba,ba...->b...", basis, self.todo[name][index])
            said = said / mass.view(-1, *[1] * (said.dim() - 1))
            said = said.clamp(min=1e-30).log().float()[:, :width]
            found[name] = F.pad(said, (0, 0) * (said.dim() - 2) + (0, width - said.shape[1]))
        return found

    def flow(self, sigma: Tensor) -> Tensor:
        """What the rates carry into each string less what they carry out of it, per unit of kappa, float64 [b, s].

        Edits are made here on tuples: by nothing that the kernel says of places.
        """
        index = {s: i for i, s in enumerate(self.strings)}
        pace = self.kernel.weights(sigma.double()) * torch.exp(sigma.double())[:, None]
        net = torch.zeros(len(sigma), len(self.strings), dtype=torch.float64)
        for kind, name in enumerate(("log_insert", "log_delete", "log_substitute")):
            rate = self.expected(name, sigma)
            for case in (rate.abs().sum(0) > 0).nonzero().tolist():
                i, place, *token = case
                s, before = self.strings[i], place - (kind > 0)
                to = index.get((*s[:before], *token, *s[before + (kind > 0) :]))
                carried = pace[:, kind] * rate[(slice(None), *case)]
                net[:, i] -= carried
                if to is not None:  # no string of the toy: what goes there is lost, and the check fails
                    net[:, to] += carried
        return net

    def bound(self, least: float) -> float:
        """The bound of a perfect network, nats: minus the mean of log u at the edits left to do, from where the share ``least`` of
        columns is noise to where all are."""
        nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(NODES))
        u = (nodes + 1) / 2
        hit = least + (1 - least) * u**3
        sigma = -torch.log1p(-hit)
        law, total = self.at(sigma), torch.zeros(len(u), dtype=torch.float64)
        for name in self.kernel.reads:
            found = self.expected(name, sigma)
            share = found / law.view(*law.shape, *[1] * (found.dim() - 2)).clamp(min=1e-300)
            total -= torch.xlogy(found, share).flatten(1).sum(-1)
        # d kappa / (1 - kappa), along u
        return float((weights / 2 * total * (1 - least) * 3 * u**2 / hit).sum())

    def check_kernel(self, end: float) -> list[Check]:
        return check_columns(self, end=end)

    def check_objective(self, objective: StringObjective[Any, Any], schedule: Schedule) -> list[Check]:
        return [*_notes(objective, self.kernel, schedule), _bound(self, objective, schedule)]


def check_columns(toy: ColumnToy, *, end: float) -> list[Check]:
    """Columns, draws, prior and edits fit together; ``end`` is the total noise at t = 1."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    edge = torch.tensor([60.0, 0.0], dtype=torch.float64)
    ends = (toy.at(edge) - torch.stack([toy.first, toy.law])).abs()
    change = (toy.change(levels) @ toy.mass.T - toy.flow(levels)).abs()
    return [
        _columns(toy),
        Check(
            "edits.ends",
            "strings of which nothing has moved are noise, and those of which everything has are text",
            float(ends.max()) < 1e-9,
            f"{float(ends.max()):.1e}",
            f"{len(toy.ends)} pairs, {len(toy.pairs):,} cases",
        ),
        Check(
            "edits.transport",
            "the rates of a perfect network, put to work on the strings, carry the law of noise to that of text",
            float(change.max()) < 1e-9,
            f"{float(change.max()):.1e}",
            f"Kolmogorov's forward equation on {len(toy.strings)} strings, {len(LEVELS)} noise levels",
        ),
        *_draws(toy, end),
    ]


def _columns(toy: ColumnToy) -> Check:
    """Columns spell both strings, in order; with as few edits as can be where that is asked for."""
    wrong, more = 0, 0

    @functools.cache
    def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    for (a, b), noise, clean in zip(toy.ends, toy.columns.noise.tolist(), toy.columns.clean.tolist(), strict=True):
        spelled = [tuple(v for v in row if v != BLANK) for row in (noise, clean)]
        wrong += spelled != [toy.strings[a], toy.strings[b]]
        more += sum(x != y for x, y in zip(noise, clean, strict=True)) - distance(toy.strings[a], toy.strings[b])
    return Check(
        "edits.columns",
        "columns without their blanks are the noise and the text",
        not wrong and more >= 0,
        f"{wrong} of {len(toy.ends)} wrong",
        f"every pair; {more} edits more than the least there can be",
    )


def _draws(toy: ColumnToy, end: float) -> list[Check]:
    kernel, draws, count = toy.kernel, 20_000, len(toy.strings)
    generator = torch.Generator().manual_seed(2)
    level = torch.full((draws,), 0.7)
    chosen = torch.multinomial(toy.law, draws, replacement=True, generator=generator)
    seen, _ = kernel.sample(toy.batch(chosen), level, random=Randomness(generator), width=None)
    found = torch.bincount(toy.number(seen), minlength=count + 1)[:count].double() / draws
    drawn = float((found - toy.at(level[:1])[0]).abs().sum() / 2)
    noise = kernel.prior(draws, longest=toy.noisy, generator=generator, allowed=None)
    found = torch.bincount(toy.number(noise), minlength=count + 1)[:count].double() / draws
    gap = float((found - toy.at(torch.tensor([end]))[0]).abs().sum() / 2)
    how = "total variation, 20,000 draws"
    return [
        Check("edits.sample", "draws of x_t are those of the columns", drawn < 0.03, f"{drawn:.4f}", how),
        Check("edits.prior", "noise at t = 1 is the prior", gap < 0.03, f"{gap:.4f}", how),
    ]


def _notes(objective: StringObjective[Any, Any], kernel: EditFlowKernel, schedule: Schedule) -> list[Check]:
    """What is to be known of the objective, on which nothing rests."""
    held = objective.held_down(kernel, schedule)
    notes = [
        Check(
            "objective.held_down",
            "share of time in which training weighs edits less than the bound does",
            None,
            f"{held:.3f}",
            "near clean text; max_weight",
        )
    ]
    if (caveat := objective.caveat(kernel)) is not None:
        notes.append(Check("objective.loose", caveat, None, "see objective.bound", "by how much, on the toy"))
    return notes


def _bound(toy: ColumnToy, objective: StringObjective[Any, Any], schedule: Schedule) -> Check:
    """With a perfect network the bound is what enumeration gives, and above the entropy of the data."""
    rows = 40_000
    _, nats = toy.perfect(objective, schedule, rows)
    mean, error = float(nats.mean()), float(nats.std() / math.sqrt(rows))
    drawn, whole = toy.bound(LEAST), toy.bound(0.0)
    return Check(
        "objective.bound",
        "with a perfect network the bound is what enumeration gives, and not below the entropy of the data",
        abs(mean - drawn) < 5 * error + 0.01 * drawn and whole > toy.entropy - 1e-5,
        f"{mean:.4f} +- {error:.4f} against {drawn:.4f} nats; with all noise {whole - toy.entropy:.4f} above the entropy",
        f"{rows:,} draws on {int((toy.law > 0).sum())} strings",
    )
