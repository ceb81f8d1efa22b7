"""The coding of noise that mixes a clean string with a noise string, column by column (edit flows with noise tokens).

The draw codes the noise string, and which columns take their clean entry. The record codes all columns given the noisy
string: the noise tokens that are not seen must be recorded, too, since a given alignment says something about them. It
is a code of pairs of strings whose columns are independent and of one of four kinds; how frequent each kind is follows
from the columns before (an adaptive code). Axes: k lanes, w positions, c columns, m noise tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import torch

from sedd_graph.diffusion.bitstream.coder import Code, Flags, Integers
from sedd_graph.diffusion.bitstream.tables import Numbers, Rows, Without, rounded
from sedd_graph.diffusion.strings.aligned_noise import AlignedNoise
from sedd_graph.diffusion.strings.columns import BLANK
from sedd_graph.errors import UserError

__all__ = ["AlignedDraw", "AlignedPath", "AlignedRecord"]

_MOST = 2**20
"""Largest number of tokens of a noise string, and of columns; a bitstream that asks for more is refused."""
_MATCH, _SUBSTITUTE, _DELETE, _INSERT = range(4)
LOST, MISSING, SAME, NEW, OLD, NOISE, TEXT = range(7)
"""Ways of a column: an unseen noise token without clean token, an unseen clean token without noise token, a pair of equal
tokens, a clean token seen in place of noise, noise in place of a clean token, noise alone, and a clean token alone."""
_KIND = np.array([_DELETE, _INSERT, _MATCH, _SUBSTITUTE, _SUBSTITUTE, _DELETE, _INSERT])


@dataclasses.dataclass(frozen=True)
class AlignedPath:
    """Columns of one pair of strings per lane, without empty columns between them.

    Attributes:
        noise: int64 [k, c], noise token of each column; BLANK where it has none.
        clean: int64 [k, c], clean token of each column; BLANK where it has none. Columns with two blanks are padding.
        moved: bool [k, c], True where the noisy string has the clean entry.
    """

    noise: Integers
    clean: Integers
    moved: Flags

    def strings(self, *, old: bool) -> list[Integers]:
        """Return the clean string of each lane, or the noisy one."""
        seen = self.clean if old else np.where(self.moved, self.clean, self.noise)
        return [row[row != BLANK] for row in seen]

    def column(self, at: int) -> tuple[Integers, Integers, Flags]:
        """Return noise token, clean token and flag of the columns at index ``at``, [k] each; blanks behind the last."""
        if at < self.noise.shape[1]:
            return self.noise[:, at], self.clean[:, at], self.moved[:, at]
        none = np.full(len(self.noise), BLANK)
        return none, none, none == 0


def _digest(*parts: Rows) -> bytes:
    return hashlib.sha256(b"".join(part.digest() for part in parts)).digest()


def _flag(chance: float) -> Rows:
    return Rows(rounded(np.array([[1 - chance, chance]])))


class AlignedDraw:
    """Columns given the clean string.

    Args:
        noise: The noise that the kernel declares.
    """

    def __init__(self, noise: AlignedNoise) -> None:
        self._align, self._longest = noise.align, noise.longest
        a, most = noise.spread, noise.longest
        ratio = (
            np.array([a])
            if most is None
            else a * (1 - a ** np.arange(most, -1.0, -1)) / (1 - a ** np.arange(most + 1, 0.0, -1))
        )
        self._more = Rows(rounded(np.stack([1 - ratio, ratio], -1)))
        law = noise.law.cpu().numpy()
        self._token, self._moved = Rows(rounded(law[None], law[None] > 0)), _flag(noise.clean)

    def digest(self) -> bytes:
        """Return a digest of all frequencies."""
        return _digest(self._more, self._token, self._moved)

    def walk(self, code: Code, old: Integers, lengths: Integers, known: AlignedPath | None) -> AlignedPath:
        """Code the noise string and the flags of one clean string per lane.

        Args:
            code: A reader or a writer.
            old: The clean strings, int64 [k, w], padded.
            lengths: int64 [k]; -1 for lanes that do not take part.
            known: The columns, for a writer.
        """
        active = lengths >= 0
        noise = self._noise(code, active, None if known is None else known)
        clean = np.where(np.arange(old.shape[1]) < lengths[:, None], old, BLANK)
        found = self._align(torch.from_numpy(noise), torch.from_numpy(clean))
        path = _packed(found.noise.numpy(), found.clean.numpy())
        if known is not None:
            path = _same(path, known)
        moved = np.zeros_like(path.moved)
        for at in range(path.noise.shape[1]):
            there = active & ((path.noise[:, at] != BLANK) | (path.clean[:, at] != BLANK))
            value = None if known is None else path.moved[:, at].astype(np.int64)
            moved[:, at] = code.digit(self._moved, 0 * lengths, there, value) == 1
        return dataclasses.replace(path, moved=moved)

    def _noise(self, code: Code, active: Flags, known: AlignedPath | None) -> Integers:
        """Code the noise strings, int64 [k, m], BLANK at padding."""
        tokens = None if known is None else [row[row != BLANK] for row in known.noise]
        made, going, zero = list[Integers](), active.copy(), np.zeros(len(active), dtype=np.int64)
        for at in range(_MOST):
            row = zero + (0 if self._longest is None else min(at, self._longest))
            more = None if tokens is None else np.array([1 * (at < len(x)) for x in tokens])
            going = going & (code.digit(self._more, row, going, more) == 1)
            if not going.any():
                return np.stack(made, 1) if made else np.zeros((len(active), 0), dtype=np.int64)
            value = None if tokens is None else np.array([x[at] if at < len(x) else 0 for x in tokens])
            made.append(np.where(going, code.digit(self._token, zero, going, value), BLANK))
        raise UserError(f"a noise string has more than {_MOST:,} tokens")


def _packed(noise: Integers, clean: Integers) -> AlignedPath:
    """Return columns without the empty ones between them."""
    order = ((noise == BLANK) & (clean == BLANK)).argsort(1, kind="stable")
    noise, clean = (np.take_along_axis(x, order, 1) for x in (noise, clean))
    width = int(((noise != BLANK) | (clean != BLANK)).sum(1).max(initial=0))
    return AlignedPath(noise[:, :width], clean[:, :width], np.zeros((len(noise), width), dtype=bool))


def _same(path: AlignedPath, known: AlignedPath) -> AlignedPath:
    """Return the known columns, if they are those of the alignment ``path``."""
    width = path.noise.shape[1]
    same = np.array_equal(path.noise, known.noise[:, :width]) and np.array_equal(path.clean, known.clean[:, :width])
    if not same or (known.noise[:, width:] != BLANK).any() or (known.clean[:, width:] != BLANK).any():
        raise UserError("the bitstream is not that of these strings: its columns are not those of an alignment")
    return AlignedPath(path.noise, path.clean, known.moved[:, :width])


class AlignedRecord:
    """Columns given the noisy string.

    Args:
        noise: The noise that the kernel declares.
        reference: Distribution of the clean tokens, [v].
    """

    def __init__(self, noise: AlignedNoise, reference: Numbers) -> None:
        law = noise.law.cpu().numpy()
        self._clean, self._law, self._reference = noise.clean, law, reference
        self._moved = _flag(noise.clean)
        (noise_law, text_law) = (rounded(x[None], x[None] > 0) for x in (law, reference))
        self._noise, self._text = Rows(noise_law), Rows(text_law)
        self._other_noise, self._other_text = Without(noise_law[0]), Without(text_law[0])
        both = law * reference
        self._equal = both / both.sum()

    def digest(self) -> bytes:
        """Return a digest of all frequencies that are known in advance."""
        return _digest(self._moved, self._noise, self._text)

    def walk(self, code: Code, new: Integers, lengths: Integers, known: AlignedPath | None) -> AlignedPath:
        """Code the columns of one string per lane; arguments are those of :meth:`AlignedDraw.walk`, with noisy strings."""
        k, padded = len(new), np.pad(new, ((0, 0), (0, 1)))
        lanes, at, zero = np.arange(k), np.zeros(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
        going, counts = lengths >= 0, np.full((k, 4), 0.5)
        columns = list[tuple[Integers, Integers, Flags]]()
        for step in range(_MOST):
            left = at < lengths
            here = np.where(left, padded[lanes, at.clip(max=padded.shape[1] - 1)], 0)
            table = Rows(self._ways(counts, here, left))
            noise, clean, moved = (None, None, None) if known is None else known.column(step)
            value = None if noise is None or clean is None or moved is None else _way(noise, clean, moved)
            # behind the last token, SAME says that there is no further column
            way = code.digit(table, lanes, going, value)
            going = going & ((way != SAME) | left)
            if not going.any():
                break
            pairs = (
                (self._noise, zero, LOST, noise), (self._text, zero, MISSING, clean),
                (self._other_noise, here, NEW, noise), (self._other_text, here, OLD, clean),
            )  # fmt: skip
            hidden = zero
            for law, row, which, token in pairs:
                hidden = hidden + code.digit(law, row, going & (way == which), token)
            same = None if moved is None else moved.astype(np.int64)
            flag = code.digit(self._moved, zero, going & (way == SAME), same)
            columns.append(_column(way, going, here, hidden, flag))
            counts[lanes[going], _KIND[way[going]]] += 1.0
            at = at + (going & (way > MISSING))
        else:
            raise UserError("the bitstream is not that of these strings: it asks for strings without end")
        if not columns:
            none = np.full((k, 0), BLANK)
            return AlignedPath(none, none, none == 0)
        return AlignedPath(*(np.stack(x, 1) for x in zip(*columns, strict=True)))

    def _ways(self, counts: Numbers, here: Integers, left: Flags) -> Integers:
        """Return frequencies of the seven ways of the next column, int64 [k, 7].

        Args:
            counts: Number of columns of each kind so far, [k, 4].
            here: The next noisy token, [k].
            left: bool [k], False where no noisy token is left; then :data:`SAME` is the end.
        """
        match, change, lost, born = (counts / counts.sum(-1, keepdims=True)).T
        a, b = self._clean, 1 - self._clean
        noise, text = self._law[here], self._reference[here]
        seen = np.stack(
            [match * self._equal[here], change * a * text, change * b * noise, lost * b * noise, born * a * text], -1
        )
        seen = np.where(left[:, None], seen, np.array([1.0, 0, 0, 0, 0]))
        unseen = np.stack([lost * a, born * b], -1)
        share = (1 - unseen.sum(-1, keepdims=True)) / seen.sum(-1, keepdims=True)
        weights = np.concatenate([unseen, seen * share], -1)
        return rounded(weights, np.where(left[:, None], True, np.arange(7) <= SAME))


def _way(noise: Integers, clean: Integers, moved: Flags) -> Integers:
    """Return the way of each column; SAME for one that is behind the last."""
    only_noise, only_clean = clean == BLANK, noise == BLANK
    ways = [noise == clean, only_noise & moved, only_clean & ~moved, only_noise, only_clean, moved]
    return np.select(ways, [SAME, LOST, MISSING, NOISE, TEXT, NEW], OLD)


def _column(
    way: Integers, going: Flags, here: Integers, hidden: Integers, flag: Integers
) -> tuple[Integers, Integers, Flags]:
    """Return noise token, clean token and flag of a column of each lane, [k] each."""
    noise = np.select([(way == LOST) | (way == NEW), (way == MISSING) | (way == TEXT)], [hidden, BLANK], here)
    clean = np.select([(way == MISSING) | (way == OLD), (way == LOST) | (way == NOISE)], [hidden, BLANK], here)
    moved = np.isin(way, [LOST, NEW, TEXT]) | ((way == SAME) & (flag == 1))
    return np.where(going, noise, BLANK), np.where(going, clean, BLANK), moved & going
