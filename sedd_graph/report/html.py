"""``report.html``: one self-contained page of a run folder: results, a film, samples, curves, claims, graph, provenance.

The page is a template (``templates/report.html``) that escapes every text. The drawing of the graph is embedded as an
image, which runs no script, and the page loads nothing from elsewhere. Parts for which the run folder has no files are
left out.
"""

from __future__ import annotations

from pathlib import Path

from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.errors import SeddGraphError
from sedd_graph.report import facts, samples
from sedd_graph.report.render import render
from sedd_graph.store.files import write_text

__all__ = ["write_report"]


def write_report(run: Path) -> Path:
    """Write ``report.html`` from the present contents of the run folder, over an older one. Return its path."""
    try:
        tokenizer = load_tokenizer(run) if (run / TOKENIZER).is_file() else None
    except SeddGraphError:
        tokenizer = None
    certificate, graph = facts.json_object(run / "certificate.json"), facts.json_object(run / "graph.json")
    page = render(
        "report.html",
        name=graph.get("name", run.name),
        lead=f"{len(graph['nodes'])} components; run {run.name}" if "nodes" in graph else f"run {run.name}",
        results=facts.results(facts.json_object(run / "evaluation.json"), certificate.get("measure") or {}),
        film=samples.film(run, tokenizer),
        samples=samples.newest_samples(run),
        quality=samples.quality(run),
        infilled=samples.newest_infilled(run, tokenizer),
        curves=facts.training_curves(run),
        activations=facts.activations(run),
        claims=certificate.get("checks", []),
        drawing=facts.drawing(run),
        provenance=facts.provenance(run),
        lock=facts.lock(run),
    )
    write_text(run / "report.html", page)
    return run / "report.html"
