"""Index of a folder of shards: its models, and reading it. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from sedd_graph.component.strict import Strict
from sedd_graph.data.characters import CODES
from sedd_graph.errors import UserError
from sedd_graph.inputs.files import read_json

__all__ = ["INDEX", "PARTS", "Index", "Part", "Shard", "TokenizerFacts", "read_index"]

INDEX = "index.json"
"""File name of the index of a folder of shards."""
Part = Literal["tokens", "documents", "characters"]
"""Type of the name of an array of a shard."""
PARTS: tuple[Part, ...] = ("tokens", "documents", "characters")
"""Names of the arrays of a shard, each in the file ``<shard>.<name>.npy``."""

Count = Annotated[int, pydantic.Field(ge=0, le=2**48)]
Hash = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(Strict):
    """Entry of one shard in ``index.json``."""

    name: Annotated[str, pydantic.Field(pattern=r"^[0-9]{5,9}$")]
    """Beginning of the names of its files, such as ``00000``."""
    tokens: Count
    """Number of tokens, separators of documents included."""
    documents: Count
    """Number of documents that end in the shard."""
    characters: Count
    """Number of characters of the text."""
    alphabet: Annotated[int, pydantic.Field(ge=0, le=CODES)]
    """Number of different characters of the text."""
    sha256: Annotated[dict[Part, Hash], pydantic.Field(min_length=3)]
    """SHA-256 of the data of each array, hexadecimal."""


class TokenizerFacts(Strict):
    """Description of the tokenizer that made the tokens, in ``index.json``."""

    sha256: Hash
    """SHA-256 of the file ``tokenizer.json`` in the folder, hexadecimal."""
    size: Annotated[int, pydantic.Field(ge=1, le=2**31)]
    """Number of token ids; ids are in [0, size)."""
    section: Any = None
    """The ``data.tokenizer`` section that it was made from; null if it was read from a file."""


class Index(Strict):
    """Content of ``index.json``, which is written last: a folder without it is not finished."""

    format: Literal[1] = 1
    """Version of the format of the folder."""
    dtype: Literal["uint16", "uint32"]
    """Type of the token ids."""
    tokenizer: TokenizerFacts
    separator: Annotated[list[Annotated[int, pydantic.Field(ge=0, le=2**31)]], pydantic.Field(max_length=64)]
    """Tokens after each document; they are counted in its end."""
    separator_text: Literal["", "\n"] = ""
    """Text of the separator: a line break if the tokenizer has no end-of-text token, else nothing. It is not counted in
    the characters."""
    unit: Literal["document", "line"] = "document"
    """What is a document: a document of the corpus, or one of its lines."""
    text_sha256: Hash
    """SHA-256 of the text, as UTF-8, in which 0xFF follows each document; hexadecimal."""
    shards: Annotated[list[Shard], pydantic.Field(min_length=1, max_length=1_000_000)]
    """The shards, in the order of the text."""


def read_index(path: Path) -> Index:
    """Return the content of an ``index.json`` file.

    Raises:
        UserError: The file cannot be read, or is no index of shards; the message names the first key at fault.
    """
    try:
        found = Index.model_validate(read_json(path))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise UserError(f"{path}: not an index of shards: {where}: {first['msg']}") from None
    names = [shard.name for shard in found.shards]
    if len(set(names)) < len(names) or max(found.separator, default=0) >= found.tokenizer.size:
        raise UserError(f"{path}: not an index of shards: a shard is named twice, or a separator is no token")
    return found
