"""How torch.compile is called: Inductor, with one of its rules of thumb set aside."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["inductor"]


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Inductor that draws dropout again in the backward pass.

    Left alone, it keeps every mask but the first, as they share their counters: a boolean per entry, which on a CPU
    takes longer to write than all of the hashing, and memory everywhere.
    """
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    with functorch_config.patch(ban_recompute_used_far_apart=False):
        return compile_fx(graph, inputs)
