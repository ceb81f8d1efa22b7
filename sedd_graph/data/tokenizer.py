"""Base classes of tokenizers and of the components that make them, and a loader of ``tokenizer.json``.

Imports no torch.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sedd_graph.component.declared import Plain
from sedd_graph.component.registry import installed
from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.inputs.files import read_text

__all__ = ["FILE", "Ids", "Tokenizer", "TokenizerFactory", "load_tokenizer", "parse_tokenizer"]

Ids = npt.NDArray[np.int64]
"""Type of an array of token ids, int64."""
FILE = "tokenizer.json"
"""File name of the tokenizer in a run folder."""
MAX_FILE = 256 * 2**20
"""Size limit of a tokenizer file, in bytes."""


class Tokenizer(ABC):
    """Base class of tokenizers, which convert text to token ids and back."""

    size: int
    """Number of token ids; ids are in [0, size)."""
    pad: int | None
    """Id of the padding token; None if the tokenizer has no such token."""
    end: int | None = None
    """Id of the end-of-text token, which separates documents in a stream; None if the tokenizer has no such token."""
    forbidden: tuple[int, ...]
    """Ids that samplers must never generate, in ascending order: padding, special tokens and ids without text."""

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the token ids of ``text``, int64 [tokens]."""

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        """Return the token ids of each of ``texts``, as :meth:`encode` does; override it if that is faster."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids. Ids without text are skipped; invalid UTF-8 is replaced by U+FFFD."""

    @abstractmethod
    def pieces(self) -> list[bytes | None]:
        """Return the UTF-8 bytes of each token, indexed by id; None for an id without text.

        Raises:
            UserError: The bytes of a token depend on the tokens beside it, so that it has no fixed bytes.
        """

    @abstractmethod
    def to_json(self) -> str:
        """Return the tokenizer as a JSON object, the content of ``tokenizer.json``.

        The value of the key ``kind`` is the name of the component whose :meth:`TokenizerFactory.from_json` reads the
        JSON text. A JSON object without the key has the format of the ``tokenizers`` library.
        """

    def library_json(self) -> str | None:
        """Return the tokenizer in the format of the ``tokenizers`` library, for export; None if it has no such form.

        Ids are the same. By default there is no such form.
        """
        return None


class TokenizerFactory(Plain, ABC):
    """Base class of components that make a tokenizer: train one, read one from a file, or construct one."""

    abstract: ClassVar[bool] = True
    trained: ClassVar[bool] = False
    """True if :meth:`make` trains the tokenizer on the training text."""
    separates: ClassVar[bool] = False
    """True if the tokenizer that :meth:`make` trains has an end-of-text token. Data sets need to know this before they
    train the tokenizer. Unused if ``trained`` is false."""
    of_weights: ClassVar[bool] = False
    """True if the tokenizer is that of the weights that a run starts from, so that :meth:`make` is not called."""

    @property
    def size(self) -> int | None:
        """Number of token ids if it follows from the Config, else None."""
        return None

    @abstractmethod
    def make(self, texts: Iterable[str], *, root: Path) -> Tokenizer:
        """Make and return the tokenizer. The result is deterministic: equal texts give equal tokenizers.

        Args:
            texts: Texts of the training documents; empty if ``trained`` is false.
            root: Folder to which file names in the Config are relative.

        Raises:
            UserError: A file cannot be read.
        """

    @classmethod
    @abstractmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Return the tokenizer that :meth:`Tokenizer.to_json` converted to ``text``.

        Raises:
            UserError: ``text`` is not the JSON of such a tokenizer.
        """


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from a file.

    Args:
        path: The file, or a folder that contains ``tokenizer.json``.

    Raises:
        UserError: The file cannot be read or does not contain a tokenizer.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    return parse_tokenizer(read_text(path, limit=MAX_FILE), where=str(path))


def parse_tokenizer(text: str, *, where: str) -> Tokenizer:
    """Return the tokenizer that a JSON text describes.

    Args:
        text: Content of a ``tokenizer.json``.
        where: Name of the file that it comes from, for messages.

    Raises:
        UserError: The text does not describe a tokenizer.
    """
    try:
        data = json.loads(text)
        op = data.get("kind", "file") if isinstance(data, dict) else "file"
        cls = installed().component(str(op))
        if not issubclass(cls, TokenizerFactory):
            raise UserError(f"the component {op!r} is not a tokenizer")
        tokenizer: Tokenizer = cls.from_json(text)
        return tokenizer
    except RecursionError:
        raise UserError(f"{where}: not JSON: nested too deeply") from None
    except ValueError as error:  # also an integer of thousands of digits
        raise UserError(f"{where}: not JSON: {error}") from None
    except SeddGraphError as error:
        raise UserError(f"{where}: {error}") from None
