"""The example of molecules: what its regular expression accepts, by hand and by RDKit, and samples that match it."""

import re
from pathlib import Path

import numpy as np
import pytest
import zarr

import sedd_graph
from sedd_graph.cli.main import run
from sedd_graph.diffusion.conditions.automaton import compile_pattern
from tests.examples.scripts import script

TOKEN = re.compile(r"Cl|Br|\[N\+\]|\[O-\]|[CNOSPFI]|[=#()]|[1-3]")


def well_formed(name: str) -> bool:
    """Return True if a molecule is made of known symbols, its brackets nest two deep at most, and its digits pair."""
    parts, depth = TOKEN.findall(name), 0
    if "".join(parts) != name or not name:
        return False
    for part in parts:
        depth += (part == "(") - (part == ")")
        if not 0 <= depth <= 2:
            return False
    return depth == 0 and all(parts.count(digit) % 2 == 0 for digit in "123")


def test_what_the_expression_accepts() -> None:
    module = script("molecules/molecules.py")
    known = compile_pattern(module.language())
    for text, good in [
        ("CCO\n", True),
        ("C1=CC=CC=C1\nOC(=O)C(Cl)C\n", True),
        ("FC(F)(F)C1CC2=C(C1)C=CC=C2\n", True),
        ("C[N+]([O-])=O\n", True),
        ("CCO", False),  # no line break at the end
        ("C1CC\n", False),
        ("C1CC\nC1\n", False),  # pairs within a molecule
        ("C(C\n", False),
        ("CC)\n", False),
        ("C(C(C(C)C)C)C\n", False),  # three deep
        ("CFC\n", False),
        ("C=OC\n", False),
        ("C11C\n", False),
        ("c1ccccc1\n", False),
        ("\n", False),
    ]:
        assert known.matches(text.encode()) is good, text


def test_the_corpus_is_what_rdkit_ships_and_reads(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    module = script("molecules/molecules.py")
    assert module.write_corpus(tmp_path) == len(names := (tmp_path / "smiles.txt").read_text().splitlines()) == 4164
    assert all(map(well_formed, names))
    assert all(map(module.valid, names[::20]))
    assert not module.valid("C1CC")
    assert not module.valid("C(C)(C)(C)(C)C")


def test_every_sampled_molecule_is_well_formed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an untrained model, whose free samples are noise."""
    pytest.importorskip("rdkit")
    module = script("molecules/molecules.py")
    monkeypatch.chdir(tmp_path)
    assert run(["init", "molecules-tiny"]) == 0
    (tmp_path / "smiles.txt").write_text("CCO\nC1CC1\n" * 100)
    small = ["params.dim=16", "params.heads=2", "params.depth=1", "data.length=24", "sample.steps=4"]
    words = ["--proof", "quick", "--device", "cpu", "--path-to", "run"]
    assert run(["build", "molecules-tiny.yaml", *small, *words]) == 0
    trained = (tmp_path / "run").read_text().strip()
    shared = [trained, "--batch", "8", "--weights", "fresh", "--device", "cpu"]
    assert run(["sample", *shared]) == 0
    assert run(["sample", *shared, "--matching", module.language()]) == 0
    rows = np.asarray(zarr.open_group(f"{trained}/samples-2.zarr", mode="r")["text"]).tolist()
    assert all(row.endswith("\n") and len(row) == 24 for row in rows)
    assert all(well_formed(name) for row in rows for name in row.removesuffix("\n").split("\n"))
    free, held = (module.check(Path(trained) / name) for name in ("samples.zarr", "samples-2.zarr"))
    assert held["syntax"] == held["molecules"] > 8
    assert free["syntax"] < free["molecules"]
    assert sedd_graph.check("molecules-tiny.yaml").data.length == 96
