"""The live view of denoising redraws drafts in place, spells control characters out, and leaves nothing behind."""

import io
import re

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sedd_graph.cli import live
from sedd_graph.cli.live import watching
from sedd_graph.component.progress import progress
from sedd_graph.errors import UserError


def drafts(rows: Tensor) -> list[str]:
    return [f"draft {row.sum()} \x1b]0;title\x07" for row in rows]


def test_drafts_are_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "REFRESH", 0.0)
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=60)
    with watching(drafts, total=3, console=console) as on_step, progress("sampling", total=3):
        for number in range(4):
            on_step(number, torch.full((6, 2), number))
    raw = terminal.getvalue()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
    assert [f"step {n} of 3" in shown for n in range(4)] == [True] * 4
    assert "draft 6 \\x1b]0;title\\x07" in shown
    assert "\x1b]0" not in raw
    assert shown.count("draft 2 ") == live.ROWS  # the first rows alone
    assert "sampling" not in shown  # no bar beside the drafts
    assert raw.rstrip("\r\n ").endswith("\x1b[2K")  # erased


def test_elsewhere_it_is_refused() -> None:
    with (
        pytest.raises(UserError, match="standard output is none"),
        watching(drafts, total=None, console=Console(file=io.StringIO())),
    ):
        pass
