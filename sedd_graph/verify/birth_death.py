"""Verification of birth-death kernels (random deletions and insertions of tokens) by enumeration of all short strings.

The reference is the generator (rate matrix) of the process over all strings up to a maximum length. It is built from
the definition of the process alone: per unit of total noise sigma, each token is deleted at rate 1, and at each place
before, between and after tokens a new token is inserted at the rate ``kernel.births``, drawn from the distribution
``kernel.law``.

Axes: b rows, s strings, w positions of a padded string (position 0 holds the start state, a special state that marks
the beginning and the padding), v = 2 data tokens.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.diffusion.strings.kernel import TOKENS, StringKernel, StringTable
from sedd_graph.diffusion.strings.strings import Strings, wide
from sedd_graph.verify.strings import DRAWS, check_frequencies, draws_distance
from sedd_graph.verify.total_variation import total_variation

__all__ = ["BirthDeathTable"]

LEVELS = (0.05, 0.7, 2.5)
"""Values of the total noise sigma at which closed forms are verified."""


class BirthDeathTable(StringTable):
    """Enumeration of all short strings, with the generator (rate matrix) of a birth-death process on them.

    Args:
        kernel: The kernel, constructed with two data tokens.
        one_length: True to give all clean strings the same length; otherwise their lengths vary.

    Attributes:
        inserted: int64 [s, w, v]: for each of the s strings, the index of the string that results from inserting token
            v after position w. The index is s, out of range, if the result is longer than all enumerated strings.
        deleted: int64 [s, w]: for each string, the index of the string that results from deleting the token at position
            w. The index is s, out of range, if position w has no token.
        generator: Rate matrix, float64 [s, s]. Entry [i, j] is the rate from string j to string i; columns sum to 0.
    """

    kernel: BirthDeath

    def __init__(self, kernel: BirthDeath, *, one_length: bool = False) -> None:
        # births can exceed any maximum length, so clean strings are short enough that this is unlikely
        longest, clean = (6, 2) if kernel.births else (3, 3)
        super().__init__(kernel, longest=longest, clean=clean, one_length=one_length)
        index = {s: i for i, s in enumerate(self.strings)}
        count = len(self.strings)
        self.inserted = torch.full((count, self.longest + 1, TOKENS), count)
        self.deleted = torch.full((count, self.longest + 1), count)
        rates = torch.zeros(count, count, dtype=torch.float64)
        for i, s in enumerate(self.strings):
            for j in range(len(s)):
                self.deleted[i, j + 1] = index[s[:j] + s[j + 1 :]]
                rates[self.deleted[i, j + 1], i] += 1.0
            for j, v in itertools.product(range(len(s) + 1), range(TOKENS)):
                if len(s) < self.longest:
                    self.inserted[i, j, v] = index[(*s[:j], v, *s[j:])]
                    rates[self.inserted[i, j, v], i] += kernel.births * float(kernel.law[v])
        self.generator = rates - torch.diag(rates.sum(0))
        if kernel.births:
            # the process is reversible, also with a maximum length: a similar matrix is symmetric
            steady = torch.tensor([math.prod(kernel.births * float(kernel.law[v]) for v in s) for s in self.strings])
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
        insert = padded.gather(1, self.inserted[index].flatten(1)).view(len(index), -1, TOKENS)
        delete = padded.gather(1, self.deleted[index])
        return insert / here[..., None].clamp(min=1e-300), delete / here.clamp(min=1e-300)

    def _deletion_rates(self, strings: Strings, delete: Tensor) -> Tensor:
        """Return the reverse rates of deletions, float64 [b, w], given the deletion ratios [b, w] of :meth:`ratios`."""
        taken = torch.where(strings.attend, strings.tokens, 0).clamp(max=TOKENS - 1)
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
        return {k: wide(v, width).clamp(min=1e-300).log().float() for k, v in found.items()}

    def check_kernel(self, end: float) -> list[Check]:
        """Verify closed forms, regression targets, draws and prior of the kernel against the generator.

        Args:
            end: Total noise at t = 1.

        Returns:
            The results of the checks.
        """
        kernel, table = self.kernel, BirthDeathTable(self.kernel)  # clean strings of every length
        worst, short = table._errors(), sum(len(s) <= table.clean for s in table.strings)
        drawn = draws_distance(table, (0, TOKENS + 1, short - 1), kernel.sample, table.at)
        noise = kernel.prior(DRAWS, longest=table.longest, generator=torch.Generator().manual_seed(1), allowed=None)
        gap = total_variation(table.number(noise), table.at(torch.tensor([end]))[0])
        slack = 1e-3 if kernel.births else 1e-6  # births beyond the maximum length are missing in the table
        exponential, each = f"exp(sigma Q) on {len(table.strings)} strings, three noise levels", "all of them, relative"
        law = "p(x | x0) by the pair HMM is that of the generator"
        insert = "reverse rates of insertions are p(x with the token) / p(x)"
        delete = "reverse rates of deletions are the birth rate times p(x without the token) / p(x)"
        return [
            Check.below("strings.law", law, worst["law"], slack, exponential),
            Check.below("strings.insert", insert, worst["insert"], 10 * slack, each),
            Check.below("strings.delete", delete, worst["delete"], 10 * slack, each),
            check_frequencies("strings.sample", "draws of x_t follow the generator", drawn),
            check_frequencies("strings.prior", "noise at t = 1 is the prior", gap),
        ]

    def _errors(self) -> dict[str, float]:
        """Return the largest errors of p(x | x0) (``law``) and of insertion and deletion targets, by name."""
        kernel, count = self.kernel, len(self.strings)
        worst = dict.fromkeys(("law", "insert", "delete"), 0.0)
        for sigma, x0 in itertools.product(LEVELS, [i for i, s in enumerate(self.strings) if len(s) <= self.clean]):
            level = torch.tensor([sigma], dtype=torch.float64)
            law = self.at(level, F.one_hot(torch.tensor(x0), count).double())
            # possible strings, and short enough that the maximum length does not show
            half = self.longest // 2 + 1
            seen = torch.tensor([i for i, s in enumerate(self.strings) if law[0, i] > 1e-9 and len(s) <= half])
            strings, batch = self.rows(seen), self.batch(torch.full((len(seen),), x0))
            levels = level.expand(len(seen))
            found = kernel.log_p(batch, strings, levels).exp()
            worst["law"] = max(worst["law"], float((found - law[0, seen]).abs().max()))
            target, unit = kernel.target(batch, strings, levels), kernel.weights(levels)
            insert, delete = self.ratios(seen, law.expand(len(seen), -1))
            expected = target.fresh[..., None].double() * kernel.law
            index = target.symbols[:, None].expand(-1, expected.shape[1], -1)
            expected = expected.scatter_add(2, index, target.missing.transpose(1, 2).double())
            gap = (unit[:, 0, None, None] * expected - insert).abs() / (1 + insert)
            worst["insert"] = max(worst["insert"], float((gap * strings.attend[..., None]).max()))
            rate = self._deletion_rates(strings, delete)
            gap = (unit[:, 1:] * target.spurious - rate).abs() / (1 + rate)
            token = strings.attend & (torch.arange(gap.shape[1]) > 0)
            worst["delete"] = max(worst["delete"], float((gap * token).max()))
        return worst

    def check_declared(self, declared: StringKernel, end: float) -> list[Check]:
        """Verify that under the declared kernel the noise at t = 1 does not depend on the length of the text.

        A higher birth rate needs more noise to forget the length, and the declared kernel can have a higher rate than
        the kernel of this table.

        Args:
            declared: The kernel as declared in the blueprint, before its reduction to two tokens.
            end: Total noise at t = 1.

        Returns:
            One check; an empty list if the declared kernel is no :class:`BirthDeath`.
        """
        if not isinstance(declared, BirthDeath):
            return []
        left = math.exp(-(1 - declared.births) * end)
        claim = "under the declared kernel, noise at t = 1 does not depend on the length of the text"
        how = "exp(-(1 - births) sigma(1)), the share of a difference in length that is left"
        return [Check.below("strings.forgets", claim, left, 0.01, how)]
