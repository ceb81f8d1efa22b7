"""The bitstream: what noise needs beside the tokens to be a bijection, (tokens, bitstream) <-> (noise, bitstream).

A bitstream is two stacks of bits. Noise pops its random draws from the *supply*, and pushes onto the *record* what they
erased, in an entropy code. Denoising pops the record and pushes the draws back onto the supply. The supply is a seeded random
stream, of which a file holds the place and nothing else; the record is what takes space. Bits of the record are never
drawn from, so that noise does not depend on the text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import numpy as np
import numpy.typing as npt

from sedd_graph.diffusion.bitstream.coder import LEAST, WORD, Stack
from sedd_graph.errors import UserError

__all__ = ["MOST_LANES", "Bitstream", "Step", "rounds"]

MOST_LANES = 4096
"""Largest number of lanes of a bitstream."""
_POSITIONS = 4096
"""Number of positions of the rows for each lane of a new bitstream."""
_MOST_WORDS = 2**27
"""Limit on the memory that reading a bitstream takes: the number of words of all lanes of a stack."""
_MAGIC = b"sedd_graph bitstream 1\n"
_HEAD = struct.Struct("<16s32sII")
_STEP = struct.Struct("<dd32s32s")
_LANE = struct.Struct("<iQI")
_DIGEST = 32


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of noise that a bitstream can undo.

    Attributes:
        start: Total noise before the step.
        end: Total noise after the step.
        tables: SHA-256 of the frequency tables of the step and of the shape of the rows: a kernel or rows of another
            kind cannot undo it.
        rows: SHA-256 of the rows after the step. Tokens that noise has left alone stand in the rows and nowhere else, so
            that nothing but this digest tells whether they were altered.
    """

    start: float
    end: float
    tables: bytes
    rows: bytes


@dataclasses.dataclass(frozen=True)
class Bitstream:
    """Random bits that noise draws from, and the erased information that it has recorded.

    Attributes:
        seed: Seed of the random streams, 16 bytes.
        supply: The stack that draws are popped from.
        record: The stack that erased information is pushed onto.
        steps: The steps of noise on the bitstream, in order.
        clean: SHA-256 of the rows before noise; zeros on a new bitstream.
        information: Information content of what noise has pushed onto the record, bits: the sum of -log2 p(y | z) over
            the tokens y that noise replaced by z. Not part of the bytes.
    """

    seed: bytes
    supply: Stack
    record: Stack
    steps: tuple[Step, ...] = ()
    clean: bytes = bytes(_DIGEST)
    information: float = 0.0

    @classmethod
    def new(cls, seed: int | bytes, rows: int, length: int, *, lanes: int | None = None) -> Bitstream:
        """Return a bitstream without any noise on it.

        Args:
            seed: A number, or 16 bytes: with 16 secret random bytes nobody else can tell noise from a random draw.
            rows: Number of rows that are to be noised together.
            length: Number of positions per row.
            lanes: Number of lanes, at most the number of rows. More are faster, and each takes 64 bits of the record.
                None: one for every 4,096 positions.
        """
        if isinstance(seed, int):
            seed = hashlib.shake_256(f"sedd_graph bitstream {seed}".encode()).digest(16)
        if len(seed) != 16:
            raise UserError(f"the seed of a bitstream is a number or 16 bytes, not {len(seed)} bytes")
        lanes = max(1, min(rows, rows * length // _POSITIONS if lanes is None else lanes, MOST_LANES))
        return cls(seed, Stack(seed, "supply", lanes), Stack(seed, "record", lanes))

    def copy(self) -> Bitstream:
        """Return an independent copy."""
        return dataclasses.replace(self, supply=self.supply.copy(), record=self.record.copy())

    @property
    def lanes(self) -> int:
        """Number of lanes: independent stacks, over which the rows are distributed."""
        return self.supply.lanes

    @property
    def bits(self) -> int:
        """Size of the record in bits: its words, and a state of 64 bits for each lane."""
        return WORD * sum(len(x) for x in self.record.explicit()) + 64 * self.lanes

    @property
    def pristine(self) -> bool:
        """True if the bitstream is as new. One that was undone with other rows than its own is not, but by chance."""
        return not self.steps and self.supply.pristine and self.record.pristine

    def begin(self, clean: bytes) -> Bitstream:
        """Return the bitstream for noise on rows of digest ``clean``. Raises :class:`UserError` if it has noise on it."""
        if self.steps:
            raise UserError("the bitstream has noise on it already; take a new one, or undo it first")
        return dataclasses.replace(self, clean=clean)

    def require_steps(self, count: int) -> None:
        """Raise :class:`UserError` unless the bitstream has ``count`` steps of noise."""
        if len(self.steps) != count:
            raise UserError(f"the bitstream has {len(self.steps)} steps of noise, and there are {count} times")

    def require_last(self, start: float, end: float, tables: bytes) -> None:
        """Raise :class:`UserError` unless the last step of noise on the bitstream has these levels and tables."""
        if not self.steps:
            raise UserError("the bitstream has no noise to undo")
        last = self.steps[-1]
        if (last.start, last.end) != (start, end):
            raise UserError(
                f"the last step of the bitstream is from total noise {last.start:g} to {last.end:g}, "
                f"not from {start:g} to {end:g}: take the schedule and times of the noise"
            )
        if last.tables != tables:
            raise UserError(
                "the bitstream was made with another kernel, reference distribution, shape of rows or choice of fixed "
                "positions: its frequency tables differ"
            )

    def require_rows(self, rows: bytes) -> None:
        """Raise :class:`UserError` unless the rows after the last step of noise have this digest."""
        if self.steps and self.steps[-1].rows != rows:
            raise UserError(
                "the noisy rows are not those of this bitstream: they were altered, or belong to another one"
            )

    def end(self, clean: bytes) -> Bitstream:
        """Return the bitstream as it was before :meth:`begin`, after all its noise was undone.

        Raises:
            UserError: The recovered rows are not those of digest ``clean``, or bits are left on the bitstream.
        """
        if self.clean != clean or not self.pristine:
            raise UserError(
                "the bitstream was altered, or is not that of the rows: it does not lead back to the clean rows"
            )
        return dataclasses.replace(self, clean=bytes(_DIGEST))

    def to_bytes(self) -> bytes:
        """Return the bitstream as bytes, the same on every machine; the last 32 are a SHA-256 digest of the others."""
        parts = [_MAGIC, _HEAD.pack(self.seed, self.clean, self.lanes, len(self.steps))]
        parts += [_STEP.pack(x.start, x.end, x.tables, x.rows) for x in self.steps]
        for stack in (self.supply, self.record):
            words = stack.explicit()
            for at, state, own in zip(stack.at.tolist(), stack.state.tolist(), words, strict=True):
                parts.append(_LANE.pack(at, state, len(own)))
            parts += [own.astype("<u2").tobytes() for own in words]
        body = b"".join(parts)
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> Bitstream:
        """Read a bitstream from the bytes of :meth:`to_bytes`.

        Raises:
            UserError: The bytes are not those of a bitstream, or they were altered.
        """
        body, digest = data[:-_DIGEST], data[-_DIGEST:]
        if not body.startswith(_MAGIC):
            raise UserError("not a bitstream of this version of sedd_graph")
        if hashlib.sha256(body).digest() != digest:
            raise UserError("the bitstream was altered or is incomplete: its digest does not match its bytes")
        try:
            return cls._read(body)
        except (struct.error, ValueError):
            raise UserError("the bitstream is malformed") from None

    @classmethod
    def _read(cls, body: bytes) -> Bitstream:
        at = len(_MAGIC)
        seed, clean, lanes, count = _HEAD.unpack_from(body, at)
        at += _HEAD.size
        if not 0 < lanes <= MOST_LANES or at + count * _STEP.size + 2 * lanes * _LANE.size > len(body):
            raise ValueError
        steps = tuple(Step(*_STEP.unpack_from(body, at + i * _STEP.size)) for i in range(count))
        at += count * _STEP.size
        stacks = list[Stack]()
        for label in ("supply", "record"):
            heads = [_LANE.unpack_from(body, at + i * _LANE.size) for i in range(lanes)]
            at += lanes * _LANE.size
            words = list[npt.NDArray[np.uint16]]()
            if max(abs(place) for place, _, _ in heads) * lanes > _MOST_WORDS:
                raise ValueError
            for place, state, size in heads:
                if at + 2 * size > len(body) or -place > size or not state >> LEAST:
                    raise ValueError
                words.append(np.frombuffer(body, dtype="<u2", count=size, offset=at).astype(np.uint16))
                at += 2 * size
            stack = Stack(seed, label, lanes)
            stack.load(np.array([h[0] for h in heads]), np.array([h[1] for h in heads], dtype=np.uint64), words)
            stacks.append(stack)
        if at != len(body):
            raise ValueError
        supply, record = stacks
        return cls(seed, supply, record, steps, clean)


def rounds(rows: int, lanes: int, *, forward: bool) -> list[int]:
    """Return the first row of each round of coding, in which every lane takes one row.

    Args:
        rows: Number of rows.
        lanes: Number of lanes.
        forward: False: in the opposite order.
    """
    found = list(range(0, rows, lanes))
    return found if forward else found[::-1]
