"""Text to tokens and back: characters, bytes, or the ``tokenizers`` library, behind one small class.

A tokenizer also says which of its tokens must never be generated: padding, ids that no text has, and special tokens.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_graph.data.config import BpeConfig, BytesConfig, CharactersConfig, FileTokenizerConfig, TokenizerConfig
from sedd_graph.data.letters import code_points, count_letters, pieces
from sedd_graph.errors import UserError

__all__ = ["Tokenizer", "load_tokenizer", "make_tokenizer"]

Ids = npt.NDArray[np.int64]
FILE = "tokenizer.json"
MAX_FILE = 256 * 2**20
MAX_SIZE = 2**21
"""More tokens than any tokenizer in use: a file is not believed when one id would cost gigabytes."""
PADS = ("<pad>", "[PAD]", "<|padding|>")
ENDS = ("<|endoftext|>", "</s>", "[SEP]")


class Tokenizer(ABC):
    """``size`` ids; ``pad`` is one of them or None, and so is ``end``, which separates documents in a stream;
    ``forbidden`` lists, in order, the ids that must never be generated."""

    size: int
    pad: int | None
    end: int | None = None
    forbidden: tuple[int, ...]

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """int64 [tokens]."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; ids of no text come out as nothing, broken bytes as U+FFFD."""

    @abstractmethod
    def pieces(self) -> list[bytes | None]:
        """The bytes of UTF-8 that each id stands for, wherever it stands; None for ids of no text.

        Raises :class:`UserError` where what a token stands for depends on its neighbours.
        """

    @abstractmethod
    def to_json(self) -> str:
        """What :func:`load_tokenizer` reads back."""


class Characters(Tokenizer):
    """Id 0 stands for every character outside the alphabet, the last id is padding."""

    def __init__(self, alphabet: str, size: int) -> None:
        self.alphabet, self.size, self.pad = alphabet, size, size - 1
        self.forbidden = (0, *range(len(alphabet) + 1, size))
        codes = code_points(alphabet)
        # the last entry of the table is for every code point beyond the alphabet's highest
        self._table = np.zeros(int(codes.max(initial=0)) + 2, dtype=np.int64)
        self._table[codes] = np.arange(1, len(alphabet) + 1)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> Characters:
        counts = count_letters(texts)
        seen = np.flatnonzero(counts)
        # a stable sort: of characters equally frequent, the lower code point comes first
        kept = seen[np.argsort(-counts[seen], kind="stable")][: size - 2]
        return cls("".join(map(chr, sorted(kept.tolist()))), size)

    def encode(self, text: str) -> Ids:
        return self._table[np.minimum(code_points(text), len(self._table) - 1)]

    def decode(self, ids: Iterable[int]) -> str:
        letters = "\N{REPLACEMENT CHARACTER}" + self.alphabet
        return "".join(letters[i] for i in ids if 0 <= i < len(letters))

    def pieces(self) -> list[bytes | None]:
        letters = [letter.encode("utf-8", "surrogatepass") for letter in self.alphabet]
        return [None, *letters, *[None] * (self.size - 1 - len(letters))]

    def to_json(self) -> str:
        return json.dumps({"kind": "characters", "size": self.size, "alphabet": self.alphabet}, ensure_ascii=True)


class Bytes(Tokenizer):
    """UTF-8 bytes, then padding."""

    size, pad, forbidden = 257, 256, (256,)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def pieces(self) -> list[bytes | None]:
        return [*(bytes([i]) for i in range(256)), None]

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})


class HuggingFace(Tokenizer):
    """A ``tokenizers.Tokenizer``."""

    def __init__(self, inner: Any) -> None:
        # a file may ask for rows of a fixed length, which would cut every text to it; rows are made elsewhere
        inner.no_truncation()
        inner.no_padding()
        used = set(inner.get_vocab(with_added_tokens=True).values())
        if not used:
            raise ValueError("it has no tokens")
        self.inner, self.size = inner, max(used) + 1
        if self.size > MAX_SIZE:
            raise ValueError(f"its highest id is {self.size - 1:,}; ids up to {MAX_SIZE - 1:,} are taken")
        self.pad = next((p for p in map(inner.token_to_id, PADS) if p is not None), None)
        ends = [e for e in map(inner.token_to_id, ENDS) if e is not None]
        self.end = ends[0] if ends else None
        special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        # an end-of-text token is text's own separator, and may come out; padding never may, special or not
        barred = (special - set(ends)) | ({self.pad} if self.pad is not None else set())
        self.forbidden = tuple(sorted((set(range(self.size)) - used) | barred))
        self._silent = set(range(self.size)) - used | ({self.pad} if self.pad is not None else set())

    def encode(self, text: str) -> Ids:
        try:
            text.encode()  # the library's own complaint is a TypeError that says nothing
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise UserError(f"the text has a lone surrogate, U+{code:04X}, which is no character") from None
        return np.asarray(self.inner.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if 0 <= i < self.size and i not in self._silent]
        text: str = self.inner.decode(kept, skip_special_tokens=False)
        return text

    def pieces(self) -> list[bytes | None]:
        decoder = (json.loads(self.inner.to_str()).get("decoder") or {}).get("type")
        if decoder != "ByteLevel":
            raise UserError(
                f"the tokenizer puts text together by its decoder {decoder or 'of words'!r}, under which a token has no text of its "
                "own; those of characters, of bytes and of byte-level BPE have"
            )
        known = _byte_letters()

        def spelled(token: str) -> bytes:
            return bytes(known[c] for c in token) if all(c in known for c in token) else token.encode()

        found = ((i, self.inner.id_to_token(i)) for i in range(self.size))
        return [None if token is None or i in self._silent else spelled(token) for i, token in found]

    def to_json(self) -> str:
        text: str = self.inner.to_str()
        return text


def _byte_letters() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes (GPT-2's): printable ones themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}


def _from_text(text: str, where: str) -> Tokenizer:
    try:
        data = json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "characters":
        alphabet, size = data.get("alphabet"), data.get("size")
        if not (isinstance(alphabet, str) and isinstance(size, int) and len(alphabet) + 2 <= size <= 2**20):
            raise UserError(f"{where}: a tokenizer of characters needs 'alphabet' and a 'size' that holds it")
        if len(set(alphabet)) < len(alphabet):
            raise UserError(f"{where}: a character is twice in 'alphabet'")
        return Characters(alphabet, size)
    if kind == "bytes":
        return Bytes()
    import tokenizers

    try:
        return HuggingFace(tokenizers.Tokenizer.from_str(text))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{where}: the tokenizers library cannot read it: {error}") from None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read ``tokenizer.json`` (a file, or the folder it lies in). Raises :class:`UserError`."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        if path.stat().st_size > MAX_FILE:
            raise UserError(f"{path}: larger than {MAX_FILE >> 20} MiB")
        return _from_text(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"tokenizer {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str], *, root: Path) -> Tokenizer:
    """The tokenizer that ``config`` asks for, trained on ``texts`` where it is one that is trained.

    The same texts give the same tokenizer. Raises :class:`UserError` where a file cannot be read.
    """
    if isinstance(config, CharactersConfig):
        return Characters.train(texts, config.size)
    if isinstance(config, BytesConfig):
        return Bytes()
    if isinstance(config, FileTokenizerConfig):
        return load_tokenizer(root / config.path)
    assert isinstance(config, BpeConfig)
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.size,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return HuggingFace(inner)
