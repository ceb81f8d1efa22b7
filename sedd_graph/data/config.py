"""The ``data`` section of a blueprint: text (:class:`DataConfig`), or points for a flow (:class:`PointsConfig`)."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

from sedd_graph.component.strict import Strict

__all__ = ["Corpus", "DataConfig", "PointsConfig", "TokenizerConfig"]

FileName = Annotated[str, pydantic.Field(min_length=1, max_length=1024)]
Files = Annotated[list[FileName], pydantic.Field(min_length=1, max_length=4096)]


class BuiltinCorpus(Strict):
    """The documentation that CPython carries (``pydoc_data.topics``): about 650,000 characters of English."""

    op: Literal["builtin"]


class TextCorpus(Strict):
    """UTF-8 text files, by name or pattern, relative to the blueprint's folder. Each file is a document."""

    op: Literal["text"]
    files: Files


class JsonlCorpus(Strict):
    """One JSON object a line; ``field`` holds the text and ``prompt``, where given, a text that comes before it."""

    op: Literal["jsonl"]
    files: Files
    field: str = "text"
    prompt: str | None = None


class ParquetCorpus(Strict):
    """Parquet files (extra ``datasets``); fields as for jsonl."""

    op: Literal["parquet"]
    files: Files
    field: str = "text"
    prompt: str | None = None


class DatasetCorpus(Strict):
    """A named set or a local folder, through the ``datasets`` library (extra ``datasets``)."""

    op: Literal["dataset"]
    name: FileName
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    prompt: str | None = None


class CharactersConfig(Strict):
    """One token a character: the ``size - 2`` most frequent of the training text, one for all others, and padding."""

    op: Literal["characters"]
    size: Annotated[int, pydantic.Field(ge=3, le=65536)] = 128


class BytesConfig(Strict):
    """One token a byte of UTF-8, and padding: 257 tokens."""

    op: Literal["bytes"]


class FileTokenizerConfig(Strict):
    """Any ``tokenizer.json`` of the ``tokenizers`` library."""

    op: Literal["file"]
    path: FileName


class BpeConfig(Strict):
    """Byte-level BPE trained on the training text."""

    op: Literal["bpe"]
    size: Annotated[int, pydantic.Field(ge=258, le=1_000_000)] = 4096


Corpus = Annotated[
    BuiltinCorpus | TextCorpus | JsonlCorpus | ParquetCorpus | DatasetCorpus, pydantic.Field(discriminator="op")
]
"""Where the text comes from, told apart by ``op``."""

TokenizerConfig = Annotated[
    CharactersConfig | BytesConfig | FileTokenizerConfig | BpeConfig, pydantic.Field(discriminator="op")
]
"""How text becomes tokens, told apart by ``op``."""


class DataConfig(Strict):
    """What is learned from: a corpus, how it becomes tokens, and how tokens become rows."""

    corpus: Corpus = BuiltinCorpus(op="builtin")
    tokenizer: TokenizerConfig = CharactersConfig(op="characters")
    length: Annotated[int, pydantic.Field(ge=2, le=1_048_576)] = 128
    """Tokens per row."""
    rows: Literal["stream", "documents", "lines"] = "stream"
    """``stream``: documents one after another, cut into rows. ``documents``: one row each, cut or padded. ``lines``: the same
    of every line that has text, without the space around it."""
    holdout: Annotated[float, pydantic.Field(gt=0, lt=0.9)] = 0.1
    """The last part of the corpus, kept from training."""
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0


class TwoMoons(Strict):
    """Two half circles of radius 1 that reach into each other, in the plane."""

    op: Literal["two_moons"]
    count: Annotated[int, pydantic.Field(ge=2, le=10_000_000)] = 20_000
    noise: Annotated[float, pydantic.Field(gt=0, le=10)] = 0.1
    """Standard deviation of what is added to each coordinate."""


class EightGaussians(Strict):
    """Eight normal densities of deviation ``noise``, evenly on a circle of radius 2, in the plane."""

    op: Literal["eight_gaussians"]
    count: Annotated[int, pydantic.Field(ge=2, le=10_000_000)] = 20_000
    noise: Annotated[float, pydantic.Field(gt=0, le=10)] = 0.2


class ArrayFile(Strict):
    """A ``.npy`` file of floats [row, ...]; its name is relative to the blueprint's folder."""

    op: Literal["npy"]
    path: FileName


class PointsConfig(Strict):
    """What a flow learns from: rows of real numbers."""

    points: Annotated[TwoMoons | EightGaussians | ArrayFile, pydantic.Field(discriminator="op")]
    holdout: Annotated[float, pydantic.Field(gt=0, lt=0.9)] = 0.1
    """The last part of the rows, kept from training."""
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
    """Of the order of rows, and of densities that are drawn."""

    @property
    def length(self) -> int:
        """A row is one thing: what is counted for each position of a text is counted for each row."""
        return 1
