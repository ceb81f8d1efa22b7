"""Protocols of published tables of likelihoods: the text, how it becomes rows, and what is counted.

Each follows the public code of a paper. A perplexity can stand beside a published one only if all of this is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from sedd_graph.data.batches import Documents, Stream
from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import Dataset
from sedd_graph.data.tokenizer import Ids, Tokenizer
from sedd_graph.errors import UserError, suggest
from sedd_graph.evaluation.detokenize import DETOKENIZERS

__all__ = ["PROTOCOLS", "KnownTokenizer", "TableProtocol", "find_protocol", "protocol_rows", "require_tokenizer"]


@dataclasses.dataclass(frozen=True)
class KnownTokenizer:
    """Tokenizer that a protocol counts tokens of, and how it is recognised.

    Attributes:
        name: Its name.
        size: Number of its tokens; a tokenizer with tokens added after them, such as padding, is accepted.
        begin: Token before a row with a frame; None if rows have none.
        end: Token after each document, and after a row with a frame; None if there is none.
        probes: Texts and the ids that it must encode them to.
    """

    name: str
    size: int
    begin: int | None
    end: int | None
    probes: tuple[tuple[str, tuple[int, ...]], ...]


GPT2 = KnownTokenizer(
    "gpt2", 50257, 50256, 50256, (("Hello world", (15496, 995)), (" the", (262,)), ("<|endoftext|>", (50256,)))
)
BERT = KnownTokenizer("bert-base-uncased", 30522, 101, 102, (("hello world", (7592, 2088)), ("The", (1996,))))
LETTERS = "abcdefghijklmnopqrstuvwxyz "


@dataclasses.dataclass(frozen=True)
class TableProtocol:
    """How one column of a published table is computed.

    Attributes:
        name: Name of the protocol.
        source: Paper and code that it follows.
        part: The text, in words.
        documents: Number of documents that the files must hold; None if their content is checked otherwise (text8).
        of: Number of documents of the whole data set, of which the last :attr:`documents` are taken; None if the files
            hold these alone.
        field: Field of a record with the text.
        detokenizer: Name of the function that each document is passed through (:mod:`sedd_graph.evaluation.detokenize`).
        tokenizer: Tokenizer of the table; None for single characters.
        length: Tokens per row.
        rows: ``cut``: documents, each followed by the end token, are joined and cut into rows. ``framed``: they are cut
            into rows of two tokens fewer, between a beginning and an end token. ``padded``: one document per row, between
            these tokens, cut or padded.
        group: Number of documents that are joined at a time; what is left at the end of a group is dropped. None: all.
        unit: Unit of the table: ``bits_per_character`` or ``perplexity``.
    """

    name: str
    source: str
    part: str
    documents: int | None
    length: int
    tokenizer: KnownTokenizer | None = GPT2
    of: int | None = None
    field: str = "text"
    detokenizer: str = "none"
    rows: Literal["cut", "framed", "padded"] = "framed"
    group: int | None = 1000
    unit: Literal["bits_per_character", "perplexity"] = "perplexity"
    keep_breaks: bool = False
    """True if a line of a text file keeps its line break, as rows of WikiText do."""

    def facts(self) -> dict[str, Any]:
        """Return the protocol as JSON values, for the record of an evaluation."""
        facts = dataclasses.asdict(self)
        facts["tokenizer"] = "characters" if self.tokenizer is None else self.tokenizer.name
        begin, end = (None, None) if self.tokenizer is None else (self.tokenizer.begin, self.tokenizer.end)
        facts["row"] = {
            "cut": "tokens of joined documents" + (", the end token after each document" if end is not None else ""),
            "framed": f"token {begin}, {self.length - 2} tokens of joined documents with token {end} after each, token {end}",
            "padded": f"token {begin}, a document cut to {self.length - 2} tokens, token {end}, padding",
        }[self.rows]
        facts["counted"] = "every token of a row but padding; beginning and end tokens are counted"
        facts["context"] = "none: rows are independent, and do not overlap"
        return facts


_MDLM, _SEDD = "MDLM (arXiv 2406.07524), its public code", "SEDD (arXiv 2310.16834), its public code"
_SETS: tuple[tuple[str, str, int, str, str, bool], ...] = (
    # name, text, documents, field, detokenizer, lines keep their breaks
    ("wikitext2", "WikiText-2 raw, validation", 3760, "text", "wikitext", True),
    ("wikitext103", "WikiText-103 raw, validation", 3760, "text", "wikitext", True),
    ("ptb", "Penn Treebank, validation", 3370, "sentence", "ptb", False),
    ("lambada", "LAMBADA of OpenAI, test", 5153, "text", "lambada", False),
    ("lm1b-gpt2", "One Billion Words, test", 306_688, "text", "lm1b", False),
    ("ag_news", "AG News, test", 7600, "text", "none", False),
    ("pubmed", "Scientific Papers of PubMed, validation", 6633, "article", "scientific_papers", False),
    ("arxiv", "Scientific Papers of arXiv, validation", 6436, "article", "scientific_papers", False),
)
_IN_SEDD = ("wikitext2", "wikitext103", "ptb", "lambada", "lm1b-gpt2")


def _zero_shot() -> Iterator[TableProtocol]:
    for name, part, documents, field, detokenizer, breaks in _SETS:
        made = TableProtocol(
            name, f"{_MDLM}, zero-shot", part, documents, 1024, field=field, detokenizer=detokenizer, keep_breaks=breaks
        )
        yield made
        if name in _IN_SEDD:
            yield dataclasses.replace(made, name=f"{name}-sedd", source=f"{_SEDD}, zero-shot", rows="cut")


PROTOCOLS: dict[str, TableProtocol] = {
    protocol.name: protocol
    for protocol in (
        TableProtocol(
            "text8",
            "D3PM (arXiv 2107.03006), SEDD (arXiv 2310.16834)",
            "text8, the last 5 million characters",
            None,
            256,
            tokenizer=None,
            rows="cut",
            group=None,
            unit="bits_per_character",
        ),
        TableProtocol(
            "lm1b",
            _MDLM,
            "One Billion Words, test",
            306_688,
            128,
            tokenizer=BERT,
            detokenizer="lm1b",
            rows="padded",
            group=None,
        ),
        TableProtocol(
            "lm1b-packed",
            f"{_MDLM}, with data.wrap; Duo (arXiv 2506.10892)",
            "One Billion Words, test",
            306_688,
            128,
            tokenizer=BERT,
            detokenizer="lm1b",
        ),
        TableProtocol("openwebtext", _MDLM, "OpenWebText, the last 100,000 documents", 100_000, 1024, of=8_013_769),
        *_zero_shot(),
    )
}
"""All protocols by name."""


def find_protocol(name: str) -> TableProtocol:
    """Return the protocol called ``name``. Raises :class:`UserError` if there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}{suggest(name, PROTOCOLS)}; one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def require_tokenizer(protocol: TableProtocol, tokenizer: Tokenizer) -> None:
    """Raise :class:`UserError` if ``tokenizer`` is not the one whose tokens the protocol counts."""
    known = protocol.tokenizer
    if known is None:
        ids = tokenizer.encode(LETTERS)
        if (
            len(ids) != len(LETTERS)
            or len(set(ids.tolist())) < len(ids)
            or set(ids.tolist()) & set(tokenizer.forbidden)
        ):
            raise UserError(
                f"protocol {protocol.name!r} counts characters: the run's tokenizer does not have one token for each of the "
                "27 characters of text8"
            )
        return
    wrong = next((text for text, ids in known.probes if tuple(tokenizer.encode(text).tolist()) != ids), None)
    if tokenizer.size < known.size or wrong is not None:
        raise UserError(
            f"protocol {protocol.name!r} counts tokens of {known.name}; the run has another tokenizer, of "
            f"{tokenizer.size:,} tokens, and perplexities per token of different tokenizers cannot be compared"
        )


def protocol_rows(
    protocol: TableProtocol, texts: Sequence[str], tokenizer: Tokenizer, config: DataConfig
) -> tuple[Dataset, dict[str, int]]:
    """Return the rows of a protocol as the held-out part of a data set, and how many tokens they have or leave out.

    Args:
        protocol: The protocol.
        texts: The documents, as they are in the files.
        tokenizer: The tokenizer of the run.
        config: The ``data`` section of the run.

    Raises:
        UserError: The text has fewer tokens than a row, or ``padded`` rows need a padding token that the tokenizer does
            not have.
    """
    clean = [DETOKENIZERS[protocol.detokenizer](text) for text in texts]
    parts = tokenizer.encode_many(clean)
    tokens = sum(map(len, parts))
    source = _padded(protocol, parts, tokenizer) if protocol.rows == "padded" else _joined(protocol, parts)
    counted = (
        int(source.take(np.arange(source.count), 0).loss.sum()) if isinstance(source, Documents) else len(source.tokens)
    )
    characters = sum(map(len, clean))
    rows = "documents" if protocol.rows == "padded" else "stream"
    data = Dataset(
        config.model_copy(update={"length": protocol.length, "rows": rows}),
        tokenizer,
        source,
        source,
        characters_per_token=characters / max(1, tokens if protocol.tokenizer is None else tokens + len(parts)),
        unigram_bits=None,
        heldout_entropy_bits=None,
    )
    return data, {"documents": len(texts), "tokens": tokens, "rows": source.count, "counted_tokens": counted}


def _joined(protocol: TableProtocol, parts: Sequence[Ids]) -> Stream:
    """Return rows cut from documents that are joined in groups."""
    known = protocol.tokenizer
    begin, end = ([], []) if known is None else ([known.begin], [known.end])
    framed = protocol.rows == "framed"
    width = protocol.length - 2 if framed else protocol.length
    size = protocol.group or max(1, len(parts))
    rows = []
    for first in range(0, len(parts), size):
        group = [np.concatenate([part, np.array(end, np.int64)]) for part in parts[first : first + size]]
        joined = np.concatenate(group)
        cut = joined[: len(joined) // width * width].reshape(-1, width)
        if framed:
            before, after = (np.full((len(cut), 1), token, np.int64) for token in (*begin, *end))
            cut = np.concatenate([before, cut, after], axis=1)
        rows.append(cut)
    found = np.concatenate(rows) if rows else np.zeros((0, protocol.length), np.int64)
    if not len(found):
        raise UserError(f"protocol {protocol.name!r}: the text has fewer tokens than a row of {protocol.length:,}")
    return Stream(found.reshape(-1).astype(np.uint32), protocol.length, shifted=False)


def _padded(protocol: TableProtocol, parts: Sequence[Ids], tokenizer: Tokenizer) -> Documents:
    """Return one row for each document, between a beginning and an end token."""
    known, pad = protocol.tokenizer, tokenizer.pad
    if known is None or pad is None:
        raise UserError(f"protocol {protocol.name!r} needs a tokenizer with a padding token")
    frame = np.array([known.begin]), np.array([known.end])
    rows = [np.concatenate([frame[0], part[: protocol.length - 2], frame[1]]) for part in parts]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    tokens = np.concatenate(rows).astype(np.uint32)
    return Documents(tokens, starts, np.zeros(len(rows), np.int64), protocol.length, pad)
