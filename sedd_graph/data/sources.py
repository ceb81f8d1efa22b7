"""Base classes of corpora of text and of sources of points. No torch."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sedd_graph.component.declared import Plain
from sedd_graph.errors import UserError

__all__ = ["MAX_BYTES", "Corpus", "Document", "Numbers", "PointSource", "read_corpus"]

MAX_BYTES = 8 * 2**30
"""Bytes (of text in memory: characters) of the largest corpus or array that is read."""

Numbers = npt.NDArray[np.float32]
"""Rows of points, float32 [row, ...]."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the prompt before it."""

    text: str
    prompt: str = ""
    """Text before ``text`` that the network attends to; it is neither corrupted nor counted in the loss."""


class Corpus(Plain, ABC):
    """Base class of corpora, whose documents have a fixed order. Subclasses implement :meth:`documents`."""

    abstract: ClassVar[bool] = True
    records: ClassVar[bool] = True
    """True if documents are separate records. In a stream a record is followed by an end-of-text token, or by a line break if
    the tokenizer has none, and the held-out part begins between two records. False for files, which have their own line
    breaks."""

    @abstractmethod
    def documents(self, root: Path) -> Iterator[Document]:
        """Yield the documents in order.

        Args:
            root: Folder that relative file names start from.

        Raises:
            UserError: A file cannot be read; the message names file and line, row or byte.
            MissingExtraError: An optional package is absent.
        """

    @property
    def prompted(self) -> bool:
        """True if documents have prompts; by default, if the Config key ``prompt`` is set."""
        return getattr(self.config, "prompt", None) is not None


class PointSource(Plain, ABC):
    """Base class of sources of points, rows of real numbers for a flow. Subclasses implement :meth:`points`."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def points(self, root: Path, generator: np.random.Generator) -> Numbers:
        """Return all rows, float32 [row, ...], two or more.

        Args:
            root: Folder that relative file names start from.
            generator: Source of all random numbers, seeded by ``data.seed``.

        Raises:
            UserError: A file cannot be read.
        """


def read_corpus(corpus: Corpus, *, root: Path) -> list[Document]:
    """Return all documents of ``corpus`` that have text, in order.

    Args:
        corpus: The corpus.
        root: Folder that relative file names start from.

    Raises:
        UserError: A file cannot be read, or the corpus has no text or more than :data:`MAX_BYTES` characters.
        MissingExtraError: An optional package is absent.
    """
    documents, characters = [], 0
    for document in corpus.documents(root):
        # as a row of its own, a document without text would be all padding
        if document.text:
            documents.append(document)
        characters += len(document.text) + len(document.prompt)
        if characters > MAX_BYTES:  # compressed files grow when read
            raise UserError(f"data.corpus: more than {MAX_BYTES >> 30} Gi characters, which is the limit")
    if not documents:
        raise UserError("data.corpus: the corpus has no text")
    return documents
