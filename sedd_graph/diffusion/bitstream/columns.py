"""The coding of a step of noise on strings: a sequence of columns, each an old token, a new token, or both.

The draw codes the columns given the old string; the record codes them given the new string. Each is one procedure for
both directions: with known columns it writes, without it reads. Axes: k lanes, w positions, c columns, n states.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from sedd_graph.diffusion.bitstream.coder import Code, Integers
from sedd_graph.diffusion.bitstream.tables import Numbers, Rows, rounded
from sedd_graph.diffusion.strings.fates import Fates
from sedd_graph.errors import UserError

__all__ = ["Draw", "Path", "Record", "spread_reference"]

END, SURVIVE, HIDE, VANISH, REPLACE, BORN = range(-1, 5)
"""Kinds of columns: no more column, a token that survives, becomes the mask, vanishes or is replaced, a born token."""
_MOST = 2**20
"""Largest number of columns of a string; a bitstream that asks for more is refused."""


@dataclasses.dataclass(frozen=True)
class Path:
    """Columns of one string per lane.

    Attributes:
        kind: int64 [k, c], the kind of each column; END from the last one on.
        old: int64 [k, c], the token before the step; 0 where it has none.
        new: int64 [k, c], the token after the step; 0 where it has none.
    """

    kind: Integers
    old: Integers
    new: Integers

    @classmethod
    def of(cls, columns: list[tuple[Integers, Integers, Integers]], lanes: int) -> Path:
        """Stack columns of [k] each."""
        if not columns:
            return cls(*(np.full((lanes, 1), x, dtype=np.int64) for x in (END, 0, 0)))
        return cls(*(np.stack(x, 1) for x in zip(*columns, strict=True)))

    def column(self, at: int) -> tuple[Integers, Integers, Integers]:
        """Return kind, old and new token of the columns at index ``at``, [k] each; END behind the last."""
        if at < self.kind.shape[1]:
            return self.kind[:, at], self.old[:, at], self.new[:, at]
        none = np.zeros(len(self.kind), dtype=np.int64)
        return none + END, none, none

    def strings(self, *, old: bool) -> list[Integers]:
        """Return the old or the new string of each lane."""
        there = (self.kind != END) & (self.kind != (BORN if old else VANISH))
        return [row[real] for row, real in zip(self.old if old else self.new, there, strict=True)]


def spread_reference(fates: Fates | None, reference: Numbers) -> Numbers:
    """Return the distribution of tokens before a step whose start is noise of ``fates``, [n]; None: at clean text."""
    if fates is None:
        return reference
    found: Numbers = fates.survive.numpy() * reference
    if fates.mask is not None:
        found[fates.mask] += float((fates.hide.numpy() * reference).sum())
    found /= found.sum()
    return found


class Draw:
    """Columns given the old string: the fates that the kernel declares.

    Args:
        fates: Probabilities of the step.
    """

    def __init__(self, fates: Fates) -> None:
        self.mask = 0 if fates.mask is None else fates.mask
        self.births = fates.birth > 0
        every = np.stack([x.numpy() for x in (fates.survive, fates.hide, fates.vanish)], -1)
        self._fate = Rows(rounded(np.concatenate([every, np.full((len(every), 1), fates.replace)], -1)))
        self._more = Rows(rounded(np.array([[1 - fates.birth, fates.birth]])))
        law = fates.law.numpy()
        self._token = Rows(rounded(law[None], law[None] > 0))

    def digest(self) -> bytes:
        """Return a digest of all frequencies."""
        return hashlib.sha256(self._fate.digest() + self._more.digest() + self._token.digest()).digest()

    def walk(self, code: Code, old: Integers, lengths: Integers, known: Path | None) -> Path:
        """Code the columns of one string per lane.

        Args:
            code: A reader or a writer.
            old: The strings, int64 [k, w], padded.
            lengths: int64 [k]; -1 for lanes that do not take part.
            known: The columns, for a writer.
        """
        k = len(old)
        zero, at = np.zeros(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
        going, live, columns = lengths >= 0, np.ones(k, dtype=bool), list[tuple[Integers, Integers, Integers]]()
        padded = np.pad(old, ((0, 0), (0, 1)))
        for step in range(_MOST):
            kind, _, new = (None, None, None) if known is None else known.column(step)
            here = padded[np.arange(k), at.clip(max=padded.shape[1] - 1)]
            born = zero
            if self.births:
                born = code.digit(self._more, zero, going & live, None if kind is None else 1 * (kind == BORN))
            going = going & ((born == 1) | (at < lengths))
            if not going.any():
                break
            token = going & (born == 0)
            fate = code.digit(self._fate, here, token, None if kind is None else kind.clip(0, REPLACE))
            made = (born == 1) | (token & (fate == REPLACE))
            fresh = code.digit(self._token, zero, made, new) if self.births else zero
            result = np.select([fate == SURVIVE, fate == HIDE], [here, zero + self.mask], 0)
            kinds = np.where(going, np.where(born == 1, BORN, fate), END)
            columns.append((kinds, np.where(token, here, 0), np.where(made, fresh, np.where(token, result, 0))))
            live, at = kinds != VANISH, at + token
        else:
            raise UserError(f"a string has more than {_MOST:,} columns of noise")
        return Path.of(columns, k)


class Record:
    """Columns given the new string: the posterior of the fates under a reference for the old string.

    Without births, the reference has independent tokens and prefers no length: then the number of tokens that vanished in
    each gap is geometric, whatever the new string is. With births, it is the stationary distribution of the kernel.

    Args:
        fates: Probabilities of the step.
        reference: Distribution of the old tokens, [n].
    """

    def __init__(self, fates: Fates, reference: Numbers) -> None:
        self.births, self.mask = fates.birth > 0, -1 if fates.mask is None else fates.mask
        weights = fates.law.numpy() if self.births else reference
        vanish, survive, hide = (x.numpy() for x in (fates.vanish, fates.survive, fates.hide))
        gone = weights * (vanish + fates.replace)
        self._gone = Rows(rounded(gone[None], gone[None] > 0))
        under = weights * hide
        if fates.mask is not None:
            under[fates.mask] += weights[fates.mask] * survive[fates.mask]
        self._under = Rows(rounded(under[None], under[None] > 0))
        lost = fates.birth if self.births else float((weights * vanish).sum())
        # with births all tokens have one fate (TKF91): its probability of vanishing is that of a birth in reverse
        d0 = float(vanish[0]) if self.births else 0.0
        swap = (1 - lost) * fates.replace / (1 - d0) if self.births else 0.0
        choice = np.array([[1 - lost - swap, lost, swap], [1 - lost, lost, 0.0]])
        self._choice = Rows(rounded(choice, choice > 0))
        self._born = Rows(rounded(np.array([[1 - d0, d0]]), np.array([[True, d0 > 0]])))

    def digest(self) -> bytes:
        """Return a digest of all frequencies."""
        parts = (self._gone, self._under, self._choice, self._born)
        return hashlib.sha256(b"".join(x.digest() for x in parts)).digest()

    def walk(self, code: Code, new: Integers, lengths: Integers, known: Path | None) -> Path:
        """Code the columns of one string per lane; arguments are those of :meth:`Draw.walk`, with the new strings."""
        k = len(new)
        zero, at = np.zeros(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
        going, live, columns = lengths >= 0, np.ones(k, dtype=bool), list[tuple[Integers, Integers, Integers]]()
        padded = np.pad(new, ((0, 0), (0, 1)))
        for step in range(_MOST):
            kind, old, _ = (None, None, None) if known is None else known.column(step)
            here, left = padded[np.arange(k), at.clip(max=padded.shape[1] - 1)], at < lengths
            born = zero
            if self.births:
                born = code.digit(self._born, zero, going & live & left, None if kind is None else 1 * (kind == BORN))
            rest = going & (born == 0)
            picked = None if kind is None else np.select([kind == VANISH, kind == REPLACE], [1, 2], 0)
            choice = code.digit(self._choice, 1 - left, rest, picked)
            going = going & ((born == 1) | (choice > 0) | left)
            if not going.any():
                break
            lost = rest & (choice > 0)
            masked = rest & going & (choice == 0) & (here == self.mask)
            gone = code.digit(self._gone, zero, lost, old)
            below = code.digit(self._under, zero, masked, old) if self.mask >= 0 else zero
            before = np.where(lost, gone, np.where(masked, below, here))
            same = np.where(masked & (before != here), HIDE, SURVIVE)
            kinds = np.select([~going, born == 1, choice == 1, choice == 2], [END, BORN, VANISH, REPLACE], same)
            seen = going & (kinds != VANISH)
            columns.append((kinds, np.where(going & (born == 0), before, 0), np.where(seen, here, 0)))
            live, at = kinds != VANISH, at + seen
        else:
            raise UserError("the bitstream is not that of these strings: it asks for strings without end")
        return Path.of(columns, k)
