"""Calls of torch.compile with Inductor, with two of its heuristics overridden."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["compile_in_place", "inductor"]

_LIMIT = 128
"""Largest number of blocks, shapes and modes that a process compiles; torch counts all blocks as one function, and stops at 8."""


def compile_in_place(module: nn.Module) -> None:
    """Compile ``module`` when it first runs, as one full graph for each shape and mode."""
    import torch._dynamo.config as dynamo_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _LIMIT)
    module.compile(fullgraph=True, dynamic=False, backend=inductor)


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Compile with Inductor so that dropout masks are recomputed in the backward pass.

    By default it saves every mask but the first, as they share their counters: a boolean per entry, which costs memory, and
    on a CPU takes longer to write than to hash again.
    """
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    with functorch_config.patch(ban_recompute_used_far_apart=False):
        return compile_fx(graph, inputs)
