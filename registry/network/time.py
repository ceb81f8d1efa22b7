"""Conditioning vectors computed from the noise level, and their addition to every position.

Vectors are computed in float32 even under autocast, including the MLP, as in the SEDD code: one vector per row costs nothing,
and bfloat16 would round noise levels that differ by less than 0.4 percent to one.

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
from sedd_graph.diffusion.numerics import full_precision


class _Encoder(Component):
    """Base class of noise-level encoders: features, then an MLP linear, SiLU, linear, SiLU (as in the SEDD code)."""

    def make_mlp(self, features: int) -> None:
        width = self.axis("e")
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def fourier(self, angle: Tensor) -> Tensor:
        """Return conditioning vectors [b, e] from the cosines and sines of ``angle`` [b, frequencies // 2], radians."""
        return self.encode(torch.cat([angle.cos(), angle.sin()], dim=-1))

    def encode(self, features: Tensor) -> Tensor:
        """Return conditioning vectors [b, e] from ``features`` [b, frequencies]."""
        with full_precision(features):
            return F.silu(self.mlp(features))


class SigmaEmbedding(_Encoder, kind="time"):
    """Conditioning vector from a sinusoidal embedding of the total noise and an MLP (``TimestepEmbedder`` of SEDD)."""

    class Config(ComponentConfig):
        frequencies: SizeField = 256
        """Number of features, of which half are cosines and half are sines."""
        max_period: float = 10000.0
        """Base of the frequencies: frequency i of n is ``max_period ** (-i / n)`` radians per
        nat of total noise."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.make_mlp(self.config.frequencies // 2 * 2)

    def forward(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b e"]:
        half = self.config.frequencies // 2
        step = torch.arange(half, device=sigma.device, dtype=torch.float32)
        return self.fourier(sigma[:, None].float() * torch.exp(-math.log(self.config.max_period) * step / half))


class TimestepEmbedding(Component, kind="time"):
    """Conditioning vector from sinusoidal features of the timestep and an MLP (DDPM; Diffusion-LM, arXiv 2205.14217)."""

    class Config(ComponentConfig):
        frequencies: SizeField = 128
        """Number of features, of which half are cosines and half are sines; even."""
        hidden: SizeField | None = None
        """Width between the two linear maps; by default 4 times the number of features."""
        max_period: float = 10000.0
        """Base of the frequencies: frequency i of n is ``max_period ** (-i / n)`` radians per step of 1."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        features = self.config.frequencies // 2 * 2
        hidden = self.config.hidden or 4 * features
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, self.axis("e")))

    def forward(self, timestep: Float[Tensor, "b"]) -> Float[Tensor, "b e"]:
        half = self.config.frequencies // 2
        step = torch.arange(half, device=timestep.device, dtype=torch.float32)
        angle = timestep[:, None].float() * torch.exp(-math.log(self.config.max_period) * step / half)
        with full_precision(angle):
            out: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return out


class GaussianFourier(_Encoder, kind="time"):
    """Conditioning vector from random Fourier features of the total noise (arXiv 2006.10739) and an MLP.

    The frequencies are drawn at construction and are not trained.
    """

    class Config(ComponentConfig):
        frequencies: SizeField = 256
        """Number of features, of which half are cosines and half are sines."""
        scale: float = 16.0
        """Standard deviation of the frequencies, in cycles per nat of total noise."""

    config: Config
    frequency: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("frequency", torch.randn(self.config.frequencies // 2) * self.config.scale)
        self.make_mlp(self.config.frequencies // 2 * 2)

    def forward(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b e"]:
        return self.fourier(2 * math.pi * sigma[:, None].float() * self.frequency)


class LearnedTime(_Encoder, kind="time"):
    """Conditioning vector from cosines of the total noise and an MLP (Time2Vec, arXiv 1907.05321).

    The frequencies and phases of the cosines are learned.
    """

    class Config(ComponentConfig):
        frequencies: SizeField = 64
        """Number of cosine features."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.frequency = nn.Parameter(torch.empty(self.config.frequencies))
        self.phase = nn.Parameter(torch.empty(self.config.frequencies))
        nn.init.normal_(self.frequency, std=2.0)
        nn.init.uniform_(self.phase, 0, 2 * math.pi)
        self.make_mlp(self.config.frequencies)

    def forward(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b e"]:
        return self.encode(torch.cos(sigma[:, None].float() * self.frequency + self.phase))


class ConditionAdd(Component, kind="time"):
    """Addition of one vector per sequence to the vectors of all its positions."""

    class Config(ComponentConfig):
        pass

    config: Config

    def forward(self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b l d"]:
        return x + c[:, None].to(x.dtype)

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        return dataclasses.replace(super().algebra(config, signature), lipschitz={("x", "out"): 1.0})

    @solves("x", given=("out", "c"), log_det="zero")
    def inverse(self, out: Tensor, c: Tensor) -> Tensor:
        return out - c[:, None].to(out.dtype)
