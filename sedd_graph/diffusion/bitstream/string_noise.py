"""Noise on texts as a bijection, for kernels of strings."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from sedd_graph.diffusion.bitstream.bitstream import Bitstream
from sedd_graph.diffusion.bitstream.reversible import Texts, padded, unpadded
from sedd_graph.diffusion.bitstream.strings import denoise_strings, noise_strings
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.kernel import StringKernel
from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["StringNoise"]


class StringNoise:
    """Reversible noise of a kernel of strings, which changes the lengths of texts.

    Args:
        kernel: The kernel. It is copied to the CPU, where probabilities are the same whatever the device of the model.
        schedule: Total noise as a function of time.
    """

    def __init__(self, kernel: StringKernel, schedule: Schedule) -> None:
        self._kernel, self._schedule = copy.deepcopy(kernel).cpu(), copy.deepcopy(schedule).cpu()
        fates = kernel.fates(1.0)
        self.mask = None if fates is None else fates.mask
        self.total: int | None = None

    def noise(self, texts: Texts, times: Sequence[float], bitstream: Bitstream) -> tuple[list[list[int]], Bitstream]:
        found, after = noise_strings(self._kernel, self._schedule, self._strings(texts), times, bitstream)
        return unpadded(found.tokens[:, 1:], found.attend[:, 1:]), after

    def denoise(self, texts: Texts, times: Sequence[float], bitstream: Bitstream) -> list[list[int]]:
        found, _ = denoise_strings(self._kernel, self._schedule, self._strings(texts), times, bitstream)
        return unpadded(found.tokens[:, 1:], found.attend[:, 1:])

    def _strings(self, texts: Texts) -> Strings:
        rows, real = padded(texts)
        start = torch.full((len(rows), 1), self._kernel.start)
        tokens = torch.cat([start, torch.where(real, rows, self._kernel.start)], 1)
        return Strings(tokens, torch.cat([torch.ones_like(start, dtype=torch.bool), real], 1))
