"""Base classes of what data comes from: corpora of text and sources of points. No torch."""

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
"""Largest corpus or array that is read."""

Numbers = npt.NDArray[np.float32]
"""Rows of points, float32 [row, ...]."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and the prompt before it, which is attended to, but neither corrupted nor counted."""

    text: str
    prompt: str = ""


class Corpus(Plain, ABC):
    """Documents of text, in an order that never changes. Subclasses implement :meth:`documents`."""

    abstract: ClassVar[bool] = True
    records: ClassVar[bool] = True
    """Documents are separate records: in a stream each ends with a line break where the tokenizer has no end-of-text token,
    and none is cut in two at the held-out part. False for files, whose text carries its own line breaks."""

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
        """Whether documents have prompts: by default, whether the Config has a key ``prompt`` that is set."""
        return getattr(self.config, "prompt", None) is not None


class PointSource(Plain, ABC):
    """Rows of real numbers for a flow. Subclasses implement :meth:`points`."""

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

    Raises:
        UserError: The corpus has no text, or more than :data:`MAX_BYTES` characters; and as :meth:`Corpus.documents` does.
    """
    documents, held = [], 0
    for document in corpus.documents(root):
        # as a row of its own, a document without text would be all padding
        if document.text:
            documents.append(document)
        held += len(document.text) + len(document.prompt)
        if held > MAX_BYTES:  # compressed files grow when read
            raise UserError(
                f"data.corpus: more than {MAX_BYTES >> 30} Gi characters, which is the limit of this reader"
            )
    if not documents:
        raise UserError("data.corpus: there is no text in it")
    return documents
