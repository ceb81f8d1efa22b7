"""Records in ``quality.jsonl``: quality statistics of samples and of held-out text, with their settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

__all__ = [
    "FRONTIER",
    "QUALITY",
    "SHOWN",
    "JudgeFacts",
    "Protocol",
    "QualityRecord",
    "format_number",
    "format_record",
    "format_sampling",
]

FRONTIER = "frontier.jsonl"
"""Name of the file of frontiers of generative perplexity in a run folder (:mod:`sedd_graph.evaluation.frontier`)."""
QUALITY = "quality.jsonl"
"""Name of the file of quality records in a run folder."""

SHOWN = {
    "generative_perplexity": "generative perplexity",
    "judge_entropy": "unigram entropy, nats per token of the judge",
    "entropy": "unigram entropy, nats per token of the model",
    "rep_2": "rep-2",
    "rep_3": "rep-3",
    "rep_4": "rep-4",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "known_words": "words that occur in the training text",
    "mauve": "MAUVE",
    "mauve_star": "MAUVE, smoothed",
    "rows": "rows",
    "judge_tokens": "tokens judged",
}
"""Label of each statistic by name, in the order of the rows of the printed table."""


@dataclasses.dataclass(frozen=True)
class JudgeFacts:
    """Description of a judge, which identifies it in a quality record.

    Attributes:
        name: Name of its file or folder.
        sha256: SHA-256 of its weight files, hexadecimal.
        parameters: Number of its parameters.
        dtype: Data type that it runs in, such as ``float32``.
        context: Maximum number of tokens per window, a segment of a text; None if unlimited.
        start: Start token that each window begins with, as text; None if there is none.
    """

    name: str
    sha256: str
    parameters: int
    dtype: str
    context: int | None
    start: str | None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Settings and software with which the statistics of a quality record were computed.

    Attributes:
        sampling: Config of the sampler, and the attributes of the zarr group of samples, such as the seed.
        length: Number of tokens of a row.
        reference: Description of the held-out text; None if there is none.
        units: Units of the statistics, in words.
        hardware: Name of the device.
        versions: Version of each package by name; None for one that is not installed.
        mauve: Parameters of MAUVE by name; None if MAUVE was not computed.
    """

    sampling: Mapping[str, object]
    length: int
    reference: str | None
    units: str
    hardware: str
    versions: Mapping[str, str | None]
    mauve: Mapping[str, object] | None


@dataclasses.dataclass(frozen=True)
class QualityRecord:
    """One line of ``quality.jsonl``: quality statistics of samples and of held-out text.

    Attributes:
        store: Name of the zarr group that holds the samples.
        samples: Statistics of the samples by name.
        reference: The same statistics of held-out text by name; None if there is no held-out text.
        judge: The judge; None if the likelihood was not computed.
        protocol: Settings and software with which the statistics were computed.
    """

    store: str
    samples: Mapping[str, float]
    reference: Mapping[str, float] | None
    judge: JudgeFacts | None
    protocol: Protocol


def format_number(numbers: Mapping[str, object] | None, name: str) -> str:
    """Format one statistic as text, such as ``3.1416 +- 0.0010``.

    Args:
        numbers: Statistics and their standard errors (``<name>_standard_error``) by name; None if there are none.
        name: Name of the statistic.

    Returns:
        The value, with its standard error if there is one; ``-`` if the value is missing or not finite.
    """
    value, error = ((numbers or {}).get(key) for key in (name, f"{name}_standard_error"))
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    form = ".2f" if value >= 10 else ".4f"
    plain = f"{value:{form}}"
    return plain + (f" +- {error:{form}}" if isinstance(error, int | float) and math.isfinite(error) else "")


def format_sampling(sampling: Mapping[str, object]) -> str:
    """Format the settings that samples were drawn with as one line, such as ``ancestral, 64 steps, seed 0``."""
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
    """Format a quality record for the console: a table of statistics, then lines on the judge and the sampler."""
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
