"""No text, wherever it comes from, sends control characters to a terminal."""

import argparse
import io
import sys
import types
import warnings
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sedd_graph.cli import main as cli
from sedd_graph.cli.progress import Bars, Lines
from sedd_graph.cli.sample import show_stored
from sedd_graph.cli.terminal import printable, say
from sedd_graph.component.progress import observed, progress
from sedd_graph.runs.open import Run

TITLE = "\x1b]0;owned\x07\x9b31m\r"
"""Sets the title of a terminal, colours what follows and returns to the start of the line."""
SPELLED = r"\x1b]0;owned\x07\x9b31m\x0d"


def test_control_characters_are_spelled_out() -> None:
    assert printable(TITLE) == SPELLED
    assert printable("tab\tline\nä\u200fא\U0001f600") == "tab\tline\nä\u200fא\U0001f600"
    assert printable("\u202egnp.exe\u2066") == r"\u202egnp.exe\u2066"
    assert printable(b"caf\xe9".decode("utf-8", "surrogateescape") + "\ud800") == r"caf\xe9\ud800"


@given(st.text(st.characters(exclude_categories=())))
def test_what_is_printed_has_no_control_characters(text: str) -> None:
    for encoding in ("ascii", "latin-1", "utf-8"):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
        say(text, stream)
        shown = raw.getvalue().decode(encoding)
        assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]


def test_paths_of_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = cast(Run, types.SimpleNamespace(path=tmp_path, weights="fresh"))
    show_stored(run, tmp_path / TITLE)
    assert capsys.readouterr().out == f"---\nweights fresh; stored in {tmp_path}/{SPELLED}\n"


def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(["build", f"{TITLE}.yaml", "--check"]) == 2
    assert capsys.readouterr().err == f"{SPELLED}.yaml: no such file\n"
    path = tmp_path / f"{TITLE}.yaml"
    path.write_text('blueprint: 1\nname: "a\\e[2J"\nnodes: {"b\\e[2J": {op: "c\\e[2J"}}\n')
    assert cli.run(["build", str(path), "--check"]) == 2
    said = capsys.readouterr().err
    assert SPELLED in said
    assert not set(said) & {"\x1b", "\x9b", "\x07", "\r"}
    with pytest.raises(SystemExit):
        cli.run(["build", "first", f"--{TITLE}"])
    assert SPELLED in capsys.readouterr().err

    def fail(arguments: argparse.Namespace) -> int:
        raise RuntimeError(TITLE)

    monkeypatch.setattr("sedd_graph.cli.schema.run", fail)
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit):
        cli.main(["schema"])
    assert rf"internal error: RuntimeError: {SPELLED.removesuffix(chr(92) + 'x0d')}" in capsys.readouterr().err
    assert warnings.formatwarning(UserWarning(TITLE), UserWarning, "", 0) == f"warning: {SPELLED}\n"
    sys.excepthook(RuntimeError, RuntimeError(TITLE), None)
    assert capsys.readouterr().err == f"RuntimeError: {SPELLED}\n"


def test_names_of_long_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sedd_graph.cli.progress.REFRESH", 0.0)
    terminal = io.StringIO()
    bars = Bars(Console(file=terminal, force_terminal=True, width=120))
    with observed(bars), progress(f"{TITLE}[red]", total=3, unit=TITLE) as advance:
        advance()
    assert f"{SPELLED}[red]" in terminal.getvalue()
    assert not {"\x07", "\x9b"} & set(terminal.getvalue())
    assert "\x1b]0" not in terminal.getvalue()
    with observed(Lines(lambda line: say(line, sys.stderr), patience=-1)), progress(TITLE):
        pass
    assert capsys.readouterr().err == f"{SPELLED}: done in 0 s\n"
