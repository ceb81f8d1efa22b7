"""Long work shows a bar on a terminal, and one plain line elsewhere."""

import contextlib
import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from sedd_graph.cli import main as cli
from sedd_graph.cli import progress as module
from sedd_graph.cli.progress import Bars, Lines, console_observer
from sedd_graph.component.progress import Advance, observed, progress, track


def plain(text: str) -> str:
    """``text`` without the terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_terminal_shows_bars_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH", 0.0)
    terminal = io.StringIO()
    bars = Bars(Console(file=terminal, force_terminal=True, width=90))
    with observed(bars), progress("training", total=1200, done=200, unit="step") as advance:
        time.sleep(0.02)
        advance(400)
        bars._progress.refresh()
        for _ in track(range(3), "evaluating", unit="batch"):
            bars._progress.refresh()
        print("step 600  loss 1.0")
    shown = plain(terminal.getvalue())
    assert re.search(r"training +━+.* 0:00:0\d 600 of 1,200 steps, [\d,.]+/s, 0:00:\d\d left", shown)
    assert re.search(r"evaluating +━+.* 2 of 3 batches, [\d,.]+/s, 0:00:00 left", shown)
    assert "step 600  loss 1.0\n" in shown  # printed lines go above the bars
    assert re.search(r"\x1b\[2K\x1b\[\?25h\r?$", terminal.getvalue())  # the bars are erased, and the cursor is back


def test_a_bar_of_unknown_length_and_a_second_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH", 0.0)
    terminal = io.StringIO()
    bars = Bars(Console(file=terminal, force_terminal=True, width=90))
    with observed(bars):
        with progress("compiling"):
            bars._progress.refresh()
        with progress("tokenising", unit="document") as advance:
            advance(7)
            bars._progress.refresh()
    shown = plain(terminal.getvalue())
    assert re.search(r"compiling +━+ +0:00:0\d +\r", shown)
    assert re.search(r"tokenising +━+ 0:00:0\d 7 documents, [\d,.]+/s", shown)


def test_elsewhere_a_long_task_says_one_line() -> None:
    now, said = [0.0], list[str]()
    lines = Lines(said.append, patience=10, clock=lambda: now[0])
    with observed(lines):
        with progress("sampling", total=64) as advance:
            for _ in range(64):
                now[0] += 1
                advance()
        with progress("compiling"):
            now[0] += 61
        with progress("proving", total=3, unit="proof") as advance:
            now[0] += 9
            advance()
        with progress("training", total=1000, done=980) as advance:
            now[0] += 20
            advance(10)
    assert said == [
        "sampling: 11 of 64 steps, 1.0/s, 0:00:53 left",
        "compiling: done in 61 s",
        "training: 990 of 1,000 steps, 0.5/s, 0:00:20 left",
    ]


def test_a_task_of_hours_says_a_line_ever_less_often() -> None:
    now, said = [0.0], list[str]()
    with observed(Lines(said.append, patience=10, clock=lambda: now[0])), progress("sampling", total=10_000) as advance:
        for _ in range(4000):
            now[0] += 1
            advance()
    assert [int(line.split()[1].replace(",", "")) for line in said] == [11, 111, 1012, 1913, 2814, 3715]


def test_a_bar_is_for_terminals_and_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(console_observer(), Lines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(console_observer(), Bars)
    monkeypatch.setenv("RANK", "1")
    assert console_observer() is None


def test_verbs_do_not_import_rich_without_a_terminal(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)  # an import of it raises
    assert cli.run(["build", str(small()), "--check"]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out
    assert said.err == ""


class Recorder:
    """An observer that counts the units of each task."""

    def __init__(self) -> None:
        self.found: list[list[object]] = []

    @contextlib.contextmanager
    def task(self, name: str, *, total: int | None, done: int, unit: str) -> Iterator[Advance]:
        task: list[object] = [name, unit, total, done]
        self.found.append(task)

        def advance(count: int = 1) -> None:
            task[3] = cast(int, task[3]) + count

        yield advance


def test_verbs_report_their_long_work(
    small: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(cli, "console_observer", lambda: recorder)

    def reported(*words: str) -> list[list[object]]:
        recorder.found.clear()
        assert cli.run([*words, "--device", "cpu"]) == 0
        return list(recorder.found)

    path = small(("evaluate: null", "evaluate: {every: 4, batches: 2}"))
    found = reported("build", str(path), "--runs", str(tmp_path / "runs"))
    assert [task[0] for task in found] == ["proving", "measuring", "tokenising", "tokenising", "compiling"]
    _, _, training_text, heldout_text, _ = found
    for task in (training_text, heldout_text):
        assert (task[1], task[2]) == ("character", task[3])
    (run,) = (tmp_path / "runs" / "small").iterdir()
    training, evaluating, whole = reported("train", str(run))  # whose tokens are kept
    assert training == ["training", "step", 6, 6]
    assert evaluating == ["evaluating", "batch", 2, 2]
    assert whole[:2] == ["evaluating", "batch"]
    assert whole[2] == whole[3]
    assert reported("eval", str(run), "--batches", "3") == [["evaluating", "batch", 3, 3]]
    assert reported("sample", str(run), "--steps", "5", "--batch", "2") == [["sampling", "step", 6, 6]]
