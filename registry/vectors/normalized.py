"""Kernel of LangFlow: normalised embeddings with Gaussian noise in continuous time.

Axes: b batch, l length, d width of a vector, v tokens.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.vectors.gaussian import along, noise_std, signal
from sedd_graph.diffusion.vectors.kernel import Estimate, VectorKernel, VectorKernelConfig

from ..network._shared import full_linear

__all__ = ["NormalizedGaussian"]


class NormalizedGaussian(VectorKernel, kind="vector_kernel"):
    """Learned embeddings of equal lengths, with Gaussian noise in continuous time (LangFlow, arXiv 2604.11748).

    x_0 is the embedding, and x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise. With ``precondition`` the logits of the
    network are added to log p(x_t | token), so that the network predicts the log-probability of the token given the other
    positions, and rounding is exact at little noise whatever the network.
    """

    learned = True
    example: ClassVar[Mapping[str, Any]] = {"vocab": 4, "width": 2}

    class Config(VectorKernelConfig):
        normalize: Literal["length", "layer"] = "length"
        """Normalisation of the embeddings. ``length``: each is scaled to ``length``, as in the published code; ``layer``: its
        mean over the width is subtracted before (layer normalisation)."""
        length: Annotated[float, pydantic.Field(gt=0, le=1e4)] | None = None
        """Length of every embedding, at most 10,000; null: sqrt(width), so that a coordinate has mean square 1."""
        precondition: bool = True
        """True: the network's logits are added to log p(x_t | token), which is sqrt(alpha_bar) x_t . embedding / (1 - alpha_bar)
        up to a constant."""

        @pydantic.model_validator(mode="after")
        def _wide_enough(self) -> "NormalizedGaussian.Config":
            least = 3 if self.normalize == "layer" else 2
            if isinstance(self.width, int) and self.width < least:
                raise ValueError(f"width must be at least {least}: narrower normalised vectors are all alike")
            return self

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.embedding = nn.Parameter(torch.randn(self.config.vocab, self.config.width))
        self._length = self.length_of(config)

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        # two layer-normalised vectors of two numbers are alike or opposite
        length = cls.length_of(config)  # the same, so that the noise levels of the schedule are as far from rounding
        changes = {"vocab": states, "width": 2, "normalize": "length", "length": length}
        return config.model_copy(update=changes)

    @classmethod
    def length_of(cls, config: ComponentConfig) -> float:
        """Return the length of the embeddings."""
        given = cls.Config.model_validate(config.model_dump())
        return math.sqrt(given.width) if given.length is None else given.length

    @torch.no_grad()
    def place(self, table: Tensor) -> None:
        self.embedding.copy_(table)

    def table(self) -> Tensor:
        rows: Tensor = self.embedding
        if self.config.normalize == "layer":
            rows = rows - rows.mean(-1, keepdim=True)
        return F.normalize(rows, dim=-1) * self._length

    def logits(self, x0: Tensor) -> Tensor:
        # embeddings have equal lengths, so the nearest one has the largest product
        return full_linear(x0, self.table(), None)

    def translate(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Estimate:
        if "x0" in outputs or not self.config.precondition:
            return super().translate(outputs, x, sigma)
        with full_precision(x):
            scale = signal(sigma) / noise_std(sigma).square()
            evidence = self.logits(along(scale, x) * x)
            return super().translate({"logits": outputs["logits"].float() + evidence}, x, sigma)
