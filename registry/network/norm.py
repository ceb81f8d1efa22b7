"""Normalisation over the channels, computed in float32 even under autocast. Axes: d width, the last axis."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context

from ._shared import wide


class LayerNorm(Component, kind="norm"):
    """Layer normalisation (arXiv 1607.06450), by default with a weight and no bias, as in SEDD and MDLM."""

    positionwise = True

    class Config(ComponentConfig):
        eps: float = 1e-5
        """Constant added to the variance."""
        affine: Literal["none", "weight", "weight_bias"] = "weight"
        """Learned parameters per channel: ``none``, ``weight``, or weight and bias (``weight_bias``)."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.weight = nn.Parameter(torch.ones(self.axis("d"))) if self.config.affine != "none" else None
        self.bias = nn.Parameter(torch.zeros(self.axis("d"))) if self.config.affine == "weight_bias" else None

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        return F.layer_norm(wide(x), x.shape[-1:], self.weight, self.bias, self.config.eps).to(x.dtype)


class RMSNorm(Component, kind="norm"):
    """Root-mean-square normalisation (arXiv 1910.07467)."""

    positionwise = True

    class Config(ComponentConfig):
        eps: float = 1e-6
        """Constant added to the mean square."""
        affine: Literal["none", "weight"] = "weight"
        """Learned parameters per channel: ``none`` or ``weight``."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.weight = nn.Parameter(torch.ones(self.axis("d"))) if self.config.affine == "weight" else None

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        return F.rms_norm(wide(x), x.shape[-1:], self.weight, self.config.eps).to(x.dtype)
