"""State of optimizers as tensors by name, as a checkpoint stores it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["expected_state", "pack_optimizers", "unpack_optimizers"]

_KEY = re.compile(r"(\d{1,9})/(\d{1,9})/(\w+)", re.ASCII)


def _named(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the state tensors by name, on their device."""
    named = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if value is not None:  # such as the momentum of SGD without momentum
                    named[f"{number}/{parameter}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return named


def pack_optimizers(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the state of the optimizers as CPU tensors by name.

    A name is ``<index of the optimizer>/<index of the parameter>/<key of the state>``, such as ``0/3/exp_avg``.
    """
    return {name: value.detach().cpu().contiguous() for name, value in _named(optimizers).items()}


def expected_state(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the names, shapes and dtypes that the state of the optimizers has after a step, as ``meta`` tensors.

    They are found by one step with zero gradients, which works for any optimizer. The step can change the parameters,
    such as by weight decay, so the caller must load the parameters afterwards. The state of the optimizers is cleared.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = {name: value.to("meta") for name, value in _named(optimizers).items()}
    for optimizer in optimizers:
        optimizer.state.clear()
    return found


def unpack_optimizers(optimizers: Sequence[torch.optim.Optimizer], packed: Mapping[str, Tensor]) -> None:
    """Load the state of optimizers from tensors.

    Args:
        optimizers: The optimizers, which are changed in place.
        packed: Tensors by name, in the format of :func:`pack_optimizers`, with the names, shapes and dtypes of
            :func:`expected_state`, or no tensors.
    """
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Any]] = {}
        for name, value in packed.items():
            if (parts := _KEY.fullmatch(name)) is not None and int(parts[1]) == number:
                state.setdefault(int(parts[2]), {})[parts[3]] = value.clone()
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
