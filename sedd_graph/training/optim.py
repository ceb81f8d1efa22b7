"""Optimizers, learning rate and averaged weights of a training run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sedd_graph.training.config import TrainConfig

__all__ = ["Average", "learning_rate", "make_optimizers"]


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers of the trainable parameters. Each parameter group has its peak learning rate as ``peak``."""
    optimizers = config.optimizer.make({n: p for n, p in model.named_parameters() if p.requires_grad})
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Return the learning rate as a share of its peak, warm-up included.

    Args:
        config: The ``train`` section.
        step: Optimizer step, from 0.
        progress: Share of the run that is done, in [0, 1].
    """
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return warm * config.schedule.share(progress)


class Average:
    """Exponential moving average of a model's parameters, in float32.

    The decay of update n is at most (1 + n) / (10 + n), so that early updates count less of the initial values.

    Args:
        model: The model.
        decay: Decay of the average, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.source = list(model.parameters())
        self.names = [n for n, _ in model.named_parameters()]
        self.values: list[Tensor] = [p.detach().clone().float() for p in self.source]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current parameters."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach().float() for p in self.source], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the current values of the parameters, in place."""
        for value, parameter in zip(self.values, self.source, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(current)

    def state(self) -> dict[str, Tensor]:
        """Return the averaged parameters by name."""
        return dict(zip(self.names, self.values, strict=True))

    def load(self, state: dict[str, Tensor], count: int) -> None:
        """Load the values ``state`` that :meth:`state` returned after ``count`` updates."""
        self.count = count
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])
