"""The ``data`` section of a blueprint: text (:class:`DataConfig`), or points for a flow (:class:`PointsConfig`). No torch."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from sedd_graph.component.choice import Choice
from sedd_graph.component.strict import Strict
from sedd_graph.data.sources import Corpus, PointSource
from sedd_graph.data.tokenizer import TokenizerFactory

__all__ = ["DataConfig", "PointsConfig"]

Share = Annotated[float, pydantic.Field(gt=0, lt=0.9)]
Seed = Annotated[int, pydantic.Field(ge=0, lt=2**31)]


class DataConfig(Strict):
    """Text to learn from: a corpus, its tokenizer, and how tokens are cut into rows."""

    corpus: Annotated[Corpus, Choice("data.corpus")] = pydantic.Field(default={"op": "builtin"}, validate_default=True)
    """Where the text comes from."""
    tokenizer: Annotated[TokenizerFactory, Choice("data.tokenizer")] = pydantic.Field(
        default={"op": "characters"}, validate_default=True
    )
    """How text becomes tokens."""
    length: Annotated[int, pydantic.Field(ge=2, le=1_048_576)] = 128
    """Tokens per row."""
    rows: Literal["stream", "documents", "lines"] = "stream"
    """``stream``: documents are joined and cut into rows. ``documents``: one document per row, cut or padded. ``lines``: one
    line per row, cut or padded, without the white space around it; empty lines are left out."""
    holdout: Share = 0.1
    """Share of the corpus, at its end, that is held out from training."""
    seed: Seed = 0
    """Seed of the order of rows."""


class PointsConfig(Strict):
    """Rows of real numbers for a flow to learn from."""

    points: Annotated[PointSource, Choice("data.points")]
    """Where the points come from."""
    holdout: Share = 0.1
    """Share of the rows, at their end, that is held out from training."""
    seed: Seed = 0
    """Seed of the order of rows, and of densities that are drawn."""

    @property
    def length(self) -> int:
        """Positions of a row: 1, since a row of numbers is counted as a whole."""
        return 1
