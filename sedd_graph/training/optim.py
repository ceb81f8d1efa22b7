"""Optimizers of a run, its learning rate, and averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sedd_graph.training.config import TrainConfig

__all__ = ["Average", "learning_rate", "make_optimizers"]


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers of the trainable parameters. Each group carries its ``peak`` learning rate."""
    optimizers = config.optimizer.make({n: p for n, p in model.named_parameters() if p.requires_grad})
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Return the share of the peak learning rate at ``step`` (from 0) and ``progress`` in [0, 1], warm-up included."""
    rising = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return rising * config.schedule.share(progress)


class Average:
    """Exponential moving average of the parameters, in float32, with the decay warmed up as (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.source = list(model.parameters())
        self.names = [n for n, _ in model.named_parameters()]
        self.values: list[Tensor] = [p.detach().clone().float() for p in self.source]

    @torch.no_grad()
    def update(self) -> None:
        """Add the current parameters to the average."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach().float() for p in self.source], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and current values in place. A second call exchanges them back."""
        for value, parameter in zip(self.values, self.source, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(current)

    def state(self) -> dict[str, Tensor]:
        """Return the averaged parameters by name."""
        return dict(zip(self.names, self.values, strict=True))

    def load(self, state: dict[str, Tensor], count: int) -> None:
        """Restore what :meth:`state` returned after ``count`` updates."""
        self.count = count
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])
