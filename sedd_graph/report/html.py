"""``report.html``: one self-contained page of a run folder: results, a film, samples, curves, claims, graph, provenance.

Everything that comes from text or data is escaped, the drawing is an image that can run nothing, and the page loads
nothing from anywhere. What a run folder does not have is left out.
"""

from __future__ import annotations

import base64
import html
import json
import math
import shlex
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import Tokenizer, load_tokenizer
from sedd_graph.errors import SeddGraphError
from sedd_graph.evaluation.record import QUALITY, SHOWN, drawn, told
from sedd_graph.report.curves import Line, Point, curve, scatter
from sedd_graph.report.film import film_data
from sedd_graph.store.arrays import stores
from sedd_graph.store.files import read_json, write_text

__all__ = ["write_report"]


def _e(value: object) -> str:
    return html.escape(str(value))


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Cells are HTML."""
    top = f"<tr>{''.join(f'<th>{_e(h)}</th>' for h in head)}</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{top}{body}</table></div>'


def _package_file(name: str) -> str:
    return files("sedd_graph.report").joinpath(name).read_text(encoding="utf-8")


def _json(path: Path) -> dict[str, Any]:
    """An object, empty where the file is missing or broken: the page is a by-product of what has succeeded."""
    try:
        found = read_json(path)
    except SeddGraphError:
        return {}
    return found if isinstance(found, dict) else {}


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one a line, without a line that is being written."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


# -- results ------------------------------------------------------------------------------------------------------


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "?"


def _results(evaluation: dict[str, Any], measure: dict[str, Any]) -> str:
    tiles: list[tuple[str, str]] = []
    flow = "bits_per_dimension" in evaluation
    if flow:
        error = _number(evaluation.get("bits_standard_error"), ".3f")
        bits, nats = (_number(evaluation.get(f"{unit}_per_dimension"), ".3f") for unit in ("bits", "nats"))
        tiles += [
            (f"{bits} <small>&plusmn; {error}</small>", "bits per dimension, held out (exact)"),
            (nats, "nats per dimension, held out (exact)"),
        ]
    elif evaluation:
        error = _number(evaluation.get("bits_standard_error"), ".3f")
        tiles += [
            (
                f"{_number(evaluation.get('bits_per_character'), '.3f')} <small>&plusmn; {error}</small>",
                "bits per character, held out (upper bound)",
            ),
            (
                _number(evaluation.get("heldout_entropy_bits"), ".3f"),
                "bits per character without context (unigram entropy of the same text)",
            ),
            (_number(evaluation.get("perplexity"), ",.2f"), "perplexity per token (upper bound)"),
        ]
    if measure:
        gib = (measure["saved_bytes"] + measure["state_bytes"]) / 2**30
        tiles += [
            (f"{measure['parameters']:,}", "parameters"),
            (
                f"{measure['flops_per_token'] / 1e6:,.1f} M",
                f"FLOPs per {'row' if measure['length'] == 1 else 'token'}, forward",
            ),
            (f"{gib:.2f} GiB", f"to train {measure['batch']} rows of {measure['length']} (estimate, float32)"),
        ]
    if not tiles:
        return ""
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{_e(label)}</span></div>' for value, label in tiles)
    told = ""
    if flow:
        told = (
            f"<p>-log p of {_number(evaluation.get('rows'), ',')} held-out rows of "
            f"{_number(evaluation.get('dimensions'), ',')} numbers, weights {_e(evaluation.get('weights', '?'))}.</p>"
        )
    elif evaluation:
        each = {
            "masked": "of how many tokens are masked: the exact form",
            "deleted": "of how many tokens are deleted",
            "noised": "of how much is noise",
        }.get(str(evaluation.get("over")), "of a time")
        told = (
            f"<p>Bound on {_number(evaluation.get('sequences'), ',')} held-out sequences, {_e(evaluation.get('draws', '?'))} "
            f"noise draw(s) each ({each}), objective {_e(evaluation.get('objective', '?'))}, weights {_e(evaluation.get('weights', '?'))}."
            f"{_e(' Note: ' + str(caveat) + '.') if (caveat := evaluation.get('caveat')) else ''}</p>"
        )
    return f'<div class="tiles">{shown}</div>{told}{_levels(evaluation)}'


def _levels(evaluation: dict[str, Any]) -> str:
    """The bound by noise level."""
    points = []
    for level in map(_object, evaluation.get("levels") or []):
        found = [level.get(name) for name in ("low", "high", "nats_per_token")]
        low, high, value = (v if isinstance(v, int | float) else math.nan for v in found)
        if math.isfinite(middle := (low + high) / 2):
            points.append(Point(middle, value, level.get("standard_error") or 0.0))
    over = over if (over := evaluation.get("over")) in ("masked", "deleted", "noised") else "time"
    where = "time, 0 clean to 1 noise" if over == "time" else f"share of tokens that are {over}"
    title = (
        f"the bound by noise level: nats per token over the {where} (its mean is the bound; band: two standard errors)"
    )
    figure = curve([Line("bound", "var(--b)", points)], title=title, over=over)
    return f'<div class="curves">{figure}</div>' if figure else ""


# -- texts --------------------------------------------------------------------------------------------------------


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    found = group[name]
    assert isinstance(found, zarr.Array)
    return found


def _facts(group: zarr.Group, store: Path) -> str:
    told = [f"{k} {group.attrs[k]}" for k in ("sampler", "steps", "seed", "weights") if k in group.attrs]
    return f"<p>{_e(', '.join([*told, store.name]))}</p>"


def _samples(run: Path) -> str:
    for store in stores(run, "samples")[:1]:
        group = zarr.open_group(str(store), mode="r")
        if "x" in group:
            return f"<h2>Samples</h2>{_facts(group, store)}{scatter(np.asarray(_array(group, 'x')[:2000]))}"
        texts = "".join(f"<pre>{_e(text)}</pre>" for text in np.asarray(_array(group, "text")[:8]).tolist())
        return f"<h2>Samples</h2>{_facts(group, store)}{texts}"
    return ""


def _quality(run: Path) -> str:
    """What was said of samples, the last first, and of held-out text beside them."""
    rows = []
    for record in reversed(_records(run / QUALITY)):
        judge, how = _object(record.get("judge")), _object(_object(record.get("protocol")).get("sampling"))
        by = f"{judge.get('name')} ({str(judge.get('sha256'))[:8]})" if judge else "no judge"
        for side, name in (("samples", f"{record.get('store')}: {drawn(how)}; {by}"), ("reference", "held-out text")):
            if isinstance(numbers := record.get(side), dict):
                rows.append([_e(name), *(_e(told(numbers, key).replace("+-", "±")) for key in SHOWN)])
    kept = [i for i, _ in enumerate(SHOWN, 1) if any(row[i] != "-" for row in rows)]
    table = _table([[row[0], *(row[i] for i in kept)] for row in rows], ("", *([*SHOWN.values()][i - 1] for i in kept)))
    return f"<h2>Quality of samples</h2>{table}" if rows else ""


def _infilled(run: Path, tokenizer: Tokenizer | None) -> str:
    for store in stores(run, "infilled")[:1]:
        group = zarr.open_group(str(store), mode="r")
        prompts = group.attrs.get("prompt")
        if tokenizer is None or not isinstance(prompts, list):
            return ""
        free = np.asarray(prompts)[0] < 0
        cuts = [0, *(np.flatnonzero(np.diff(free)) + 1).tolist(), len(free)]
        shown = []
        for row in np.asarray(_array(group, "tokens")[:4]):
            pieces = [(free[a], _e(tokenizer.decode(row[a:b].tolist()))) for a, b in pairwise(cuts)]
            shown.append("".join(f"<mark>{text}</mark>" if written else text for written, text in pieces))
        body = "".join(f"<pre>{text}</pre>" for text in shown)
        return f"<h2>Filled in</h2>{_facts(group, store)}<p>Marked: what the model wrote.</p>{body}"
    return ""


def _film(run: Path, tokenizer: Tokenizer | None) -> str:
    """Of the newest samples that were kept with their way."""
    for store in stores(run, "samples"):
        group = zarr.open_group(str(store), mode="r")
        if "trajectory" not in group or tokenizer is None:
            continue
        mask = group.attrs.get("mask")
        frames = np.asarray(_array(group, "trajectory")[:, 0], dtype=np.int64)
        data = film_data(frames, tokenizer, mask=mask if isinstance(mask, int) else None)
        text = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
        return (
            f"<h2>One sample, from noise to text</h2><p>The first row of {_e(store.name)}; coloured: what the last three steps changed.</p>"
            '<div class="bar"><button id="play" type="button">play</button>'
            '<input id="slide" type="range" min="0" value="0" aria-label="step"><span id="at"></span></div>'
            '<pre class="film" id="film"></pre>'
            f'<script type="application/json" id="film-data">{text}</script><script>{_package_file("film.js")}</script>'
        )
    return ""


# -- training -----------------------------------------------------------------------------------------------------


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [record for record in _records(run / "metrics.jsonl") if isinstance(record.get("step"), int)]


def _curves(metrics: list[dict[str, Any]]) -> str:
    def line(label: str, key: str, error: str = "", colour: str = "var(--a)") -> Line:
        records = [m for m in metrics if isinstance(m.get(key), int | float)]
        return Line(label, colour, [Point(m["step"], m[key], m.get(error) or 0.0) for m in records])

    unit = "dimension" if any("bits_per_dimension" in m for m in metrics) else "character"
    thing, what = ("dimensions", "-log p") if unit == "dimension" else ("tokens", "bound")
    bits = line("training", f"bits_per_{unit}")
    held = line("held out", f"heldout_bits_per_{unit}", "heldout_bits_standard_error", "var(--b)")
    last = line("held out", f"final_bits_per_{unit}", "final_bits_standard_error", "var(--b)")
    held = Line(held.label, held.colour, [*held.points, *last.points])
    figures = [
        curve([bits, held], title=f"{what}, bits per {unit} (band: two standard errors)"),
        curve([line("learning rate", "learning_rate")], title="learning rate"),
        curve([line("norm", "gradient_norm")], title="norm of the gradient"),
        curve([line(f"{thing}/s", f"{thing}_per_second")], title=f"{thing} per second"),
    ]
    return f'<h2>Training</h2><div class="curves">{"".join(figures)}</div>' if any(figures) else ""


def _recorded(run: Path) -> str:
    """What lies in ``activations.zarr``."""
    if not (run / "activations.zarr" / "zarr.json").is_file():
        return ""
    group = zarr.open_group(str(run / "activations.zarr"), mode="r")
    rows = []
    for path, member in sorted(group.members(max_depth=None)):
        if isinstance(member, zarr.Array) and path.endswith("/step") and f"{path[:-5]}/value" in group:
            steps, values = np.asarray(member[:]), _array(group, f"{path[:-5]}/value")
            span = f"{steps[0]} to {steps[-1]}" if len(steps) else ""
            shape = " x ".join(str(size) for size in values.shape[1:])
            rows.append([_e(path[:-5]), str(len(steps)), span, _e(shape), _e(values.dtype)])
    head = ("port", "records", "steps", "shape", "dtype")
    return "<h2>Recorded in activations.zarr</h2>" + _table(rows, head) if rows else ""


# -- what it is ---------------------------------------------------------------------------------------------------


def _claims(checks: Sequence[dict[str, Any]]) -> str:
    marks = {"True": '<span class="ok">holds</span>', "False": '<span class="bad">fails</span>', "None": "note"}
    rows = [[marks.get(str(c["holds"]), "?"), _e(c["claim"]), _e(c["value"]), _e(c["how"])] for c in checks]
    return "<h2>What was claimed, and what holds</h2>" + _table(rows, ("", "claim", "found", "how")) if rows else ""


def _graph(run: Path) -> str:
    """As an image: a drawing from a stranger's run folder runs no script."""
    if not (run / "graph.svg").is_file():
        return ""
    drawing = base64.b64encode((run / "graph.svg").read_bytes()).decode()
    return f'<h2>Graph</h2><div class="graph"><img alt="the graph, top to bottom" src="data:image/svg+xml;base64,{drawing}"></div>'


def _fact(name: str, value: object) -> str:
    if name == "argv" and isinstance(value, list):
        return shlex.join(str(v) for v in value)
    if isinstance(value, list):
        return ", ".join(str(v) for v in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)


def _provenance(run: Path) -> str:
    rows = [[_e(k), _e(_fact(k, v))] for k, v in _json(run / "run.json").items() if k != "root"]
    lock = run / "blueprint.lock.yaml"
    source = ""
    if lock.is_file():
        text = _e(lock.read_text(encoding="utf-8"))
        source = f"<details><summary>{lock.name}: the blueprint as it was resolved</summary><pre>{text}</pre></details>"
    return f"<h2>Provenance</h2>{_table(rows)}{source}" if rows or source else ""


def write_report(run: Path) -> Path:
    """(Re)write ``run/report.html`` from what the run folder holds now. Returns its path."""
    certificate, graph = _json(run / "certificate.json"), _json(run / "graph.json")
    try:
        tokenizer = load_tokenizer(run) if (run / TOKENIZER).is_file() else None
    except SeddGraphError:
        tokenizer = None
    name = graph.get("name", run.name)
    lead = f"{len(graph['nodes'])} components; run {run.name}" if "nodes" in graph else f"run {run.name}"
    parts = [
        f'<h1>{_e(name)}</h1><p class="lead">{_e(lead)}</p>',
        _results(_json(run / "evaluation.json"), certificate.get("measure") or {}),
        _film(run, tokenizer),
        _samples(run),
        _quality(run),
        _infilled(run, tokenizer),
        _curves(_metrics(run)),
        _recorded(run),
        _claims(certificate.get("checks", [])),
        _graph(run),
        _provenance(run),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(name)}</title><style>{_package_file('report.css')}</style>"
    )
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
    write_text(run / "report.html", page)
    return run / "report.html"
