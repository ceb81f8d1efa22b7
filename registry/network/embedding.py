"""Token embeddings. Axes: b batch, l length, d model width, vocab states."""

import math
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField


class TokenEmbedding(Component, kind="embedding"):
    """Learned vector for each of ``vocab`` states, a mask or start state included.

    The second output is the table itself; connect it to a head's ``table`` to tie the weights of both.
    """

    class Config(ComponentConfig):
        vocab: SizeField
        """Number of states: the data tokens, plus one for a mask, plus one for a start state, where the kernel has them."""
        init: Literal["normal", "kaiming"] = "normal"
        """``normal``: standard deviation 0.02; ``kaiming``: uniform, as in the SEDD code."""

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
