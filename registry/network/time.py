"""Noise level to a conditioning vector: sinusoidal (SEDD), Gaussian Fourier, learned frequencies; and adding it to tokens.

Axes: b batch, l length, d model width, e conditioning width.
"""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context, solves
from sedd_graph.component.contract import Algebra, Signature, SizeField


class _Encoder(Component):
    """Features of the noise level, then linear, SiLU, linear, SiLU (the last as in the SEDD code, before adaLN)."""

    def make_mlp(self, features: int) -> None:
        width = self.axis("e")
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def head(self, features: Tensor) -> Tensor:
        out: Tensor = F.silu(self.mlp(features))
        return out


class SigmaEmbedding(_Encoder, kind="time"):
    """SEDD's encoder of total noise: ``frequencies`` cosines and sines, then an MLP (SEDD code, ``TimestepEmbedder``)."""

    class Config(ComponentConfig):
        frequencies: SizeField = 256
        max_period: float = 10000.0

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.make_mlp(self.config.frequencies // 2 * 2)

    def forward(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b e"]:
        half = self.config.frequencies // 2
        step = torch.arange(half, device=sigma.device, dtype=torch.float32)
        angle = sigma[:, None].float() * torch.exp(-math.log(self.config.max_period) * step / half)
        return self.head(torch.cat([angle.cos(), angle.sin()], dim=-1))


class GaussianFourier(_Encoder, kind="time"):
    """Random Fourier features of the noise level (arXiv 2006.10739), fixed at construction, then an MLP."""

    class Config(ComponentConfig):
        frequencies: SizeField = 256
        scale: float = 16.0

    frequency: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("frequency", torch.randn(self.config.frequencies // 2) * self.config.scale)
        self.make_mlp(self.config.frequencies // 2 * 2)

    def forward(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b e"]:
        angle = 2 * math.pi * sigma[:, None].float() * self.frequency
        return self.head(torch.cat([angle.cos(), angle.sin()], dim=-1))


class LearnedTime(_Encoder, kind="time"):
    """Cosines whose frequencies and phases are learned (Time2Vec, arXiv 1907.05321), then an MLP."""

    class Config(ComponentConfig):
        frequencies: SizeField = 64

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.frequency = nn.Parameter(torch.empty(self.config.frequencies))
        self.phase = nn.Parameter(torch.empty(self.config.frequencies))
        nn.init.normal_(self.frequency, std=2.0)
        nn.init.uniform_(self.phase, 0, 2 * math.pi)
        self.make_mlp(self.config.frequencies)

    def forward(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b e"]:
        return self.head(torch.cos(sigma[:, None].float() * self.frequency + self.phase))


class ConditionAdd(Component, kind="time"):
    """Plain conditioning: adds one vector per sequence to every token's embedding."""

    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b l d"]:
        return x + c[:, None].to(x.dtype)

    @classmethod
    def algebra(cls, config: ComponentConfig, signature: Signature) -> Algebra:
        return dataclasses.replace(super().algebra(config, signature), lipschitz={("x", "out"): 1.0})

    @solves("x", given=("out", "c"), log_det="zero")
    def undo(self, out: Tensor, c: Tensor) -> Tensor:
        return out - c[:, None].to(out.dtype)
