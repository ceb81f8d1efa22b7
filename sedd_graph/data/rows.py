"""Documents to rows of tokens with roles, in an order that is a function of the seed and one integer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedd_graph.data.config import DataConfig
from sedd_graph.data.corpus import Document, read_corpus
from sedd_graph.data.tokenizer import Ids, Tokenizer, make_tokenizer
from sedd_graph.errors import UserError

__all__ = ["Dataset", "Rows", "open_data"]

Flags = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Rows:
    """``tokens`` int64 [b, l]; roles bool [b, l]: attend, corrupt, loss (see docs/data.md)."""

    tokens: Ids
    attend: Flags
    corrupt: Flags
    loss: Flags


@dataclasses.dataclass
class _Stream:
    """One long row of tokens, cut into rows of ``length`` at a phase that changes from epoch to epoch."""

    tokens: npt.NDArray[np.unsignedinteger]
    length: int

    def rows_at(self, phase: int) -> int:
        return (len(self.tokens) - phase) // self.length

    @property
    def count(self) -> int:
        """Rows in every epoch, whatever its phase."""
        return max(1, (len(self.tokens) - self.length + 1) // self.length)

    def take(self, index: Ids, phase: int) -> Rows:
        starts = phase + index * self.length
        tokens = self.tokens[starts[:, None] + np.arange(self.length)].astype(np.int64)
        every = np.ones(tokens.shape, dtype=np.bool_)
        return Rows(tokens, every, every, every)


@dataclasses.dataclass
class _Documents:
    """One document a row, padded or cut; a prompt is attended to and nothing else."""

    tokens: Ids
    prompt: Ids
    lengths: Ids

    @property
    def count(self) -> int:
        return len(self.tokens)

    def take(self, index: Ids, phase: int) -> Rows:
        tokens = self.tokens[index]
        place = np.arange(tokens.shape[1])
        attend = place < self.lengths[index][:, None]
        counted = attend & (place >= self.prompt[index][:, None])
        return Rows(tokens, attend, counted, counted)


@dataclasses.dataclass
class Dataset:
    """A corpus as rows: training rows by position, held-out rows in order."""

    config: DataConfig
    tokenizer: Tokenizer
    train: _Stream | _Documents
    heldout: _Stream | _Documents
    characters_per_token: float
    """Of the held-out text: turns nats per token into bits per character."""
    unigram_bits: float
    """Bits per character of the held-out text under the training text's character frequencies (add-one smoothing)."""

    def batch(self, position: int, rows: int, *, start: int = 0, stop: int | None = None) -> Rows:
        """Rows ``start`` to ``stop`` of the global batch of ``rows`` that begins at row ``position`` of the endless order.

        A pure function of the seed and its arguments: any split of a batch over processes sees the same rows.
        """
        count = self.train.count
        wanted = np.arange(position + start, position + (rows if stop is None else stop))
        parts = []
        for epoch in range(int(wanted[0]) // count, int(wanted[-1]) // count + 1):
            generator = np.random.Generator(np.random.Philox(key=[self.config.seed, epoch]))
            longest = len(self.train.tokens) - count * self.config.length if isinstance(self.train, _Stream) else 0
            phase = int(generator.integers(0, min(self.config.length, longest + 1)))
            order = generator.permutation(count)
            mine = wanted[(wanted >= epoch * count) & (wanted < (epoch + 1) * count)] - epoch * count
            parts.append(self.train.take(order[mine], phase))
        if len(parts) == 1:
            return parts[0]
        return Rows(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Rows)))

    def held_out(self, rows: int, *, batches: int | None = None) -> Iterator[Rows]:
        """The held-out rows in order; ``batches`` takes so many, spread evenly over all of them."""
        total = math.ceil(self.heldout.count / rows)
        chosen = range(total) if batches is None or batches >= total else np.linspace(0, total - 1, batches).astype(int)
        for number in chosen:
            first = int(number) * rows
            yield self.heldout.take(np.arange(first, min(first + rows, self.heldout.count)), 0)


def open_data(config: DataConfig, *, root: Path, tokenizer: Tokenizer | None = None) -> Dataset:
    """Read the corpus, make (or take) the tokenizer, and cut rows. Raises :class:`UserError`."""
    documents = read_corpus(config.corpus, root=root)
    if config.rows == "stream" and any(d.prompt for d in documents):
        raise UserError("data.corpus.prompt needs data.rows 'documents'")
    training, held = _hold_out(documents, config)
    tokenizer = tokenizer or make_tokenizer(config.tokenizer, (d.prompt + d.text for d in training), root=root)
    if config.rows == "documents":
        if tokenizer.pad is None:
            raise UserError("data.rows 'documents' needs a tokenizer with a padding token (such as '<pad>')")
        train: _Stream | _Documents = _pad(training, tokenizer, config.length)
        heldout: _Stream | _Documents = _pad(held, tokenizer, config.length)
        counted = int((heldout.lengths - heldout.prompt).sum())  # type: ignore[union-attr]
    else:
        train, heldout = (_stream(part, tokenizer, config.length) for part in (training, held))
        counted = len(heldout.tokens)
        for name, part in (("training", train), ("held-out", heldout)):
            if len(part.tokens) < config.length:
                raise UserError(
                    f"the {name} text has {len(part.tokens)} tokens, fewer than one row of data.length = {config.length}"
                )
    characters = sum(len(d.text) for d in held)
    if config.rows == "documents":
        characters = max(1, round(characters * counted / max(1, sum(len(tokenizer.encode(d.text)) for d in held))))
    return Dataset(config, tokenizer, train, heldout, characters / max(1, counted), _unigram_bits(training, held))


def _hold_out(documents: list[Document], config: DataConfig) -> tuple[list[Document], list[Document]]:
    """The last part of the corpus, by characters in a stream and by documents otherwise."""
    if config.rows == "documents":
        if len(documents) < 2:
            raise UserError("data.rows 'documents' needs at least two documents, one of them to hold out")
        kept = min(len(documents) - 1, max(1, round(len(documents) * (1 - config.holdout))))
        return documents[:kept], documents[kept:]
    text = "".join(d.text for d in documents)
    cut = round(len(text) * (1 - config.holdout))
    return [Document(text[:cut])], [Document(text[cut:])]


def _stream(documents: list[Document], tokenizer: Tokenizer, length: int) -> _Stream:
    kind = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    # pieces, so that a large text is not held several times over as Python integers
    pieces = [tokenizer.encode(piece).astype(kind) for d in documents for piece in _pieces(d.text, 4 * 2**20)]
    return _Stream(np.concatenate(pieces) if pieces else np.zeros(0, kind), length)


def _pieces(text: str, size: int) -> Iterator[str]:
    """``text`` in pieces of about ``size`` characters, cut before a space so that words stay whole."""
    start = 0
    while start < len(text):
        stop = min(len(text), start + size)
        if stop < len(text):
            space = text.rfind(" ", start + 1, stop)
            stop = space if space > start else stop
        yield text[start:stop]
        start = stop


def _pad(documents: list[Document], tokenizer: Tokenizer, length: int) -> _Documents:
    tokens = np.full((len(documents), length), tokenizer.pad, dtype=np.int64)
    prompts, lengths = np.zeros(len(documents), np.int64), np.zeros(len(documents), np.int64)
    for row, document in enumerate(documents):
        prompt = tokenizer.encode(document.prompt)[: length - 1] if document.prompt else np.zeros(0, np.int64)
        ids = np.concatenate([prompt, tokenizer.encode(document.text)])[:length]
        tokens[row, : len(ids)], prompts[row], lengths[row] = ids, len(prompt), len(ids)
    return _Documents(tokens, prompts, lengths)


def _unigram_bits(training: list[Document], held: list[Document]) -> float:
    def counts(documents: list[Document]) -> npt.NDArray[np.float64]:
        total = np.zeros(0x110000, dtype=np.int64)
        for d in documents:
            codes = np.frombuffer(d.text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
            total += np.bincount(codes, minlength=total.size)
        return total.astype(np.float64)

    seen, new = counts(training), counts(held)
    alphabet = (seen > 0) | (new > 0)
    chance = (seen[alphabet] + 1) / (seen[alphabet] + 1).sum()
    return float(-(new[alphabet] * np.log2(chance)).sum() / max(1.0, new.sum()))
