"""Tensors and numbers on their way from a device to the host, which the host reads without waiting for the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

__all__ = ["HostNumber", "LateNumbers", "ToHost", "reads"]


def reads(device: torch.device) -> bool:
    """Return whether the host may read numbers of a device at once, since it does not wait for it."""
    return device.type == "cpu"


class ToHost:
    """A tensor on its way from a device to the host, which is awaited only when it is read.

    Reading it waits for the work that was started before it, not for the work started since.

    Args:
        tensor: Tensor on any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.cpu()

    @property
    def value(self) -> Tensor:
        """The tensor, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class HostNumber(ToHost):
    """A number on its way from a device to the host, a scalar tensor."""

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)


class LateNumbers:
    """Numbers of successive steps, of which all but the newest are read.

    Before step n the number of step n - 2 is read. A device has computed it long ago, so that reading it does not hold up
    the host; and each process reads it at the same step, whatever the speed of its device.
    """

    def __init__(self) -> None:
        self._numbers: deque[HostNumber] = deque()

    def put(self, number: Tensor) -> None:
        """Start the way of a scalar tensor to the host."""
        self._numbers.append(HostNumber(number.detach()))

    def take(self, *, leave: int = 1) -> list[float]:
        """Return and forget all numbers but the newest ``leave``."""
        return [float(self._numbers.popleft()) for _ in range(len(self._numbers) - leave)]
