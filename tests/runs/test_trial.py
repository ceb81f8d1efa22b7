"""The trial step of ``build`` is the step that training will run, and its memory is measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sedd_graph.cli import main as cli
from sedd_graph.engine.measure import measure
from sedd_graph.engine.peak import PeakMemory, allocated_peak
from sedd_graph.runs.check import check
from sedd_graph.runs.distilled import distiller
from sedd_graph.runs.memory import measure_training
from sedd_graph.runs.open import make_engine, read_data
from sedd_graph.runs.trial import try_step
from sedd_graph.training.trainer import Trainer

CPU = torch.device("cpu")


def test_the_memory_of_the_allocator_is_that_of_its_operations() -> None:
    def work() -> float:
        x = torch.zeros(300, 300)
        y = x + 1
        del x
        w = torch.ones(300, 300, requires_grad=True)
        loss = (w @ y).relu().sum()
        loss.backward()
        return float(loss.detach())

    with (counted := PeakMemory()):
        value = work()
    peak, again = allocated_peak(work, CPU)
    assert peak == pytest.approx(counted.peak, abs=64)
    assert again == value


@pytest.mark.parametrize(
    ("train", "processes", "rows", "passes", "dtype"),
    [
        ("batch: 8", 1, 8, 1, "float32"),
        ("batch: 8, dtype: bfloat16", 2, 4, 1, "bfloat16"),
        ("batch: 24, accumulate: 3, ema: null", 2, 4, 2, "float32"),
    ],
)
def test_the_trial_is_a_step_of_training(
    small: Callable[..., Path], train: str, processes: int, rows: int, passes: int, dtype: str, monkeypatch: Any
) -> None:
    """With its rows, precision and optimizer; what it takes is near the estimate where that is in float32."""
    path = small(("batch: 8", train))
    report = check(path)
    seen: list[int] = []
    real = Trainer.micro_batches

    def watched(self: Trainer) -> Any:
        for batch, random in real(self):
            seen.append(len(batch))
            yield batch, random

    monkeypatch.setattr(Trainer, "micro_batches", watched)
    engine = make_engine(report, device=CPU, compile="off")
    used: set[torch.dtype] = set()
    mlp = next(module for name, module in engine.model.named_modules() if name.endswith("mlp"))
    mlp.register_forward_hook(lambda m, i, o: used.add(o.dtype))
    before = [p.detach().clone() for p in engine.model.parameters()]
    cost = measure_training(report, processes)
    assert cost.batch == rows
    trial = try_step(engine, read_data(report, root=path.parent), report.train, cost, processes=processes)
    assert seen == [rows] * passes
    assert (trial.rows, trial.micro_batch, trial.dtype, trial.finite) == (rows, rows, dtype, True)
    assert used == {getattr(torch, dtype)}
    assert any(not torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))  # a whole step
    assert trial.peak_bytes is not None
    assert 0.5 < trial.peak_bytes / trial.estimate_bytes < 1.6
    assert f"of a step of {rows} rows in {dtype}" in trial.text(CPU)


@pytest.mark.parametrize(("op", "passes", "trained"), [("consistency", 4, 1), ("idlm", 7, 2)])
def test_distillation_is_estimated_with_all_of_its_networks(
    small: Callable[..., Path], op: str, passes: int, trained: int
) -> None:
    report = check(small(), [f"distill.op={op}"])
    cost, alone = measure_training(report), measure_training(check(small()))
    engine = make_engine(report, device=CPU, compile="off")
    weights = 4 * sum(p.numel() for p in engine.model.parameters())
    engine = distiller(engine, report)
    engine.compile("off")
    trial = try_step(engine, read_data(report, root=small().parent), report.train, cost)
    # with weights, gradients and two moments each; one weight average, and the teacher
    assert (cost.passes, alone.passes) == (passes, 3)
    assert cost.state_bytes == weights * (4 * trained + 2)
    assert alone.state_bytes == weights * 5
    whole = measure(report.graph, report.registry, batch=cost.batch, length=cost.length).saved_bytes
    assert cost.saved_bytes == trained * whole
    assert trial.finite
    assert trial.peak_bytes is not None
    assert trial.peak_bytes > cost.state_bytes
    assert 0.8 < trial.peak_bytes / trial.estimate_bytes < 3


def test_build_says_what_a_step_takes(small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    arguments = ["build", str(small()), "--runs", str(tmp_path), "--path-to", str(tmp_path / "at"), "--proof", "quick"]
    assert cli.run([*arguments, "--device", "cpu", "--processes", "2"]) == 0
    said = capsys.readouterr().out
    assert "saved for backward (4 rows of 32)" in said
    assert "GiB at the peak of a step of 4 rows in float32 (estimate: " in said
    trial = json.loads((Path((tmp_path / "at").read_text()) / "certificate.json").read_text())["trial"]
    assert (trial["rows"], trial["compile"], trial["finite"]) == (4, "off", True)
    assert cli.run([*arguments, "--device", "cpu", "--processes", "3"]) == 2
    assert "train.batch = 8 is not a multiple of accumulate * processes = 1 * 3" in capsys.readouterr().err


def test_a_blueprint_without_data_is_tried_on_arbitrary_rows(small: Callable[..., Path]) -> None:
    report = check(small())
    engine = make_engine(report, device=CPU, compile="off")
    trial = try_step(engine, None, report.train, measure_training(report))
    assert trial.finite
    assert trial.peak_bytes
    assert all(p.grad is None for p in engine.model.parameters())
