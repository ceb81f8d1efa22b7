"""Byte-level BPE of whole texts by the words in them, each of which is encoded once. The module does not import torch.

The ``tokenizers`` library encodes about a megabyte a second on a core, and most words of a text have occurred before.
"""

import json
import re
from typing import Any

import numpy as np

from sedd_graph.data.tokenizer import Ids

BLANKS = " \\t\\n\\r"
OTHERS = "\\x0b\\x0c\\x1c-\\x1f\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
WORD = re.compile(f"[{BLANKS}]*(?:[^{BLANKS}]+|(?<=[{OTHERS}])[{BLANKS}]+)*")
"""A word: blanks and what follows them up to the next blank. Where it ends, GPT-2's pattern always begins a new token: a
token of that pattern has white space only at its start. A blank that follows other white space belongs to the same run."""
MAX_WORDS = 2**20
"""Largest number of words that are kept; then all are forgotten."""
MAX_KEPT = 64
"""Longest word that is kept, in characters."""


class Words:
    """Cache of the token ids of words.

    Args:
        inner: A ``tokenizers.Tokenizer`` for which :func:`splits_words` is true.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._forget()

    def _forget(self) -> None:
        self._numbers = _Numbers()
        self._starts, self._sizes = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._ids = np.zeros(0, np.int64)

    def encode(self, text: str) -> Ids:
        """Return the token ids of a text, int64 [tokens]."""
        if len(self._starts) > MAX_WORDS:
            self._forget()
        words = WORD.findall(text)
        found = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        if new := self._numbers.take():
            try:
                self._add(new)
            except BaseException:
                self._forget()  # words have numbers, but no tokens
                raise
        sizes = self._sizes[found]
        ends = np.cumsum(sizes)
        return self._ids[np.repeat(self._starts[found] - (ends - sizes), sizes) + np.arange(int(ends[-1]))]

    def _add(self, words: list[str]) -> None:
        """Encode new words, whose numbers follow those of the known ones."""
        parts = [code.ids for code in self._inner.encode_batch_fast(words, add_special_tokens=False)]
        sizes = np.fromiter(map(len, parts), np.int64, len(parts))
        flat = np.fromiter((i for part in parts for i in part), np.int64, int(sizes.sum()))
        self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(sizes) - sizes])
        self._sizes, self._ids = np.concatenate([self._sizes, sizes]), np.concatenate([self._ids, flat])


class _Numbers(dict[str, int]):
    """Numbers of words, in the order in which the words are first looked up."""

    def __init__(self) -> None:
        super().__init__()
        self._new: list[str] = []
        self._count = 0

    def __missing__(self, word: str) -> int:
        self[word] = self._count
        self._count += 1
        self._new.append(word)
        return self[word]

    def take(self) -> list[str]:
        """Return the words numbered since the last call. The long ones are forgotten, which occur hardly again."""
        new, self._new = self._new, []
        for word in new:
            if len(word) > MAX_KEPT:
                del self[word]
        return new


def splits_words(inner: Any) -> bool:
    """Return whether a tokenizer encodes each word of :data:`WORD` independently of its neighbours.

    That is so for byte-level BPE with GPT-2's pattern alone, unless the tokenizer normalises text, adds a space before it,
    or has an added token that takes in white space.

    Args:
        inner: A ``tokenizers.Tokenizer``.
    """
    facts = json.loads(inner.to_str())
    before, model = facts.get("pre_tokenizer") or {}, facts.get("model") or {}
    plain = (
        before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space")
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and facts.get("normalizer") is None
    )
    return plain and all(
        not (
            token.get("lstrip") or token.get("rstrip") or token.get("single_word") or re.search(r"\s", token["content"])
        )
        for token in facts.get("added_tokens") or ()
    )
