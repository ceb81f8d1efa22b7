"""scripts/demo: every command of it exists with its options, and the last one that it prints trains on a text of the user's."""

import argparse
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from sedd_graph.cli import main as cli
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.hardware import pick_device
from sedd_graph.inputs.confine import allow_outside
from sedd_graph.runs.open import open_run
from tests.conftest import ROOT

DEMO = (ROOT / "scripts" / "demo").read_text(encoding="utf-8")
CALLS = re.findall(r"^(?:exec |  exec )?\.venv/bin/sedd-graph (.*)$", DEMO, re.MULTILINE)
SMALL = [
    *("params.dim=32", "params.heads=2", "params.depth=1", "params.tokens=300", "data.length=16"),
    *("train.steps=3", "train.batch=4", "train.compile=off", "train.evaluate=null"),
]


def printed() -> str:
    """The command that trains on the user's own file."""
    (command,) = re.findall(r"\"\.venv/bin/sedd-graph (train .*)\"$", DEMO, re.MULTILINE)
    return command


@pytest.mark.parametrize("call", [*CALLS, printed()])
def test_commands_parse(call: str) -> None:
    parsed = cli._parsed(shlex.split(call))
    assert isinstance(parsed, argparse.Namespace)
    assert parsed.run if hasattr(parsed, "run") else parsed.sources


def test_the_demo_has_its_steps() -> None:
    assert [shlex.split(call)[0] for call in CALLS] == ["train", "sample", "infill", "eval", "eval", "view", "serve"]


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_last_command_trains_on_a_file_of_the_user(tmp_path: Path, quick: bool) -> None:
    """To the letter, and in the two steps that it does, with a quick proof."""
    words = ["aardvark", "badger", "civet", "dingo", "ermine", "fossa", "genet"]
    own = tmp_path / "elsewhere" / "own text.txt"
    own.parent.mkdir()
    own.write_text(" ".join(words[n % 7] for n in range(1500)), encoding="utf-8")
    command = printed().replace("/path/to/your.txt", f'"{own}"')
    where = ["--runs", str(tmp_path / "runs"), "--path-to", str(tmp_path / "run.txt"), "--device", "cpu"]
    verb, *rest = [*shlex.split(command), *SMALL, *where]
    assert verb == "train"
    assert cli.run(["build", *rest, "--proof", "quick", "--compile", "off"] if quick else [verb, *rest]) == 0
    run = Path((tmp_path / "run.txt").read_text(encoding="utf-8"))
    assert not quick or cli.run(["train", str(run), "--allow-outside", "--device", "cpu"]) == 0
    with allow_outside():
        data = open_run(run, device=pick_device("cpu"), compile="off").data()
    assert isinstance(data, Dataset)
    text = data.tokenizer.decode(data.train.take(np.arange(8), 0).tokens.ravel())
    assert set(text.split()[1:-1]) == set(words)
    assert (run / "evaluation.json").is_file()
