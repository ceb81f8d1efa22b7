"""Writer of ``report.html``, a self-contained page about a run folder.

The page has sections for results, an animation, samples, training curves, verified claims, the graph and provenance;
sections whose files are missing are omitted. The template ``templates/report.html`` escapes all text. The drawing of
the graph is embedded as an image, which cannot run scripts, and the page loads no external resources. A Content Security
Policy in the page forbids every script and style but its own, and all requests.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from markupsafe import Markup

from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import load_tokenizer
from sedd_graph.errors import SeddGraphError
from sedd_graph.report import facts, samples, trajectories
from sedd_graph.report.frontier import frontier
from sedd_graph.report.render import policy, render
from sedd_graph.store.files import json_object, write_text

__all__ = ["write_report"]

Content = TypeVar("Content")


def write_report(run: Path) -> Path:
    """Write ``report.html`` from the current files of the run folder ``run``, and return the path of the report."""
    try:
        tokenizer = load_tokenizer(run) if (run / TOKENIZER).is_file() else None
    except SeddGraphError:
        tokenizer = None
    certificate, graph = json_object(run / "certificate.json"), json_object(run / "graph.json")
    film, edited = (
        (
            _section("samples", trajectories.newest, run, tokenizer),
            _section("edited", trajectories.edited, run, tokenizer),
        )
        if tokenizer is not None
        else (None, None)
    )
    curves = facts.training_curves(run)
    player = render("player.js") + render("reel.js") + render("report.js") if film or edited else Markup()
    script, style = player + render("curves.js"), render("palette.css") + render("player.css") + render("report.css")
    page = render(
        "report.html",
        script=script,
        style=style,
        policy=policy(script, style),
        name=graph.get("name", run.name),
        lead=f"{len(graph['nodes'])} components; run {run.name}" if "nodes" in graph else f"run {run.name}",
        results=facts.results(
            json_object(run / "evaluation.json"),
            certificate.get("measure") or {},
            json_object(run / "evaluation-ode.json"),
            facts.tables(run),
        ),
        film=film,
        edited=edited,
        samples=_section("samples", samples.newest_samples, run),
        quality=samples.quality(run),
        frontier=frontier(run),
        infilled=_section("infilled", samples.newest_infilled, run, tokenizer),
        curves=curves,
        fallbacks=facts.fallbacks(run),
        activations=_section("activations", facts.activations, run) or [],
        claims=certificate.get("checks", []),
        drawing=facts.drawing(run),
        provenance=facts.provenance(run),
        lock=facts.lock(run),
    )
    # names of files that are not UTF-8 hold surrogates, which cannot be written
    write_text(run / "report.html", page.encode("utf-8", "backslashreplace").decode())
    return run / "report.html"


def _section(name: str, read: Callable[..., Content], *arguments: object) -> Content | None:
    """Return what ``read`` finds in the zarr groups of a ``name``; None, with a warning, if they are damaged."""
    try:
        return read(*arguments)
    except Exception as error:  # zarr, codecs and file systems raise many classes
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"report.html is without {name}: {name}.zarr is damaged: {first}", stacklevel=3)
        return None
