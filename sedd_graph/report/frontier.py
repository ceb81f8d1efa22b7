"""Frontier of generative perplexity of a run folder (``frontier.jsonl``), as input of the report's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from sedd_graph.evaluation.record import FRONTIER
from sedd_graph.report.curves import Line, Point, curve
from sedd_graph.report.facts import json_lines
from sedd_graph.store.files import as_object

__all__ = ["Frontier", "frontier"]

COLOURS = ("var(--a)", "#8a5cc7", "#2f8f5b", "#b5651d")


class Frontier(NamedTuple):
    """The newest frontier.

    Attributes:
        figure: Perplexity over entropy, one line for each number of steps, and a dot for held-out text.
        values: For each number of steps, the perplexity at the entropy of held-out text, as text.
        protocol: Judge, number of samples, and changes of the blueprint's sampler, as text.
    """

    figure: Markup
    values: list[str]
    protocol: str


def frontier(run: Path) -> Frontier | None:
    """Return the newest record of ``frontier.jsonl`` in the run folder ``run``; None if there is none."""
    records = json_lines(run / FRONTIER)
    if not records:
        return None
    record = records[-1]
    points = [as_object(point) for point in _list(record.get("points"))]
    lines = list[Line]()
    held = [p for p in points if p.get("temperature") is None]
    for number, steps in enumerate(dict.fromkeys(p.get("steps") for p in points if p.get("temperature") is not None)):
        own = [p for p in points if p.get("temperature") is not None and p.get("steps") == steps]
        label = "samples" if steps is None else f"{steps} steps"
        lines.append(Line(label, COLOURS[number % len(COLOURS)], _drawn(own)))
    lines.append(Line("held out", "var(--b)", _drawn(held)))
    judge, how = as_object(record.get("judge")), as_object(record.get("protocol"))
    changed = "".join(f", {text}" for text in _list(how.get("overrides")))
    temperatures = ", ".join(f"{t:g}" for t in _list(how.get("temperatures")) if isinstance(t, int | float))
    return Frontier(
        curve(
            lines, title="generative perplexity over unigram entropy, nats (band: two standard errors)", over="entropy"
        ),
        [_value(as_object(each)) for each in _list(record.get("at_entropy"))],
        f"judge {judge.get('name')} ({str(judge.get('sha256'))[:8]}), {how.get('rows')} samples at each of the temperatures "
        f"{temperatures}{changed}",
    )


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _drawn(points: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return the points from the lowest entropy to the highest."""
    found = list[Point]()
    for point in points:
        entropy, perplexity, error = (point.get(key) for key in ("entropy", "perplexity", "nats_standard_error"))
        if isinstance(entropy, int | float) and isinstance(perplexity, int | float):
            found.append(Point(entropy, perplexity, perplexity * error if isinstance(error, int | float) else 0.0))
    return sorted(found)


def _value(each: Mapping[str, Any]) -> str:
    steps = "" if each.get("steps") is None else f", {each['steps']} steps"
    keys = ("perplexity", "standard_error", "sample_error", "temperature")
    perplexity, error, sample_error, temperature = (each.get(key) for key in keys)
    if not isinstance(perplexity, int | float):
        return f"At the entropy of held-out text{steps}: unknown, since {each.get('why_not')}."
    spread = f" ± {error:.2f}" if isinstance(error, int | float) else ""
    if isinstance(sample_error, int | float):
        spread += f", ± {sample_error:.2f} beside this text"
    at = f" (temperature {temperature:.3f})" if isinstance(temperature, int | float) else ""
    why_not = "" if each.get("why_not") is None else f" No error: {each['why_not']}."
    return f"At the entropy of held-out text{steps}: perplexity {perplexity:.2f}{spread}{at}.{why_not}"
