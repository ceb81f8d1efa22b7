"""Live view of denoising on a terminal: the drafts of the first rows after each sampler step, redrawn in place."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sedd_graph.cli.terminal import printable
from sedd_graph.component.progress import observed
from sedd_graph.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

__all__ = ["watching"]

ROWS = 4
"""Number of rows that are shown."""
REFRESH = 0.05
"""Least time between two drafts, seconds."""


@contextlib.contextmanager
def watching(
    drafts: Callable[[Tensor], Sequence[str]], *, total: int | None, console: Console | None = None
) -> Iterator[Callable[[int, Tensor], None]]:
    """Context manager that shows drafts in place of progress bars. Its value is the callback of the sampler's steps.

    The drafts are erased at the end.

    Args:
        drafts: Function that returns the text of rows, int64 [b, l], which may have masks.
        total: Number of sampler steps; None if unknown.
        console: The terminal; standard output by default.

    Raises:
        UserError: Standard output is not a terminal.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.rule import Rule
    from rich.text import Text

    terminal = Console() if console is None else console
    if not terminal.is_terminal:
        raise UserError("--watch shows drafts on a terminal, and standard output is none: leave it out")
    shown = 0.0
    with (
        observed(None),
        Live(console=terminal, auto_refresh=False, transient=True, vertical_overflow="ellipsis") as live,
    ):

        def on_step(number: int, rows: Tensor) -> None:
            nonlocal shown
            if (now := time.monotonic()) - shown < REFRESH and number != total:
                return
            shown = now
            title = f"step {number:,}" + ("" if total is None else f" of {total:,}")
            parts = [part for text in drafts(rows[:ROWS]) for part in (Rule(style="dim"), Text(printable(text)))]
            live.update(Group(Text(title, style="bold"), *parts), refresh=True)

        yield on_step
    sys.stdout.flush()
