"""Muon optimizer for weight matrices. Axes: k matrices of one shape, m rows, n columns."""

import math
from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn


class MuonOptimizer(torch.optim.Optimizer):
    """Muon optimizer (Jordan et al. 2024), with updates scaled to the root mean square of AdamW's updates.

    The scale is that of arXiv 2502.16982, eq. 4. ``torch.optim.Muon`` orthogonalises in bfloat16 on all hardware, which
    is hundreds of times slower on a CPU without bfloat16 instructions. This class orthogonalises in bfloat16 on GPUs
    and in float32 on CPUs, and all matrices of one shape as one batch.

    Args:
        parameters: Weight matrices, each of two axes.
        lr: Learning rate.
        momentum: Decay rate of the moving average of the gradient; the momentum is Nesterov's.
        weight_decay: Decoupled weight decay.
    """

    COEFFICIENTS = (3.4445, -4.775, 2.0315)
    STEPS = 5

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @classmethod
    def orthogonal(cls, matrices: Tensor) -> Tensor:
        """Orthogonalise matrices approximately by a Newton-Schulz iteration.

        Args:
            matrices: Matrices of one shape, [k, m, n].

        Returns:
            Matrices with the same singular vectors and with singular values of about 0.7 to 1.2, [k, m, n], in the
            dtype of ``matrices``.
        """
        dtype = torch.bfloat16 if matrices.device.type == "cuda" else torch.float32
        tall = matrices.shape[1] > matrices.shape[2]
        x = (matrices.transpose(1, 2) if tall else matrices).to(dtype)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        a, b, c = cls.COEFFICIENTS
        for _ in range(cls.STEPS):
            gram = x @ x.transpose(1, 2)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.transpose(1, 2) if tall else x).to(matrices.dtype)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient, in place.

        Args:
            closure: Function that evaluates the model anew, with gradients enabled, and returns the loss; None: the
                gradients are those already computed.

        Returns:
            The loss that ``closure`` returned; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
        return loss
