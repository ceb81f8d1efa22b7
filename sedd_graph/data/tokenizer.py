"""Base classes of tokenizers and of the components that make them, and reading of ``tokenizer.json``. No torch."""

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
"""Name of the tokenizer's file in a run folder."""
MAX_FILE = 256 * 2**20
"""Largest tokenizer file that is read, bytes."""


class Tokenizer(ABC):
    """Base class of tokenizers, which convert text to token ids and back."""

    size: int
    """Number of ids."""
    pad: int | None
    """Id of the padding token, or None."""
    end: int | None = None
    """Id of the end-of-text token, which separates documents in a stream, or None."""
    forbidden: tuple[int, ...]
    """Ids that must never be generated, in ascending order: padding, ids without text, special tokens."""

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the token ids of ``text``, int64 [tokens]."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``. Ids without text are skipped; invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def pieces(self) -> list[bytes | None]:
        """Return the UTF-8 bytes of each id, in order; None for ids without text.

        Raises:
            UserError: The bytes of a token depend on its neighbours.
        """

    @abstractmethod
    def to_json(self) -> str:
        """Return the content of ``tokenizer.json``, a JSON object.

        Its key ``kind`` is the op of the component whose :meth:`TokenizerFactory.from_json` reads it; without that key it is a
        file of the ``tokenizers`` library.
        """


class TokenizerFactory(Plain, ABC):
    """Base class of components that make a tokenizer: train it, read it from a file, or construct it."""

    abstract: ClassVar[bool] = True
    trained: ClassVar[bool] = False
    """True if :meth:`make` reads the training text."""
    separates: ClassVar[bool] = False
    """True if the trained tokenizer will have an end-of-text token; unused if ``trained`` is false."""

    @property
    def size(self) -> int | None:
        """Number of ids if the Config determines it, else None."""
        return None

    @abstractmethod
    def make(self, texts: Iterable[str], *, root: Path) -> Tokenizer:
        """Return the tokenizer. The same texts give the same tokenizer.

        Args:
            texts: The training text, in parts; empty if ``trained`` is false.
            root: Folder that relative file names start from.

        Raises:
            UserError: A file cannot be read.
        """

    @classmethod
    @abstractmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Return the tokenizer whose :meth:`Tokenizer.to_json` returned ``text``. Raises :class:`UserError` for other text."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from ``path``, its file or the folder of its ``tokenizer.json``.

    Raises:
        UserError: The file cannot be read, or is not that of a tokenizer.
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
            raise UserError(f"the component {op!r} is not a tokenizer")
        tokenizer: Tokenizer = cls.from_json(text)
        return tokenizer
    except RecursionError:
        raise UserError(f"{path}: not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    except SeddGraphError as error:
        raise UserError(f"{path}: {error}") from None
