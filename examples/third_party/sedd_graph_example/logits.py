"""A kernel whose output is its own: masked diffusion of a network that puts out plain logits.

Axes: b rows, l positions, n states (the mask is the last), d width.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from sedd_graph_registry.noise.interpolating import Absorb
from torch import Tensor, nn

from sedd_graph.plugin import Component, ComponentConfig, Context, Output

LOGITS = Output("logits", "float b l v", "unnormalised log probabilities of the clean token", gives="log_x0")


class LogitsAbsorb(Absorb, kind="kernel"):
    """``absorb`` for a network of any logits: they are normalised, the mask gets no probability, and seen tokens are kept (SUBS,
    arXiv 2406.07524)."""

    class Config(Absorb.Config):
        pass

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        return ((LOGITS,),)

    def translate(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Mapping[str, Tensor]:
        mask = torch.arange(self.states, device=x.device) == self.mask
        log_x0 = outputs["logits"].float().masked_fill(mask, -1e6).log_softmax(-1)
        kept = torch.where(x[..., None] == torch.arange(self.states, device=x.device), 0.0, -1e6)
        return {"log_x0": torch.where((x == self.mask)[..., None], log_x0, kept)}

    def express(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Mapping[str, Tensor]:
        return {"logits": outputs["log_x0"]}


class LogitsHead(Component, kind="head"):
    """A linear map to the states, in float32."""

    class Config(ComponentConfig):
        pass

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = nn.Linear(self.axis("d"), self.axis("v"))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l v"]:
        return self.linear(x).float()
