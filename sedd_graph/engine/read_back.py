"""Reconstruction of the inputs of an invertible block from its outputs, within a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sedd_graph.diffusion.grid import Grid
from sedd_graph.engine.layer_run import LayerRun
from sedd_graph.engine.layout import Layout
from sedd_graph.engine.network import Network
from sedd_graph.errors import UserError, choices
from sedd_graph.graph.claims import uses

__all__ = ["read_back"]


@torch.no_grad()
def read_back(network: Network, block: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Evaluate a network without dropout, and reconstruct the inputs of one of its blocks from the block's outputs alone.

    Args:
        network: The network.
        block: Dotted path of a node whose block claims to be invertible and is not repeated, such as ``text``.
        inputs: Inputs of the network by name.

    Returns:
        The reconstructed inputs of the block by name, such as its tokens, int64 [b, l].

    Raises:
        UserError: There is no such node.
        DivergedError: A reconstructed vector is not finite.
    """
    found = {use.path: use for use in uses(network.graph.root)}
    module: Any = network.model.root
    for name in block.split(".") if block in found else ():
        module = module._modules[name]
    if block not in found or module.repeat:
        paths = [path for path, use in found.items() if use.depth == 1]
        raise UserError(f"no invertible block that is not repeated has the path {block!r}{choices(block, paths)}")
    use, seen = found[block], list[tuple[Any, Any]]()
    claim = use.layer.claim
    layout = Layout(use.layer, () if claim is None else claim.given, Grid() if use.exact else None)
    hook = module.register_forward_hook(lambda _, arguments, made: seen.append((arguments[1:], made)))
    try:
        with network.evaluating(eager=True):
            network.run(inputs)
            (arguments, made) = seen[-1]
            known = dict(zip(layout.inputs, arguments, strict=True))
            run = LayerRun(layout, module)
            run.put(layout.outputs.values(), made)
            run.put([layout.inputs[name] for name in layout.given], [known[name] for name in layout.given])
            run.invert()
    finally:
        hook.remove()
    return dict(zip(layout.streams, run.take(layout.inputs[name] for name in layout.streams), strict=True))
