"""Results, training curves, saved activations and provenance of a run folder, as input of the report's template.

Missing or invalid files are treated as empty, so that writing the report does not fail after a completed command.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zarr
from markupsafe import Markup

from sedd_graph.errors import SeddGraphError
from sedd_graph.report.curves import Line, Point, curve
from sedd_graph.store.arrays import array_of, read_array
from sedd_graph.store.changes import read_changes
from sedd_graph.store.files import as_object, json_object

__all__ = [
    "activations",
    "drawing",
    "fallbacks",
    "json_lines",
    "lock",
    "provenance",
    "results",
    "tables",
    "training_curves",
]


MARGIN, CODE_ERROR = "margin_", "code_error_"
"""Prefixes of the metrics that record the margin of a code and the bound on errors; the code's path follows."""
DRIFT = "drift_"
"""Prefix of the metric that records at which error a block fell back to checkpointing; the block's path follows."""


class Tile(NamedTuple):
    """A statistic shown in large type in the report: formatted value, label, standard error (empty if unknown)."""

    value: str
    label: str
    error: str = ""


class Results(NamedTuple):
    """First section of the report.

    Attributes:
        tiles: Statistics shown in large type.
        protocol: How the model was evaluated, as text; empty without an evaluation.
        levels: Plot of the upper bound on -log p by noise level; empty if the evaluation has no noise levels.
    """

    tiles: list[Tile]
    protocol: str
    levels: Markup


class Lock(NamedTuple):
    """The lock file (the resolved blueprint): file name and text."""

    name: str
    text: str


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, skipping invalid lines, such as one that is still being written."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "?"


def tables(run: Path) -> list[Mapping[str, Any]]:
    """Return the contents of the files ``evaluation-<protocol>.json``, which ``eval --protocol`` has written."""
    found = [json_object(path) for path in sorted(run.glob("evaluation-*.json"))[:100]]
    return [evaluation for evaluation in found if as_object(as_object(evaluation.get("protocol")).get("table"))]


def _table(evaluation: Mapping[str, Any]) -> tuple[Tile, str]:
    """Return the number of a benchmark, and the text of how it was computed."""
    facts = as_object(as_object(evaluation.get("protocol")).get("table"))
    bits = facts.get("unit") == "bits_per_character"
    label = f"{'bits per character' if bits else 'perplexity per token'}, {facts.get('name', '?')} (upper bound)"
    if bits:
        value, error = _number(evaluation.get("bits_per_character"), ".3f"), evaluation.get("bits_standard_error")
    else:
        value, error = _number(evaluation.get("perplexity"), ",.2f"), None
    text = (
        f" {facts.get('name', '?')}: {facts.get('part', '?')}; {_number(facts.get('rows'), ',')} rows of "
        f"{_number(facts.get('length'), ',')} tokens ({facts.get('row', '?')}), detokenizer {facts.get('detokenizer', '?')}, "
        f"tokenizer {facts.get('tokenizer', '?')}, by {facts.get('source', '?')}."
    )
    return Tile(value, label, _number(error, ".3f") if error is not None else ""), text


def results(
    evaluation: Mapping[str, Any],
    measure: Mapping[str, Any],
    ode: Mapping[str, Any] | None = None,
    tables: Sequence[Mapping[str, Any]] = (),
) -> Results:
    """Return the results section of the report.

    Args:
        evaluation: Content of ``evaluation.json``; may be empty.
        measure: The ``measure`` object of ``certificate.json`` (parameters, FLOPs, memory); may be empty.
        ode: Content of ``evaluation-ode.json``; None or empty if there is none.
        tables: Evaluations by protocols of published tables (:func:`tables`).
    """

    def tile(key: str, label: str, form: str = ".3f", error: str = "") -> Tile:
        return Tile(_number(evaluation.get(key), form), label, _number(evaluation.get(error), form) if error else "")

    tiles, protocol = [], ""
    if "bits_per_dimension" in evaluation:
        tiles += [
            tile("bits_per_dimension", "bits per dimension, held out (exact)", error="bits_standard_error"),
            tile("nats_per_dimension", "nats per dimension, held out (exact)"),
        ]
        protocol = (
            f"-log p of {_number(evaluation.get('rows'), ',')} held-out rows of "
            f"{_number(evaluation.get('dimensions'), ',')} numbers, weights {evaluation.get('weights', '?')}."
        )
    elif evaluation:
        tiles += [
            tile("bits_per_character", "bits per character, held out (upper bound)", error="bits_standard_error"),
            tile("heldout_entropy_bits", "bits per character without context (unigram entropy of the same text)"),
            tile("perplexity", "perplexity per token (upper bound)", ",.2f"),
        ]
        if evaluation.get("heldout_entropy_bits") is None:  # of a part of shards
            del tiles[1]
        protocol = (
            f"Bound on {_number(evaluation.get('sequences'), ',')} held-out sequences, "
            f"{evaluation.get('draws', '?')} noise draw(s) per sequence, drawn over {_noise_level(evaluation)}; "
            f"objective {evaluation.get('objective', '?')}, weights {evaluation.get('weights', '?')}."
        )
        if caveat := evaluation.get("caveat"):
            protocol += f" Note: {caveat}."
    if ode:
        error = _number(ode.get("bits_standard_error"), ".3f")
        tiles.append(
            Tile(_number(ode.get("bits_per_character"), ".3f"), "bits per character, by the ODE (estimate)", error)
        )
        protocol += f" By the ODE on {_number(ode.get('sequences'), ',')} sequences: {ode.get('caveat', '?')}."
    for made, text in map(_table, tables):
        tiles.append(made)
        protocol += text
    if measure:
        gib = (measure["saved_bytes"] + measure["state_bytes"]) / 2**30
        unit = "row" if measure["length"] == 1 else "token"
        tiles += [
            Tile(f"{measure['parameters']:,}", "parameters"),
            Tile(f"{measure['flops_per_token'] / 1e6:,.1f} M", f"FLOPs per {unit}, forward"),
            Tile(f"{gib:.2f} GiB", f"to train {measure['batch']} rows of {measure['length']} (estimate, float32)"),
        ]
    return Results(tiles, protocol, _levels(evaluation))


def _noise_level(evaluation: Mapping[str, Any]) -> str:
    """Return the variable that the bound is averaged over, in words."""
    over = evaluation.get("over") or "time"
    return "time" if over == "time" else f"the share of tokens that are {over}"


def _levels(evaluation: Mapping[str, Any]) -> Markup:
    """Return the curve of the bound by noise level, nats per token."""
    points = []
    for level in map(as_object, evaluation.get("levels") or []):
        found = [level.get(name) for name in ("low", "high", "nats_per_token")]
        low, high, value = (v if isinstance(v, int | float) else math.nan for v in found)
        if math.isfinite(middle := (low + high) / 2):
            points.append(Point(middle, value, level.get("standard_error") or 0.0))
    where = _noise_level(evaluation) + (", 0 clean to 1 noise" if _noise_level(evaluation) == "time" else "")
    title = f"bound by noise level: nats per token over {where} (its mean is the bound; band: two standard errors)"
    return curve([Line("bound", "var(--b)", points)], title=title, over=str(evaluation.get("over") or "time"))


def training_curves(run: Path) -> list[Markup]:
    """Return plots of ``metrics.jsonl`` against the training step, without those that have no data.

    They show the loss (bits per character or dimension; in its own unit if it is not in nats), learning rate, gradient norm, tokens (or dimensions) per second,
    and the margin of each code.

    Args:
        run: The run folder.
    """
    metrics = [record for record in json_lines(run / "metrics.jsonl") if isinstance(record.get("step"), int)]

    def line(label: str, key: str, error: str = "", colour: str = "var(--a)") -> Line:
        records = [m for m in metrics if isinstance(m.get(key), int | float)]
        return Line(label, colour, [Point(m["step"], m[key], m.get(error) or 0.0) for m in records])

    exact = any("bits_per_dimension" in m for m in metrics)
    unit, thing = ("dimension", "dimensions") if exact else ("character", "tokens")
    bits = line("training", f"bits_per_{unit}")
    held = line("held out", f"heldout_bits_per_{unit}", "heldout_bits_standard_error", "var(--b)")
    last = line("held out", f"final_bits_per_{unit}", "final_bits_standard_error", "var(--b)")
    held = Line(held.label, held.colour, [*held.points, *last.points])
    own = [] if bits.points else [line("training", "loss")]
    figures = [
        curve(own, title="training loss, in the unit of the objective, which is not nats"),
        curve([bits, held], title=f"{'-log p' if exact else 'bound'}, bits per {unit} (band: two standard errors)"),
        curve([line("learning rate", "learning_rate")], title="learning rate"),
        curve([line("norm", "gradient_norm")], title="norm of the gradient"),
        curve([line(f"{thing}/s", f"{thing}_per_second")], title=f"{thing} per second"),
        *(
            curve(
                [line("margin", f"{MARGIN}{path}"), line("error bound", f"{CODE_ERROR}{path}", colour="var(--b)")],
                title=f"{path}: half the least distance of codewords, and the error of reconstructed vectors",
            )
            for path in _codes(metrics)
        ),
    ]
    return [figure for figure in figures if figure]


def _codes(metrics: list[dict[str, Any]]) -> list[str]:
    """Return the paths of the codes whose margins were recorded, in order of first record."""
    names = dict.fromkeys(name for record in metrics for name in record if name.startswith(MARGIN))
    return [name.removeprefix(MARGIN) for name in names]


def fallbacks(run: Path) -> list[str]:
    """Return one sentence for each block that fell back from reversible execution to checkpointing in training.

    Args:
        run: The run folder.
    """
    return [
        f"Step {record['step']}: block {key.removeprefix(DRIFT)} reconstructed its inputs with a relative error of "
        f"{_number(error, '.1e')}, and is checkpointed from this step on. Its gradients were recomputed."
        for record in json_lines(run / "metrics.jsonl")
        for key, error in record.items()
        if key.startswith(DRIFT) and isinstance(record.get("step"), int)
    ]


def activations(run: Path) -> list[tuple[str, ...]]:
    """Return one row of a table for each port whose activations are in ``activations.zarr``; no rows without the file.

    Args:
        run: The run folder.

    Returns:
        Rows of texts: path of the port, number of records, first and last training step, shape of a record, dtype.
    """
    if not (run / "activations.zarr" / "zarr.json").is_file():
        return []
    group = zarr.open_group(str(run / "activations.zarr"), mode="r")
    rows: list[tuple[str, ...]] = []
    for path, member in sorted(group.members(max_depth=None)):
        if isinstance(member, zarr.Array) and path.endswith("/step") and f"{path[:-5]}/value" in group:
            steps, values = read_array(group, path), array_of(group, f"{path[:-5]}/value")
            span = f"{steps[0]} to {steps[-1]}" if len(steps) else ""
            shape = " x ".join(str(size) for size in values.shape[1:])
            rows.append((path[:-5], str(len(steps)), span, shape, str(values.dtype)))
    return rows


def drawing(run: Path) -> str:
    """Return the file ``graph.svg`` of a run folder in base64, or an empty string if it is missing.

    The report embeds the drawing as an image, in which scripts of an untrusted SVG do not run.
    """
    path = run / "graph.svg"
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""


def _fact(name: str, value: object) -> str:
    if name == "argv" and isinstance(value, list):
        return shlex.join(str(v) for v in value)
    if isinstance(value, list):
        return ", ".join(str(v) for v in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)


def provenance(run: Path) -> list[tuple[str, str]]:
    """Return the entries of ``run.json`` as pairs (name, text), except ``root``, the folder of the original build.

    The changes to training settings since then follow, one pair each.
    """
    facts = [(name, _fact(name, value)) for name, value in json_object(run / "run.json").items() if name != "root"]
    try:
        changes = read_changes(run)
    except SeddGraphError:
        changes = []
    return [*facts, *(("changed", f"{change} ({change.at})") for change in changes)]


def lock(run: Path) -> Lock | None:
    """Return the name and text of a run folder's lock file, or None if it is missing."""
    path = run / "blueprint.lock.yaml"
    return Lock(path.name, path.read_text(encoding="utf-8")) if path.is_file() else None
