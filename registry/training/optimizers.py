"""Optimizers: AdamW, and Muon with AdamW. torch is imported when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import pydantic

from sedd_graph.component.choice import Choice
from sedd_graph.component.contract import ComponentConfig
from sedd_graph.training.interfaces import OptimizerFactory

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Positive = Annotated[float, pydantic.Field(gt=0)]
NotNegative = Annotated[float, pydantic.Field(ge=0)]
Decay = Annotated[float, pydantic.Field(ge=0, lt=1)]


class AdamW(OptimizerFactory, kind="optimizer"):
    """AdamW (arXiv 1711.05101). Weight decay acts on matrices only."""

    class Config(ComponentConfig):
        lr: Positive = 3e-4
        """Peak learning rate."""
        betas: tuple[Decay, Decay] = (0.9, 0.99)
        """Decay rates of the averages of the gradient and of its square."""
        eps: Positive = 1e-8
        """Added to the denominator."""
        weight_decay: NotNegative = 0.0
        """Decoupled weight decay of matrices."""

    config: Config

    def make(self, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        import torch

        config, every = self.config, list(parameters.values())
        if not every:
            return []
        matrices = [p for p in every if p.dim() >= 2]
        vectors = [p for p in every if p.dim() < 2]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
            if group
        ]
        fused = all(p.device.type in ("cpu", "cuda") for p in every)
        return [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)]


class Muon(OptimizerFactory, kind="optimizer"):
    """Muon (Jordan et al. 2024; arXiv 2502.16982) for matrices inside blocks, AdamW for all other parameters."""

    class Config(ComponentConfig):
        lr: Positive = 3e-3
        """Peak learning rate of matrices inside blocks, on AdamW's scale: updates are scaled to its root mean square."""
        momentum: Decay = 0.95
        """Decay rate of the average of the gradient."""
        weight_decay: NotNegative = 0.0
        """Decoupled weight decay of matrices inside blocks."""
        adamw: Annotated[AdamW, Choice("train.optimizer")] = pydantic.Field(
            default={"op": "adamw", "lr": 3e-3}, validate_default=True
        )
        """AdamW for embeddings, heads, vectors and all else."""

    config: Config

    def make(self, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        from ._muon import MuonOptimizer

        config = self.config
        # a matrix inside a block has a repeat or block in its path, 'trunk.0.attend...'; embeddings and heads have none
        inner = {n: p for n, p in parameters.items() if p.dim() == 2 and n.count(".") >= 2 and ".embed." not in f".{n}"}
        muon: list[Optimizer] = []
        if inner:
            muon.append(
                MuonOptimizer(inner.values(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
            )
        return [*muon, *config.adamw.make({n: p for n, p in parameters.items() if n not in inner})]
