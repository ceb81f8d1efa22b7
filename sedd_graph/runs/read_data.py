"""Reading of the data set of a blueprint, of text or of points."""

from __future__ import annotations

from pathlib import Path

from sedd_graph.data.cached import TokenCache
from sedd_graph.data.config import DataConfig
from sedd_graph.data.points import PointData, open_points
from sedd_graph.data.rows import Dataset, open_data
from sedd_graph.data.tokenizer import Tokenizer
from sedd_graph.runs.check import Report

__all__ = ["read_data"]


def read_data(
    report: Report, *, root: Path, tokenizer: Tokenizer | None = None, cache: TokenCache | None = None
) -> Dataset | PointData:
    """Read the data set of a blueprint's ``data`` section.

    Args:
        report: Result of checking the blueprint.
        root: Folder to which file names in the blueprint are relative.
        tokenizer: Tokenizer for text, such as that of a run; None makes the one that the ``data`` section declares.
        cache: Where the tokens of text are kept; None to tokenise it.

    Returns:
        The training and held-out rows: tokens, or points for a flow.

    Raises:
        UserError: The data cannot be read.
    """
    if isinstance(report.data, DataConfig):
        return open_data(report.data, root=root, tokenizer=tokenizer, cache=cache)
    return open_points(report.data, root=root, shape=report.plan.shape)
