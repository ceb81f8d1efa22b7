"""Optimizers: AdamW, and Muon for matrices with AdamW for other parameters.

The module imports torch only when an optimizer is created.
"""

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
    """AdamW optimizer (arXiv 1711.05101), with weight decay of parameters of two or more axes only."""

    class Config(ComponentConfig):
        lr: Positive = 3e-4
        """Peak learning rate, which the learning-rate schedule scales; above 0."""
        betas: tuple[Decay, Decay] = (0.9, 0.99)
        """Decay rates of the moving averages of the gradient and of the squared gradient, each in [0, 1)."""
        eps: Positive = 1e-8
        """Constant added to the denominator of the update for numerical stability, above 0."""
        weight_decay: NotNegative = 0.0
        """Decoupled weight decay of parameters with two or more axes, at least 0."""

    config: Config

    def make(self, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        import torch

        config, every = self.config, list(parameters.values())
        if not every:
            return []
        matrices = {"params": [p for p in every if p.dim() >= 2], "weight_decay": config.weight_decay}
        vectors = {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0}
        groups = [group for group in (matrices, vectors) if group["params"]]
        fused = all(p.device.type in ("cpu", "cuda") for p in every)
        return [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)]


class Muon(OptimizerFactory, kind="optimizer"):
    """Muon optimizer (arXiv 2502.16982) for weight matrices inside blocks, and AdamW for all other parameters."""

    class Config(ComponentConfig):
        lr: Positive = 3e-3
        """Peak learning rate of matrices inside blocks, above 0. Updates are scaled to the root mean square of AdamW's
        updates."""
        momentum: Decay = 0.95
        """Decay rate of the moving average of the gradient, in [0, 1)."""
        weight_decay: NotNegative = 0.0
        """Decoupled weight decay of matrices inside blocks, at least 0."""
        adamw: Annotated[AdamW, Choice("train.optimizer")] = pydantic.Field(
            default={"op": "adamw", "lr": 3e-3}, validate_default=True
        )
        """Config of AdamW for all other parameters, such as embeddings, heads and vectors."""

    config: Config

    def make(self, parameters: Mapping[str, nn.Parameter]) -> list[Optimizer]:
        from ._muon import MuonOptimizer

        config = self.config
        # a matrix inside a block has a repeat or block in its path, 'trunk.0.attend...'; embeddings and heads have none
        inner = {n: p for n, p in parameters.items() if p.dim() == 2 and n.count(".") >= 2 and ".embed." not in f".{n}"}
        rest = config.adamw.make({n: p for n, p in parameters.items() if n not in inner})
        settings = config.model_dump(include={"lr", "momentum", "weight_decay"})
        return [MuonOptimizer(inner.values(), **settings), *rest] if inner else rest
