"""Forms of our own tokenizers in the ``tokenizers`` library, for export. The module does not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["bytes_json", "characters_json"]

_EVERY = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}


def _special(index: int, content: str) -> dict[str, Any]:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **off, "special": True}


def _text(model: Mapping[str, Any], pad: int, before: Mapping[str, Any], decoder: Mapping[str, Any]) -> str:
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                *([_special(0, unknown)] if (unknown := model.get("unk_token")) else []),
                _special(pad, "[PAD]"),
            ],
            "normalizer": None,
            "pre_tokenizer": before,
            "post_processor": None,
            "decoder": decoder,
            "model": model,
        }
    )


def characters_json(alphabet: str, size: int) -> str:
    """Return a tokenizer of characters: ids from 1 for the characters of ``alphabet``, 0 for others, the last is padding."""
    unknown = "[UNK]" if "\N{REPLACEMENT CHARACTER}" in alphabet else "\N{REPLACEMENT CHARACTER}"
    vocab = {unknown: 0, **{character: i for i, character in enumerate(alphabet, start=1)}, "[PAD]": size - 1}
    return _text({"type": "WordLevel", "vocab": vocab, "unk_token": unknown}, size - 1, _EVERY, {"type": "Fuse"})


def bytes_json(spelled: Mapping[str, int], pad: int) -> str:
    """Return a tokenizer of bytes.

    Args:
        spelled: Bytes by the characters that stand for them in byte-level BPE.
        pad: Id of padding.
    """
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {**spelled, "[PAD]": pad},
        "merges": [],
    }
    return _text(model, pad, level, level)
