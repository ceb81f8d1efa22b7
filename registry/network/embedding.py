"""Token embedding.

Axes: b batch, l length, d model width, vocab (number of states: data tokens, and mask or start state if there is one).
"""

import math
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField


class TokenEmbedding(Component, kind="embedding"):
    """Embedding table of ``vocab`` states, which include the mask or start state if there is one.

    The second output is the table, [vocab, d]; connect the table to the port ``table`` of a head to tie their weights.
    """

    class Config(ComponentConfig):
        vocab: SizeField
        """Number of states: data tokens, plus one for the mask and one for the start state if the kernel has them."""
        init: Literal["normal", "kaiming"] = "normal"
        """Initialisation of the table: ``normal``, with standard deviation 0.02; ``kaiming``, uniform as in the SEDD
        code."""

    config: Config
    outputs = ("out", "table")

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.embed = nn.Embedding(self.config.vocab, self.axis("d"))
        if self.config.init == "normal":
            nn.init.normal_(self.embed.weight, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.embed.weight, a=math.sqrt(5))

    def forward(self, tokens: Int[Tensor, "b l"]) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "vocab d"]]:
        return F.embedding(tokens, self.embed.weight), self.embed.weight
