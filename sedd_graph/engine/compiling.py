"""Compilation of modules with torch.compile and Inductor.

Four defaults of torch are overridden: Dynamo's ``recompile_limit`` is at least 128, and while Inductor compiles, functorch's
``ban_recompute_used_far_apart`` is False and its ``backward_pass_autocast`` is "off", and Inductor's
``realize_opcount_threshold`` is higher.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["compile_in_place", "inductor", "recorder"]

_LIMIT = 128
"""Dynamo's ``recompile_limit`` (by default 8), which all blocks, shapes and modes of a process share."""
_INLINED = 80
"""Inductor's ``realize_opcount_threshold`` (by default 30): most operations of a value that each of its readers computes anew.

A dropout mask takes 60.
"""


def compile_in_place(module: nn.Module, share: float = 1.0, *, recorded: bool = False) -> None:
    """Mark ``module`` for torch.compile: its first call with new input shapes compiles one full graph.

    So does the first call in another mode: training or evaluation, with or without gradients.

    Args:
        module: The module.
        share: Share of the memory of its activations that the compiled code may retain for the backward pass. It
            recomputes the others, those first that take the least FLOPs for their size (torch's
            ``activation_memory_budget``).
        recorded: Whether the kernels of a GPU are recorded once and replayed (CUDA graphs); not with a ``share``.
    """
    import torch._dynamo.config as dynamo_config

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _LIMIT)
    backend = recorder if recorded else inductor if share == 1 else _sparing(share)
    module.compile(fullgraph=True, dynamic=False, backend=backend)


@cache
def _sparing(share: float) -> Callable[[torch.fx.GraphModule, list[Tensor]], Any]:
    """Return a backend whose compiled code retains only a share of its activations; one object for each share."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        import torch._functorch.config as functorch_config

        with functorch_config.patch(activation_memory_budget=share):
            return inductor(graph, inputs)

    return backend


def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Compile an FX graph with Inductor so that dropout masks are computed where they are read, instead of being saved.

    Dropout masks are hashes of counters (:mod:`sedd_graph.component.counter_rng`). By default Inductor saves every mask
    but the first for the backward pass, since all masks read the same counters, and writes a mask that two kernels read. A saved mask takes one byte per element, and on a CPU writing
    the mask takes longer than recomputing the hash.

    The backward pass has no autocast, as where nothing is compiled. By default, torch compiles it with the autocast of the
    forward pass: it then rounds to bfloat16 the products of layers that turn autocast off, such as an output head.

    Args:
        graph: Graph to compile.
        inputs: Example inputs of the graph.

    Returns:
        The compiled callable.
    """
    return _compiled(graph, inputs, {})


def recorder(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Compile an FX graph as :func:`inductor` does, and record its kernels as CUDA graphs when it is first run.

    Results are overwritten when the module is next called, of a call with gradients after its backward pass. Only a CUDA
    GPU records.

    Args:
        graph: Graph to compile.
        inputs: Example inputs of the graph.

    Returns:
        The compiled callable.
    """
    return _compiled(graph, inputs, {"triton.cudagraphs": True})


def _compiled(graph: torch.fx.GraphModule, inputs: list[Tensor], patches: Mapping[str, Any]) -> Any:
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    with functorch_config.patch(ban_recompute_used_far_apart=False, backward_pass_autocast="off"):
        # of the backward pass too, which is compiled later
        return compile_fx(graph, inputs, config_patches={"realize_opcount_threshold": _INLINED, **patches})
