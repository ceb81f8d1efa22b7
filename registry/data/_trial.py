"""Trial of a ``tokenizer.json`` file, in a child process with limits. Imports nothing of this project.

The ``tokenizers`` library can panic, overflow the stack, or allocate gigabytes for a small file, when it loads one or
when it first encodes a text.
"""

import json
from collections.abc import Iterator
from typing import Any

TRIAL = (
    "The quick brown fox.\nIt's 12:34\t"
    + "a" * 40
    + "!"
    + " " * 20
    + "1" * 40
    + "x é \u0301 ß 你好 \U0001f600 \u2028 \0 <pad> {}"
)
MAX_TOKENS = 256
"""Largest number of tokens, and of characters once normalised, for each character of a text."""


def try_tokenizer(text: str, max_size: int) -> Iterator[dict[str, Any]]:
    """Test a tokenizer in the child process: load it, and encode and decode short texts.

    Args:
        text: Content of the ``tokenizer.json`` file.
        max_size: Exclusive upper bound of token ids.

    Yields:
        One empty mapping, which reports success to the parent process.

    Raises:
        ValueError: An id is out of bounds; or normalising or encoding makes a text more than 256 (:data:`MAX_TOKENS`)
            times as long, or decoding its tokens more than 256^2 times.
        Exception: The library refuses the file.
    """
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(text)
    inner.no_truncation()
    inner.no_padding()
    size = max(inner.get_vocab(with_added_tokens=True).values(), default=0) + 1
    if size > max_size:
        raise ValueError(f"its highest id is {size - 1:,}; the limit is {max_size - 1:,}")
    for piece in ("a", "\u0301", TRIAL):
        limit = MAX_TOKENS * len(piece)
        if inner.normalizer is not None and len(inner.normalizer.normalize_str(piece)) > limit:
            raise ValueError(f"it normalises one character to more than {MAX_TOKENS}")
        try:
            ids = inner.encode(piece, add_special_tokens=False).ids
        except Exception:
            continue
        if len(ids) > limit:
            raise ValueError(f"it makes more than {MAX_TOKENS} tokens of one character")
        if len(inner.decode(ids, skip_special_tokens=False)) > limit * MAX_TOKENS:
            raise ValueError("it decodes a few tokens to a text without bounds")
    json.loads(inner.to_str())
    yield {}
