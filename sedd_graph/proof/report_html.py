"""``report.html``: one self-contained page of a run folder: graph, claims, curves, samples, a film of one denoising.

Everything that comes from text or data is escaped; the page loads nothing from anywhere.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zarr

from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import Tokenizer, load_tokenizer
from sedd_graph.errors import SeddGraphError
from sedd_graph.store.files import read_json, write_text

__all__ = ["curve", "write_report"]

_STYLE = """
:root{--ink:#0f172a;--soft:#475569;--line:#e2e8f0;--back:#fff;--card:#f8fafc;--a:#2563eb;--b:#ea580c;--ok:#15803d;--bad:#b91c1c}
@media(prefers-color-scheme:dark){:root{--ink:#e2e8f0;--soft:#94a3b8;--line:#334155;--back:#0b1220;--card:#111a2c;--a:#60a5fa;--b:#fb923c;--ok:#4ade80;--bad:#f87171}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1080px;padding:28px 20px 80px;font:15px/1.55 ui-sans-serif,system-ui,sans-serif;color:var(--ink);background:var(--back)}
h1{font-size:28px;margin:0 0 4px}h2{font-size:18px;margin:40px 0 10px}p,td,th{color:var(--soft)}.lead{font-size:16px;margin-top:0}
table{border-collapse:collapse;width:100%;font-size:13.5px}td,th{padding:5px 12px 5px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}th{font-weight:600}
.ok{color:var(--ok);font-weight:600}.bad{color:var(--bad);font-weight:600}
.graph{overflow:auto;max-height:640px;border:1px solid var(--line);border-radius:10px;background:#fff;padding:8px;text-align:center}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;font:13px/1.5 ui-monospace,monospace;margin:8px 0}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:18px 0}.tile{flex:1 1 150px;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.tile b{display:block;font-size:20px;color:var(--ink)}.tile span{font-size:12.5px;color:var(--soft)}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:18px}figure{margin:0}figcaption{font-size:13px;color:var(--soft);margin-bottom:4px}
svg.curve{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}svg.curve text{fill:var(--soft);font-size:11px}
.film{min-height:120px}.film i{font-style:normal;color:var(--line)}.film u{text-decoration:none;background:color-mix(in srgb,var(--a) 30%,transparent);border-radius:2px}
.bar{display:flex;gap:12px;align-items:center}.bar input{flex:1}button{font:inherit;padding:4px 14px;border-radius:8px;border:1px solid var(--line);background:var(--card);color:var(--ink);cursor:pointer}
mark{background:color-mix(in srgb,var(--b) 28%,transparent);color:inherit;border-radius:2px}
"""

_FILM = """
const film=JSON.parse(document.getElementById('film-data').textContent),view=document.getElementById('film'),slide=document.getElementById('slide'),
play=document.getElementById('play'),at=document.getElementById('at');let timer=null;slide.max=film.length-1;
function show(n){n=+n;view.replaceChildren();const now=film[n],old=film[n-1];now.forEach((s,i)=>{if(s===null){const e=document.createElement('i');e.textContent='\\u2588';view.append(e)}
else if(old&&old[i]!==s){const e=document.createElement('u');e.textContent=s;view.append(e)}else view.append(s)});slide.value=n;at.textContent='step '+n+' of '+(film.length-1)}
function stop(){clearInterval(timer);timer=null;play.textContent='play'}
play.onclick=()=>{if(timer)return stop();if(+slide.value>=film.length-1)show(0);play.textContent='pause';timer=setInterval(()=>{if(+slide.value>=film.length-1)stop();else show(+slide.value+1)},70)};
slide.oninput=()=>{stop();show(slide.value)};show(film.length-1);
"""


def _e(value: object) -> str:
    return html.escape(str(value))


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= count)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def curve(series: Sequence[tuple[str, str, Sequence[tuple[float, float, float]]]], *, title: str) -> str:
    """An SVG of lines over steps. Each series is (label, colour, points of (step, value, standard error))."""
    points = [p for _, _, line in series for p in line if math.isfinite(p[1])]
    if not points:
        return ""
    width, height, left, right, top, bottom = 480, 260, 52, 14, 14, 30
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    ordered = sorted(p[1] for p in points)
    # the first few losses would flatten all the rest
    y0, y1 = ordered[0], ordered[min(len(ordered) - 1, round(0.98 * (len(ordered) - 1)))]
    y0, y1 = y0 - 0.06 * (y1 - y0 or 1), y1 + 0.08 * (y1 - y0 or 1)
    x1 = x1 if x1 > x0 else x0 + 1

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (width - left - right)

    def py(y: float) -> float:
        return max(4.0, height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom))

    parts = []
    for value in _ticks(y0, y1):
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{py(value):.1f}" y2="{py(value):.1f}" stroke="var(--line)"/>'
        )
        parts.append(f'<text x="{left - 6}" y="{py(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _ticks(x0, x1):
        parts.append(f'<text x="{px(value):.1f}" y="{height - 10}" text-anchor="middle">{value:g}</text>')
    for number, (label, colour, line) in enumerate(series):
        line = [p for p in line if math.isfinite(p[1])]
        if not line:
            continue
        if any(p[2] > 0 for p in line):
            band = [(px(x), py(y + 2 * s)) for x, y, s in line] + [(px(x), py(y - 2 * s)) for x, y, s in reversed(line)]
            parts.append(
                f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in band)}" fill="{colour}" opacity="0.18"/>'
            )
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _ in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        for x, y, s in line[:: max(1, len(line) // 60)]:
            note = f"{label}: {y:.4g}" + (f" +- {s:.2g}" if s > 0 else "") + f" at step {x:g}"
            parts.append(
                f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="{4 if s > 0 else 2.4}" fill="{colour}" opacity="0.7"><title>{_e(note)}</title></circle>'
            )
        parts.append(
            f'<text x="{width - right - 6}" y="{top + 14 + 15 * number}" text-anchor="end" style="fill:{colour}">{_e(label)}</text>'
        )
    return f'<figure><figcaption>{_e(title)}</figcaption><svg class="curve" viewBox="0 0 {width} {height}">{"".join(parts)}</svg></figure>'


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:  # the line that is being written
            continue
    return found


def _curves(metrics: list[dict[str, Any]]) -> str:
    def line(key: str, error: str = "") -> list[tuple[float, float, float]]:
        return [(m["step"], m[key], m.get(error, 0.0)) for m in metrics if isinstance(m.get(key), int | float)]

    figures = [
        curve(
            [
                ("training", "var(--a)", line("bits_per_character")),
                ("held out", "var(--b)", line("heldout_bits_per_character", "heldout_bits_standard_error")),
            ],
            title="bound, bits per character (band: two standard errors)",
        ),
        curve([("tokens per second", "var(--a)", line("tokens_per_second"))], title="tokens per second"),
        curve([("learning rate", "var(--a)", line("learning_rate"))], title="learning rate"),
        curve([("gradient norm", "var(--a)", line("gradient_norm"))], title="norm of the gradient"),
    ]
    return f'<h2>Training</h2><div class="curves">{"".join(figures)}</div>' if any(figures) else ""


def _stores(run: Path, stem: str) -> list[Path]:
    found = [p for p in run.glob(f"{stem}*.zarr") if (p / "zarr.json").is_file()]
    return sorted(found, key=lambda p: p.stat().st_mtime)


def _samples(run: Path) -> str:
    stores = _stores(run, "samples")
    if not stores:
        return ""
    group = zarr.open_group(str(stores[-1]), mode="r")
    facts = ", ".join(f"{k} {group.attrs[k]}" for k in ("sampler", "steps", "seed", "weights") if k in group.attrs)
    body = "".join(f"<pre>{_e(t)}</pre>" for t in list(group["text"][:8]))  # type: ignore[index]
    return f"<h2>Samples</h2><p>{_e(facts)}</p>{body}"


def _infilled(run: Path, tokenizer: Tokenizer | None) -> str:
    stores = _stores(run, "infilled")
    if not stores or tokenizer is None:
        return ""
    group = zarr.open_group(str(stores[-1]), mode="r")
    prompt = group.attrs.get("prompt", [[]])[0]  # type: ignore[index]
    rows = []
    for row in group["tokens"][:4].tolist():  # type: ignore[index, union-attr]
        out, index = "", 0
        while index < len(row):
            free, start = prompt[index] < 0, index
            while index < len(row) and (prompt[index] < 0) == free:
                index += 1
            piece = _e(tokenizer.decode(row[start:index]))
            out += f"<mark>{piece}</mark>" if free else piece
        rows.append(f"<pre>{out}</pre>")
    return f"<h2>Filled in</h2><p>Marked: what the model wrote.</p>{''.join(rows)}"


def _film(run: Path, tokenizer: Tokenizer | None) -> str:
    for store in reversed(_stores(run, "samples")):
        group = zarr.open_group(str(store), mode="r")
        if "trajectory" in group and tokenizer is not None:
            mask = group.attrs.get("mask", -1)
            frames = group["trajectory"][:, 0].tolist()  # type: ignore[index, union-attr]
            frames = frames[:: max(1, len(frames) // 200)] + ([frames[-1]] if len(frames) > 200 else [])
            words = [[None if t == mask else tokenizer.decode([t]) for t in row] for row in frames]
            data = json.dumps(words, ensure_ascii=True).replace("<", "\\u003c")
            return (
                "<h2>One sample, from noise to text</h2>"
                '<div class="bar"><button id="play">play</button><input id="slide" type="range" min="0" value="0" aria-label="step"><span id="at"></span></div>'
                f'<pre class="film" id="film"></pre><script type="application/json" id="film-data">{data}</script><script>{_FILM}</script>'
            )
    return ""


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    top = f"<tr>{''.join(f'<th>{_e(h)}</th>' for h in head)}</tr>" if head else ""
    return f"<table>{top}{''.join('<tr>' + ''.join(f'<td>{c}</td>' for c in row) + '</tr>' for row in rows)}</table>"


def write_report(run: Path) -> Path:
    """(Re)write ``run/report.html`` from what the run folder holds now. Returns its path."""
    certificate = (
        read_json(run / "certificate.json") if (run / "certificate.json").is_file() else {"checks": [], "measure": None}
    )
    facts = read_json(run / "run.json") if (run / "run.json").is_file() else {}
    evaluation = read_json(run / "evaluation.json") if (run / "evaluation.json").is_file() else None
    graph = read_json(run / "graph.json") if (run / "graph.json").is_file() else {"name": run.name, "nodes": []}
    drawing = (run / "graph.svg").read_text(encoding="utf-8") if (run / "graph.svg").is_file() else ""
    try:
        tokenizer = load_tokenizer(run) if (run / TOKENIZER).is_file() else None
    except SeddGraphError:
        tokenizer = None
    tiles = []
    if evaluation:
        tiles += [
            (
                f"{evaluation['bits_per_character']:.3f} &plusmn; {evaluation['bits_standard_error']:.3f}",
                "bits per character, held out (upper bound)",
            ),
            (f"{evaluation['unigram_bits']:.3f}", "unigram entropy of the same text, bits per character"),
            (f"{evaluation['perplexity']:.2f}", "perplexity per token (upper bound)"),
        ]
    measure = certificate.get("measure")
    if measure:
        tiles += [
            (f"{measure['parameters']:,}", "parameters"),
            (f"{measure['flops_per_token'] / 1e6:,.1f} M", "FLOPs per token, forward"),
            (
                f"{(measure['saved_bytes'] + measure['state_bytes']) / 2**30:.2f} GiB",
                f"to train, {measure['batch']} rows of {measure['length']}",
            ),
        ]
    checks = [
        [
            '<span class="ok">holds</span>' if c["holds"] else '<span class="bad">fails</span>',
            _e(c["claim"]),
            _e(c["value"]),
            _e(c["how"]),
        ]
        for c in certificate.get("checks", [])
    ]
    rows = [
        [_e(k), _e(json.dumps(v, ensure_ascii=False) if isinstance(v, dict | list) else v)]
        for k, v in facts.items()
        if k != "root"
    ]
    parts = [
        f"<h1>{_e(graph['name'])}</h1><p class='lead'>{len(graph['nodes'])} components; run {_e(run.name)}</p>",
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{_e(label)}</span></div>' for value, label in tiles)
        + "</div>",
        _film(run, tokenizer),
        _samples(run),
        _infilled(run, tokenizer),
        _curves(_metrics(run)),
        "<h2>What was claimed, and what holds</h2>" + _table(checks, ("", "claim", "found", "how")) if checks else "",
        f'<h2>Graph</h2><div class="graph">{drawing}</div>' if drawing else "",
        "<h2>Provenance</h2>" + _table(rows) if rows else "",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(graph['name'])}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    write_text(run / "report.html", page)
    return run / "report.html"
