"""Noise on rows of tokens as a bijection: (tokens, bitstream) <-> (noise, bitstream), for every kernel.

Each step draws the noisy row from the kernel's transition probabilities with bits popped from the supply of the bitstream,
and pushes the row before the step, given the noisy row, onto its record (bits-back coding). Undoing a step pops the record
and returns the drawn bits to the supply. Axes: b rows, l positions, k lanes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sedd_graph.diffusion.bitstream.bitstream import Bitstream, Step, rounds
from sedd_graph.diffusion.bitstream.coder import Code, Flags, Integers, Reader, Stack, Writer
from sedd_graph.diffusion.bitstream.laws import TokenLaw, reference_of, token_law
from sedd_graph.diffusion.bitstream.tables import Table
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.errors import UserError

__all__ = ["denoise", "denoise_step", "levels", "noise", "noise_step"]


@torch.no_grad()
def levels(schedule: Schedule, times: Sequence[float] | Tensor) -> list[float]:
    """Return total noise at increasing times in [0, 1], as float64 numbers.

    Raises:
        UserError: The times are not increasing numbers in [0, 1].
    """
    t = torch.as_tensor(times, dtype=torch.float64).reshape(-1)
    if not len(t) or not bool(((t >= 0) & (t <= 1)).all()) or bool((t.diff() <= 0).any()):
        raise UserError("times of noise are increasing numbers in [0, 1], at least one")
    return [float(x) for x in schedule.sigma(t).double()]


def noise(
    kernel: Kernel,
    schedule: Schedule,
    rows: Tensor,
    times: Sequence[float] | Tensor,
    bitstream: Bitstream,
    *,
    corrupt: Tensor | None = None,
    reference: Tensor | None = None,
) -> tuple[Tensor, Bitstream]:
    """Noise clean rows up to the last of ``times``, and record on the bitstream what noise erases.

    The distribution of the result is that of the kernel, up to rounding of the frequency tables.

    Args:
        kernel: The kernel.
        schedule: Total noise as a function of time.
        rows: Clean tokens, int64 [b, l].
        times: Increasing times in [0, 1] at which the noisy rows are drawn one after another; one time is one step. The
            record holds the whole trajectory, so that more steps take more bits.
        bitstream: A bitstream without steps.
        corrupt: bool [b, l], positions that noise may change; None: all.
        reference: Weights of the data tokens, [m], under which the record is coded; None: all equal. Frequencies of
            the tokens make it shorter.

    Returns:
        The noisy rows, int64 [b, l], and the bitstream after noise; the argument is unchanged.

    Raises:
        UserError: The rows have other tokens than data tokens where noise may change them, or the times are not
            increasing.
    """
    every = torch.ones_like(rows, dtype=torch.bool) if corrupt is None else corrupt
    clean = (rows >= 0) & (rows < kernel.states) & (rows != (-1 if kernel.mask is None else kernel.mask))
    if not bool(clean[every].all()):
        raise UserError("only rows of data tokens can be noised: they have a mask, or a token outside the vocabulary")
    start, bitstream = 0.0, bitstream.begin(_rows_digest(rows))
    for sigma in levels(schedule, times):
        rows, bitstream = noise_step(kernel, sigma, start, rows, bitstream, corrupt=every, reference=reference)
        start = sigma
    return rows, bitstream


def denoise(
    kernel: Kernel,
    schedule: Schedule,
    rows: Tensor,
    times: Sequence[float] | Tensor,
    bitstream: Bitstream,
    *,
    corrupt: Tensor | None = None,
    reference: Tensor | None = None,
) -> tuple[Tensor, Bitstream]:
    """Recover the clean rows from noisy rows and the bitstream: the exact inverse of :func:`noise`.

    Args:
        kernel: The kernel.
        schedule: Total noise as a function of time.
        rows: The noisy rows, int64 [b, l].
        times: The times of the noise.
        bitstream: The bitstream after noise.
        corrupt: bool [b, l], positions that noise could change; None: all.
        reference: The weights that the noise was recorded under.

    Returns:
        The clean rows, int64 [b, l], and the bitstream before noise.

    Raises:
        UserError: The bitstream is not that of this noise: other times, another kernel, another reference, rows of another
            shape, or rows that were altered.
    """
    every = torch.ones_like(rows, dtype=torch.bool) if corrupt is None else corrupt
    ends = levels(schedule, times)
    bitstream.require_steps(len(ends))
    for sigma, start in zip(reversed(ends), reversed([0.0, *ends[:-1]]), strict=True):
        bitstream.require_rows(_rows_digest(rows))
        rows, bitstream = denoise_step(kernel, sigma, start, rows, bitstream, corrupt=every, reference=reference)
    return rows, bitstream.end(_rows_digest(rows))


def noise_step(
    kernel: Kernel,
    sigma: float,
    start: float,
    rows: Tensor,
    bitstream: Bitstream,
    *,
    corrupt: Tensor,
    reference: Tensor | None = None,
) -> tuple[Tensor, Bitstream]:
    """Noise rows by one step, from total noise ``start`` to ``sigma``; other arguments are those of :func:`noise`."""
    law = token_law(kernel, sigma, start, reference_of(kernel, reference))
    made = bitstream.copy()
    moved, bits = _exchange(rows, corrupt, (made.supply, law.draw), (made.record, law.record), forward=True)
    step = Step(start, sigma, _digest(law, corrupt), _rows_digest(moved))
    return moved, dataclasses.replace(made, steps=(*made.steps, step), information=made.information + bits)


def denoise_step(
    kernel: Kernel,
    sigma: float,
    start: float,
    rows: Tensor,
    bitstream: Bitstream,
    *,
    corrupt: Tensor,
    reference: Tensor | None = None,
) -> tuple[Tensor, Bitstream]:
    """Undo the last step of noise on a bitstream: the inverse of :func:`noise_step`.

    It does not require that the rows are those that noise has made: with other rows, it is the tokens before noise that
    are other ones, and the bitstream after them.

    Raises:
        UserError: The last step of the bitstream is another one, or the rows have a token outside the vocabulary.
    """
    law = token_law(kernel, sigma, start, reference_of(kernel, reference))
    bitstream.require_last(start, sigma, _digest(law, corrupt))
    if not bool(((rows >= 0) & (rows < kernel.states))[corrupt].all()):
        raise UserError(f"noisy rows have tokens outside the vocabulary of {kernel.states:,} states")
    made = bitstream.copy()
    moved, _ = _exchange(rows, corrupt, (made.record, law.record), (made.supply, law.draw), forward=False)
    return moved, dataclasses.replace(made, steps=made.steps[:-1])


def _digest(law: TokenLaw, corrupt: Tensor) -> bytes:
    """Return the digest of all that both directions of a step must agree on."""
    moves = np.ascontiguousarray(corrupt.cpu().numpy())
    shape = f"tokens {moves.shape}".encode()
    return hashlib.sha256(shape + law.draw.digest() + law.record.digest() + np.packbits(moves).tobytes()).digest()


def _rows_digest(rows: Tensor) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(rows.cpu().numpy(), dtype="<i8").tobytes()).digest()


def _exchange(
    rows: Tensor, corrupt: Tensor, source: tuple[Stack, Table], sink: tuple[Stack, Table], *, forward: bool
) -> tuple[Tensor, float]:
    """Replace tokens by symbols popped from one stack, and push the replaced tokens onto the other one.

    Args:
        rows: Tokens, int64 [b, l].
        corrupt: bool [b, l], positions to replace.
        source: The stack to pop from, and the table of the new tokens given the old ones.
        sink: The stack to push to, and the table of the old tokens given the new ones.
        forward: True for noise; denoising takes the rows in the opposite order.

    Returns:
        The new tokens, int64 [b, l], and the information content of what was pushed, bits.
    """
    old, moves = rows.cpu().numpy(), corrupt.cpu().numpy()
    new, lanes, bits = old.copy(), source[0].lanes, 0.0
    for first in rounds(len(old), lanes, forward=forward):
        given = np.zeros((lanes, old.shape[1]), dtype=np.int64)
        active = np.zeros_like(given, dtype=bool)
        part = old[first : first + lanes]
        given[: len(part)], active[: len(part)] = part, moves[first : first + lanes]
        found = _row(Reader(source[0]), source[1], given, active, None)
        writer = Writer(sink[0])
        _row(writer, sink[1], found, active, given)
        writer.finish()
        bits += writer.information
        new[first : first + lanes] = np.where(active, found, given)[: len(part)]
    return torch.from_numpy(new).to(rows.device), bits


def _row(code: Code, table: Table, given: Integers, active: Flags, known: Integers | None) -> Integers:
    """Code the active positions of one row per lane, from left to right: tokens [k, l] given the tokens ``given`` [k, l]."""
    found = np.zeros_like(given)
    for at in np.flatnonzero(active.any(0)):
        found[:, at] = table.take(code, given[:, at], active[:, at], None if known is None else known[:, at])
    return found
