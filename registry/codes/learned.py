"""Learned code: a trained table of codewords whose distances are kept above a margin by a penalty.

Axes: b batch, l length, d width, p sampled pairs.
"""

from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.component.counter_rng import hashed
from sedd_graph.diffusion.codes.code import Code
from sedd_graph.diffusion.codes.tables import require_two

from ..network._shared import Positive


class LearnedCode(Code, kind="embedding"):
    """Table of one trained vector for each of ``vocab`` states, decoded to the nearest row.

    In training, pairs of rows are drawn at random, and a distance below ``margin`` adds its shortfall to the loss
    (hinge penalty). The penalty keeps rows apart but guarantees nothing: the least distance is measured when the model is
    built and at each checkpoint.
    """

    class Config(Code.Config):
        margin: Positive = 1.0
        """Distance of two rows below which they are penalised: max(0, margin - distance)."""
        weight: Annotated[float, pydantic.Field(ge=0)] = 1.0
        """Factor of the mean penalty of the sampled pairs, nats per token; 0 for no penalty."""
        pairs: Annotated[int, pydantic.Field(ge=1, le=2**16)] = 64
        """Number of pairs of rows that are drawn for each row of a batch."""
        std: Positive = 1.0
        """Standard deviation of the elements of the initial table, which is normal."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        require_two(self.config.vocab)
        self.weight = nn.Parameter(torch.empty(self.config.vocab, self.axis("d")).normal_(std=self.config.std))

    def rows(self) -> Tensor:
        return self.weight

    def penalty(self, key: Tensor) -> Tensor | None:
        """Return the mean of max(0, margin - distance) over sampled pairs of rows, times ``weight``, for each key.

        Args:
            key: One key per batch row, int32 [b], of which the pairs are a function.

        Returns:
            Penalties, nats per token, float32 [b]; None if ``weight`` is 0.
        """
        if not self.config.weight:
            return None
        vocab, pairs = len(self.weight), self.config.pairs
        place = torch.arange(2 * pairs, device=key.device)
        drawn = (hashed((hashed(key)[:, None] + place).int()) & 0x7FFFFFFF).long()
        first = drawn[:, :pairs] % vocab
        second = (first + 1 + drawn[:, pairs:] % (vocab - 1)) % vocab
        distance = (self.weight[first] - self.weight[second]).float().norm(dim=-1)
        return self.config.weight * (self.config.margin - distance).clamp(min=0).mean(1)
