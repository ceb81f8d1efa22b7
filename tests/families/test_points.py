"""A flow by the commands that language models have: its likelihood against closed forms, its samples against its density."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import zarr

import sedd_graph
from sedd_graph.cli.main import run
from sedd_graph.data.config import PointsConfig
from sedd_graph.data.points import open_points
from sedd_graph.engine.engine import Engine
from sedd_graph.errors import BlueprintError, SeddGraphError
from sedd_graph.runs.check import check
from tests.conftest import ROOT

TINY = ROOT / "blueprints" / "flow-tiny.yaml"
LINEAR = """
blueprint: 1
name: linear-flow
axes: {b: batch, d: 3}
inputs: {x: float b 1 d}
outputs: {z: mix}
nodes:
  norm: {op: act_norm, in: x}
  mix: {op: plu, in: norm}
objective: {op: exact_likelihood}
data: {points: {op: npy, path: points.npy}, holdout: 0.25}
train: {steps: 400, batch: 256, optimizer: {op: adamw, lr: 1e-2}, warmup: 10, ema: null, evaluate: null, checkpoint: {every: 200}}
"""
MEAN = np.array([3.0, -1.0, 0.5])
FACTOR = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.3, 0.5, 0.2]])


@pytest.fixture
def moved() -> Engine:
    """flow-tiny's network, started from data and with its weights moved far off their start."""
    engine = sedd_graph.build(TINY, ["params.depth=3", "params.hidden=16"], device="cpu")
    assert isinstance(engine, Engine)
    generator = torch.Generator().manual_seed(0)
    engine.loss(torch.randn(512, 1, 2, generator=generator))
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    engine.model.eval()
    return engine


def grid(low: float, high: float, side: int) -> tuple[torch.Tensor, float]:
    """The middles of the cells of a square, [side^2, 1, 2], the second coordinate running faster, and a cell's area."""
    step = (high - low) / side
    at = low + step * (torch.arange(side, dtype=torch.float64) + 0.5)
    return torch.cartesian_prod(at, at)[:, None], step**2


def test_the_likelihood_is_the_change_of_variables_by_autograd(moved: Engine) -> None:
    moved.model.double()
    x = torch.randn(5, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    for row in x:
        z = moved.model(x=row[None])["z"]
        jacobian = torch.autograd.functional.jacobian(lambda r: moved.model(x=r[None])["z"].flatten(), row)
        log_det = torch.linalg.slogdet(jacobian.reshape(2, 2)).logabsdet
        expected = -scipy.stats.norm.logpdf(z.detach().numpy()).sum() - log_det.item()
        assert moved.loss(row[None]).item() == pytest.approx(expected, abs=1e-10)
    assert torch.allclose(moved.process.inverse(moved.model, moved.model(x=x)["z"]), x, atol=1e-9)


def test_the_density_integrates_to_one_and_samples_follow_it(moved: Engine) -> None:
    moved.model.double()
    fine, area = grid(-12.0, 12.0, 480)
    mass = (-moved.bound_rows(fine, seed=0)).exp() * area
    assert mass.sum().item() == pytest.approx(1.0, abs=2e-3)
    # the chance of each of 24 x 24 squares of side 1 beside how many of the draws fall there
    expected = mass.reshape(24, 20, 24, 20).sum((1, 3)).flatten().numpy() * 20_000
    moved.model.float()
    drawn = moved.sample(20_000, seed=0).flatten(1).numpy()
    counts, _, _ = np.histogram2d(drawn[:, 0], drawn[:, 1], bins=24, range=[[-12, 12], [-12, 12]])
    often = expected >= 5
    rest = [counts.flatten()[~often].sum() + 20_000 - counts.sum(), 20_000 - expected[often].sum()]
    observed, chances = np.append(counts.flatten()[often], rest[0]), np.append(expected[often], rest[1])
    statistic = ((observed - chances) ** 2 / chances).sum()
    assert len(chances) > 30
    assert scipy.stats.chi2.sf(statistic, len(chances) - 1) > 1e-3


def test_the_same_seed_draws_the_same_rows(moved: Engine) -> None:
    assert torch.equal(moved.sample(4, seed=3), moved.sample(4, seed=3))
    assert not torch.equal(moved.sample(4, seed=3), moved.sample(4, seed=4))


def normal(path: Path, rows: int = 20_000) -> Any:
    """Rows of a known normal density into ``path``; returns that density."""
    drawn = np.random.default_rng(0).normal(size=(rows, 3)) @ FACTOR.T + MEAN
    np.save(path, drawn.astype(np.float32))
    return scipy.stats.multivariate_normal(MEAN, FACTOR @ FACTOR.T)


def test_by_the_verbs_a_linear_flow_reaches_the_entropy_of_normal_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    true = normal(tmp_path / "points.npy")
    (tmp_path / "linear.yaml").write_text(LINEAR, encoding="utf-8")
    assert run(["build", "linear.yaml", "--path-to", "where"]) == 0
    folder = Path((tmp_path / "where").read_text())
    assert run(["train", str(folder)]) == 0
    held = np.load("points.npy")[15_000:]
    entropy = true.entropy() / 3
    found = json.loads((folder / "evaluation.json").read_text())
    assert (found["rows"], found["dimensions"]) == (5_000, 3)
    assert found["objective"] == "exact_likelihood.v1"
    # never below the data's own -log p but by chance, and hardly above it
    own = -true.logpdf(held).mean() / 3
    assert own - 1e-3 < found["nats_per_dimension"] < own + 5e-3
    assert abs(found["nats_per_dimension"] - entropy) < 3 * found["standard_error"] + 5e-3
    assert found["bits_per_dimension"] == pytest.approx(found["nats_per_dimension"] / math.log(2))
    assert run(["sample", str(folder), "--batch", "4000"]) == 0
    group = zarr.open_group(str(folder / "samples.zarr"), mode="r")
    x, nats = np.asarray(group["x"])[:, 0], np.asarray(group["nats"])
    assert np.abs(x.mean(0) - MEAN).max() < 0.1
    assert np.abs(np.cov(x.T) - FACTOR @ FACTOR.T).max() < 0.1
    assert np.abs(nats + true.logpdf(x)).mean() < 0.05
    report = (folder / "report.html").read_text()
    assert "nats per dimension, held out (exact)" in report
    assert "4,000" not in report  # two thousand dots are enough
    assert "2,000 rows by their first two of 3 numbers" in report
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "bits_per_dimension", "dimensions_per_second", "final_nats_per_dimension"} <= set().union(*records)
    capsys.readouterr()
    assert run(["sample", str(folder), "--steps", "3"]) == 2
    assert "a flow draws whole rows by its inverse: leave steps out" in capsys.readouterr().err
    assert run(["infill", str(folder), "--prefix", "a"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run(["export", str(folder), "-o", "out"]) == 0
    again = sedd_graph.build("out", device="cpu")
    assert torch.equal(again.sample(5, seed=1), sedd_graph.build(folder, device="cpu").sample(5, seed=1))


def test_a_resumed_flow_goes_through_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    normal(tmp_path / "points.npy", rows=1000)
    (tmp_path / "linear.yaml").write_text(LINEAR, encoding="utf-8")
    found = []
    for name, steps in (("whole", (12,)), ("parts", (6, 12))):
        for at, count in enumerate(steps):
            settings = ["train.steps=12", "train.schedule=constant", "train.checkpoint.every=6", "train.batch=64"]
            if not at:
                assert run(["build", "linear.yaml", *settings, "--runs", name, "--path-to", f"{name}.path"]) == 0
            folder = Path((tmp_path / f"{name}.path").read_text())
            if count == 6:  # as if it had been killed after its checkpoint
                assert run(["train", str(folder)]) == 0
                (folder / "checkpoints" / "step-00000012").rename(tmp_path / "gone")
            else:
                assert run(["train", str(folder), *(["--resume"] if at else [])]) == 0
        found.append(sedd_graph.build(folder, device="cpu").model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# -- data ---------------------------------------------------------------------------------------------------------


def test_densities_of_the_plane_are_what_they_say() -> None:
    gaussians = open_points(
        PointsConfig.model_validate({"points": {"op": "eight_gaussians", "count": 40_000}}), root=Path(), shape=(1, 2)
    )
    x = np.concatenate([gaussians.train.x, gaussians.heldout.x])[:, 0]
    assert (gaussians.train.count, gaussians.heldout.count) == (36_000, 4_000)
    assert np.abs(x.mean(0)).max() < 0.05
    assert (x**2).sum(1).mean() == pytest.approx(2**2 + 2 * 0.2**2, rel=0.01)
    moons = open_points(
        PointsConfig.model_validate({"points": {"op": "two_moons", "noise": 1e-3}}), root=Path(), shape=(2,)
    )
    x = moons.train.x.astype(np.float64) + np.array([0.5, 0.25])
    on = np.minimum(np.abs(np.hypot(*x.T) - 1), np.abs(np.hypot(x[:, 0] - 1, x[:, 1] - 0.5) - 1))
    assert on.max() < 0.01
    assert np.array_equal(moons.batch(0, 8).x[2:5], moons.batch(0, 8, start=2, stop=5).x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("objective:", "process: {op: absorb, schedule: {op: loglinear}}\nobjective:"), "a flow has no noise process"),
        (("objective:", "sample: {op: analytic}\nobjective:"), "a flow has no noise process, and is sampled by its inverse"),
        (("points: {op: npy, path: points.npy}, holdout: 0.25", "length: 64"), "a flow learns from real numbers"),
        (("{op: exact_likelihood}", "{op: exact_likelihood, base: cauchy}"), "base"),
        (("{op: exact_likelihood}", "{op: score_entropy}"), "'objective' is given, but 'process' is missing"),
        (("{op: plu, in: norm}", "{op: linear, in: norm, with: {width: 3}}"), "the graph is no flow"),
        (("{op: plu, in: norm}", "{op: linear, in: norm, with: {width: 2}}"), "the graph is no flow"),
        (("objective: {op: exact_likelihood}\n", ""), "points are for flows"),
        (("x: float b 1 d", "x: float b l d"), "a flow's rows are real numbers of a fixed shape"),
        (("warmup: 10", "sample: {every: 10}, warmup: 10"), "train.sample: samples of points are not text"),
        (("op: npy, path: points.npy", "op: npy"), "path"),
    ],
)  # fmt: skip
def test_what_is_no_flow_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "linear.yaml"
    assert change[0] in LINEAR
    text = LINEAR.replace(*change).replace("{b: batch, d: 3}", "{b: batch, l: length, d: 3}")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SeddGraphError, match=message):
        check(path)


def test_saved_activations_are_refused_at_the_node_that_names_them(tmp_path: Path) -> None:
    """The layers of a flow free what they compute, so training would have nothing to write at the first due step."""
    text = TINY.read_text(encoding="utf-8")
    up = "      up: {op: linear, in: half.x0, "
    path = tmp_path / "flow.yaml"
    text = text.replace(up, up + "save: {ports: [out]}, ").replace(
        "    repeat: ", "    save: {ports: [x]}\n    repeat: "
    )
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BlueprintError) as error:
        check(path)
    assert [(p.path, p.message) for p in error.value.problems] == [
        ("blocks.layer.nodes.up.save", "a flow stores no activations: leave 'save' out"),
        ("nodes.flow.save", "a flow stores no activations: leave 'save' out"),
    ]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [lines[p.line - 1].split(":")[0].strip() for p in error.value.problems] == ["up", "save"]


def test_files_that_hold_no_points_are_refused(tmp_path: Path) -> None:
    config = PointsConfig.model_validate({"points": {"op": "npy", "path": "points.npy"}})

    def refused(array: Any, message: str) -> None:
        np.save(tmp_path / "points.npy", array, allow_pickle=True)
        with pytest.raises(SeddGraphError, match=message):
            open_points(config, root=tmp_path, shape=(1, 2))

    with pytest.raises(SeddGraphError, match="cannot be read as a"):
        open_points(config, root=tmp_path, shape=(1, 2))
    refused(np.array([[{}, {}]]), "cannot be read as a .npy file")
    refused(np.zeros((5, 3)), "3 numbers a row")
    refused(np.zeros(5), "must hold numbers")
    refused(np.array([[0.0, np.nan], [0.0, 1.0]]), "not finite")
    (tmp_path / "points.npy").write_bytes(b"no array")
    with pytest.raises(SeddGraphError, match="cannot be read"):
        open_points(config, root=tmp_path, shape=(1, 2))


def test_rows_of_another_shape_are_refused(moved: Engine) -> None:
    with pytest.raises(SeddGraphError, match=r"floats \[batch, 1, 2\]"):
        moved.loss(torch.zeros(3, 2))
