"""Optimizers, learning rate and averaged weights."""

from __future__ import annotations

import math
from typing import Any

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


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024; scaled to AdamW's updates as in arXiv 2502.16982, eq. 4), for matrices.

    torch.optim.Muon orthogonalises in bfloat16 whatever the hardware; on a CPU without it that is hundreds of times
    slower. Here the dtype follows the hardware, and matrices of one shape go through it together.
    """

    COEFFICIENTS = (3.4445, -4.775, 2.0315)
    STEPS = 5

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @classmethod
    def orthogonal(cls, matrices: Tensor) -> Tensor:
        """Nearest (semi-)orthogonal matrices to [k, m, n], roughly: singular values between 0.7 and 1.2."""
        dtype = torch.bfloat16 if matrices.device.type == "cuda" else torch.float32
        tall = matrices.shape[1] > matrices.shape[2]
        x = (matrices.transpose(1, 2) if tall else matrices).to(dtype)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        a, b, c = cls.COEFFICIENTS
        for _ in range(cls.STEPS):
            gram = x @ x.transpose(1, 2)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.transpose(1, 2) if tall else x).to(matrices.dtype)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append((p, p.grad))
            for shape, pairs in shapes.items():
                updates = []
                for p, gradient in pairs:
                    state = self.state[p]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(p)
                    buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(buffer, group["momentum"]))
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for (p, _), update in zip(pairs, self.orthogonal(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


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
        optimizers.append(Muon([group], lr=choice.lr, momentum=choice.momentum, weight_decay=choice.weight_decay))
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
        self.source = list(model.parameters())
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
