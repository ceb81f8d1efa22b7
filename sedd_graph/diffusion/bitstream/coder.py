"""An entropy coder whose state is a stack of bits: rANS (Duda, arXiv 1311.2540) in exact integers, many lanes at a time.

A symbol that takes ``size`` of the :data:`TOTAL` values of a frequency table costs log2(TOTAL / size) bits. Pushing a
symbol adds its bits to the stack; popping takes bits from the stack and turns them into a symbol of the table's
distribution. Popping is the exact inverse of pushing, in any order of symbols. Bits-back coding (Townsend et al., arXiv
1901.04866) rests on this: random bits on a stack become random symbols, and nothing is lost.

Every stack is infinite: below what has been pushed lie the random bits of a seeded stream (SHAKE-256), so that a pop
never fails. All arithmetic is that of unsigned 64-bit integers, so that equal tables give equal bits on every machine.
Axes: k lanes, which are independent stacks.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sedd_graph.errors import UserError

__all__ = ["BITS", "LEAST", "TOTAL", "WORD", "Code", "Digits", "Flags", "Integers", "Reader", "Stack", "Writer"]

Integers = npt.NDArray[np.int64]
"""Type of arrays of symbols, rows and frequencies."""
Flags = npt.NDArray[np.bool_]
"""Type of masks over lanes."""

BITS = 28
"""Number of bits of the sum of a frequency table."""
TOTAL = 1 << BITS
"""Sum of every frequency table."""
WORD = 16
"""Number of bits of a word of the stack."""
LEAST = 48
"""The state of a lane is at least 2^48 and below 2^64, so that a symbol's probability is exact to about 2^(28 - 48)."""

_WORD, _BITS, _LEAST = np.uint64(WORD), np.uint64(BITS), np.uint64(1 << LEAST)
_TOP = np.uint64(64 - BITS)
_LOW, _VALUE = np.uint64((1 << WORD) - 1), np.uint64(TOTAL - 1)
_FIRST = 64
"""Number of words of the random stream that a new stack prepares."""


class Digits(Protocol):
    """A frequency table for symbols that are coded at once; ``rows`` [k] are what the distribution is conditional on."""

    def of(self, rows: Integers, symbols: Integers) -> tuple[Integers, Integers]:
        """Return the first value and the number of values of each symbol, int64 [k] each."""

    def find(self, rows: Integers, values: Integers) -> tuple[Integers, Integers, Integers]:
        """Return the symbol that each of the values in [0, TOTAL) belongs to, its first value and its size, [k] each."""


class Stack:
    """Infinite stacks of bits, one per lane.

    Positions of a lane's words are counted from the initial top: words at 0 and above are those of the random stream
    unless they were overwritten, words below 0 have been pushed. ``at`` is the position of the top.

    Args:
        seed: Seed of the random streams.
        label: Text that distinguishes stacks of one seed.
        lanes: Number of lanes k.

    Attributes:
        at: int64 [k], position of the top word.
        state: uint64 [k], the bits above the top word.
    """

    def __init__(self, seed: bytes, label: str, lanes: int) -> None:
        self._name = [seed + f"/{label}/{lane}".encode() for lane in range(lanes)]
        self.at = np.zeros(lanes, dtype=np.int64)
        self.state = self.initial
        self._random = self._stream(_FIRST)
        self._words = self._random.copy()
        self._below = 0  # number of columns of _words that are positions below 0

    @property
    def lanes(self) -> int:
        """Number of lanes k."""
        return len(self._name)

    @property
    def initial(self) -> npt.NDArray[np.uint64]:
        """The state of each lane of a new stack, uint64 [k]."""
        drawn = [hashlib.shake_256(name + b"/state").digest(LEAST // 8) for name in self._name]
        return np.array([int.from_bytes(x, "little") for x in drawn], dtype=np.uint64) | _LEAST

    def _stream(self, count: int) -> npt.NDArray[np.uint16]:
        drawn = b"".join(hashlib.shake_256(name).digest(2 * count) for name in self._name)
        return np.frombuffer(drawn, dtype="<u2").reshape(self.lanes, count).astype(np.uint16)

    def copy(self) -> Stack:
        """Return an independent copy."""
        made = Stack.__new__(Stack)
        made._name, made.at, made.state = self._name, self.at.copy(), self.state.copy()
        made._random, made._words, made._below = self._random, self._words.copy(), self._below
        return made

    def _above(self, position: int) -> None:
        """Prepare the random stream up to ``position``, exclusive."""
        ready = self._random.shape[1]
        if position > ready:
            self._random = self._stream(max(position, 2 * ready))
            self._words = np.concatenate([self._words, self._random[:, ready:]], axis=1)

    def _room(self, position: int) -> None:
        """Make room for words down to ``position``, below 0."""
        if -position > self._below:
            more = max(-position, 2 * self._below, _FIRST) - self._below
            self._words = np.pad(self._words, ((0, 0), (more, 0)))
            self._below += more

    def push(self, start: Integers, size: Integers) -> None:
        """Push one symbol on each lane.

        Args:
            start: First value of each symbol, [k].
            size: Number of values of each symbol, [k], above 0; TOTAL costs no bits and changes nothing.
        """
        state, share = self.state.copy(), size.astype(np.uint64)
        for _ in range(2):
            lanes = ((state >> _TOP) >= share).nonzero()[0]
            if not len(lanes):
                break
            at = self.at[lanes] - 1
            if int(at.min()) + self._below < 0:
                self._room(int(at.min()))
            self.at[lanes], here = at, state[lanes]
            self._words[lanes, at + self._below] = here & _LOW
            state[lanes] = here >> _WORD
        self.state = ((state // share) << _BITS) + state % share + start.astype(np.uint64)

    @property
    def values(self) -> Integers:
        """The value in [0, TOTAL) on top of each lane, which determines the symbol that is popped next, int64 [k]."""
        return (self.state & _VALUE).astype(np.int64)

    def pop(self, start: Integers, size: Integers) -> None:
        """Remove the symbol that takes the values [start, start + size) from each lane: the inverse of :meth:`push`.

        Args:
            start: First value of each symbol, [k]; the lane's :attr:`values` must be among those of the symbol.
            size: Number of values of each symbol, [k].
        """
        state = size.astype(np.uint64) * (self.state >> _BITS) + (self.state & _VALUE) - start.astype(np.uint64)
        for _ in range(2):
            lanes = (state < _LEAST).nonzero()[0]
            if not len(lanes):
                break
            at = self.at[lanes]
            if int(at.max()) + self._below >= self._words.shape[1]:
                self._above(int(at.max()) + 1)
            state[lanes] = (state[lanes] << _WORD) | self._words[lanes, at + self._below]
            self.at[lanes] = at + 1
        self.state = state

    def explicit(self) -> list[npt.NDArray[np.uint16]]:
        """Return the words of each lane that a file must hold: from the top to the last that is not of the stream."""
        return [
            self._words[lane, top + self._below : end + self._below].copy()
            for lane, (top, end) in enumerate(zip(self.at.tolist(), self._ends().tolist(), strict=True))
        ]

    def _ends(self) -> Integers:
        """Return the position behind the last word of each lane, from the top on, that is not of the stream, [k]."""
        here = np.arange(self._random.shape[1])
        other = (self._words[:, self._below :] != self._random) & (here >= self.at[:, None])
        last = np.where(other, here + 1, 0).max(-1)
        return np.where(last > 0, last, np.maximum(self.at, 0))

    def load(self, at: Integers, state: npt.NDArray[np.uint64], words: list[npt.NDArray[np.uint16]]) -> None:
        """Restore the stack from what a file holds: the inverse of :meth:`explicit`.

        Args:
            at: Position of the top word of each lane, [k].
            state: The state of each lane, [k].
            words: The words of each lane from the top on, as far as they are not those of the stream.
        """
        self.at, self.state = at.copy(), state.copy()
        self._room(int(at.min()))
        self._above(max(int((at + np.array([len(x) for x in words])).max()), 0))
        for lane, own in enumerate(words):
            first = int(at[lane]) + self._below
            self._words[lane, first : first + len(own)] = own

    @property
    def pristine(self) -> bool:
        """True if the stack is as new: all that was pushed has been popped, and all that was popped pushed back."""
        if bool((self.at != 0).any()) or bool((self.state != self.initial).any()):
            return False
        return np.array_equal(self._words[:, self._below :], self._random)


class Code(Protocol):
    """A direction of coding, so that one procedure describes both encoding and decoding of a sequence of symbols."""

    def digit(self, table: Digits, rows: Integers, active: Flags, known: Integers | None) -> Integers:
        """Code one symbol on each active lane and return it.

        Args:
            table: The frequency table.
            rows: The row of the table for each lane, [k].
            active: bool [k], lanes that take part.
            known: The symbols, [k], where they are known; None where they are to be read.

        Returns:
            The symbols, int64 [k]; 0 on lanes that do not take part.
        """


class Reader:
    """Pops symbols from a stack as they are asked for.

    Args:
        stack: The stack, changed in place.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def digit(self, table: Digits, rows: Integers, active: Flags, known: Integers | None) -> Integers:
        symbols, start, size = table.find(np.where(active, rows, 0), self.stack.values)
        if bool((active & (size <= 0)).any()):
            lane = int(np.flatnonzero(active & (size <= 0))[0])
            raise UserError(
                f"state {int(rows[lane])} cannot occur: the rows are not those of this kernel at this noise level"
            )
        self.stack.pop(np.where(active, start, 0), np.where(active, size, TOTAL))
        return np.where(active, symbols, 0)


class Writer:
    """Collects symbols in the order in which a :class:`Reader` will read them, and pushes them in the opposite order.

    Args:
        stack: The stack, changed in place by :meth:`finish`.

    Attributes:
        information: Information content of all symbols under their tables, -log2 of their probabilities, bits. No code
            takes fewer bits on average over symbols of these tables.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack, self.information = stack, 0.0
        self._pending: list[tuple[Integers, Integers]] = []

    def digit(self, table: Digits, rows: Integers, active: Flags, known: Integers | None) -> Integers:
        if known is None:
            raise TypeError("a writer needs the symbols that it writes")
        start, size = table.of(np.where(active, rows, 0), np.where(active, known, 0))
        if bool((active & (size <= 0)).any()):
            lane = int(np.flatnonzero(active & (size <= 0))[0])
            raise UserError(
                f"symbol {int(known[lane])} cannot occur given {int(rows[lane])}: the rows are not those of this kernel "
                "at this noise level"
            )
        self._pending.append((np.where(active, start, 0), np.where(active, size, TOTAL)))
        self.information += float((BITS - np.log2(self._pending[-1][1])).sum())
        return np.where(active, known, 0)

    def finish(self) -> None:
        """Push all symbols."""
        for start, size in reversed(self._pending):
            self.stack.push(start, size)
        self._pending.clear()
