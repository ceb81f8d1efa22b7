"""Verification that a token kernel with any number of states is accurate in float32, and that its methods are pure.

A pure method changes neither its inputs nor global random generators, and treats each row and position by itself.

Axes: k noise levels, c pairs of a noisy state and a clean token, n states.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.verify.guards import generators_state
from sedd_graph.verify.kernel_draws import noised
from sedd_graph.verify.worst import worst

__all__ = ["check_precision", "check_pure"]

FLOAT32_LEVELS = (3e-8, 1e-6, 5e-4, 1e-3, 0.03, 0.5, 2.0, 5.0, 7.0)
"""Values of the total noise sigma at which float32 is compared with float64. A naive float32 evaluation of
1 - exp(-sigma) gives 0 at the first value, and is off by 5 % at the second."""
SHORT = 0.2
"""Share of the total noise that the reverse steps under test remove."""


@torch.no_grad()
def check_precision(kernel: Kernel) -> Check:
    """Verify that the losses, scores and reverse steps of a token kernel in float32 agree with float64.

    This depends on the number of states: SEDD's published form of the loss for uniform noise is NaN in float32 with
    50,257 states at low noise. Gradients of the losses must be finite.

    Args:
        kernel: Kernel with any number of states.
    """
    error = _rounding(kernel)
    least, most = min(FLOAT32_LEVELS), max(FLOAT32_LEVELS)
    how = f"against float64, {kernel.states:,} states, total noise from {least:g} to {most:g}"
    claim = "losses, scores and reverse steps are accurate in float32, also at the least noise"
    return Check.below("kernel.float32", claim, error, 1e-4, how)


def _pairs(kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Return noisy states and clean tokens, int64 [1, 4] each: the first and last tokens, changed and unchanged."""
    last = kernel.data_tokens - 1
    x0 = torch.tensor([[0, min(1, last), last, last]])
    xt = x0.clone()
    xt[0, 0], xt[0, 3] = _neighbour(kernel, 0), _neighbour(kernel, last)
    return xt, x0


def _neighbour(kernel: Kernel, token: int) -> int:
    """Return the state that ``token`` most often changes to, at the lowest noise at which any of 4,096 draws changes."""
    clean, generator = torch.full((1, 4096), token), torch.Generator().manual_seed(9)
    for sigma in (1e-3, 0.5, 5.0):
        seen = noised(kernel, clean, torch.tensor([sigma]), generator)
        moved = seen[seen != token]
        if len(moved):
            return int(moved.mode().values)
    return kernel.states - 1


def _heads(kernel: Kernel, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-scores of order 1, log-scores from -9 to 9 and log-predictions, the same in each row, float32 [k, c, n]."""
    generator = torch.Generator().manual_seed(8)
    near = torch.randn(shape[1], kernel.states, generator=generator).expand(*shape, -1)
    far = (18 * torch.rand(shape[1], kernel.states, generator=generator) - 9).expand(*shape, -1)
    logits = near * torch.tensor([1.0, 6.0])[torch.arange(shape[1]) % 2, None]
    masked = torch.arange(kernel.states) >= kernel.data_tokens
    return near, far, logits.masked_fill(masked, -1e6).double().log_softmax(-1).float()


def _rounding(kernel: Kernel) -> float:
    """Return the largest relative difference between float32 and float64 of all methods, over all noise levels."""
    level = torch.tensor(FLOAT32_LEVELS)
    below = (1 - SHORT) * level
    xt, x0 = (v.expand(len(level), -1).contiguous() for v in _pairs(kernel))
    near, far, log_x0 = _heads(kernel, xt.shape)
    near, far = (v.scatter(-1, xt[..., None], 0.0) for v in (near, far))
    levels = {torch.float32: (level, below), torch.float64: (level.double(), below.double())}
    error = 0.0

    def compare(
        method: Callable[..., Tensor],
        head: Tensor,
        *before: Tensor,
        steps: int = 1,
        floor: float = 3e-3,
        share: float = 0.0,
    ) -> None:
        nonlocal error
        found, exact = (
            method(head.to(dtype), *before, *levels[dtype][:steps]) for dtype in (torch.float32, torch.float64)
        )
        right = found.dtype == torch.float32 and bool(found.isfinite().all())
        gap = (found.double() - exact).abs() / (exact.abs() + floor + share * exact.abs().amax(-1, keepdim=True))
        error = worst(error, float(gap.nan_to_num(nan=math.inf).max()) if right else math.inf)

    # with scores up to e^9 the terms of a small loss are large, and may cancel
    for head, share in ((near, 0.0), (far, 1e-2)):
        compare(kernel.score_entropy, head, xt, x0, share=share)
        compare(kernel.reverse_rate, head.exp(), xt)
    compare(kernel.nelbo, log_x0, xt, x0)
    compare(lambda *v: kernel.log_score(*v).clamp(min=-40), log_x0, xt, floor=1.0)
    compare(kernel.posterior, log_x0.exp(), xt, steps=2)
    for loss, head in ((kernel.score_entropy, far), (kernel.nelbo, log_x0)):
        error = worst(error, 0.0 if _finite_gradient(loss, head, xt, x0, level) else math.inf)
    return error


@torch.enable_grad()
def _finite_gradient(loss: Callable[..., Tensor], head: Tensor, xt: Tensor, x0: Tensor, level: Tensor) -> bool:
    leaf = head.clone().requires_grad_()
    value = loss(leaf, xt, x0, level).sum()
    if not value.requires_grad:
        return True
    return bool(torch.autograd.grad(value, leaf)[0].isfinite().all())


@torch.no_grad()
def check_pure(kernel: Kernel) -> Check:
    """Verify that each value depends on its own row and position alone, and that calls change nothing.

    Values of a batch are compared with those of each row and position by itself, in float64.
    """
    xt, x0 = _pairs(kernel)
    xt, x0 = xt.expand(3, -1).contiguous(), x0.expand(3, -1).contiguous()
    near, _, log_x0 = (v.double() for v in _heads(kernel, xt.shape))
    log_x0 = log_x0.log_softmax(-1)
    sigma = torch.tensor([0.02, 0.6, 3.0], dtype=torch.float64)
    below, score, guess = 0.7 * sigma, near.exp(), log_x0.exp()
    calls: dict[str, tuple[Tensor, ...]] = {
        "score_entropy": (near, xt, x0, sigma),
        "nelbo": (log_x0, xt, x0, sigma),
        "log_score": (log_x0, xt, sigma),
        "reverse_rate": (score, xt, sigma),
        "analytic": (score, xt, sigma, below),
        "posterior": (guess, xt, sigma, below),
    }
    inputs = (near, xt, x0, sigma, log_x0, below, score, guess)
    kept, before = [v.clone() for v in inputs], generators_state()
    first = {name: getattr(kernel, name)(*given) for name, given in calls.items()}
    wrong = []
    for name, given in calls.items():
        again = getattr(kernel, name)(*given)
        alone = [
            getattr(kernel, name)(*(v[b : b + 1] if v.dim() == 1 else v[b : b + 1, c : c + 1] for v in given))
            for b in range(len(xt))
            for c in range(xt.shape[1])
        ]
        table = torch.stack(alone).view(first[name].shape)
        close = bool(((table - first[name]).abs() <= 1e-9 * (1 + table.abs())).all())
        if not torch.equal(again, first[name]) or not close:
            wrong.append(f"{name} gives other values")
    if not all(map(torch.equal, inputs, kept)):
        wrong.append("inputs are changed in place")
    if generators_state() != before:
        wrong.append("the global random generators are used")
    claim = "losses, scores and steps depend on one row and position alone, and change nothing"
    how = "a batch against single positions, and again"
    return Check("kernel.pure", claim, not wrong, "; ".join(wrong) or "they do", how)
