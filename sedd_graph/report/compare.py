"""Writer of a page that compares runs: results, curves laid over each other, settings that differ, and samples side by side.

As the report of a run (:mod:`sedd_graph.report.html`), the page is self-contained and loads nothing; its script shows values of curves.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from markupsafe import Markup

from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.evaluation.paired import ROWS_FILE, difference, row_bounds
from sedd_graph.report import samples
from sedd_graph.report.curves import Line, Point, curve
from sedd_graph.report.facts import json_lines
from sedd_graph.report.render import policy, render
from sedd_graph.store.files import json_object, write_text

__all__ = ["COMPARED", "Compared", "Pair", "changed_settings", "pairs", "write_comparison"]

COMPARED = 12
"""Largest number of runs of a page."""
_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777", "#4d7c0f", "#7c3aed",
            "#0f766e", "#be123c")  # fmt: skip
_TEXTS = 2
"""Number of samples of a run that are shown."""


class Compared(Protocol):
    """A run folder in a few numbers (:class:`sedd_graph.runs.summary.Summary`)."""

    @property
    def path(self) -> Path: ...

    @property
    def name(self) -> str: ...

    @property
    def step(self) -> int | None: ...

    @property
    def parameters(self) -> int | None: ...

    @property
    def process(self) -> str | None: ...

    @property
    def objective(self) -> str | None: ...

    @property
    def bits(self) -> float | None: ...

    @property
    def error(self) -> float | None: ...

    @property
    def unit(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Pair:
    """Difference of the bounds of two runs on the same held-out rows.

    Attributes:
        one: Path of the first run.
        other: Path of the second run.
        bits: Bound of the first minus that of the second, bits per character or dimension.
        error: Its standard error over rows.
        p_value: Two-sided p-value of no difference.
        rows: Number of rows.
    """

    one: Path
    other: Path
    bits: float
    error: float
    p_value: float
    rows: int


def pairs(runs: Sequence[Compared]) -> list[Pair]:
    """Return the differences of all pairs of runs that were evaluated on the same held-out rows."""
    bounds = [row_bounds(json_object(run.path / ROWS_FILE)) for run in runs]
    found = []
    for (one, first), (other, second) in itertools.combinations(zip(runs, bounds, strict=True), 2):
        if first is None or second is None or one.bits is None or (known := difference(first, second)) is None:
            continue
        mean = float(first.nats.sum() / first.tokens.sum())
        factor = one.bits / mean if mean else 0.0  # from nats per token to bits per character
        found.append(
            Pair(
                one.path,
                other.path,
                known.nats_per_token * factor,
                known.standard_error * abs(factor),
                known.p_value,
                known.rows,
            )
        )
    return found


def changed_settings(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """Return the keys of the resolved blueprints whose values differ, each with the value of every run; ``-`` for none."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = []
    for key in keys:
        values = ["-" if key not in run.settings else _text(run.settings[key]) for run in runs]
        if len(set(values)) > 1 and key != "description":
            found.append((key, values))
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write_comparison(runs: Sequence[Compared], page: Path) -> None:
    """Write a page that compares runs.

    Args:
        runs: Summaries of the run folders, 2 to :data:`COMPARED`.
        page: File to write; it is replaced if it is an earlier comparison.

    Raises:
        UserError: There are too few runs or too many, or ``page`` is another file.
    """
    if not 2 <= len(runs) <= COMPARED:
        raise UserError(f"a comparison is of 2 to {COMPARED} runs, not {len(runs)}")
    if page.exists() and not _is_comparison(page):
        raise UserError(f"{page} exists and is no comparison: choose another name (-o)")
    names = {run.path: letter for run, letter in zip(runs, string.ascii_uppercase, strict=False)}
    script, style = render("curves.js"), render("palette.css") + render("report.css")
    unit = next((run.unit for run in runs if run.bits is not None), "character")
    text = render(
        "compare.html",
        style=style,
        script=script,
        policy=policy(script, style),
        unit=unit,
        runs=[{"letter": names[run.path], "summary": run, "colour": _COLOURS[at]} for at, run in enumerate(runs)],
        pairs=[(names[p.one], names[p.other], p) for p in pairs(runs)],
        settings=changed_settings(runs),
        curves=_curves(runs, list(names.values()), unit),
        samples=[(names[run.path], *_samples(run.path)) for run in runs],
    )
    write_text(page, text.encode("utf-8", "backslashreplace").decode())


def _is_comparison(page: Path) -> bool:
    try:
        with page.open("rb") as stream:
            return b"<title>Comparison of " in stream.read(2000)
    except OSError:
        return False


def _curves(runs: Sequence[Compared], letters: Sequence[str], unit: str) -> list[Markup]:
    """Return plots of the runs' metrics over the training step, with one line for each run."""
    records = [[m for m in json_lines(r.path / "metrics.jsonl") if isinstance(m.get("step"), int)] for r in runs]

    def lines(keys: Sequence[tuple[str, str]]) -> list[Line]:
        found = []
        for letter, colour, own in zip(letters, _COLOURS, records, strict=False):
            points = [
                Point(m["step"], m[key], m.get(error) or 0.0)
                for key, error in keys
                for m in own
                if isinstance(m.get(key), int | float)
            ]
            found.append(Line(letter, colour, points))
        return found

    held = [(f"{p}bits_per_{unit}", f"{p}bits_standard_error") for p in ("heldout_", "final_")]
    figures = [
        curve(lines(held), title=f"held out, bits per {unit} (band: two standard errors)"),
        curve(lines([(f"bits_per_{unit}", "")]), title=f"training, bits per {unit}"),
        curve(lines([("gradient_norm", "")]), title="norm of the gradient"),
        curve(lines([("tokens_per_second", ""), ("dimensions_per_second", "")]), title="tokens per second"),
    ]
    return [figure for figure in figures if figure]


def _samples(run: Path) -> tuple[str, list[str]]:
    """Return what the newest samples of a run are, and the first of them; nothing if there are none or they are damaged."""
    try:
        found = samples.newest_samples(run)
    except (SeddGraphError, OSError, ValueError, KeyError, TypeError):
        return "the samples are damaged", []
    return ("no samples", []) if found is None else (found.facts, found.texts[:_TEXTS])
