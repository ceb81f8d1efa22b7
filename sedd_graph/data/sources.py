"""Base classes of text corpora and of sources of real-valued points. Imports no torch."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sedd_graph.component.declared import Plain
from sedd_graph.data.characters import pieces
from sedd_graph.data.shards import Shards
from sedd_graph.errors import UserError

__all__ = ["MAX_BYTES", "Corpus", "Document", "Numbers", "PointSource", "read_corpus"]

MAX_BYTES = 8 * 2**30
"""Size limit of a corpus that is read into memory, in bytes of its files and in characters, and of an array of points,
in bytes."""

Numbers = npt.NDArray[np.float32]
"""Type of an array of points, float32 [point, ...]; the axes after the first are those of one point."""


@dataclasses.dataclass(frozen=True)
class Document:
    """Document of a corpus: a text and, optionally, a prompt before the text."""

    text: str
    prompt: str = ""
    """Text before ``text`` that the network attends to, but that is neither corrupted nor included in the loss."""


class Corpus(Plain, ABC):
    """Base class of corpora: sequences of documents in a fixed order. Subclasses implement :meth:`documents`."""

    abstract: ClassVar[bool] = True
    records: ClassVar[bool] = True
    """True if documents are separate records, such as lines of JSON. With ``data.rows: stream``, an end-of-text token
    (a line break if the tokenizer has no such token) follows each record, and the held-out part begins between two
    records. False for plain text files, which contain their own line breaks."""

    @abstractmethod
    def documents(self, root: Path) -> Iterator[Document]:
        """Yield the documents in their fixed order.

        Args:
            root: Folder to which file names in the Config are relative.

        Raises:
            UserError: A file cannot be read; the message gives the file and the line, row or byte.
            MissingExtraError: An optional package that reads the files is not installed.
        """

    def text(self, root: Path) -> Iterator[tuple[str, bool]]:
        """Yield the text in pieces of at most 4 Mi characters, without prompts; documents without text are skipped.

        Corpora with documents that do not fit into memory override it. The pieces must be those of
        :func:`~sedd_graph.data.characters.pieces`.

        Args:
            root: Folder to which file names in the Config are relative.

        Yields:
            A piece, and whether it is the last of its document.
        """
        for document in self.documents(root):
            waiting: str | None = None
            for piece in pieces(document.text):
                if waiting is not None:
                    yield waiting, False
                waiting = piece
            if waiting is not None:
                yield waiting, True

    def files(self, root: Path) -> list[Path]:
        """Return the files that the corpus reads, in order; none if it does not read files.

        Args:
            root: Folder to which file names in the Config are relative.
        """
        return []

    def shards(self, root: Path) -> Shards | None:
        """Return the tokens of a corpus that is tokenised already; None for a corpus of text.

        Args:
            root: Folder to which file names in the Config are relative.
        """
        return None

    @property
    def repeats(self) -> bool:
        """True if documents repeat others in another form, such as reverse complements of DNA; by default False.

        The end of the corpus cannot be held out then, since the training part would have the same text.
        """
        return False

    @property
    def prompted(self) -> bool:
        """True if the documents have prompts; by default, if the Config has a field ``prompt`` other than None."""
        return getattr(self.config, "prompt", None) is not None


class PointSource(Plain, ABC):
    """Base class of sources of points (vectors of real numbers) for training a flow.

    Subclasses implement :meth:`points`.
    """

    abstract: ClassVar[bool] = True

    @abstractmethod
    def points(self, root: Path, generator: np.random.Generator) -> Numbers:
        """Return all points, float32 [point, ...], at least two.

        Args:
            root: Folder to which file names in the Config are relative.
            generator: Random generator to use for all draws, seeded with ``data.seed``.

        Raises:
            UserError: A file cannot be read.
        """


def read_corpus(corpus: Corpus, *, root: Path) -> list[Document]:
    """Return all documents of ``corpus`` with non-empty text, in order.

    Args:
        corpus: The corpus.
        root: Folder to which file names in the Config are relative.

    Raises:
        UserError: A file cannot be read, the corpus has no text, or its texts and prompts have more than 2^33
            characters (the number :data:`MAX_BYTES`) in all.
        MissingExtraError: An optional package that reads the corpus is not installed.
    """
    if (total := sum(path.stat().st_size for path in corpus.files(root))) > MAX_BYTES:
        raise UserError(
            f"data.corpus.files: {total / 2**30:.1f} GiB in all; the limit of what is read into memory is "
            f"{MAX_BYTES >> 30} GiB: make shards of it with `sedd-graph tokenize`"
        )
    documents, characters = [], 0
    for document in corpus.documents(root):
        # as a row of its own, a document without text would be all padding
        if document.text:
            documents.append(document)
        characters += len(document.text) + len(document.prompt)
        if characters > MAX_BYTES:  # compressed files grow when read
            raise UserError(
                f"data.corpus: more than {MAX_BYTES >> 30} Gi characters, which is the limit of what is read into memory: "
                "make shards of it with `sedd-graph tokenize`"
            )
    if not documents:
        raise UserError("data.corpus: the corpus has no text")
    return documents
