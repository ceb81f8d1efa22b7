"""Compilation of modules with torch.compile and Inductor.

Two defaults of torch are overridden: Dynamo's ``recompile_limit`` is at least 128, and functorch's
``ban_recompute_used_far_apart`` is switched off while Inductor compiles.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["compile_in_place", "inductor"]

_LIMIT = 128
"""Dynamo's ``recompile_limit`` (by default 8), which all blocks, shapes and modes of a process share."""


def compile_in_place(module: nn.Module) -> None:
    """Mark ``module`` for torch.compile: its first call with new input shapes compiles one full graph.

    So does the first call in another mode: training or evaluation, with or without gradients.
    """
    import torch._dynamo.config as dynamo_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _LIMIT)
    module.compile(fullgraph=True, dynamic=False, backend=inductor)


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Compile an FX graph with Inductor so that the backward pass recomputes dropout masks instead of saving them.

    Dropout masks are hashes of counters (:mod:`sedd_graph.component.counter_rng`). By default Inductor saves every mask
    but the first, since all masks read the same counters. A saved mask takes one byte per element, and on a CPU writing
    the mask takes longer than recomputing the hash.

    Args:
        graph: Graph to compile.
        inputs: Example inputs of the graph.

    Returns:
        The compiled callable.
    """
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    with functorch_config.patch(ban_recompute_used_far_apart=False):
        return compile_fx(graph, inputs)
