"""Enumeration of all short strings and all cases of an Edit Flow (arXiv 2506.09018).

A noise string and a clean string are aligned in columns. At an intermediate time a subset of the columns is already
clean, and the others are still noise. A *case* is a pair of strings with such a subset; all cases are enumerated. The
expected number of each remaining edit, given the noisy string, is the rate that a perfect network predicts. These rates
must transport the distribution of noise to that of data.

Axes: b rows, s strings, e cases, c columns, w positions of a padded string (position 0 holds the BOS token, a special
state that marks the beginning and the padding), v data tokens (two or three).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.diffusion.strings.columns import BLANK, Columns, Remaining, partway
from sedd_graph.diffusion.strings.edit_flow import EditFlowKernel
from sedd_graph.diffusion.strings.kernel import TOKENS
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.string_table import Cases, EnumeratedTable

__all__ = ["EditFlowCases"]

NODES = 96
"""Number of Gauss-Legendre nodes in the integral over time of the likelihood bound."""


class EditFlowCases(EnumeratedTable):
    """Enumeration of all cases of an Edit Flow, for verification.

    A noise string and a clean string are aligned in c columns. A case is a pair of such strings with a subset of the
    columns, which are already clean; the other columns are still noise. The tokens of all columns form the noisy string
    of the case.

    Args:
        kernel: The kernel, constructed with two or three data tokens.

    Attributes:
        noisy: Maximum length of noise strings.
        first: Distribution of noise strings, float64 [s].
        ends: List of all pairs (index of the noise string, index of the clean string).
        columns: Alignments of the pairs in ``ends``, int64 [pair, c] for noise and for clean tokens.
        count: Number of columns of an alignment, padding included, c.
        there: Noisy strings of the cases (:class:`~sedd_graph.diffusion.strings.strings.Strings`), e rows.
        left: Remaining edits of each case, from its noisy string to its clean string, at most one per column, [e, c]
            (:class:`~sedd_graph.diffusion.strings.columns.Remaining`).
        pairs: For each case, the probability of its pair of a noise string and a clean string, float64 [e].
        moved: Number of clean columns of each case, int64 [e].
        here: Index of the noisy string of each case, int64 [e].
        mass: Sum of ``pairs`` over the cases with a given noisy string and number of clean columns, float64 [s, c + 1].
        todo: For each network output (``log_insert``, ``log_delete``, ``log_substitute``), the sum of ``pairs`` over
            the cases in which the edit remains, by noisy string, number of clean columns, position and, except for
            deletions, new token; float64 [s, c + 1, w, v], or [s, c + 1, w] for deletions.

    Raises:
        ValueError: Noise strings have no maximum length.
    """

    kernel: EditFlowKernel
    kinds: ClassVar[Mapping[str, int]] = {"log_insert": 0, "log_delete": 1, "log_substitute": 2}

    def __init__(self, kernel: EditFlowKernel) -> None:
        if kernel.spread and kernel.longest is None:
            raise ValueError("the table of an Edit Flow needs noise strings of a maximum length")
        more = kernel.data_tokens - TOKENS
        self.noisy, clean = (kernel.longest or 0, 2 + more) if kernel.spread else (0, 3 + more)
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
            "log_insert": self._edits((*shape, kernel.data_tokens), self.left.insert, self.left.token),
            "log_delete": self._edits(shape, self.left.delete),
            "log_substitute": self._edits((*shape, kernel.data_tokens), self.left.substitute, self.left.token),
        }
        self._clean = b.repeat_interleave(len(choices))

    @cached_property
    def cases(self) -> Cases:
        """All cases: each pair of a noise string and a clean string, with each subset of columns already clean.

        Their ``share`` is 1 and has no meaning here: :meth:`chance` returns their probabilities.
        """
        return Cases(self._clean, self.here, torch.ones(len(self.here), dtype=torch.float64))

    def chance(self, sigma: Tensor) -> Tensor:
        return self.basis(sigma)[:, self.moved] * self.pairs

    def conditional(self, sigma: Tensor) -> Tensor:
        clean = self.clean_strings
        found: Tensor = self.basis(sigma) @ self._mass_of_each.view(-1, self.count + 1).T
        return found.view(len(sigma), len(clean), len(self.strings))

    @cached_property
    def _mass_of_each(self) -> Tensor:
        """The mass of cases by clean string, given it, noisy string and number of clean columns, float64 [c, s, k]."""
        clean = self.clean_strings
        row = torch.searchsorted(clean, self._clean)
        found = torch.zeros(len(clean), len(self.strings), self.count + 1, dtype=torch.float64)
        return found.index_put_((row, self.here, self.moved), self.pairs / self.law[self._clean], accumulate=True)

    def drawn(self, case: Tensor) -> Any:
        strings = Strings(self.there.tokens[case], self.there.attend[case])
        return strings, Remaining(*(x[case] for x in self.left))

    def targets(self, case: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        left, shape = Remaining(*(x[case] for x in self.left)), (len(case), self.longest + 1, self.kernel.data_tokens)
        each = torch.arange(len(case))[:, None].expand_as(left.place)

        def put(which: Tensor) -> Tensor:
            at = (each, left.place, left.token)
            return torch.zeros(shape, dtype=torch.float64).index_put_(at, which.double(), accumulate=True)

        kinds = {"log_insert": left.insert, "log_delete": left.delete, "log_substitute": left.substitute}
        found = {name: put(kinds[name]) for name in self.kernel.reads}
        return {name: value.sum(-1) if name == "log_delete" else value for name, value in found.items()}

    @property
    def whole(self) -> float:
        return self.bound(0.0)

    def spent(self, sigma: Tensor) -> Tensor:
        hits = -torch.expm1(-sigma.double())
        return torch.tensor([self.bound(0.0, float(hit)) for hit in hits], dtype=torch.float64)

    def rate(self, sigma: Tensor) -> Tensor:
        return self._integrand(sigma) / torch.expm1(sigma)

    def _unpadded(self, index: Tensor, width: int) -> Tensor:
        """Return the strings with indices ``index`` [k], without BOS token, padded with blanks, int64 [k, width]."""
        strings = self.rows(index)
        return torch.where(strings.attend, strings.tokens, BLANK)[:, 1 : width + 1]

    def _sum(self, shape: tuple[int, ...], case: Tensor, *more: Tensor) -> Tensor:
        """Sum the pair probabilities of cases [k] by noisy string, number of clean columns and ``more`` [k]."""
        at = (self.here[case], self.moved[case], *more)
        return torch.zeros(shape, dtype=torch.float64).index_put_(at, self.pairs[case], accumulate=True)

    def _edits(self, shape: tuple[int, ...], which: Tensor, *token: Tensor) -> Tensor:
        """Sum the pair probabilities where ``which`` is True, by string, clean columns, position and token [e, c]."""
        at = which.nonzero(as_tuple=True)
        return self._sum(shape, at[0], self.left.place[at], *(x[at] for x in token))

    def basis(self, sigma: Tensor) -> Tensor:
        """Return the probability that exactly the columns of one given subset are clean, by the size of the subset.

        For a subset of k columns it is kappa^k (1 - kappa)^(c - k). Here kappa = exp(-sigma) is the probability that a
        column is clean, and c the number of columns.

        Args:
            sigma: Total noise, float [b].

        Returns:
            Probabilities, float64 [b, c + 1], for k from 0 to c.
        """
        kappa, many = torch.exp(-sigma.double())[:, None], torch.arange(self.count + 1)
        return kappa**many * (-torch.expm1(-sigma.double()))[:, None] ** (self.count - many)

    def change(self, sigma: Tensor) -> Tensor:
        """Return the derivative of :meth:`basis` with respect to kappa = exp(-sigma).

        Args:
            sigma: Total noise, float [b].

        Returns:
            Derivatives, float64 [b, c + 1].
        """
        kappa, many = torch.exp(-sigma.double())[:, None], torch.arange(self.count + 1)
        rest = self.count - many
        up = many * kappa ** (many - 1).clamp(min=0) * (1 - kappa) ** rest
        return up - rest * kappa**many * (1 - kappa) ** (rest - 1).clamp(min=0)

    def at(self, sigma: Tensor) -> Tensor:
        """Return the distribution of noisy strings, float64 [b, s], at total noise ``sigma``, float [b]."""
        return self.basis(sigma) @ self.mass.T

    def expected(self, name: str, sigma: Tensor) -> Tensor:
        """Return the joint probability that x_t is a given string and that a given edit remains to be made to it.

        Args:
            name: Network output that predicts the edits: ``log_insert``, ``log_delete`` or ``log_substitute``.
            sigma: Total noise, float [b].

        Returns:
            Probabilities by string, position and new token, float64 [b, s, w, v]; [b, s, w] for deletions.
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
        """Return the net probability flow into each string under the rates of a perfect network.

        This is the right-hand side of Kolmogorov's forward equation in the time variable kappa = exp(-sigma). Edits are
        applied to Python tuples, independently of the kernel's position arithmetic.

        Args:
            sigma: Total noise, float [b].

        Returns:
            Inflow minus outflow of probability per unit of kappa, float64 [b, s].
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

    def bound(self, least: float, most: float = 1.0) -> float:
        """Return the likelihood bound of a perfect network, nats per string, by numerical integration over time.

        Args:
            least: Lower limit of the integral over the probability 1 - kappa that a column is still noise; kappa is
                exp(-sigma).
            most: Upper limit of the integral.
        """
        nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(NODES))
        u = (nodes + 1) / 2
        hit = least + (most - least) * u**3
        # d kappa / (1 - kappa) in terms of u
        return float((weights / 2 * self._integrand(-torch.log1p(-hit)) * (most - least) * 3 * u**2 / hit).sum())

    def _integrand(self, sigma: Tensor) -> Tensor:
        """Return the expected sum of -log u over the remaining edits, nats, float64 [b], at total noise ``sigma`` [b].

        Here u is the expected number of the edit given the noisy string, as a perfect network predicts it.
        """
        law, total = self.at(sigma), torch.zeros(len(sigma), dtype=torch.float64)
        for name in self.kernel.reads:
            found = self.expected(name, sigma)
            share = found / law.view(*law.shape, *[1] * (found.dim() - 2)).clamp(min=1e-300)
            total -= torch.xlogy(found, share).flatten(1).sum(-1)
        return total
