"""Optimizers, learning rate and exponential moving average of the weights in a training run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sedd_graph.training.config import TrainConfig
from sedd_graph.training.distributed import local

__all__ = ["Average", "learning_rate", "make_optimizers"]


def make_optimizers(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Make the optimizers of the trainable ones of some parameters, as ``train.optimizer`` configures them.

    The key ``peak`` of each parameter group stores its peak learning rate, since training changes ``lr``.

    Args:
        parameters: Parameters by name.
        config: The ``train`` section of the blueprint.
    """
    optimizers = config.optimizer.make({n: p for n, p in parameters.items() if p.requires_grad})
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Return the learning rate divided by its peak, warm-up included.

    Args:
        config: The ``train`` section of the blueprint.
        step: Number of optimizer steps done, which determines warm-up.
        progress: Share of the run that is done, in [0, 1], which determines the schedule.
    """
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return warm * config.schedule.share(progress)


class Average:
    """Exponential moving average of a model's parameters, in float32.

    The decay of update n = 1, 2, ... is min(decay, (1 + n) / (10 + n)), so that the random initial weights are
    forgotten early.

    Args:
        model: The model whose parameters are averaged.
        decay: Largest decay, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        # frozen parameters are their own average
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.source = [p for _, p in trained]
        self.names = [n for n, _ in trained]
        self.values: list[Tensor] = [p.detach().clone().float() for p in self.source]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current parameters."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        source = [local(p.detach()).float() for p in self.source]
        torch._foreach_lerp_([local(value) for value in self.values], source, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged values and the model's parameters, in place; a second call restores both."""
        for value, parameter in zip(self.values, self.source, strict=True):
            trained, averaged = local(parameter.detach()), local(value)
            current = trained.clone()
            trained.copy_(averaged)
            averaged.copy_(current)

    def state(self) -> dict[str, Tensor]:
        """Return the averages of the trained parameters, float32, by name."""
        return dict(zip(self.names, self.values, strict=True))
