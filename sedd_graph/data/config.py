"""The ``data`` section of a blueprint: text (:class:`DataConfig`) or points for a flow (:class:`PointsConfig`). No torch."""

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
    """Text for training: a corpus, its tokenizer, and how its tokens are cut into rows."""

    corpus: Annotated[Corpus, Choice("data.corpus")] = pydantic.Field(default={"op": "builtin"}, validate_default=True)
    """Source of the text."""
    tokenizer: Annotated[TokenizerFactory, Choice("data.tokenizer")] = pydantic.Field(
        default={"op": "characters"}, validate_default=True
    )
    """Conversion of text to tokens."""
    length: Annotated[int, pydantic.Field(ge=2, le=1_048_576)] = 128
    """Tokens per row."""
    rows: Literal["stream", "documents", "lines"] = "stream"
    """Contents of a row. ``stream``: the documents are joined and cut into rows. ``documents``: one document, truncated or
    padded. ``lines``: one line, truncated or padded, without white space around it; empty lines are skipped."""
    holdout: Share = 0.1
    """Share of the corpus, at its end, that is held out from training."""
    seed: Seed = 0
    """Seed of the order of rows."""


class PointsConfig(Strict):
    """Rows of real numbers for training a flow."""

    points: Annotated[PointSource, Choice("data.points")]
    """Source of the points."""
    holdout: Share = 0.1
    """Share of the rows, at their end, that is held out from training."""
    seed: Seed = 0
    """Seed of the order of rows and of the points that are drawn from a density."""

    @property
    def length(self) -> int:
        """Positions per row: 1, since the loss of a row of numbers is counted as a whole."""
        return 1
