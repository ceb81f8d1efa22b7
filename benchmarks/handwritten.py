"""SEDD written by hand in plain PyTorch, in the manner of the public code: the reference for the engine's speed.

The same network as ``blueprints/sedd-*.yaml`` (adaLN-zero transformer, rotary, log-score head scaled by sigma), the same
loss (score entropy, absorb, loglinear), the same optimizer step (clip, AdamW, averaged weights). ``plain`` follows the
public code line by line: rotary over queries, keys and values at once, the norm's weight applied after the norm, torch's
default AdamW, averages in a loop. ``tuned`` makes the next obvious improvements: rotary on queries and keys only, the norm as
one call, fused AdamW, averages in one call. Nothing of sedd_graph is imported here. Axes: B batch, L length, D width, H heads, V states.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-3


def rotate(x_BHLR: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """Apply rotary position embedding to the last axis."""
    a, b = x_BHLR.chunk(2, dim=-1)
    return x_BHLR * cos_LR + torch.cat([-b, a], dim=-1) * sin_LR


class Norm(nn.Module):
    """Layer norm with a weight and no bias."""

    def __init__(self, dim: int, tuned: bool) -> None:
        super().__init__()
        self.weight, self.tuned = nn.Parameter(torch.ones(dim)), tuned

    def forward(self, x: Tensor) -> Tensor:
        if self.tuned:
            return F.layer_norm(x, x.shape[-1:], self.weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.float(), x.shape[-1:]) * self.weight


class Block(nn.Module):
    """One adaLN-zero transformer block: attention, then feed-forward."""

    def __init__(self, dim: int, heads: int, cond: int, dropout: float, tuned: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.tuned = heads, dropout, tuned
        self.norm1 = Norm(dim, tuned)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm2 = Norm(dim, tuned)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.adaln = nn.Linear(cond, 6 * dim)
        nn.init.zeros_(self.adaln.weight)
        nn.init.zeros_(self.adaln.bias)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, L, D = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c)[:, None].chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        qkv = self.qkv(h).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if self.tuned:
            q, k, v = qkv
            h = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        else:
            turn = torch.stack([cos, cos, torch.ones_like(cos)]), torch.stack([sin, sin, torch.zeros_like(sin)])
            h = F.scaled_dot_product_attention(*rotate(qkv, *(t[:, None, None] for t in turn)))
        h = self.out(h.transpose(1, 2).reshape(B, L, D))
        x = x + gate1 * F.dropout(h, self.dropout, self.training)
        h = self.norm2(x) * (1 + scale2) + shift2
        h = self.down(F.gelu(self.up(h), approximate="tanh"))
        y: Tensor = x + gate2 * F.dropout(h, self.dropout, self.training)
        return y


class Sedd(nn.Module):
    """The whole network: log-scores float32 [B, L, V] from tokens [B, L] and total noise sigma [B]."""

    cos: Tensor
    sin: Tensor
    frequency: Tensor

    def __init__(
        self,
        *,
        states: int,
        dim: int,
        heads: int,
        depth: int,
        cond: int,
        dropout: float,
        length: int,
        tuned: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(states, dim)
        nn.init.kaiming_uniform_(self.embed.weight, a=math.sqrt(5))
        self.time = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.blocks = nn.ModuleList(Block(dim, heads, cond, dropout, tuned) for _ in range(depth))
        self.norm = Norm(dim, tuned)
        self.adaln = nn.Linear(cond, 2 * dim)
        self.head = nn.Linear(dim, states)
        for zeroed in (self.adaln, self.head):
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)
        width = dim // heads
        angle = torch.outer(torch.arange(length).float(), 1e4 ** (-torch.arange(0, width, 2).float() / width))
        self.register_buffer("cos", angle.cos().repeat(1, 2))
        self.register_buffer("sin", angle.sin().repeat(1, 2))
        self.register_buffer("frequency", torch.exp(-math.log(1e4) * torch.arange(128).float() / 128))

    def forward(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        angle = sigma[:, None] * self.frequency
        c = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], dim=-1)))
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, c, self.cos.to(x.dtype), self.sin.to(x.dtype))
        shift, scale = self.adaln(c)[:, None].chunk(2, dim=-1)
        log_score: Tensor = self.head(self.norm(x) * (1 + scale) + shift).float()
        log_score = log_score - torch.log(torch.expm1(sigma))[:, None, None] - math.log(log_score.shape[-1] - 1)
        return log_score.scatter(-1, tokens[..., None], 0.0)


class Loss(nn.Module):
    """Network and score entropy in one module, which is compiled. ``forward`` returns nats [B]."""

    def __init__(self, model: Sedd, states: int) -> None:
        super().__init__()
        self.model, self.mask = model, states - 1

    def forward(self, x0: Tensor, xt: Tensor, sigma: Tensor, dsigma: Tensor) -> Tensor:
        log_score = self.model(xt, sigma)
        with torch.autocast(x0.device.type, enabled=False):
            masked = xt == self.mask
            k = (1 / torch.expm1(sigma))[:, None]
            score = log_score[..., :-1].masked_fill(~masked[..., None], 0.0)
            target = score.gather(-1, torch.where(masked, x0, 0)[..., None])[..., 0]
            entropy = score.exp().sum(-1) - k * target + k * (k.log() - 1)
            return dsigma * torch.where(masked, entropy, 0.0).sum(-1)


class Trainer:
    """The state of a hand-written training loop; ``step(x0)`` takes one optimizer step and returns the loss, nats per token."""

    def __init__(
        self, loss: Loss, *, lr: float, ema: float, clip: float, dtype: torch.dtype, tuned: bool = False
    ) -> None:
        self.loss, self.ema, self.clip, self.dtype, self.tuned = loss, ema, clip, dtype, tuned
        self.parameters: list[Tensor] = list(loss.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True if tuned else None
        )
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, x0: Tensor) -> Tensor:
        t = (torch.rand(1, device=x0.device) + torch.arange(len(x0), device=x0.device) / len(x0)) % 1
        t = 1e-4 + (1 - 1e-4) * t
        sigma, dsigma = -torch.log1p(-(1 - EPS) * t), (1 - EPS) / (1 - (1 - EPS) * t)
        xt = torch.where(torch.rand(x0.shape, device=x0.device) < (1 - EPS) * t[:, None], self.loss.mask, x0)
        with torch.autocast(x0.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            loss: Tensor = self.loss(x0, xt, sigma, dsigma).mean() / x0.shape[1]
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if self.tuned:
                torch._foreach_lerp_(self.average, self.parameters, 1 - self.ema)
            else:
                for average, parameter in zip(self.average, self.parameters, strict=True):
                    average.sub_((1 - self.ema) * (average - parameter))
        return loss.detach()
