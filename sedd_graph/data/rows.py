"""Data set of a text corpus: rows of tokens cut from documents, or from shards of tokens. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from sedd_graph.component.progress import progress, track
from sedd_graph.data.batches import Documents, Packed, Rows, Stream, TokenSource
from sedd_graph.data.cached import TokenCache, cache_key, documents_digest, sources_of, tokenised
from sedd_graph.data.characters import count_characters, cross_entropy_bits, entropy_bits, pieces
from sedd_graph.data.config import DataConfig
from sedd_graph.data.order import Ordered, Units
from sedd_graph.data.sharded import Part, ShardDocuments, ShardStream, cut_shards, tokenizer_of, whole
from sedd_graph.data.shards import Shards
from sedd_graph.data.sources import Document, read_corpus
from sedd_graph.data.tokenizer import Ids, Tokenizer
from sedd_graph.errors import UserError

__all__ = ["Dataset", "Rows", "open_data"]


@dataclasses.dataclass
class Dataset(Ordered[Rows]):
    """Data set of a text corpus: its tokenizer, training rows and held-out rows."""

    config: DataConfig
    tokenizer: Tokenizer
    train: TokenSource
    heldout: TokenSource
    characters_per_token: float
    """Mean number of characters per token of the held-out text without prompts, which converts nats per token to bits
    per character."""
    unigram_bits: float | None
    """Cross-entropy of the held-out text under the character frequencies of the training text, in bits per
    character; None where these are not known (a held-out part that begins within a shard)."""
    heldout_entropy_bits: float | None
    """Entropy of the character frequencies of the held-out text itself, in bits per character; None as above."""

    def fingerprint(self) -> str:
        """Return the first 16 hexadecimal digits of the SHA-256 of all tokens, training and held-out.

        Unless ``data.rows`` is ``stream``, the boundaries of documents and prompts are hashed as well. Of shards, the
        hashes in their index are hashed instead.
        """
        found = hashlib.sha256()
        for part in (self.train, self.heldout):
            part.update(found)
        return found.hexdigest()[:16]

    def describe(self) -> str:
        """Return one line of text for the user: number and length of rows, characters per token, unigram entropy."""
        text = (
            f"{self.train.count:,} training rows and {self.heldout.count:,} held-out rows of {self.width} tokens, "
            f"{self.characters_per_token:.2f} characters per token"
        )
        if self.unigram_bits is None:
            return text
        return f"{text}; unigram entropy of the held-out text {self.unigram_bits:.3f} bits per character"

    def record(self) -> dict[str, object]:
        """Return the description of the data that is saved with the results of an evaluation, as JSON values by key.

        The keys are ``corpus``, the :meth:`fingerprint`; ``length``, the tokens per row; and ``rows`` and ``holdout``,
        the settings of these names in the ``data`` section.
        """
        rows = {"rows": self.config.rows, "holdout": self.config.holdout}
        return {"corpus": self.fingerprint(), "length": self.width, **rows}

    def baselines(self) -> dict[str, float]:
        """Return ``unigram_bits`` and ``heldout_entropy_bits`` by name, bits per character; nothing if not known.

        They are baselines with which the model's likelihood bound on the held-out text is compared.
        """
        if self.unigram_bits is None or self.heldout_entropy_bits is None:
            return {}
        return {"unigram_bits": self.unigram_bits, "heldout_entropy_bits": self.heldout_entropy_bits}

    @property
    def units(self) -> Units:
        """Units in which the loss is reported: nats per token, bits per character, and mean characters per token."""
        return Units("token", "character", self.characters_per_token)

    @property
    def width(self) -> int:
        """Number of tokens per row."""
        return self.config.length


def open_data(
    config: DataConfig, *, root: Path, tokenizer: Tokenizer | None = None, cache: TokenCache | None = None
) -> Dataset:
    """Read the corpus of a ``data`` section, make its tokenizer, and cut the text into training and held-out rows.

    Args:
        config: The ``data`` section.
        root: Folder to which file names in the blueprint are relative.
        tokenizer: Existing tokenizer to use, such as that of a run; None makes the tokenizer of the ``data`` section.
        cache: Where the tokens of a text corpus are kept, so that equal text is not tokenised again.

    Raises:
        UserError: The corpus cannot be read or has too little text, or ``data.rows`` needs a padding token that the
            tokenizer does not have.
        MissingExtraError: An optional package that reads the corpus is not installed.
    """
    shards = config.corpus.shards(root)
    held = None if config.heldout is None else config.heldout.shards(root)
    if shards is None and held is None:
        return _open_text(config, root, tokenizer, cache)
    if shards is None or (held is None and config.heldout is not None):
        raise UserError("data.heldout and data.corpus are either both text, or both tokens in shards")
    return _open_shards(config, root, tokenizer, shards, held)


def _open_text(config: DataConfig, root: Path, tokenizer: Tokenizer | None, cache: TokenCache | None) -> Dataset:
    """Read a corpus of text into memory, or its tokens from the cache."""
    corpora = [config.corpus] if config.heldout is None else [config.corpus, config.heldout]
    factory, records = config.tokenizer, config.corpus.records
    if tokenizer is None and not factory.trained:
        tokenizer = factory.make((), root=root)
    if cache is not None and tokenizer is not None and cache.holds():
        key = cache_key(config, tokenizer, [documents_digest(corpus.documents(root)) for corpus in corpora])
        kept = cache.load(key)
        sources = None if kept is None else sources_of(kept, config, tokenizer)
        if kept is not None and sources is not None:
            return _dataset(config, tokenizer, *sources, kept.numbers)
    read = [read_corpus(corpus, root=root) for corpus in corpora]
    digests = [] if cache is None else [documents_digest(documents) for documents in read]
    if config.rows != "documents" and any(d.prompt for documents in read for d in documents):
        raise UserError("data.corpus.prompt needs data.rows 'documents'")
    if config.rows == "lines":
        read = [
            [Document(x.strip()) for d in documents for x in d.text.splitlines() if x.strip()] for documents in read
        ]
    ends = tokenizer.end is not None if tokenizer is not None else factory.separates
    if config.rows == "stream" and not ends:
        # without a separator, records would run together; files have their own line breaks
        read = [
            [Document(d.text + "\n") for d in documents] if corpus.records else documents
            for corpus, documents in zip(corpora, read, strict=True)
        ]
    training, held = _hold_out(read[0], config, whole=records) if len(read) == 1 else read
    del read  # so that a large text is not in memory twice
    if tokenizer is None:
        tokenizer = factory.make((d.prompt + d.text for d in training), root=root)
    cut = _stream if config.rows == "stream" else _pad
    train, _ = cut(training, tokenizer, config, "training")
    heldout, tokens = cut(held, tokenizer, config, "held-out")
    counts = count_characters(d.text for d in held)
    numbers = {
        "characters_per_token": int(counts.sum()) / tokens,
        "unigram_bits": cross_entropy_bits(counts, under=count_characters(d.text for d in training)),
        "heldout_entropy_bits": entropy_bits(counts),
    }
    if cache is not None:
        cache.save(cache_key(config, tokenizer, digests), tokenised(train, heldout, numbers))
    return _dataset(config, tokenizer, train, heldout, numbers)


def _dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    train: Stream | Documents,
    heldout: Stream | Documents,
    numbers: Mapping[str, float],
) -> Dataset:
    return Dataset(
        config,
        tokenizer,
        train,
        heldout,
        characters_per_token=numbers["characters_per_token"],
        unigram_bits=numbers["unigram_bits"],
        heldout_entropy_bits=numbers["heldout_entropy_bits"],
    )


def _open_shards(
    config: DataConfig, root: Path, given: Tokenizer | None, shards: Shards, held: Shards | None
) -> Dataset:
    """Open the shards of a corpus, and those of the held-out corpus if there are any."""
    if config.rows == "lines":
        raise UserError("data.rows 'lines' is for text: tokenise with --lines, and set data.rows to 'documents'")
    tokenizer = tokenizer_of(shards, config, root, given)
    if held is not None:
        held.require_tokenizer(tokenizer)
    parts = cut_shards(shards, config.holdout) if held is None else (whole(shards), whole(held))
    pad = tokenizer.pad
    if config.rows == "documents" and pad is None:
        raise UserError(f"data.rows {config.rows!r} needs a tokenizer with a padding token (such as '<pad>')")

    def source(part: Part, name: str) -> ShardStream | ShardDocuments:
        if config.rows == "documents" and pad is not None:
            return ShardDocuments(part, config.length, pad)
        found = ShardStream(part, config.length, shifted=name == "training")
        if found.tokens < config.length:
            raise UserError(_too_short(name, found.tokens, config.length))
        return found

    train, heldout = source(parts[0], "training"), source(parts[1], "held-out")
    under, counts = (part.counts(separators=config.rows == "stream") for part in parts)
    return Dataset(
        config,
        tokenizer,
        train,
        heldout,
        characters_per_token=heldout.characters / max(1, heldout.tokens),
        unigram_bits=None if under is None or counts is None else cross_entropy_bits(counts, under=under),
        heldout_entropy_bits=None if under is None or counts is None else entropy_bits(counts),
    )


def _too_short(name: str, tokens: int, length: int) -> str:
    return f"the {name} text has {tokens} tokens, fewer than one row of data.length = {length}"


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


def _stream(documents: list[Document], tokenizer: Tokenizer, config: DataConfig, name: str) -> tuple[Stream, int]:
    """Join the documents. Returns the rows and the number of tokens."""

    def parts() -> Iterator[Ids]:
        characters = sum(len(document.text) for document in documents)
        with progress("tokenising", total=characters, unit="character") as advance:
            for number, document in enumerate(documents):
                if number and tokenizer.end is not None:
                    yield np.array([tokenizer.end], dtype=np.int64)
                for piece in pieces(document.text):
                    yield tokenizer.encode_many([piece])[0]
                    advance(len(piece))

    tokens = _packed(parts(), tokenizer)
    if len(tokens) < config.length:
        raise UserError(_too_short(name, len(tokens), config.length))
    return Stream(tokens, config.length, shifted=name == "training"), len(tokens)


def _pad(documents: list[Document], tokenizer: Tokenizer, config: DataConfig, name: str) -> tuple[Documents, int]:
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
    return Documents(tokens, starts, np.asarray(prompts, np.int64), length, pad), total
