"""Token embedding.

Axes: b batch, l length, d model width, vocab (number of states: data tokens, and mask or BOS token if there is one).
"""

import math
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField


class TokenEmbedding(Component, kind="embedding"):
    """Token embedding: a table of one learned vector for each of ``vocab`` states.

    The first output is the embeddings of ``tokens`` int64 [b, l], [b, l, d]. The second output is the table itself,
    [vocab, d]; connect it to the input ``table`` of an output head to tie the weights of the two.
    """

    class Config(ComponentConfig):
        vocab: SizeField
        """Number of states: the data tokens, one more if the noise process uses a mask, and one more if it changes the
        length of strings, for the marker at the start of every string. An integer or an expression such as ``v+1``."""
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
