"""Files at every place that takes one: few here, many in the slow test."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.inputs.nasty import PLACES, run

PRESENT = tuple(p for p in PLACES if p != "parquet" or importlib.util.find_spec("pyarrow") is not None)


@pytest.mark.skipif(sys.platform != "linux", reason="file types and limits of Linux")
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_600_nasty_files_do_no_harm(tmp_path: Path) -> None:
    outcome = run(600, 1, tmp_path, places=PRESENT)
    assert outcome["refused"] > 300
    assert outcome["accepted"] > 10


def test_every_place_reads_its_good_file(tmp_path: Path) -> None:
    """So that what is refused above is refused for what it is."""
    import subprocess

    from tests.inputs.nasty import READ, SUFFIX, good

    for place in ("parquet", "tokenizer", "weights") if "parquet" in PRESENT else ("tokenizer", "weights"):
        path = tmp_path / f"good{SUFFIX[place]}"
        path.write_bytes(good(place))
        done = subprocess.run(
            [sys.executable, "-c", READ, place, str(path)], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, (place, done.stdout, done.stderr)
