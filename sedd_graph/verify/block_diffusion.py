"""Verification of a block diffusion network (BD3-LM, arXiv 2503.09573) with random weights, on three blocks.

The likelihood bound is valid only if the prediction for a block depends on nothing but the visible tokens of that block
and the clean blocks before it. Sampling is correct only if evaluation block by block, with or without KV cache, gives
the same outputs as the single forward pass of training.

Axes: b rows, l positions, n states, v data tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.tokens.block_diffusion import block_inputs
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.engine.block_cache import cached, uncached
from sedd_graph.engine.construct import build_model
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Graph
from sedd_graph.verify.guards import guarded
from sedd_graph.verify.worst import worst

__all__ = ["prove_blocks"]

BLOCK, BLOCKS = 2, 3
ROW, ZERO = torch.arange(1), torch.zeros(1)
TOLERANCE = 1e-3
"""Tolerance for differences of log-probabilities, nats: above float32 rounding errors, and far below the change that an
unwanted dependence on a clean token causes."""


@torch.no_grad()
def prove_blocks(graph: Graph, process: TokenParts, registry: Registry, output: str) -> list[Check]:
    """Verify that a block diffusion network cannot see the clean tokens that it predicts, and can run block by block.

    Evaluation block by block, as in sampling, must give the outputs of the single forward pass of training.

    Args:
        graph: The expanded graph of the network.
        process: Components of the process, whose kernel must have a mask.
        registry: The installed components, from which the network is built.
        output: Name of the graph's output.

    Returns:
        A check of the tokens that the outputs depend on, and a check that block-wise evaluation equals the single pass.

    Raises:
        UserError: The kernel has no mask.
    """
    mask, tokens = process.kernel.mask, process.kernel.data_tokens
    if mask is None:
        raise UserError("block objectives need a kernel with a mask, such as absorb")
    return guarded("network", lambda: _checks(graph, mask, tokens, registry, output))


def _checks(graph: Graph, mask: int, tokens: int, registry: Registry, output: str) -> list[Check]:
    torch.manual_seed(0)
    model = build_model(graph, registry).eval()
    for parameter in model.parameters():  # gates that start at zero would hide a dependence
        parameter.add_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5))
    length = BLOCK * BLOCKS
    clean = torch.randint(0, tokens, (1, length))
    noised = torch.where(torch.arange(length) % BLOCK == 0, mask, clean)

    def at_masks(noised: Tensor, clean: Tensor) -> Tensor:
        """Return log-probabilities of data tokens at the masked first position of each block, [b, blocks, v]."""
        outputs = model.run(block_inputs(noised, clean, block=BLOCK))[0][output]
        return outputs[:, ::BLOCK, :tokens]

    expected = at_masks(noised, clean)
    leaks, allowed = 0.0, 0.0
    for block in range(BLOCKS):
        here = torch.arange(length) // BLOCK == block
        other = torch.where(here, (clean + 1) % tokens, clean)
        seen = torch.where(here & (noised != mask), other, noised)
        by_clean = (at_masks(noised, other) - expected).abs().amax((0, 2))  # only later blocks may depend on it
        by_noised = (at_masks(seen, clean) - expected).abs().amax((0, 2))  # only the block itself may depend on it
        others = torch.arange(BLOCKS) != block
        leaks = worst(leaks, float(by_clean[: block + 1].max()), float(by_noised[others].max()))
        allowed = worst(allowed, float(by_clean.max()), float(by_noised.max()))

    starts = range(0, length, BLOCK)
    with cached(model, BLOCK, rows=1, length=length) as after:
        found = [after(clean[:, :s])(noised[:, s : s + BLOCK], ZERO, ROW) for s in starts]
    found += [uncached(model, BLOCK, clean[:, :s])(noised[:, s : s + BLOCK], ZERO, ROW) for s in starts]
    by_block = torch.cat([outputs[output][:, :1, :tokens] for outputs in found], dim=1)
    error = float((by_block - torch.cat([expected, expected], dim=1)).abs().max())
    how = f"random weights, {BLOCKS} blocks of {BLOCK}"
    claim = "the output at a block depends only on its visible tokens and the clean blocks before it"
    value = f"{leaks:.1e} nats (allowed dependences: {allowed:.1e})"
    same = "evaluation block by block, with KV cache and without, equals the single pass"
    return [
        Check("network.blocks", claim, leaks < TOLERANCE, value, how),
        Check("network.memory", same, error < TOLERANCE, f"{error:.1e} nats", how),
    ]
