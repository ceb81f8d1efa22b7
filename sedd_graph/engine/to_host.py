"""Copies of tensors from a device to the host that are awaited only when they are read."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ToHost"]


class ToHost:
    """A tensor on its way from a device to the host.

    Reading it waits for the work that was started before, not for the work started since.

    Args:
        tensor: The tensor. On a CPU there is nothing to wait for.
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
