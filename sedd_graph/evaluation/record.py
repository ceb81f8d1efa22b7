"""The records of ``quality.jsonl``, for the eyes: one a line, each with the numbers of both sides and how they were had."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["QUALITY", "SHOWN", "drawn", "table", "told"]

QUALITY = "quality.jsonl"
"""Its name in a run folder."""

SHOWN = {
    "generative_perplexity": "generative perplexity",
    "judge_entropy": "unigram entropy, nats per token of the judge",
    "entropy": "unigram entropy, nats per token of the model",
    "rep_2": "rep-2",
    "rep_3": "rep-3",
    "rep_4": "rep-4",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "mauve": "MAUVE",
    "mauve_star": "MAUVE, smoothed",
    "rows": "rows",
    "judge_tokens": "tokens judged",
}
"""The numbers of a record, in the order in which they are told."""


def told(numbers: Mapping[str, Any] | None, name: str) -> str:
    """One number with its standard error, where there is one."""
    value, error = ((numbers or {}).get(key) for key in (name, f"{name}_standard_error"))
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    form = ".2f" if value >= 10 else ".4f"
    plain = f"{value:{form}}"
    return plain + (f" +- {error:{form}}" if isinstance(error, int | float) and math.isfinite(error) else "")


def drawn(sampling: Mapping[str, Any]) -> str:
    """How samples were drawn, in a line; a sampler that takes its own number of steps has none."""
    words = {
        "steps": "{} steps",
        "temperature": "temperature {}",
        "top_p": "top-p {}",
        "seed": "seed {}",
        "weights": "weights {}",
    }
    parts = [text.format(sampling[key]) for key, text in words.items() if sampling.get(key) is not None]
    return ", ".join([str(sampling.get("sampler")), *parts])


def table(record: Mapping[str, Any]) -> str:
    """The record for the eyes."""
    rows = [["", record["store"], "held out"]]
    for name, label in SHOWN.items():
        cells = [told(record[side], name) for side in ("samples", "reference")]
        if set(cells) != {"-"}:
            rows.append([label, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    judge = record["judge"]
    if judge is not None:
        start = "every token counts" if judge["start"] else "the first token of a window does not count"
        lines.append(
            f"judge {judge['name']} ({judge['parameters']:,} parameters, sha256 {judge['sha256'][:12]}), float32, windows of "
            f"{judge['context'] or 'any'} tokens, {start}"
        )
    lines.append(f"drawn by {drawn(record['protocol']['sampling'])}")
    return "\n".join(lines)
