"""Conversion of weights of the public Diffusion-LM code (github.com/XiangLi1999/Diffusion-LM) to the blueprint of that name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sedd_graph.engine.process import KERNEL
from sedd_graph.errors import UserError

__all__ = ["convert"]

BERT_WIDTH, BERT_HEADS = 768, 12
_TIED = "lm_head.weight"

# ours: released
_NETWORK = {
    f"{KERNEL}.embedding": "word_embedding.weight",
    f"{KERNEL}.bias": "lm_head.bias",
    "up.up.weight": "input_up_proj.0.weight",
    "up.up.bias": "input_up_proj.0.bias",
    "up.down.weight": "input_up_proj.2.weight",
    "up.down.bias": "input_up_proj.2.bias",
    "place.embed.weight": "position_embeddings.weight",
    "time.mlp.0.weight": "time_embed.0.weight",
    "time.mlp.0.bias": "time_embed.0.bias",
    "time.mlp.2.weight": "time_embed.2.weight",
    "time.mlp.2.bias": "time_embed.2.bias",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
    "down.up.weight": "output_down_proj.0.weight",
    "down.up.bias": "output_down_proj.0.bias",
    "down.down.weight": "output_down_proj.2.weight",
    "down.down.bias": "output_down_proj.2.bias",
}
_BLOCK = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "norm": "output.LayerNorm",
}
_BUFFERS = frozenset({"position_ids", "embeddings.position_ids"})
_LAYER = "input_transformers.layer."


def convert(path: Path, tensors: Mapping[str, Tensor], heads: int | None) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Return the overrides that set the sizes of the blueprint ``diffusion-lm``, and the tensors by our names.

    Args:
        path: File of the weights, for messages.
        tensors: Tensors by their names in the published code.
        heads: Number of attention heads; None: 12, for the width 768 of BERT base.

    Raises:
        UserError: A tensor is missing, unknown or of an unexpected shape, the rounding head is not tied to the
            embeddings, or the number of heads is unknown.
    """
    left = {name: tensor for name, tensor in tensors.items() if name not in _BUFFERS}

    def take(name: str) -> Tensor:
        if name not in left:
            raise UserError(f"{path} has no tensor {name!r}; found: {', '.join(sorted(left)[:6])} ...")
        return left.pop(name).float()

    layers = [int(m[1]) for name in left if (m := re.match(re.escape(_LAYER) + r"(\d{1,4})\.", name))]
    depth = 1 + max(layers, default=-1)
    weights = {ours: take(theirs) for ours, theirs in _NETWORK.items()}
    for index in range(depth):
        source, target = f"{_LAYER}{index}.", f"trunk.{index}."
        for part in ("weight", "bias"):
            qkv = [take(f"{source}attention.self.{which}.{part}") for which in ("query", "key", "value")]
            weights[f"{target}attention.qkv.{part}"] = torch.cat(qkv)
            weights |= {f"{target}{ours}.{part}": take(f"{source}{theirs}.{part}") for ours, theirs in _BLOCK.items()}
    table = weights[f"{KERNEL}.embedding"]
    if _TIED in left and not torch.equal(left.pop(_TIED).float(), table):
        raise UserError(f"{path}: {_TIED} differs from word_embedding.weight: the rounding head must be tied to it")
    if left:
        raise UserError(f"{path} has tensors that the network does not have: {', '.join(sorted(left)[:8])}")
    if depth == 0 or table.dim() != 2 or weights["time.mlp.0.weight"].dim() != 2:
        raise UserError(f"{path} is not a Diffusion-LM network: it has no layers, or its embeddings are no table")
    dim = len(weights["norm.weight"])
    if heads is None and dim != BERT_WIDTH:
        raise UserError(
            f"{path} has a width of {dim}: say --heads, since only {BERT_WIDTH} is known to have {BERT_HEADS}"
        )
    heads = heads or BERT_HEADS
    if heads < 1 or dim % heads:
        raise UserError(f"--heads {heads} does not divide the width {dim} of the network")
    overrides = (
        f"params.width={table.shape[1]}",
        f"params.dim={dim}",
        f"params.heads={heads}",
        f"params.depth={depth}",
        f"params.frequencies={weights['time.mlp.0.weight'].shape[1]}",
        f"params.positions={len(weights['place.embed.weight'])}",
        f"params.tokens={len(table)}",
        "name=diffusion-lm-imported",
    )
    return overrides, weights
