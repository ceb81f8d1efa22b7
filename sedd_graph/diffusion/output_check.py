"""Verification of network outputs during sampling, without a wait for the device in each evaluation.

Outputs that are NaN, or probabilities that do not sum to 1, would otherwise be sampled as if every token were equally
likely. Axes: r rows, l positions, n states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sedd_graph.errors import UserError

__all__ = ["UNNORMALISED", "OutputCheck"]

UNNORMALISED = 0.03
"""Largest distance from 1 of the sum of predicted probabilities; logarithms in bfloat16 may reach about half of it."""
_LARGEST = math.log(torch.finfo(torch.float32).max)
_CHUNK = 2**24  # numbers that are exponentiated at a time


class OutputCheck:
    """Largest error found so far in the network's outputs, stored on the device until :meth:`read` transfers it.

    Args:
        device: Device of the outputs.
    """

    def __init__(self, device: torch.device) -> None:
        # infinite once an output was not finite
        self._worst = torch.zeros((), device=device)

    def add(self, outputs: Mapping[str, Tensor], where: Tensor, tokens: Tensor | None = None) -> None:
        """Examine outputs of the network, and record the largest error, which :meth:`read` reports.

        All outputs are logarithms. Minus infinity (the logarithm of 0) is valid; NaN and values whose exponential
        overflows float32 are errors. The exponentials of ``log_x0`` must sum to 1 over the last axis.

        Args:
            outputs: Outputs by name, [r, l] or [r, l, n].
            where: bool [r, l], positions whose outputs are used; outputs at other positions are not examined.
            tokens: bool [r, l], positions at which the sum of ``log_x0`` is examined; None: all positions of ``where``.
        """
        if not where.numel():
            return
        for name, value in outputs.items():
            if value.dim() == where.dim():
                peak = value.float()
            else:
                peak = value.amax(-1).float()
            error = torch.where(peak < _LARGEST, 0.0, torch.inf)  # NaN is not below
            if name == "log_x0":
                rows = max(1, _CHUNK // max(1, value[:1].numel()))
                total = torch.cat([part.float().exp().sum(-1) for part in value.split(rows)])
                gap = (total - 1).abs().nan_to_num(torch.inf)
                error = torch.maximum(error, gap if tokens is None else torch.where(tokens, gap, 0.0))
            self._worst = torch.maximum(self._worst, torch.where(where, error, 0.0).amax())

    def read(self, *flags: Tensor) -> list[float]:
        """Raise an error if outputs examined by :meth:`add` are invalid, else return the values of small tensors.

        The recorded error and these values reach the host in one transfer.

        Args:
            *flags: Tensors on the device whose values the caller needs, so that it waits for the device in any case.

        Returns:
            The values of ``flags``, one after another.

        Raises:
            UserError: An output was not finite, or a distribution did not sum to 1.
        """
        *found, worst = torch.cat([value.reshape(-1).double() for value in (*flags, self._worst)]).tolist()
        if worst == math.inf:
            raise UserError(
                "sample: the network's outputs are NaN or infinite, so there is nothing to sample from: "
                "its weights may have diverged in training, or its dtype overflows"
            )
        if worst > UNNORMALISED:
            raise UserError(
                f"sample: the network's log_x0 is not a distribution: probabilities sum to 1 +- {worst:.3g} at some position. "
                "End the graph in log_softmax over the tokens"
            )
        return found
