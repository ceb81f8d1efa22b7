"""Files of a run folder that say what the network is: the lock file, and drawings of the graph."""

from __future__ import annotations

from pathlib import Path

from sedd_graph.graph.draw import to_json, to_mermaid, to_svg
from sedd_graph.runs.check import LOCK, Report, lock_text
from sedd_graph.store.files import write_text

__all__ = ["write_graph"]


def write_graph(run: Path, report: Report) -> None:
    """Write the lock file, and the network graph as JSON, SVG and Mermaid, to a run folder.

    The lock file is the blueprint with all default values and component versions.

    Args:
        run: The run folder.
        report: Result of checking the blueprint.
    """
    write_text(run / LOCK, lock_text(report))
    for name, draw in (("graph.json", to_json), ("graph.svg", to_svg), ("graph.mmd", to_mermaid)):
        write_text(run / name, draw(report.graph))
