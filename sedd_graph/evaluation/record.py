"""Records of ``quality.jsonl``: the statistics of samples and those of held-out text, and how both were obtained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

__all__ = [
    "QUALITY",
    "SHOWN",
    "JudgeFacts",
    "Protocol",
    "QualityRecord",
    "format_number",
    "format_record",
    "format_sampling",
]

QUALITY = "quality.jsonl"
"""Name of the file in a run folder."""

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
"""Labels of the statistics, in the order in which they are shown."""


@dataclasses.dataclass(frozen=True)
class JudgeFacts:
    """Identity of a judge. ``start`` is the token that it begins each window with, if any."""

    name: str
    sha256: str
    parameters: int
    dtype: str
    context: int | None
    start: str | None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Settings from which the statistics were obtained. ``sampling`` holds the Config of the sampler and the attributes of the samples."""

    sampling: Mapping[str, object]
    length: int
    reference: str | None
    units: str
    hardware: str
    versions: Mapping[str, str | None]
    mauve: Mapping[str, object] | None


@dataclasses.dataclass(frozen=True)
class QualityRecord:
    """One line of ``quality.jsonl``: the statistics of the samples in ``store`` and of held-out text, if there is any."""

    store: str
    samples: Mapping[str, float]
    reference: Mapping[str, float] | None
    judge: JudgeFacts | None
    protocol: Protocol


def format_number(numbers: Mapping[str, object] | None, name: str) -> str:
    """Return one statistic as text, with its standard error if it has one; ``-`` where it is missing or not finite."""
    value, error = ((numbers or {}).get(key) for key in (name, f"{name}_standard_error"))
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    form = ".2f" if value >= 10 else ".4f"
    plain = f"{value:{form}}"
    return plain + (f" +- {error:{form}}" if isinstance(error, int | float) and math.isfinite(error) else "")


def format_sampling(sampling: Mapping[str, object]) -> str:
    """Return how samples were drawn, as a line of text."""
    words = {
        "steps": "{} steps",
        "temperature": "temperature {}",
        "top_p": "top-p {}",
        "seed": "seed {}",
        "weights": "weights {}",
    }
    parts = [text.format(sampling[key]) for key, text in words.items() if sampling.get(key) is not None]
    return ", ".join([str(sampling.get("sampler")), *parts])


def format_record(record: QualityRecord) -> str:
    """Return the record as a table for the console, with a line on the judge and one on the sampling."""
    rows = [["", record.store, "held out"]]
    for name, label in SHOWN.items():
        cells = [format_number(side, name) for side in (record.samples, record.reference)]
        if set(cells) != {"-"}:
            rows.append([label, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if (judge := record.judge) is not None:
        start = "every token counts" if judge.start else "the first token of a window does not count"
        lines.append(
            f"judge {judge.name} ({judge.parameters:,} parameters, sha256 {judge.sha256[:12]}), {judge.dtype}, "
            f"windows of {judge.context or 'any'} tokens, {start}"
        )
    lines.append(f"drawn by {format_sampling(record.protocol.sampling)}")
    return "\n".join(lines)
