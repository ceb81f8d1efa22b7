"""The network of a block model held to what its bound and its sampler take for granted, with random weights on three blocks.

A network that sees what it is to predict would have a bound that is none; one that stands elsewhere when it is asked block by
block would write by another law than the one it is trained for.
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

__all__ = ["prove_blocks"]

BLOCK, BLOCKS = 2, 3
ROW, ZERO = torch.arange(1), torch.zeros(1)
TOLERANCE = 1e-3
"""Nats that rounding in float32 may make; what leaks makes tenths."""


@torch.no_grad()
def prove_blocks(graph: Graph, process: TokenParts, registry: Registry, output: str) -> list[Check]:
    """Verify that the network of an objective of blocks sees what it may see, and no more; ``output`` is the name of its output."""
    mask, tokens = process.kernel.mask, process.kernel.data_tokens
    if mask is None:
        raise UserError("text is written in blocks under a kernel with a mask alone")
    torch.manual_seed(0)
    model = build_model(graph, registry).eval()
    for parameter in model.parameters():  # gates that start at zero would let nothing through
        parameter.add_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5))
    length = BLOCK * BLOCKS
    clean = torch.randint(0, tokens, (1, length))
    noised = torch.where(torch.arange(length) % BLOCK == 0, mask, clean)

    def said(noised: Tensor, clean: Tensor) -> Tensor:
        """Log probabilities of data tokens where the mask stands, [b, blocks, v]."""
        outputs = model.run(block_inputs(noised, clean, block=BLOCK))[0][output]
        return outputs[:, ::BLOCK, :tokens]

    expected = said(noised, clean)
    leaks, told = 0.0, 0.0
    for at in range(BLOCKS):
        here = torch.arange(length) // BLOCK == at
        other = torch.where(here, (clean + 1) % tokens, clean)
        seen = torch.where(here & (noised != mask), other, noised)
        moved = (said(noised, other) - expected).abs().amax((0, 2))  # by a clean block: the ones after it may
        apart = (said(seen, clean) - expected).abs().amax((0, 2))  # by a noised block: it alone may
        leaks = max(leaks, float(moved[: at + 1].max()), float(apart[torch.arange(BLOCKS) != at].max()))
        told = max(told, float(moved.max()), float(apart.max()))

    with cached(model, BLOCK, rows=1, length=length) as given:
        found = [given(clean[:, :s])(noised[:, s : s + BLOCK], ZERO, ROW) for s in range(0, length, BLOCK)]
    found += [
        uncached(model, BLOCK, clean[:, :s])(noised[:, s : s + BLOCK], ZERO, ROW) for s in range(0, length, BLOCK)
    ]
    answers = torch.cat([outputs[output][:, :1, :tokens] for outputs in found], dim=1)
    off = float((answers - torch.cat([expected, expected], dim=1)).abs().max())
    how = f"random weights, {BLOCKS} blocks of {BLOCK}"
    return [
        Check(
            "network.blocks",
            "what is said of a block depends on nothing but what is seen of it and clean blocks before it",
            leaks < TOLERANCE,
            f"{leaks:.1e} nats (what it may depend on: {told:.1e})",
            how,
        ),
        Check(
            "network.memory",
            "block by block, with the past remembered and without, it says what it says in one pass",
            off < TOLERANCE,
            f"{off:.1e} nats",
            how,
        ),
    ]
