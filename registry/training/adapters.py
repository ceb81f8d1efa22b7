"""Low-rank adapters of weight matrices (LoRA). The module imports torch only when an adapter is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.training.interfaces import Adapter

if TYPE_CHECKING:
    from torch import Tensor, nn

Pattern = Annotated[str, pydantic.Field(min_length=1, max_length=256)]


class Lora(Adapter, kind="adapter"):
    """LoRA (arXiv 2106.09685): a frozen matrix W becomes W + (alpha / rank) B A, with A of ``rank`` rows and B, initially 0.

    Raises:
        ValueError: The rank is not below both sizes of a matrix.
    """

    class Config(ComponentConfig):
        weights: Annotated[list[Pattern], pydantic.Field(min_length=1, max_length=64)]
        """Names of the adapted matrices, with ``*`` for any text, as in ``train.freeze``: ``trunk.*.attention.*`` for the
        maps of all attention layers. Other parameters that match are left as they are."""
        rank: Annotated[int, pydantic.Field(ge=1, le=4096)] = 8
        """Rank of the change, below the smaller size of each matrix."""
        alpha: Annotated[float, pydantic.Field(gt=0)] | None = None
        """Scale of the change, which is multiplied by ``alpha / rank``; by default ``rank``, for a factor of 1."""

    config: Config

    @property
    def patterns(self) -> Sequence[str]:
        return self.config.weights

    def make(self, weight: Tensor) -> nn.Module:
        from ._lora import LowRank

        rank = self.config.rank
        if rank >= min(weight.shape):
            raise ValueError(f"rank {rank} is not below the smaller size of a matrix {list(weight.shape)}")
        alpha = rank if self.config.alpha is None else self.config.alpha
        return LowRank(weight, rank, alpha / rank)
