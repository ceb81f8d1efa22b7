"""Training rows of tokens cut from documents, with masks for attention, corruption and loss. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedd_graph.component.progress import progress, track
from sedd_graph.data.characters import count_characters, cross_entropy_bits, entropy_bits, pieces
from sedd_graph.data.config import DataConfig
from sedd_graph.data.order import Ordered, Units
from sedd_graph.data.sources import Document, read_corpus
from sedd_graph.data.tokenizer import Ids, Tokenizer
from sedd_graph.errors import UserError

__all__ = ["Dataset", "Rows", "open_data"]

Flags = npt.NDArray[np.bool_]
Packed = npt.NDArray[np.unsignedinteger]
"""Type of the token ids of a whole corpus, uint16 or uint32 [tokens] to save memory; the ids in a batch are int64."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Batch of rows of tokens with masks, as NumPy arrays. Axes: b rows in the batch, l tokens per row."""

    tokens: Ids
    """Token ids, int64 [b, l]."""
    attend: Flags
    """Attention mask, bool [b, l]: true at positions that are not padding."""
    corrupt: Flags
    """Corruption mask, bool [b, l]: true at positions that the forward process may corrupt."""
    loss: Flags
    """Loss mask, bool [b, l]: true at positions that are included in the loss."""


@dataclasses.dataclass
class _Stream:
    """One long sequence of tokens, cut into rows of ``length``.

    With ``shifted`` the first cut (the phase) changes from epoch to epoch, so that rows begin at every offset in time;
    otherwise it is always 0. Fewer than ``length`` tokens (``2 * length`` with ``shifted``) at the end are unused.
    """

    tokens: Packed
    length: int
    shifted: bool

    @property
    def count(self) -> int:
        """Rows per epoch, the same for every phase."""
        usable = len(self.tokens) - self.length + 1 if self.shifted else len(self.tokens)
        return max(1, usable // self.length)

    @property
    def phases(self) -> int:
        """Number of offsets of the first row, in tokens, at which ``count`` rows fit."""
        return min(self.length, len(self.tokens) - self.count * self.length + 1) if self.shifted else 1

    def take(self, index: Ids, phase: int) -> Rows:
        starts = phase + index * self.length
        tokens = self.tokens[starts[:, None] + np.arange(self.length)].astype(np.int64)
        return Rows(tokens, *(np.ones(tokens.shape, dtype=np.bool_) for _ in range(3)))


@dataclasses.dataclass
class _Documents:
    """One document per row, padded or truncated. Its prompt is attended to, but neither corrupted nor counted.

    Document i is ``tokens[starts[i] : starts[i + 1]]``, of which the first ``prompts[i]`` are the prompt.
    """

    tokens: Packed
    starts: Ids
    prompts: Ids
    length: int
    pad: int
    phases = 1

    @property
    def count(self) -> int:
        return len(self.prompts)

    def take(self, index: Ids, phase: int) -> Rows:
        position = np.arange(self.length)
        first = self.starts[index][:, None]
        attend = position < self.starts[index + 1][:, None] - first
        tokens = np.where(attend, self.tokens[np.minimum(first + position, len(self.tokens) - 1)], self.pad)
        counted = attend & (position >= self.prompts[index][:, None])
        return Rows(tokens.astype(np.int64), attend, counted, counted.copy())


@dataclasses.dataclass
class Dataset(Ordered[Rows]):
    """Data set of a text corpus: its tokenizer, training rows and held-out rows."""

    config: DataConfig
    tokenizer: Tokenizer
    train: _Stream | _Documents
    heldout: _Stream | _Documents
    characters_per_token: float
    """Mean number of characters per token of the held-out text without prompts, which converts nats per token to bits
    per character."""
    unigram_bits: float
    """Cross-entropy of the held-out text under the character frequencies of the training text, in bits per
    character."""
    heldout_entropy_bits: float
    """Entropy of the character frequencies of the held-out text itself, in bits per character."""

    def fingerprint(self) -> str:
        """Return the first 16 hexadecimal digits of the SHA-256 of all tokens, training and held-out.

        Unless ``data.rows`` is ``stream``, the boundaries of documents and prompts are hashed as well.
        """
        found = hashlib.sha256()
        for part in (self.train, self.heldout):
            arrays = [part.tokens] if isinstance(part, _Stream) else [part.tokens, part.starts, part.prompts]
            for array in arrays:
                found.update(f"{array.dtype.str} {len(array)};".encode())
                found.update(array.tobytes())
        return found.hexdigest()[:16]

    def describe(self) -> str:
        """Return one line of text for the user: number and length of rows, characters per token, unigram entropy."""
        return (
            f"{self.train.count:,} training rows and {self.heldout.count:,} held-out rows of {self.width} tokens, "
            f"{self.characters_per_token:.2f} characters per token; unigram entropy of the held-out text "
            f"{self.unigram_bits:.3f} bits per character"
        )

    def record(self) -> dict[str, object]:
        """Return the description of the data that is saved with the results of an evaluation, as JSON values by key.

        The keys are ``corpus``, the :meth:`fingerprint`; ``length``, the tokens per row; and ``rows`` and ``holdout``,
        the settings of these names in the ``data`` section.
        """
        rows = {"rows": self.config.rows, "holdout": self.config.holdout}
        return {"corpus": self.fingerprint(), "length": self.width, **rows}

    def baselines(self) -> dict[str, float]:
        """Return ``unigram_bits`` and ``heldout_entropy_bits`` by name, bits per character.

        They are baselines with which the model's likelihood bound on the held-out text is compared.
        """
        return {"unigram_bits": self.unigram_bits, "heldout_entropy_bits": self.heldout_entropy_bits}

    @property
    def units(self) -> Units:
        """Units in which the loss is reported: nats per token, bits per character, and mean characters per token."""
        return Units("token", "character", self.characters_per_token)

    @property
    def width(self) -> int:
        """Number of tokens per row."""
        return self.config.length


def open_data(config: DataConfig, *, root: Path, tokenizer: Tokenizer | None = None) -> Dataset:
    """Read the corpus of a ``data`` section, make its tokenizer, and cut the text into training and held-out rows.

    Args:
        config: The ``data`` section.
        root: Folder to which file names in the blueprint are relative.
        tokenizer: Existing tokenizer to use, such as that of a run; None makes the tokenizer of the ``data`` section.

    Raises:
        UserError: The corpus cannot be read or has too little text, or ``data.rows`` needs a padding token that the
            tokenizer does not have.
        MissingExtraError: An optional package that reads the corpus is not installed.
    """
    documents = read_corpus(config.corpus, root=root)
    if config.rows != "documents" and any(d.prompt for d in documents):
        raise UserError("data.corpus.prompt needs data.rows 'documents'")
    if config.rows == "lines":
        documents = [Document(line.strip()) for d in documents for line in d.text.splitlines() if line.strip()]
    factory, records = config.tokenizer, config.corpus.records
    if tokenizer is None and not factory.trained:
        tokenizer = factory.make((), root=root)
    ends = tokenizer.end is not None if tokenizer is not None else factory.separates
    if records and config.rows == "stream" and not ends:
        # without a separator, records would run together; files have their own line breaks
        documents = [Document(d.text + "\n") for d in documents]
    training, held = _hold_out(documents, config, whole=records)
    del documents  # so that a large text is not in memory twice
    if tokenizer is None:
        tokenizer = factory.make((d.prompt + d.text for d in training), root=root)
    cut = _stream if config.rows == "stream" else _pad
    train, _ = cut(training, tokenizer, config, "training")
    heldout, tokens = cut(held, tokenizer, config, "held-out")
    counts = count_characters(d.text for d in held)
    return Dataset(
        config,
        tokenizer,
        train,
        heldout,
        characters_per_token=int(counts.sum()) / tokens,
        unigram_bits=cross_entropy_bits(counts, under=count_characters(d.text for d in training)),
        heldout_entropy_bits=entropy_bits(counts),
    )


def _hold_out(documents: list[Document], config: DataConfig, *, whole: bool) -> tuple[list[Document], list[Document]]:
    """Split the corpus into training text and held-out text at its end: by characters for a stream, else by documents.

    ``whole`` moves the cut of a stream to the nearest end of a document, if that holds out half to twice the requested
    share.
    """
    if config.rows != "stream":
        if len(documents) < 2:
            raise UserError(f"data.rows {config.rows!r} needs at least two {config.rows}, one of them to hold out")
        split = min(len(documents) - 1, max(1, round(len(documents) * (1 - config.holdout))))
        return documents[:split], documents[split:]
    ends = np.cumsum([len(d.text) for d in documents])
    cut = round(int(ends[-1]) * (1 - config.holdout))
    if whole and len(documents) > 1:
        nearest = int(ends[:-1][np.argmin(np.abs(ends[:-1] - cut))])
        requested = int(ends[-1]) - cut
        cut = nearest if requested / 2 <= int(ends[-1]) - nearest <= requested * 2 else cut
    split = int(np.searchsorted(ends, cut))  # the document that contains the cut, or ends at it
    within = cut - (int(ends[split - 1]) if split else 0)
    first, second = documents[split].text[:within], documents[split].text[within:]
    return (
        [*documents[:split], *([Document(first)] if first else [])],
        [*([Document(second)] if second else []), *documents[split + 1 :]],
    )


def _packed(parts: Iterable[Ids], tokenizer: Tokenizer) -> Packed:
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    return np.concatenate([np.zeros(0, dtype), *(part.astype(dtype) for part in parts)])


def _stream(documents: list[Document], tokenizer: Tokenizer, config: DataConfig, name: str) -> tuple[_Stream, int]:
    """Join the documents. Returns the rows and the number of tokens."""

    def parts() -> Iterator[Ids]:
        characters = sum(len(document.text) for document in documents)
        with progress("tokenising", total=characters, unit="character") as advance:
            for number, document in enumerate(documents):
                if number and tokenizer.end is not None:
                    yield np.array([tokenizer.end], dtype=np.int64)
                for piece in pieces(document.text):
                    yield tokenizer.encode(piece)
                    advance(len(piece))

    tokens = _packed(parts(), tokenizer)
    if len(tokens) < config.length:
        raise UserError(
            f"the {name} text has {len(tokens)} tokens, fewer than one row of data.length = {config.length}"
        )
    return _Stream(tokens, config.length, shifted=name == "training"), len(tokens)


def _pad(documents: list[Document], tokenizer: Tokenizer, config: DataConfig, name: str) -> tuple[_Documents, int]:
    """Truncate or pad each document.

    Returns the rows and the number of tokens of the texts before they are truncated.
    """
    if (pad := tokenizer.pad) is None:
        raise UserError(f"data.rows {config.rows!r} needs a tokenizer with a padding token (such as '<pad>')")
    length = config.length
    prompts: list[int] = []
    lengths: list[int] = []
    total = 0

    def parts() -> Iterator[Ids]:
        nonlocal total
        for document in track(documents, "tokenising", unit="document"):
            text = tokenizer.encode(document.text)
            total += len(text)
            if len(text):  # white space may have no tokens
                prompt = tokenizer.encode(document.prompt)[: length - 1]
                prompts.append(len(prompt))
                lengths.append(min(length, len(prompt) + len(text)))
                yield prompt
                yield text[: length - len(prompt)]

    tokens = _packed(parts(), tokenizer)
    if not prompts:
        raise UserError(f"the {name} documents have no tokens")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return _Documents(tokens, starts, np.asarray(prompts, np.int64), length, pad), total
