"""State of optimizers as tensors by name of the parameter, as a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["create_state", "named_state", "set_state"]

Optimizers = Sequence[torch.optim.Optimizer]
Parameters = Mapping[str, nn.Parameter]


def named_state(optimizers: Optimizers, parameters: Parameters) -> dict[str, Tensor]:
    """Return the state tensors of optimizers by name, on their device.

    A name is ``<name of the parameter>/<key of the state>``, such as ``embed.weight/exp_avg``.

    Args:
        optimizers: The optimizers, each of whose parameters is in no other.
        parameters: The parameters by name.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    found = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if value is not None:  # such as the momentum of SGD without momentum
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                    found[f"{names[parameter]}/{key}"] = tensor
    return found


def create_state(optimizers: Optimizers, parameters: Parameters) -> dict[str, Tensor]:
    """Create the state that optimizers have after a step, and return it by name (:func:`named_state`).

    It is created by one step with zero gradients, which works for any optimizer. The step can change the parameters,
    such as by weight decay, so the caller must load the parameters and the state afterwards.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return named_state(optimizers, parameters)


def set_state(optimizers: Optimizers, parameters: Parameters, state: Mapping[str, Tensor]) -> None:
    """Replace the state of optimizers.

    Args:
        optimizers: The optimizers, which are changed in place.
        parameters: The parameters by name.
        state: State tensors by name, as of :func:`named_state`; empty for no state.
    """
    for optimizer in optimizers:
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        index = {parameter: i for i, parameter in enumerate(every)}
        found: dict[int, dict[str, Any]] = {}
        for name, value in state.items():
            of, key = name.rsplit("/", 1)
            if parameters[of] in index:
                found.setdefault(index[parameters[of]], {})[key] = value
        optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
