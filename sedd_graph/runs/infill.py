"""Text with holes as a row of tokens: the prompt of ``sedd-graph infill``."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sedd_graph.data.config import DataConfig
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.errors import UserError
from sedd_graph.families.strings import StringEngine
from sedd_graph.runs.open import Run

__all__ = ["Law", "infilling", "read_prompt"]

_HOLE = re.compile(r"\[\[(\d+)\]\]")
_ANY_LENGTH = re.compile(r"\[\[\]\]")
LARGEST = 2**20
FREE = -1


class Law(NamedTuple):
    """Whether what is filled in has the model's law given the text, and how that text is held."""

    holds: bool
    how: str


def infilling(run: Run, observed: Literal["clamp", "renoise"]) -> Law:
    """What filling in amounts to under the run's kernel and ``observed``. Raises :class:`UserError`."""
    name, data, process = run.plan().kernel.contract.name, run.report.data, run.engine.process
    if isinstance(run.engine, StringEngine):
        if (reason := run.engine.edits.kernel.holds_nothing()) is not None:
            raise UserError(f"infill: {name!r} holds no text: {reason}")
        return Law(
            False,
            "gaps in the given text are held shut, which is a heuristic: the model has not been told that nothing is missing there",
        )
    if process is None or process.kernel.clamp_safe:
        return Law(
            True, "exact: the given text is held fixed, and with this kernel a token that is seen is a clean one"
        )
    if observed == "clamp" and isinstance(data, DataConfig) and data.corpus.prompted:
        return Law(
            True, "as trained: the given text is held fixed, and the model has learned from rows with clean prompts"
        )
    done = "holding the given text fixed" if observed == "clamp" else "noising the given text anew at each step"
    return Law(
        False,
        f"the kernel {name!r} can move every token, so {done} is a heuristic: "
        "what is written is not drawn from the model's law given that text",
    )


def read_prompt(run: Run, *, text: str | None, prefix: str | None, suffix: str | None, length: int | None) -> Tensor:
    """int64 [1, l] with -1 where the model fills in: ``text`` with ``[[N]]`` for N free tokens, or ``prefix`` and
    ``suffix`` around whatever ``length`` (default: data.length) leaves free. Raises :class:`UserError`."""
    if run.tokenizer is None:
        raise UserError(f"there is no tokenizer in {run.path}: text cannot become tokens")
    encode = run.tokenizer.encode
    if run.plan().edits:
        return _open_prompt(run, run.tokenizer, text=text, prefix=prefix, suffix=suffix)
    if text is not None:
        if prefix is not None or suffix is not None:
            raise UserError("infill: give --text, or --prefix and --suffix, not both")
        parts = _HOLE.split(text)
        if len(parts) == 1:
            raise UserError("infill: --text has no hole: write [[N]] where N tokens are free, such as 'The [[12]] is'")
        row: list[int] = []
        for index, part in enumerate(parts):
            if index % 2 and (len(part) > 7 or len(row) + int(part) > LARGEST):
                raise UserError(f"infill: [[{part[:20]}]] makes more than {LARGEST:,} tokens")
            row += [FREE] * int(part) if index % 2 else encode(part).tolist()
    else:
        if prefix is None and suffix is None:
            raise UserError("infill: give --text 'The [[12]] is', or --prefix or --suffix")
        before = encode(prefix).tolist() if prefix else []
        after = encode(suffix).tolist() if suffix else []
        whole = length or run.report.data.length
        if len(before) + len(after) >= whole:
            raise UserError(
                f"infill: prefix and suffix have {len(before) + len(after)} tokens; nothing is free of {whole}"
            )
        row = before + [FREE] * (whole - len(before) - len(after)) + after
    if length is not None and length != len(row):
        if length < len(row):
            raise UserError(f"infill: the text has {len(row)} tokens, more than --length {length}")
        row += [FREE] * (length - len(row))
    _known(row, run.tokenizer)
    if len(row) > LARGEST:
        raise UserError(f"infill: the text has {len(row):,} tokens, more than {LARGEST:,}")
    if FREE not in row:
        raise UserError("infill: nothing is free: write [[N]] with N of at least 1 where the model is to write")
    return torch.tensor([row], dtype=torch.int64)


def _known(row: list[int], tokenizer: Tokenizer) -> None:
    if set(row) & set(tokenizer.forbidden):
        raise UserError("infill: the text has characters that the model has never seen")


def _open_prompt(run: Run, tokenizer: Tokenizer, *, text: str | None, prefix: str | None, suffix: str | None) -> Tensor:
    """As :func:`read_prompt` for a model that chooses lengths itself: -1 is a hole of any length."""
    if text is not None:
        if prefix is not None or suffix is not None:
            raise UserError("infill: give --text, or --prefix and --suffix, not both")
        if _HOLE.search(text):
            raise UserError("infill: this model chooses lengths itself: write [[]] for a hole, without a number")
        parts = _ANY_LENGTH.split(text)
        if len(parts) == 1:
            raise UserError("infill: --text has no hole: write [[]] where the model is to write, such as 'The [[]] is'")
    elif prefix is None and suffix is None:
        raise UserError("infill: give --text 'The [[]] is', or --prefix or --suffix")
    else:
        parts = [prefix or "", suffix or ""]
    row: list[int] = []
    for number, part in enumerate(parts):
        row += ([FREE] if number else []) + tokenizer.encode(part).tolist()
    _known(row, tokenizer)
    if len(row) > LARGEST:
        raise UserError(f"infill: the text has {len(row):,} tokens, more than {LARGEST:,}")
    return torch.tensor([row], dtype=torch.int64)
