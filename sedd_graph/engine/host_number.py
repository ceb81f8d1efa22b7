"""Numbers on their way from a device to the host, which the host reads without waiting for the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

__all__ = ["HostNumber", "LateNumbers"]


class HostNumber:
    """A number on its way from a device to the host, which is awaited only when it is read.

    Reading it waits for the work that was started before it, not for the work started since.

    Args:
        number: Scalar tensor, on any device.
    """

    def __init__(self, number: Tensor) -> None:
        self._event = None
        if number.device.type == "cuda":
            self._host = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = number.cpu()

    def _wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def __int__(self) -> int:
        self._wait()
        return int(self._host)

    def __float__(self) -> float:
        self._wait()
        return float(self._host)


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
