"""Config classes of the ``data`` section of a blueprint: text, or real-valued points for a flow. Imports no torch."""

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
    """``data`` section for text: the corpus, the tokenizer, and the division of the tokens into training rows."""

    corpus: Annotated[Corpus, Choice("data.corpus")] = pydantic.Field(default={"op": "builtin"}, validate_default=True)
    """Source of the text."""
    tokenizer: Annotated[TokenizerFactory, Choice("data.tokenizer")] = pydantic.Field(
        default={"op": "characters"}, validate_default=True
    )
    """Tokenizer that converts the text to tokens."""
    length: Annotated[int, pydantic.Field(ge=2, le=1_048_576)] = 128
    """Tokens per row."""
    rows: Literal["stream", "documents", "lines"] = "stream"
    """Contents of a row. ``stream``: the documents are joined and cut into rows. ``documents``: one document, truncated
    or padded. ``lines``: one line, truncated or padded, without white space around it; empty lines are skipped."""
    holdout: Share = 0.1
    """Fraction of the corpus, taken from its end, that is held out from training: above 0 and below 0.9. It is
    measured in characters if ``rows`` is ``stream``, else in documents or lines; in shards always in tokens. Unused if
    ``heldout`` is given."""
    heldout: Annotated[Corpus, Choice("data.corpus")] | None = None
    """Source of the held-out text, such as the validation part of a data set; null: the end of ``corpus`` is held
    out."""
    seed: Seed = 0
    """Seed of the order of the training rows."""

    @pydantic.model_validator(mode="after")
    def _heldout_is_new(self) -> DataConfig:
        for name, corpus in (("corpus", self.corpus), ("heldout", self.heldout)):
            if corpus is not None and corpus.repeats and (name == "heldout" or self.heldout is None):
                raise ValueError(
                    f"data.{name} has its text twice, the second time in another form (such as reverse complements): "
                    "give data.heldout a corpus of its own, without repeats"
                )
        return self


class PointsConfig(Strict):
    """``data`` section for a flow: rows of real numbers (points) drawn from a density or read from a file."""

    points: Annotated[PointSource, Choice("data.points")]
    """Source of the points."""
    holdout: Share = 0.1
    """Fraction of the points that is held out from training, above 0 and below 0.9. The last points are held out."""
    seed: Seed = 0
    """Seed of the order of the training rows, and of points that are drawn from a density."""

    @property
    def length(self) -> int:
        """Positions per row: always 1, since a row of numbers is not a sequence."""
        return 1
