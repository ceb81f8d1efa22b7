"""Noise on strings as a bijection, (strings, bitstream) <-> (noise, bitstream), if the kernel declares fates of tokens.

A step pops from the supply which tokens survive, are masked, deleted or born, and pushes onto the record the deleted and
masked tokens with their places. Axes: b rows, w positions (the BOS token first), k lanes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sedd_graph.diffusion.bitstream.aligned import AlignedDraw, AlignedRecord
from sedd_graph.diffusion.bitstream.bitstream import Bitstream, Step, rounds
from sedd_graph.diffusion.bitstream.coder import Code, Integers, Reader, Stack, Writer
from sedd_graph.diffusion.bitstream.columns import Draw, Record, spread_reference
from sedd_graph.diffusion.bitstream.noise import levels
from sedd_graph.diffusion.bitstream.tables import Numbers
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import StringKernel
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.errors import UserError

__all__ = ["denoise_string_step", "denoise_strings", "noise_string_step", "noise_strings"]

_PathT = TypeVar("_PathT")


def noise_strings(
    kernel: StringKernel,
    schedule: Schedule,
    strings: Strings,
    times: Sequence[float] | Tensor,
    bitstream: Bitstream,
    *,
    reference: Tensor | None = None,
) -> tuple[Strings, Bitstream]:
    """Noise clean strings up to the last of ``times``, and record on the bitstream what noise erases.

    Args:
        kernel: The kernel.
        schedule: Total noise as a function of time.
        strings: Clean strings of data tokens, b.
        times: Increasing times in [0, 1] at which the noisy strings are drawn one after another.
        bitstream: A bitstream without steps.
        reference: Weights of the data tokens, [v], under which the record is coded; None: all equal. Kernels with
            births have a reference of their own, the frequencies of born tokens.

    Returns:
        The noisy strings, and the bitstream after noise; the arguments are unchanged.

    Raises:
        UserError: The kernel declares no reversible noise, there are several times and it draws its noise in one step,
            or the strings have other tokens than data tokens.
    """
    tokens = strings.tokens[:, 1:][strings.attend[:, 1:]]
    if not bool(((tokens >= 0) & (tokens < kernel.data_tokens)).all()):
        raise UserError(
            "only strings of data tokens can be noised: they have a mask, or a token outside the vocabulary"
        )
    start, bitstream = 0.0, bitstream.begin(_rows_digest(strings))
    for sigma in levels(schedule, times):
        strings, bitstream = noise_string_step(kernel, sigma, start, strings, bitstream, reference=reference)
        start = sigma
    return strings, bitstream


def denoise_strings(
    kernel: StringKernel,
    schedule: Schedule,
    strings: Strings,
    times: Sequence[float] | Tensor,
    bitstream: Bitstream,
    *,
    reference: Tensor | None = None,
) -> tuple[Strings, Bitstream]:
    """Recover the clean strings from noisy strings and the bitstream: the exact inverse of :func:`noise_strings`.

    Args:
        kernel: The kernel.
        schedule: Total noise as a function of time.
        strings: The noisy strings, b.
        times: The times of the noise.
        bitstream: The bitstream after noise.
        reference: The weights that the noise was recorded under.

    Returns:
        The clean strings, and the bitstream before noise.

    Raises:
        UserError: The bitstream is not that of this noise, or the strings were altered.
    """
    ends = levels(schedule, times)
    bitstream.require_steps(len(ends))
    for sigma, start in zip(reversed(ends), reversed([0.0, *ends[:-1]]), strict=True):
        bitstream.require_rows(_rows_digest(strings))
        strings, bitstream = denoise_string_step(kernel, sigma, start, strings, bitstream, reference=reference)
    return strings, bitstream.end(_rows_digest(strings))


def noise_string_step(
    kernel: StringKernel,
    sigma: float,
    start: float,
    strings: Strings,
    bitstream: Bitstream,
    *,
    reference: Tensor | None = None,
) -> tuple[Strings, Bitstream]:
    """Noise strings by one step, from total noise ``start`` to ``sigma``; others as in :func:`noise_strings`."""
    draw, record = _laws(kernel, sigma, start, reference)
    made = bitstream.copy()
    moved, bits = _exchange(kernel, strings, (made.supply, draw), (made.record, record), forward=True)
    step = Step(start, sigma, _digest(draw, record, len(strings.tokens)), _rows_digest(moved))
    return moved, dataclasses.replace(made, steps=(*made.steps, step), information=made.information + bits)


def denoise_string_step(
    kernel: StringKernel,
    sigma: float,
    start: float,
    strings: Strings,
    bitstream: Bitstream,
    *,
    reference: Tensor | None = None,
) -> tuple[Strings, Bitstream]:
    """Undo the last step of noise on a bitstream: the inverse of :func:`noise_string_step`.

    Raises:
        UserError: The last step of the bitstream is another one, or the strings have a token outside the vocabulary.
    """
    draw, record = _laws(kernel, sigma, start, reference)
    bitstream.require_last(start, sigma, _digest(draw, record, len(strings.tokens)))
    tokens = strings.tokens[:, 1:][strings.attend[:, 1:]]
    if not bool(((tokens >= 0) & (tokens < kernel.start)).all()):
        raise UserError("noisy strings have tokens outside the vocabulary")
    made = bitstream.copy()
    moved, _ = _exchange(kernel, strings, (made.record, record), (made.supply, draw), forward=False)
    return moved, dataclasses.replace(made, steps=made.steps[:-1])


class _Law(Protocol[_PathT]):
    """Distribution of the columns of a step given one of the two strings."""

    def digest(self) -> bytes:
        """Return a digest of all frequencies that are known in advance."""

    def walk(self, code: Code, given: Integers, lengths: Integers, known: _PathT | None, /) -> _PathT:
        """Code the columns of one string per lane."""


@torch.no_grad()
def _laws(kernel: StringKernel, sigma: float, start: float, reference: Tensor | None) -> tuple[_Law[Any], _Law[Any]]:
    """Return the laws of the columns given the old strings (the draw) and the new ones (the record)."""
    clean, fates = _reference(kernel, reference), kernel.fates(sigma, start)
    if fates is not None:
        if reference is not None and fates.birth:
            raise UserError(
                "a kernel that inserts tokens records under its own token frequencies; leave out the reference"
            )
        return Draw(fates), Record(fates, spread_reference(kernel.fates(start) if start > 0 else None, clean))
    noise = kernel.aligned_noise(sigma)
    if noise is None:
        raise UserError(
            f"{type(kernel).__name__} declares neither the fates of tokens nor noise strings that text is aligned with, so "
            "that its noise is not reversible; take delete, indel, mask_delete or edit_flow"
        )
    if start > 0:
        raise UserError(
            f"{type(kernel).__name__} aligns text with one noise string, in one step: take one time of noise"
        )
    return AlignedDraw(noise), AlignedRecord(noise, clean[: kernel.data_tokens])


def _reference(kernel: StringKernel, reference: Tensor | None) -> Numbers:
    """Return the reference distribution of clean tokens, float64 [states]."""
    v = kernel.data_tokens
    weights = torch.ones(v, dtype=torch.float64) if reference is None else reference.detach().double().cpu()
    if weights.shape != (v,) or not bool((weights > 0).all()) or not bool(weights.isfinite().all()):
        raise UserError(f"a reference distribution is {v} positive numbers, one for each data token of the kernel")
    clean = np.zeros(kernel.states)
    clean[:v] = (weights / weights.sum()).numpy()
    return clean


def _digest(draw: _Law[Any], record: _Law[Any], rows: int) -> bytes:
    return hashlib.sha256(f"strings {rows}".encode() + draw.digest() + record.digest()).digest()


def _rows_digest(strings: Strings) -> bytes:
    """Return a digest of the strings that does not depend on the width that they are padded to."""
    lengths = strings.lengths.cpu().numpy().astype("<i8")
    tokens = strings.tokens[:, 1:][strings.attend[:, 1:]].cpu().numpy().astype("<i8")
    return hashlib.sha256(lengths.tobytes() + tokens.tobytes()).digest()


def _exchange(
    kernel: StringKernel,
    strings: Strings,
    source: tuple[Stack, _Law[Any]],
    sink: tuple[Stack, _Law[Any]],
    *,
    forward: bool,
) -> tuple[Strings, float]:
    """Replace strings by those that columns popped from one stack lead to, and push the columns onto the other stack.

    Args:
        kernel: The kernel.
        strings: Strings before the step; after it for denoising.
        source: The stack to pop from, and the law of the columns given ``strings``.
        sink: The stack to push to, and the law of the columns given the result.
        forward: True for noise; denoising takes the rows in the opposite order.

    Returns:
        The new strings, and the information content of what was pushed, bits.
    """
    old, many = strings.tokens[:, 1:].cpu().numpy(), strings.lengths.cpu().numpy()
    rows, lanes, bits = len(old), source[0].lanes, 0.0
    found = [np.zeros(0, dtype=np.int64)] * rows
    for first in rounds(rows, lanes, forward=forward):
        part = old[first : first + lanes]
        given, lengths = np.zeros((lanes, old.shape[1]), dtype=np.int64), np.full(lanes, -1)
        given[: len(part)], lengths[: len(part)] = part, many[first : first + lanes]
        path = source[1].walk(Reader(source[0]), given, lengths, None)
        made = path.strings(old=not forward)
        writer = Writer(sink[0])
        sizes = np.where(lengths < 0, -1, [len(x) for x in made])
        sink[1].walk(writer, _padded(made, 0), sizes, path)
        writer.finish()
        bits += writer.information
        found[first : first + len(part)] = made[: len(part)]
    tokens = torch.from_numpy(_padded(found, kernel.start))
    lengths_now = torch.tensor([len(x) for x in found])
    start = torch.full((rows, 1), kernel.start)
    attend = torch.arange(tokens.shape[1] + 1) <= lengths_now[:, None]
    device = strings.tokens.device
    return Strings(torch.cat([start, tokens], 1).to(device), attend.to(device)), bits


def _padded(rows: list[Integers], rest: int) -> Integers:
    found = np.full((len(rows), max((len(x) for x in rows), default=0)), rest, dtype=np.int64)
    for row, own in zip(found, rows, strict=True):
        row[: len(own)] = own
    return found
