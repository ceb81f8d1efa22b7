"""How torch.compile is called: Inductor, with two of torch's rules of thumb set aside."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["compile_in_place", "inductor"]

_LIMIT = 128
"""How many blocks, shapes and modes a process may compile; torch counts all blocks as one function, and stops at 8."""


def compile_in_place(module: nn.Module) -> None:
    """Compile ``module`` when it first runs, as one graph for each shape and mode that it meets."""
    import torch._dynamo.config as dynamo_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _LIMIT)
    module.compile(fullgraph=True, dynamic=False, backend=inductor)


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Inductor that draws dropout again in the backward pass.

    Left alone, it keeps every mask but the first, as they share their counters: a boolean per entry, which on a CPU
    takes longer to write than all of the hashing, and memory everywhere.
    """
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    with functorch_config.patch(ban_recompute_used_far_apart=False):
        return compile_fx(graph, inputs)
