"""The tutorial of eight commands, to the letter: its files, its commands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import DOCS, blocks, blueprints

PAGE = DOCS / "tutorials" / "eight-commands.md"


def files(folder: Path) -> None:
    """Write the files that the page shows."""
    making, opening = blocks(PAGE, "py")
    subprocess.run([sys.executable, "-c", making], cwd=folder, check=True)
    (folder / "open.py").write_text(opening, encoding="utf-8")
    (folder / "prompts.jsonl").write_text(blocks(PAGE, "json")[0], encoding="utf-8")
    (folder / "notes.yaml").write_text(blueprints(PAGE)["notes.yaml"], encoding="utf-8")


def test_there_are_eight_commands() -> None:
    (commands,) = blocks(PAGE, "bash")
    assert len(commands.splitlines()) == 8
    assert [line.split()[1] for line in commands.splitlines()] == ["build", "train", "train", "sample", "infill", "eval", "export", "open.py"]  # fmt: skip


@pytest.mark.slow
def test_the_eight_commands_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra 'hub' is not installed")
    files(tmp_path)
    (commands,) = blocks(PAGE, "bash")
    programs = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["id"] for answer in answers] == ["middle", "end"]
    assert answers[0]["text"].startswith("The ")
    assert " statement is used to " in answers[0]["text"]
    run = tmp_path / (tmp_path / "run.txt").read_text(encoding="utf-8").strip()
    assert json.loads((run / "changes.json").read_text(encoding="utf-8"))
    bounds = [float(n) for n in re.findall(r"held-out bound ([\d.]+)", done.stdout)]
    assert bounds[-1] < 5.4  # log 512 = 6.24 for a model that knows nothing
    assert re.search(r"^The .* statement$", done.stdout.rstrip(), re.MULTILINE | re.DOTALL)
    assert done.stdout.rstrip().endswith(" statement")
    assert (tmp_path / "notes-model" / "config.json").is_file()
