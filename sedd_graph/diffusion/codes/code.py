"""Base class of codes: maps from tokens to vectors with an inversion rule, which decodes a vector to the nearest codeword.

Axes: b batch, l length, d channels, v tokens.
"""

import dataclasses
from abc import abstractmethod

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, solves
from sedd_graph.component.contract import Algebra, Signature, SizeField
from sedd_graph.diffusion.codes.nearest import nearest

__all__ = ["Code"]


class Code(Component):
    """Base class of codes, which map each token to the row of a table.

    The first output is the codewords of ``tokens`` int64 [b, l], [b, l, d]. The second output is the table itself,
    [vocab, d]; connect it to the input ``table`` of an output head to tie the weights of the two. A subclass defines
    :meth:`rows`. The inversion rule :meth:`decode` recovers the tokens from vectors whose errors are less than half the
    least distance of two rows.
    """

    abstract = True
    outputs = ("out", "table")

    class Config(ComponentConfig):
        vocab: SizeField
        """Number of states: the data tokens, and mask or BOS token if there is one. An integer or an expression such as
        ``v+1``."""

    config: Config

    @classmethod
    def algebra(cls, config: Config, signature: Signature) -> Algebra:
        return dataclasses.replace(super().algebra(config, signature), integers={"tokens": config.vocab})

    @abstractmethod
    def rows(self) -> Tensor:
        """Return the table of codewords, float [vocab, d]."""

    def forward(self, tokens: Int[Tensor, "b l"]) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "vocab d"]]:
        rows = self.rows()
        return F.embedding(tokens, rows), rows

    @solves("tokens", given=("out",))
    def decode(self, out: Tensor) -> Tensor:
        """Return the tokens whose codewords are nearest to vectors.

        Args:
            out: Vectors, float [b, l, d].

        Returns:
            Tokens, int64 [b, l].

        Raises:
            DivergedError: A vector has an element that is NaN or infinite.
        """
        return nearest(self.rows(), out)

    def declared_distance(self) -> float | None:
        """Return the least distance of two codewords where it is known without comparing them; None otherwise."""
        return None
