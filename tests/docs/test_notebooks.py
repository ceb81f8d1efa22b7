"""The notebooks under docs/notebooks: each runs from a folder of its own, at reduced sizes, and says what it promises."""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.pages import DOCS, NOTEBOOKS

SMALL = {
    "first-model": """
seconds = 60
changes = ["params.dim=32", "params.heads=2", "params.depth=1", "params.tokens=300", "data.length=32"]
changes += ["train.steps=4", "train.batch=4", "train.log_every=1", "train.compile=off", "train.evaluate=null"]
options = "--proof quick --compile off"
samples, steps = 4, 4
""",
    "your-own-kernel": """
proof = "quick"
steps = 2
changes = ["params.dim=16", "params.heads=2", "params.depth=1", "params.cond=16", "data.length=16"]
""",
    "reversible-memory": """
depths = [2, 4, 6]
width, length, rows = 64, 64, 4
""",
}
"""What is put below the cell of parameters."""
LARGEST = 2**17
"""Bytes of a notebook with its outputs."""


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def executed(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a notebook at small sizes in ``folder``; return all that its cells print."""
    notebook = copy.deepcopy(read(path))
    (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(SMALL[path.stem]))
    # the kernel is that of this environment, and leaves nothing at home
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(folder / "jupyter"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (folder / "work").mkdir()
    where = {"metadata": {"path": folder / "work"}}
    NotebookClient(notebook, timeout=500, startup_timeout=500, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text") or output.get("data", {}).get("text/html", "") for output in outputs)


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return executed(DOCS / "notebooks" / f"{name}.ipynb", folder, monkeypatch)


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages
def test_a_first_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("first-model", tmp_path, monkeypatch)
    assert "holds  objective.tight" in said
    assert "done at step 4" in said
    assert "<polyline" in said
    assert said.count("statement is used to") == 2
    assert "words that occur in the training text" in said


@pytest.mark.filterwarnings("ignore")
def test_a_kernel_is_proved_and_its_faults_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("your-own-kernel", tmp_path, monkeypatch)
    right, _, wrong = said.partition("every check holds\n")
    assert not [line for line in right.splitlines() if line.startswith("kernel.")]
    assert [line.split()[0] for line in wrong.splitlines()[:1]] == ["kernel.transition"]  # the missing derivative
    assert "kernel.prior" in wrong  # the slow pace
    assert "checks hold, such as" in wrong
    assert "nats per token" in wrong


@pytest.mark.filterwarnings("ignore")
def test_memory_against_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("reversible-memory", tmp_path, monkeypatch)
    assert "x1 = y1 - f(x2, c, angles)" in said  # the derived inverse
    assert said.count(" MiB per layer") == 3
    assert said.count("<polyline") == 3


def test_notebooks_are_small_and_show_no_path_of_a_machine() -> None:
    assert {path.stem for path in NOTEBOOKS} == SMALL.keys()
    for path in NOTEBOOKS:
        notebook = read(path)
        nbformat.validate(notebook)
        assert path.stat().st_size < LARGEST
        for cell in notebook.cells:
            assert not {"ExecuteTime", "execution"} & cell.metadata.keys()
            for output in cell.get("outputs", []):
                assert output["output_type"] != "error"
                text = str(output.get("text", "")) + str(output.get("data", ""))
                assert not any(word in text for word in ("/home/", "/tmp/", "/root/", "/work/", "/Users/")), text
