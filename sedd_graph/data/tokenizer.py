"""Text to tokens and back. The tokenizers themselves are components; this module holds what they have in common. No torch."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from sedd_graph.component.declared import Plain
from sedd_graph.component.registry import installed
from sedd_graph.errors import SeddGraphError, UserError

__all__ = ["FILE", "Ids", "Tokenizer", "TokenizerFactory", "load_tokenizer"]

Ids = npt.NDArray[np.int64]
"""Token ids, int64 [tokens]."""
FILE = "tokenizer.json"
"""The file of a run folder that holds its tokenizer."""
MAX_FILE = 256 * 2**20


class Tokenizer(ABC):
    """A tokenizer that is ready for use."""

    size: int
    """Number of ids."""
    pad: int | None
    """Id of padding, or None."""
    end: int | None = None
    """Id that separates documents in a stream, or None."""
    forbidden: tuple[int, ...]
    """Ids that must never be generated, in order: padding, ids without text, special tokens."""

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the ids of ``text``, int64 [tokens]."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``. Ids without text are skipped; invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def pieces(self) -> list[bytes | None]:
        """Return the UTF-8 bytes of each id, wherever it stands; None for ids without text.

        Raises:
            UserError: The text of a token depends on its neighbours.
        """

    @abstractmethod
    def to_json(self) -> str:
        """Return the content of ``tokenizer.json``: a JSON object, whose key ``kind`` is the op of the component that reads
        it (by :meth:`TokenizerFactory.from_json`); without that key it is a file of the ``tokenizers`` library."""


class TokenizerFactory(Plain, ABC):
    """Makes a tokenizer: trains it on the training text, reads it from a file, or has nothing to learn."""

    abstract: ClassVar[bool] = True
    trained: ClassVar[bool] = False
    """Whether :meth:`make` reads the training text."""
    separates: ClassVar[bool] = False
    """Of one that is trained: whether it will have an end-of-text token."""

    @property
    def size(self) -> int | None:
        """Number of ids, where the Config alone says it, else None."""
        return None

    @abstractmethod
    def make(self, texts: Iterable[str], *, root: Path) -> Tokenizer:
        """Return the tokenizer. The same texts give the same tokenizer.

        Args:
            texts: The training text, in parts; empty where ``trained`` is false.
            root: Folder that relative file names start from.

        Raises:
            UserError: A file cannot be read.
        """

    @classmethod
    @abstractmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Return the tokenizer whose :meth:`Tokenizer.to_json` gave ``text``. Raises :class:`UserError` for other text."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read ``tokenizer.json`` (a file, or the folder that it lies in).

    Raises:
        UserError: The file cannot be read, or holds no tokenizer.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"{path}: larger than {MAX_FILE >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"tokenizer {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    try:
        data = json.loads(text)
        op = data.get("kind", "file") if isinstance(data, dict) else "file"
        cls = installed().component(str(op))
        if not issubclass(cls, TokenizerFactory):
            raise UserError(f"{op!r} is no tokenizer")
        tokenizer: Tokenizer = cls.from_json(text)
    except RecursionError:
        raise UserError(f"{path}: not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    except SeddGraphError as error:
        raise UserError(f"{path}: {error}") from None
    return tokenizer
