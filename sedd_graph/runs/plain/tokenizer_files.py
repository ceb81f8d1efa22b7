"""Tokenizer files of an exported model, for the transformers library: with a mask token of the model's id."""

from __future__ import annotations

import json
from typing import Any

from sedd_graph.data.tokenizer import FILE, Tokenizer
from sedd_graph.errors import UserError

__all__ = ["tokenizer_files"]

MASKS = ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>")
"""Names of the mask token; the first that is not in use is taken."""


def tokenizer_files(tokenizer: Tokenizer | None, *, mask: int | None, length: int | None) -> dict[str, str]:
    """Return the text of ``tokenizer.json`` and ``tokenizer_config.json``; none without a tokenizer.

    Args:
        tokenizer: Tokenizer of the run.
        mask: Id of the mask state; None without one.
        length: Tokens per row; None if unknown.

    Raises:
        UserError: The tokenizer has no form in the ``tokenizers`` library, or no room for the mask.
    """
    if tokenizer is None:
        return {}
    text = tokenizer.library_json()
    if text is None:
        raise UserError(
            f"{type(tokenizer).__name__} cannot be exported: it has no form in the tokenizers library (library_json)"
        )
    data: dict[str, Any] = json.loads(text)
    known = _tokens(data)
    special = {}
    if mask is not None:
        name = next((m for m in MASKS if m not in known.values()), None)
        if name is None or mask in known:
            raise UserError(f"the tokenizer cannot be exported: it has a token of the id of the mask, {mask}")
        _add(data, name, mask)
        special["mask_token"] = name
    for key, index in (("pad_token", tokenizer.pad), ("eos_token", tokenizer.end)):
        if index is not None and index in known:
            special[key] = known[index]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **({} if length is None else {"model_max_length": length}),
        **special,
    }
    written = json.dumps(data, ensure_ascii=False, indent=2) + "\n"
    return {FILE: written, "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n"}


def _tokens(data: dict[str, Any]) -> dict[int, str]:
    """Return the tokens of a tokenizer of the ``tokenizers`` library by id."""
    vocab = data["model"].get("vocab", {})
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    found = {int(index): str(token) for token, index in pairs}
    return found | {int(entry["id"]): str(entry["content"]) for entry in data.get("added_tokens") or []}


def _add(data: dict[str, Any], name: str, index: int) -> None:
    """Add a special token of a given id, in place. Raises :class:`UserError` if the kind of vocabulary has no gaps."""
    vocab = data["model"].get("vocab", {})
    if isinstance(vocab, dict):
        vocab[name] = index
    elif index != max(_tokens(data)) + 1:
        raise UserError(f"the tokenizer cannot be exported: its list of tokens has no room for the mask, {index}")
    entry = {"id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["added_tokens"] = sorted(
        [*(data.get("added_tokens") or []), {**entry, "special": True}], key=lambda token: int(token["id"])
    )
