"""Verification of birth-death kernels (random deletions and insertions of tokens) by enumeration of all short strings.

The reference is the generator (rate matrix) of the process over all strings up to a maximum length. It is built from
the definition of the process alone: per unit of total noise sigma, each token is deleted at rate 1, and at each place
before, between and after tokens a new token is inserted at the rate ``kernel.births``, drawn from the distribution
``kernel.law``.

Axes: b rows, s strings, w positions of a padded string (position 0 holds the BOS token, a special state that marks
the beginning and the padding), v data tokens (two or three).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.diffusion.strings.kernel import TOKENS, StringKernel
from sedd_graph.diffusion.strings.strings import Strings, wide
from sedd_graph.verify.string_draws import NOISE, check_draws, check_prior, check_prior_is_noise, check_spared
from sedd_graph.verify.string_table import Cases, EnumeratedTable, kept_subsets
from sedd_graph.verify.worst import worst

__all__ = ["BirthDeathTable"]

LEVELS = (0.05, 0.7, 2.5)
"""Values of the total noise sigma at which closed forms are verified."""


class BirthDeathTable(EnumeratedTable):
    """Enumeration of all short strings, with the generator (rate matrix) of a birth-death process on them.

    Args:
        kernel: The kernel, constructed with two or three data tokens.
        one_length: True to give all clean strings the same length; otherwise their lengths vary.

    Attributes:
        law: Distribution of clean strings, float64 [s].
        inserted: int64 [s, w, v]: for each of the s strings, the index of the string that results from inserting token
            v after position w. The index is s, out of range, if the result is longer than all enumerated strings.
        deleted: int64 [s, w]: for each string, the index of the string that results from deleting the token at position
            w. The index is s, out of range, if position w has no token.
        generator: Rate matrix, float64 [s, s]. Entry [i, j] is the rate from string j to string i; columns sum to 0.
    """

    kernel: BirthDeath
    kinds: ClassVar[Mapping[str, int]] = {"log_insert": 0, "log_delete": 1}

    def __init__(self, kernel: BirthDeath, *, one_length: bool = False) -> None:
        more = kernel.data_tokens - TOKENS
        # births can exceed any maximum length, so clean strings are short enough that this is unlikely
        longest, clean = (6 - more, 2) if kernel.births else (3 + more, 3 + more)
        super().__init__(kernel, longest=longest, clean=clean, one_length=one_length)
        self._one_length = one_length
        if kernel.births:
            self.rounding, self.least = 2e-4, 1e-8
        index = {s: i for i, s in enumerate(self.strings)}
        count = len(self.strings)
        self.inserted = torch.full((count, self.longest + 1, kernel.data_tokens), count)
        self.deleted = torch.full((count, self.longest + 1), count)
        rates, born = torch.zeros(count, count, dtype=torch.float64), (kernel.births * kernel.law).tolist()
        for i, s in enumerate(self.strings):
            for j in range(len(s)):
                self.deleted[i, j + 1] = index[s[:j] + s[j + 1 :]]
                rates[self.deleted[i, j + 1], i] += 1.0
            for j, v in itertools.product(range(len(s) + 1), range(kernel.data_tokens)):
                if len(s) < self.longest:
                    self.inserted[i, j, v] = index[(*s[:j], v, *s[j:])]
                    rates[self.inserted[i, j, v], i] += born[v]
        self.generator = rates - torch.diag(rates.sum(0))
        if kernel.births:
            # the process is reversible, also with a maximum length: a similar matrix is symmetric
            steady = torch.tensor([math.prod(born[v] for v in s) for s in self.strings])
            root = steady.double().sqrt()[:, None]
            self._values, vectors = torch.linalg.eigh(self.generator * root.T / root)
            self._right, self._left = root * vectors, (vectors / root).T
        else:
            values, vectors = torch.linalg.eig(self.generator)  # triangular: the eigenvalues are real
            self._values, self._right = values.real, vectors.real
            self._left = torch.linalg.inv(self._right)

    def at(self, sigma: Tensor, law: Tensor | None = None) -> Tensor:
        """Return the distribution of noisy strings x_t.

        Args:
            sigma: Total noise, float [b].
            law: Distribution of clean strings, float64 [s]; None for the table's attribute ``law``.

        Returns:
            Probabilities, float64 [b, s].
        """
        law = self.law if law is None else law
        found: Tensor = (torch.exp(sigma.double()[:, None] * self._values) * (self._left @ law)) @ self._right.T
        return found

    def conditional(self, sigma: Tensor) -> Tensor:
        modes = torch.exp(sigma.double()[:, None] * self._values)
        found = torch.einsum("sk,bk,kc->bcs", self._right, modes, self._left[:, self.clean_strings])
        return found.clamp(min=0)

    @cached_property
    def exact(self) -> Tensor:
        """True for each string whose targets the table's maximum length hardly affects, bool [s].

        With insertions these are the strings of up to half that length, else all strings.
        """
        most = self.longest // 2 if self.kernel.births else self.longest
        return torch.tensor([len(s) <= most for s in self.strings])

    @cached_property
    def cases(self) -> Cases:
        """All cases, the ways in which a clean string becomes noisy.

        If the kernel inserts tokens, a case is a pair of a clean and a noisy string. Otherwise it is a clean string
        with the subset of its tokens that are not deleted.
        """
        clean = self.clean_strings
        if self.kernel.births:
            x0, here = clean.repeat_interleave(len(self.strings)), torch.arange(len(self.strings)).repeat(len(clean))
            return Cases(x0, here, torch.ones(len(here), dtype=torch.float64))
        which, kept = kept_subsets([len(self.strings[i]) for i in clean.tolist()], self.clean)
        index = {s: i for i, s in enumerate(self.strings)}
        left = [
            index[tuple(v for v, keep in zip(self.strings[x], row, strict=False) if keep)]
            for x, row in zip(clean[which].tolist(), kept.tolist(), strict=True)
        ]
        here, count = torch.tensor(left), len(self.strings)
        pair = clean[which] * count + here
        return Cases(clean[which], here, 1 / torch.bincount(pair)[pair].double(), kept)

    def targets(self, case: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        here, x0 = self.cases.here[case], self.cases.x0[case]
        if (kept := self.cases.kept) is None:
            levels, level = torch.unique(sigma, return_inverse=True)
            row = torch.searchsorted(self.clean_strings, x0)
            insert, delete = self.ratios(here, self.conditional(levels)[level, row])
            unit = self.kernel.weights(sigma.double())
            spurious = self._deletion_rates(self.rows(here), delete) / unit[:, 1:]
            return {"log_insert": insert / unit[:, 0, None, None], "log_delete": spurious}
        tokens, real = self.rows(x0).tokens[:, 1 : self.clean + 1], self.rows(x0).attend[:, 1 : self.clean + 1]
        gap = kept[case].long().cumsum(-1)
        missing = torch.zeros(len(case), self.longest + 1, self.kernel.data_tokens + 1, dtype=torch.float64)
        each = torch.arange(len(case))[:, None].expand_as(gap)
        missing.index_put_((each, gap, tokens), (real & ~kept[case]).double(), accumulate=True)
        return {"log_insert": missing[..., :-1]}

    def ratios(self, index: Tensor, law: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probability ratios p(y) / p(x) of all strings y one insertion or deletion away from a string x.

        Args:
            index: Index of each string x, int64 [b].
            law: For each x the distribution p over all strings, float64 [b, s].

        Returns:
            p(x with token v inserted after position w) / p(x), float64 [b, w, v], and p(x without the token at position
            w) / p(x), float64 [b, w].
        """
        padded, here = F.pad(law, (0, 1)), law.gather(1, index[:, None])
        insert = padded.gather(1, self.inserted[index].flatten(1)).view(len(index), -1, self.kernel.data_tokens)
        delete = padded.gather(1, self.deleted[index])
        return insert / here[..., None].clamp(min=1e-300), delete / here.clamp(min=1e-300)

    def _deletion_rates(self, strings: Strings, delete: Tensor) -> Tensor:
        """Return the reverse rates of deletions, float64 [b, w], given the deletion ratios [b, w] of :meth:`ratios`."""
        taken = torch.where(strings.attend, strings.tokens, 0).clamp(max=self.kernel.data_tokens - 1)
        return self.kernel.births * self.kernel.law[taken] * delete

    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        levels, level = torch.unique(sigma, return_inverse=True)
        laws = self.at(levels)[level]
        index = self.number(strings).clamp(max=len(self.strings) - 1)
        insert, delete = self.ratios(index, laws)
        unit = self.kernel.weights(sigma.double())
        # noise can make strings that are too long for the table: those get the ratio of pure noise
        insert = torch.where(self.inserted[index] < len(self.strings), insert, self.kernel.births * self.kernel.law)
        width = strings.tokens.shape[1]
        found = {"log_insert": insert / unit[:, 0, None, None]}
        if self.kernel.births:
            found["log_delete"] = self._deletion_rates(strings, wide(delete, width)) / unit[:, 1:]
        # tau-leaping can reach strings of probability 0, whose ratios are undefined or without bounds
        bounded = {k: wide(v, width).nan_to_num(nan=0.0).clamp(min=1e-300, max=1e30) for k, v in found.items()}
        return {k: v.log().float() for k, v in bounded.items()}

    def check_kernel(self, end: float) -> list[Check]:
        """Verify closed forms, regression targets, draws and prior of the kernel against the generator.

        Args:
            end: Total noise at t = 1.

        Returns:
            The results of the checks.
        """
        kernel, table = self.kernel, self
        if table._one_length:
            table = BirthDeathTable(kernel)  # clean strings of every length
            table.proof = self.proof
        errors = table._errors()
        slack = 1e-3 if kernel.births else 1e-6  # births beyond the maximum length are missing in the table
        exponential, each = f"exp(sigma Q) on {len(table.strings)} strings, three noise levels", "all of them, relative"
        law = "p(x | x0) by the pair HMM is that of the generator"
        insert = "reverse rates of insertions are p(x with the token) / p(x)"
        delete = "reverse rates of deletions are the birth rate times p(x without the token) / p(x)"
        return [
            Check.below("strings.law", law, errors["law"], slack, exponential),
            Check.below("strings.insert", insert, errors["insert"], 10 * slack, each),
            Check.below("strings.delete", delete, errors["delete"], 10 * slack, each),
            check_draws(
                "strings.sample", "draws of x_t follow the generator", table, self._sample, table.levels(), self.proof
            ),
            *check_spared(table, self._sample),
            check_prior(table, NOISE / (1 - kernel.births), self.longest),
        ]

    def _sample(self, batch: Batch, sigma: Tensor, random: Randomness) -> Strings:
        return self.kernel.sample(batch, sigma, random=random, width=None)

    def _errors(self) -> dict[str, float]:
        """Return the largest errors of p(x | x0) (``law``) and of insertion and deletion targets, by name."""
        kernel, errors = self.kernel, dict.fromkeys(("law", "insert", "delete"), 0.0)
        for level in torch.tensor(LEVELS, dtype=torch.float64).split(1):
            laws = self.conditional(level)[0]
            row, seen = ((laws > 1e-9) & self.exact).nonzero().unbind(1)
            strings, batch = self.rows(seen), self.batch(self.clean_strings[row])
            levels = level.expand(len(seen))
            found = kernel.log_p(batch, strings, levels).exp()
            errors["law"] = worst(errors["law"], float((found - laws[row, seen]).abs().max()))
            target, unit = kernel.target(batch, strings, levels), kernel.weights(levels)
            insert, delete = self.ratios(seen, laws[row])
            expected = target.fresh[..., None].double() * kernel.law
            index = target.symbols[:, None].expand(-1, expected.shape[1], -1)
            expected = expected.scatter_add(2, index, target.missing.transpose(1, 2).double())
            gap = (unit[:, 0, None, None] * expected - insert).abs() / (1 + insert)
            errors["insert"] = worst(errors["insert"], float((gap * strings.attend[..., None]).max()))
            rate = self._deletion_rates(strings, delete)
            gap = (unit[:, 1:] * target.spurious - rate).abs() / (1 + rate)
            token = strings.attend & (torch.arange(gap.shape[1]) > 0)
            errors["delete"] = worst(errors["delete"], float((gap * token).max()))
        return errors

    def check_declared(self, declared: StringKernel, end: float) -> list[Check]:
        """Verify that under the declared kernel the noise at t = 1 does not depend on the length of the text.

        A higher birth rate needs more noise to forget the length, and the declared kernel can have a higher rate than
        the kernel of this table.

        Args:
            declared: The kernel as declared in the blueprint, before its reduction to two tokens.
            end: Total noise at t = 1.

        Returns:
            Two checks; an empty list if the declared kernel is no :class:`BirthDeath`.
        """
        if not isinstance(declared, BirthDeath):
            return []

        def sample(batch: Batch, sigma: Tensor, random: Randomness) -> Strings:
            return declared.sample(batch, sigma, random=random, width=None)

        left = math.exp(-(1 - declared.births) * end)
        claim = "under the declared kernel, noise at t = 1 does not depend on the length of the text"
        how = "exp(-(1 - births) sigma(1)), the share of a difference in length that is left"
        mean = declared.births / (1 - declared.births)
        return [
            Check.below("strings.forgets", claim, left, 0.01, how),
            check_prior_is_noise(declared, sample, NOISE / (1 - declared.births), mean),
        ]
