"""Writer of the page of ``sedd-graph view``: one file without links that plays one or two samples from noise to text.

All text of samples is data (JSON in a script element, which is not run) that the page's script puts in as text. A Content
Security Policy in the page forbids every script and style but its own, and all requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sedd_graph.data.tokenizer import FILE as TOKENIZER
from sedd_graph.data.tokenizer import Tokenizer, load_tokenizer
from sedd_graph.errors import UserError
from sedd_graph.report.film import BYTES
from sedd_graph.report.heat import heat_maps
from sedd_graph.report.render import policy, render
from sedd_graph.report.trajectories import Films, films_of, newest, shortened
from sedd_graph.store.files import json_object, write_text

__all__ = ["LIMIT", "write_view"]

LIMIT = 1_000_000
"""Largest number of bytes of a page."""
_MARK = '<meta name="generator" content="sedd-graph view">'


def write_view(sources: Sequence[Path], page: Path) -> None:
    """Write the page.

    Args:
        sources: One run folder, whose newest samples with a trajectory are shown, or one or two zarr groups, whose
            samples play side by side.
        page: File to write; it is replaced if it is an earlier page of this kind.

    Raises:
        UserError: There are no samples with a trajectory, or ``page`` is another file.
        DamagedError: A zarr group is damaged.
    """
    if page.exists() and not _is_view(page):
        raise UserError(f"{page} exists and is no page of `sedd-graph view`: choose another name (-o)")
    found = [_films(source, BYTES // len(sources)) for source in sources]
    films = [film for made, _ in found for film in made.films][:2]
    if len(found) > 1:
        for film, (made, _) in zip(films, found, strict=True):
            film.update(label=made.store, note=made.facts)
    run = found[0][1]
    name = str(json_object(run / "graph.json").get("name") or run.name)
    script = render("player.js") + render("reel.js") + render("heat.js") + render("theme.js") + render("view.js")
    style = render("palette.css") + render("player.css") + render("view.css")
    notes = [f"{made.store}: {', '.join(left)}." for made, _ in found if (left := _left_out(made, run))]
    text = render(
        "view.html",
        mark=_MARK.removeprefix('<meta name="generator" content="').removesuffix('">'),
        policy=policy(script, style),
        script=script,
        style=style,
        name=name,
        lead=found[0][0].facts if len(found) == 1 else "two samples, played together",
        notes=notes,
        films=films,
        heat=heat_maps(run),
    )
    content = text.encode("utf-8", "backslashreplace").decode()
    if len(content.encode()) > LIMIT:
        raise UserError(f"{page} would have {len(content.encode()):,} bytes; the limit is {LIMIT:,}")
    write_text(page, content)


def _is_view(page: Path) -> bool:
    try:
        with page.open("rb") as stream:
            return _MARK.encode() in stream.read(2000)
    except OSError:
        return False


def _films(source: Path, limit: int) -> tuple[Films, Path]:
    """Return the films of a run folder or a zarr group, and the run folder."""
    if not source.exists():
        raise UserError(f"{source} does not exist")
    is_store = (source / "zarr.json").is_file() or source.suffix == ".zarr"
    run = source.parent if is_store else source
    tokenizer = _tokenizer(run)
    if is_store:
        return films_of(source, tokenizer, limit=limit), run
    if (found := newest(source, tokenizer, limit=limit)) is None:
        raise UserError(
            f"{source} has no samples with a trajectory: draw some by `sedd-graph sample {source} --trajectory`"
        )
    return found, run


def _tokenizer(run: Path) -> Tokenizer:
    if not (run / TOKENIZER).is_file():
        raise UserError(
            f"{run} has no {TOKENIZER}, without which tokens have no text: name a run folder, or samples in one"
        )
    return load_tokenizer(run)


def _left_out(made: Films, run: Path) -> list[str]:
    return shortened(run / made.store, made.films[0])
