"""Tokenizers: characters, bytes, byte-level BPE, and any tokenizer of the Hugging Face ``tokenizers`` library.

The module does not import torch.
"""

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from sedd_graph.component.contract import ComponentConfig
from sedd_graph.component.progress import progress
from sedd_graph.data.characters import code_points, count_characters, pieces
from sedd_graph.data.tokenizer import Ids, Tokenizer, TokenizerFactory, load_tokenizer
from sedd_graph.errors import UserError
from sedd_graph.inputs.child import first_limited
from sedd_graph.inputs.confine import confined

from ._library import bytes_json, characters_json
from ._trial import try_tokenizer
from ._words import Words, splits_words

MAX_SIZE = 2**21
"""Largest accepted vocabulary size; it prevents a tokenizer file with one huge id from allocating gigabytes."""
TRIAL_MEMORY, TRIAL_CPU_S = 2**30, 8
"""Limits of the memory (bytes) and of the processor time (seconds) of a trial. Each character of the file adds 16 bytes,
and each MiB a second."""
CANNOT_READ = "the tokenizers library cannot read it"
MAX_WORD = 256
"""Largest number of bytes of a word in the training of BPE, whose time grows with the square of it."""
PADS = ("<pad>", "[PAD]", "<|padding|>")
ENDS = ("<|endoftext|>", "</s>", "[SEP]")


class Characters(Tokenizer):
    """Character tokenizer: one id per character of ``alphabet``, id 0 for all others; the last id is padding.

    Args:
        alphabet: The characters with ids 1, 2, ..., in ascending order of code points.
        size: Vocabulary size, at least ``len(alphabet) + 2``; ids between the alphabet and padding are unused.
    """

    def __init__(self, alphabet: str, size: int) -> None:
        self.alphabet, self.size, self.pad = alphabet, size, size - 1
        self.forbidden = (0, *range(len(alphabet) + 1, size))
        codes = code_points(alphabet)
        # the last entry is for all code points above the highest of the alphabet
        self._table = np.zeros(int(codes.max(initial=0)) + 2, dtype=np.int64)
        self._table[codes] = np.arange(1, len(alphabet) + 1)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "Characters":
        """Return a character tokenizer whose alphabet is the ``size - 2`` most frequent characters of a text.

        Args:
            texts: The training text, in pieces.
            size: Vocabulary size, at least 3.
        """
        counts = count_characters(texts)
        seen = np.flatnonzero(counts)
        # stable, so that of equally frequent characters the lower code points are selected
        kept = seen[np.argsort(-counts[seen], kind="stable")][: size - 2]
        return cls("".join(map(chr, sorted(kept.tolist()))), size)

    def encode(self, text: str) -> Ids:
        return self._table[np.minimum(code_points(text), len(self._table) - 1)]

    def decode(self, ids: Iterable[int]) -> str:
        characters = "\N{REPLACEMENT CHARACTER}" + self.alphabet
        return "".join(characters[i] for i in ids if 0 <= i < len(characters))

    def pieces(self) -> list[bytes | None]:
        characters = [character.encode("utf-8", "surrogatepass") for character in self.alphabet]
        return [None, *characters, *[None] * (self.size - 1 - len(characters))]

    def to_json(self) -> str:
        return json.dumps({"kind": "characters", "size": self.size, "alphabet": self.alphabet}, ensure_ascii=True)

    def library_json(self) -> str:
        return characters_json(self.alphabet, self.size)


class CharactersFactory(TokenizerFactory, kind="tokenizer"):
    """Character tokenizer for a given alphabet, or for the ``size - 2`` most frequent characters of the training text.

    One more token stands for all other characters, and one is padding.
    """

    trained = True

    class Config(ComponentConfig):
        size: Annotated[int, pydantic.Field(ge=3, le=65536)] = 128
        """Vocabulary size, the two special tokens included, from 3 to 65,536; unused if ``alphabet`` is given."""
        alphabet: Annotated[str, pydantic.Field(min_length=1, max_length=65534)] | None = None
        """The characters, each once, such as ``ACGTN``; the vocabulary has two tokens more. null: the most frequent ones
        of the training text."""

        @pydantic.field_validator("alphabet")
        @classmethod
        def _each_once(cls, alphabet: str | None) -> str | None:
            if alphabet is not None and len(set(alphabet)) < len(alphabet):
                twice = next(character for character in alphabet if alphabet.count(character) > 1)
                raise ValueError(f"the alphabet has {twice!r} twice; give each character once")
            return alphabet

    config: Config

    @property
    def size(self) -> int:
        return self.config.size if self.config.alphabet is None else len(self.config.alphabet) + 2

    def make(self, texts: Iterable[str], *, root: Path) -> Tokenizer:
        if self.config.alphabet is not None:
            return Characters("".join(sorted(self.config.alphabet)), self.size)
        return Characters.train(texts, self.config.size)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        data = json.loads(text)
        alphabet, size = data.get("alphabet"), data.get("size")
        if not (isinstance(alphabet, str) and isinstance(size, int) and len(alphabet) + 2 <= size <= 2**20):
            raise UserError("a tokenizer of characters needs 'alphabet' and a 'size' of at least its length plus 2")
        if len(set(alphabet)) < len(alphabet):
            raise UserError("'alphabet' has a character twice")
        return Characters(alphabet, size)


class Bytes(Tokenizer):
    """Byte tokenizer: ids 0 to 255 are the bytes of UTF-8, and id 256 is padding."""

    size, pad, forbidden = 257, 256, (256,)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def pieces(self) -> list[bytes | None]:
        return [*(bytes([i]) for i in range(256)), None]

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes"})

    def library_json(self) -> str:
        return bytes_json(_byte_characters(), self.pad)


class BytesFactory(TokenizerFactory, kind="tokenizer"):
    """Byte tokenizer: one token per byte of UTF-8, and padding; 257 tokens."""

    class Config(ComponentConfig):
        pass

    size = Bytes.size

    def make(self, texts: Iterable[str], *, root: Path) -> Tokenizer:
        return Bytes()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        return Bytes()


class HuggingFace(Tokenizer):
    """Adapter of a tokenizer of the Hugging Face ``tokenizers`` library.

    Args:
        inner: The ``tokenizers.Tokenizer``; its truncation and padding are switched off in place.

    Raises:
        ValueError: ``inner`` has no tokens, or an id of :data:`MAX_SIZE` or more.
    """

    def __init__(self, inner: Any) -> None:
        # a file may set a fixed length, to which every text would be truncated or padded
        inner.no_truncation()
        inner.no_padding()
        used = set(inner.get_vocab(with_added_tokens=True).values())
        if not used:
            raise ValueError("it has no tokens")
        self.inner, self.size = inner, max(used) + 1
        self._words: Words | Literal[False] | None = None  # made when first used
        if self.size > MAX_SIZE:
            raise ValueError(f"its highest id is {self.size - 1:,}; the limit is {MAX_SIZE - 1:,}")
        self.pad = next((p for p in map(inner.token_to_id, PADS) if p is not None), None)
        ends = [e for e in map(inner.token_to_id, ENDS) if e is not None]
        self.end = ends[0] if ends else None
        special = {i for i, token in inner.get_added_tokens_decoder().items() if token.special}
        self._silent = set(range(self.size)) - used | ({self.pad} if self.pad is not None else set())
        # an end-of-text token separates documents and may be generated
        self.forbidden = tuple(sorted(self._silent | (special - set(ends))))

    def encode(self, text: str) -> Ids:
        _require_characters(text)
        with _library_faults(f"the tokenizer cannot encode {text[:40]!r}"):
            return np.asarray(self.inner.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        if self._words is None:
            self._words = Words(self.inner) if splits_words(self.inner) else False
        if self._words is False:
            return [self.encode(text) for text in texts]
        found = []
        for text in texts:
            _require_characters(text)
            with _library_faults(f"the tokenizer cannot encode {text[:40]!r}"):
                found.append(self._words.encode(text) if text else np.zeros(0, np.int64))
        return found

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if 0 <= i < self.size and i not in self._silent]
        with _library_faults("the tokenizer cannot decode these tokens"):
            text: str = self.inner.decode(kept, skip_special_tokens=False)
        return text

    def pieces(self) -> list[bytes | None]:
        decoder = (json.loads(self.inner.to_str()).get("decoder") or {}).get("type")
        if decoder != "ByteLevel":
            raise UserError(
                f"the tokenizer decodes by {decoder or 'words'!r}, where the text of a token depends on its neighbours; "
                "tokenizers of characters, of bytes and of byte-level BPE work"
            )
        known = _byte_characters()

        def spelled(token: str) -> bytes:
            return bytes(known[c] for c in token) if all(c in known for c in token) else token.encode()

        found = ((i, self.inner.id_to_token(i)) for i in range(self.size))
        return [None if token is None or i in self._silent else spelled(token) for i, token in found]

    def to_json(self) -> str:
        text: str = self.inner.to_str()
        return text

    library_json = to_json


def _require_characters(text: str) -> None:
    try:
        text.encode()  # the library raises a TypeError without the position
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"the text has a lone surrogate, U+{code:04X}, which is not a character") from None


@contextlib.contextmanager
def _library_faults(what: str) -> Iterator[None]:
    """Context manager that converts exceptions and panics of the ``tokenizers`` library to :class:`UserError`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # KeyboardInterrupt
        advice = "; give it an unknown token" if "unk" in str(error).lower() else ""
        raise UserError(f"{what}: {error}{advice}") from None


@functools.lru_cache(maxsize=8)
def _tried(text: str) -> None:
    """Load the tokenizer in a child process first. Raises :class:`UserError` if that fails."""
    memory, cpu_s = TRIAL_MEMORY + 16 * len(text), TRIAL_CPU_S + len(text) // 2**20
    silence_s = 60.0 + 10 * cpu_s
    first_limited(try_tokenizer, text, MAX_SIZE, what=CANNOT_READ, memory=memory, silence_s=silence_s, cpu_s=cpu_s)


def _byte_characters() -> dict[str, int]:
    """Return the bytes by the characters that represent them in byte-level BPE.

    As in GPT-2, printable bytes represent themselves and the others are U+0100 and following.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}


class TokenizerFile(TokenizerFactory, kind="tokenizer"):
    """Tokenizer loaded from a ``tokenizer.json`` file that the ``tokenizers`` library or sedd_graph has written."""

    class Config(ComponentConfig):
        path: Annotated[str, pydantic.Field(min_length=1, max_length=1024)]
        """Path of the ``tokenizer.json`` file, relative to the blueprint's folder."""

    config: Config

    def make(self, texts: Iterable[str], *, root: Path) -> Tokenizer:
        return load_tokenizer(confined(self.config.path, root, what="data.tokenizer.path"))

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        import tokenizers

        _tried(text)
        with _library_faults(CANNOT_READ):
            return HuggingFace(tokenizers.Tokenizer.from_str(text))


class Bpe(TokenizerFactory, kind="tokenizer"):
    """Byte-level BPE tokenizer (arXiv 1508.07909), fitted to the training text, with padding and end-of-text tokens."""

    trained = separates = True

    class Config(ComponentConfig):
        size: Annotated[int, pydantic.Field(ge=258, le=1_000_000)] = 4096
        """Vocabulary size, the two special tokens included, from 258 to 1,000,000."""

    config: Config

    @property
    def size(self) -> int:
        return self.config.size

    def make(self, texts: Iterable[str], *, root: Path) -> Tokenizer:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        inner = tokenizers.Tokenizer(models.BPE())
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        # text without blanks, such as DNA, is one word; pieces of it have the same pairs but for one in MAX_WORD
        piece = pre_tokenizers.Split(tokenizers.Regex(f".{{1,{MAX_WORD}}}"), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([words, piece])
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.size,
            special_tokens=["<pad>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        with progress("reading text for BPE", total=None, unit="character") as advance:

            def counted() -> Iterator[str]:
                for text in texts:
                    for part in pieces(text):
                        yield part
                        advance(len(part))

            inner.train_from_iterator(counted(), trainer)
        inner.pre_tokenizer = words
        return HuggingFace(inner)

    from_json = TokenizerFile.from_json


class Pretrained(TokenizerFactory, kind="tokenizer"):
    """Tokenizer of the weights that a run starts from (``--from``): their token ids have a meaning under it alone."""

    of_weights = True

    class Config(ComponentConfig):
        pass

    def make(self, texts: Iterable[str], *, root: Path) -> Tokenizer:
        raise UserError(
            "data.tokenizer: {op: pretrained} is the tokenizer of weights that a run starts from: name them with --from, "
            "a run folder or a folder with a tokenizer.json or a GGUF file"
        )

    from_json = TokenizerFile.from_json
