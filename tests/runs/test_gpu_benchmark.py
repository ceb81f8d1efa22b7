"""The measurements of one GPU session run, at toy sizes, on a CPU: a fault in them must not cost the session."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, imported from its folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    import gpu as found

    yield found
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and "benchmarks" in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_every_item_runs_as_a_toy(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.jsonl"
    assert gpu.main(["--toy", "--device", "cpu", "--output", str(path)]) == 0, capsys.readouterr().out
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted({r["item"] for r in records}) == list(range(1, 15))
    assert all(r["toy"] and r["hardware"].startswith("cpu") and r["torch"] for r in records)
    found = {r["name"]: r for r in records}
    assert found["device against CPU, float32"]["loss"] < 1e-6
    assert found["dropout"]["equal"]
    assert found["exact, float32"]["equal"] == found["exact, float32"]["gradients"] > 0
    assert found["resumed against unbroken"]["largest"] == 0
    assert found["whole rows against chunks"]["apart"] < 1e-5
    assert {"block, 2 rows", "by hand, 2 rows", "reversible", "evaluation of the bound"} <= found.keys()
    # one number, which a GPU sends while it evaluates the trunk
    assert found["training step, sedd-small"]["where"] == {"_local_scalar_dense": 1}


def test_a_failure_is_written_and_the_next_item_begins(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(setting: Any) -> Any:
        yield "before", {"value": 1.0}
        raise RuntimeError("no such kernel")

    def works(setting: Any) -> Any:
        yield "after", {"value": 2.0}

    def endless(setting: Any) -> Any:
        while True:
            if setting.left() < -60:
                yield "never", {}

    monkeypatch.setattr(gpu, "ITEMS", {1: (fails, 10.0), 2: (endless, 0.3), 3: (works, 10.0)})
    record = gpu.Record(tmp_path / "found.jsonl", {"hardware": "none"})
    setting = gpu.Setting(gpu.torch.device("cpu"), False)
    monkeypatch.setattr(gpu, "SHORTEST", 0.0)
    gpu.run(setting, record, [1, 2, 3], 100.0)
    records = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [r["name"] for r in records] == ["before", "fails", "endless", "after"]
    assert "RuntimeError: no such kernel (test_gpu_benchmark.py:" in records[1]["error"]
    assert "OutOfTimeError" in records[2]["error"]
    assert record.errors == 2
