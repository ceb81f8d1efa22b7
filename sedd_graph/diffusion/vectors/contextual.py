"""The interface of kernels whose vectors depend on the whole row, such as those of a frozen encoder.

Axes: b batch, l length, d width of a vector, v tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.component.outputs import TOKEN_LOGITS, VECTOR_X0, Output
from sedd_graph.diffusion.vectors.kernel import VectorKernel

__all__ = ["ContextualKernel"]


class ContextualKernel(VectorKernel):
    """A kernel whose clean vectors are a frozen function of the whole row of tokens.

    There is no table of embeddings, so nothing rounds a vector by itself: the network has two outputs, ``x0`` (clean
    vectors) and ``logits`` (tokens), and reads tokens where its input ``decode`` is 1.
    """

    abstract: ClassVar[bool] = True
    contextual: ClassVar[bool] = True

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        return ((VECTOR_X0, TOKEN_LOGITS),)

    @abstractmethod
    def encode(self, tokens: Tensor, attend: Tensor) -> Tensor:
        """Return the vectors of token rows, float32 [b, l, d], without gradients.

        Args:
            tokens: int64 [b, l].
            attend: Positions that vectors may depend on, bool [b, l], at least one in each row.
        """

    def embed(self, tokens: Tensor, attend: Tensor | None = None, given: Tensor | None = None) -> Tensor:
        """Return the vectors of token rows, float32 [b, l, d], without gradients; 0 at padding.

        Vectors at given positions are those of the row without its other positions, since in sampling these are unknown.
        """
        seen = torch.ones_like(tokens, dtype=torch.bool) if attend is None else attend
        found = self._encoded(tokens, seen)
        if given is None or bool((given & seen == seen).all()) or not bool(given.any()):
            return found
        return torch.where(given[..., None], self._encoded(tokens, seen & given), found)

    def _encoded(self, tokens: Tensor, attend: Tensor) -> Tensor:
        """Return :meth:`encode` where ``attend``, and 0 elsewhere; rows may be without any such position."""
        rows = attend.any(-1)
        found = torch.zeros(*tokens.shape, self.width, device=tokens.device)
        if bool(rows.any()):
            with torch.no_grad():
                found[rows] = self.encode(tokens[rows], attend[rows]).float()
        return torch.where(attend[..., None], found, 0.0)

    def table(self) -> NoReturn:
        """Raise TypeError: there is no table. Callers ask :attr:`contextual` before."""
        raise TypeError("vectors depend on the whole row: there is no table of embeddings")

    def logits(self, x0: Tensor) -> NoReturn:
        """Raise TypeError: the network reads tokens from vectors (:meth:`Denoiser.decode`)."""
        raise TypeError("vectors depend on the whole row: the network reads tokens from them")
