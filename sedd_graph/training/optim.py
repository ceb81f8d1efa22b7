"""Optimizers, learning rate and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sedd_graph.training.config import AdamWConfig, MuonConfig, TrainConfig

__all__ = ["Average", "learning_rate", "make_optimizers"]


def _adamw(parameters: list[nn.Parameter], config: AdamWConfig) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": group, "weight_decay": decay, "peak": config.lr}
        for group, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if group
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """One optimizer, or Muon for matrices inside blocks and AdamW for the rest. Frozen parameters are left out."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    choice = config.optimizer
    if not isinstance(choice, MuonConfig):
        return [_adamw([p for _, p in named], choice)]
    # A matrix inside a block has a repeat or block in its path: 'trunk.0.attend...'; embeddings and heads do not.
    inner = [p for n, p in named if p.dim() == 2 and n.count(".") >= 2 and ".embed." not in f".{n}"]
    chosen = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if inner:
        group = {"params": inner, "peak": choice.lr}
        optimizers.append(
            torch.optim.Muon(
                [group],
                lr=choice.lr,
                momentum=choice.momentum,
                weight_decay=choice.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return [*optimizers, _adamw(rest, choice.adamw)] if rest else optimizers


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Share of the peak learning rate at ``step`` (from 0) and ``progress`` in [0, 1]."""
    rising = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    left = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.schedule]
    return rising * (left if config.schedule == "constant" else config.final + (1 - config.final) * left)


class Average:
    """Exponential moving average of the parameters, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.source = [p for p in model.parameters()]
        self.names = [n for n, _ in model.named_parameters()]
        self.values: list[Tensor] = [p.detach().clone().float() for p in self.source]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach().float() for p in self.source], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and current values, in place; a second call undoes it."""
        for value, parameter in zip(self.values, self.source, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    def load(self, state: dict[str, Tensor], count: int) -> None:
        self.count = count
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])
