"""Noise on texts of different lengths as a bijection: the interface of all kernels, and kernels of tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sedd_graph.diffusion.bitstream.bitstream import Bitstream
from sedd_graph.diffusion.bitstream.noise import denoise, noise
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["ReversibleNoise", "Texts", "TokenNoise", "padded", "unpadded"]

Texts = Sequence[Sequence[int]]
"""Type of the tokens of some texts."""


class ReversibleNoise(Protocol):
    """The forward process as a bijection: (texts, bitstream) <-> (noisy texts, bitstream)."""

    mask: int | None
    """Id of the mask; None for a process without mask."""
    total: int | None
    """Number of steps of a kernel in discrete time, whose noise is drawn at multiples of 1 / ``total``; None otherwise."""

    def noise(self, texts: Texts, times: Sequence[float], bitstream: Bitstream) -> tuple[list[list[int]], Bitstream]:
        """Noise clean texts up to the last of ``times``; return the noisy texts, and the bitstream after noise.

        Raises:
            UserError: A text has other tokens than data tokens, or the kernel has no reversible noise at these times.
        """

    def denoise(self, texts: Texts, times: Sequence[float], bitstream: Bitstream) -> list[list[int]]:
        """Recover the clean texts from noisy ones: the exact inverse of :meth:`noise`.

        Raises:
            UserError: The bitstream is not that of this noise, or texts or bitstream were altered.
        """


class TokenNoise:
    """Reversible noise of a kernel of tokens; each text retains its length.

    Args:
        kernel: The kernel. It is copied to the CPU, where probabilities are the same whatever the device of the model.
        schedule: Total noise as a function of time.
    """

    def __init__(self, kernel: Kernel, schedule: Schedule) -> None:
        self._kernel, self._schedule = copy.deepcopy(kernel).cpu(), copy.deepcopy(schedule).cpu()
        self.mask, self.total = kernel.mask, kernel.steps

    def noise(self, texts: Texts, times: Sequence[float], bitstream: Bitstream) -> tuple[list[list[int]], Bitstream]:
        rows, real = padded(texts)
        found, after = noise(self._kernel, self._schedule, rows, times, bitstream, corrupt=real)
        return unpadded(found, real), after

    def denoise(self, texts: Texts, times: Sequence[float], bitstream: Bitstream) -> list[list[int]]:
        rows, real = padded(texts)
        return unpadded(denoise(self._kernel, self._schedule, rows, times, bitstream, corrupt=real)[0], real)


def padded(texts: Texts) -> tuple[Tensor, Tensor]:
    """Return texts as rows, int64 [b, l], padded with 0, and which positions are theirs, bool [b, l]."""
    lengths = torch.tensor([len(text) for text in texts])
    rows = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.as_tensor(text, dtype=torch.int64)
    return rows, torch.arange(rows.shape[1]) < lengths[:, None]


def unpadded(rows: Tensor, real: Tensor) -> list[list[int]]:
    """Return the texts of rows [b, l], of which the positions ``real``, bool [b, l], are theirs."""
    return [row[own].tolist() for row, own in zip(rows, real, strict=True)]
