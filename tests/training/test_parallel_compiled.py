"""Shards whose blocks are compiled, in processes of ``torchrun``: compilers have threads, which forks lack."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sedd_graph.cli import main as cli
from tests.conftest import ROOT, SMALL

CPU = ["--device", "cpu"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiles for a CPU")
def test_compiled_shards_have_the_losses_of_one_process(tmp_path: Path) -> None:
    """Two processes with ``compile: block``, against one that compiles nothing."""
    (tmp_path / "small.yaml").write_text(SMALL)
    losses = []
    for name, settings in (("one", []), ("two", ["train.compile=block", "train.parallel={shard: null}"])):
        where = ["--runs", str(tmp_path / name), "--path-to", str(tmp_path / "at"), *CPU]
        build = ["build", str(tmp_path / "small.yaml"), "--proof", "quick", "--compile", "off", *where, *settings]
        assert cli.run(build) == 0
        run = Path((tmp_path / "at").read_text())
        if name == "one":
            assert cli.run(["train", str(run), *CPU]) == 0
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, "-m", "sedd_graph", "train", str(run), *CPU],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
