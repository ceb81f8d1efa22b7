"""A learned code in training: its penalty reaches the loss, and its margin is in the metrics, the report and the build."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sedd_graph
from sedd_graph.cli import main as cli
from sedd_graph.component.counter_rng import fold
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.codes.code import Code
from sedd_graph.diffusion.codes.nearest import least_distance
from sedd_graph.engine.engine import Engine

EMBED = "embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}"
LEARNED = "embed: {op: learned_code, in: tokens, out: float b l d, with: {vocab: v, margin: MARGIN, weight: WEIGHT}}"
TRUNK = "in: {x: embed, attend"


def learned(small: Callable[..., Path], *, weight: float = 1.0, margin: float = 5.0) -> Path:
    text = LEARNED.replace("WEIGHT", str(weight)).replace("MARGIN", str(margin))
    return small((EMBED, text), (TRUNK, "in: {x: embed.out, attend"))


def loss(engine: Engine, rows: slice, key: torch.Tensor) -> torch.Tensor:
    batch = engine.process.batch(torch.arange(6 * 20).view(6, 20)[rows] % 128, torch.device("cpu"))
    random = Randomness(torch.Generator().manual_seed(5), start=rows.start, total=6)
    return engine.trained(engine.draw(batch, random=random), batch, key[rows])[0]


def test_the_penalty_is_added_to_the_loss_of_each_row(small: Callable[..., Path]) -> None:
    key = torch.arange(6, dtype=torch.int32) * 7919
    engines = [sedd_graph.build(learned(small, weight=w), device="cpu", compile="off") for w in (2.0, 0.0)]
    found, plain = (loss(engine, slice(0, 6), key) for engine in engines)
    code = engines[0].model.get_submodule("embed")
    assert isinstance(code, Code)
    penalty = code.penalty(fold(key, 0))
    assert penalty is not None
    assert penalty.min() > 0
    assert torch.allclose(found - plain, 20 * penalty, rtol=1e-4)
    halves = torch.cat([loss(engines[0], rows, key) for rows in (slice(0, 2), slice(2, 6))])
    assert torch.allclose(halves, found, rtol=1e-5)  # the same for every split of the batch
    found.mean().backward()
    assert code.rows().grad is not None
    for engine in engines:
        engine.model.eval()
    assert torch.equal(loss(engines[0], slice(0, 6), key), loss(engines[1], slice(0, 6), key))


def test_margins_are_recorded_at_each_checkpoint(
    small: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, at = learned(small), tmp_path / "at"
    options = ["--runs", str(tmp_path), "--device", "cpu", "--proof", "quick", "--path-to", str(at)]
    assert cli.run(["build", str(path), *options]) == 0
    run = Path(at.read_text())
    checks = {c["name"]: c for c in json.loads((run / "certificate.json").read_text())["checks"]}
    half = float(checks["embed.margin"]["value"])
    assert f"margin      embed: {half:.6g}\n" in capsys.readouterr().out
    assert checks["embed.decode"]["holds"] is True
    assert cli.run(["train", str(run), "--device", "cpu"]) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: r["margin_embed"] for r in records if "margin_embed" in r}
    assert found.keys() == {3, 6}
    for step, margin in found.items():
        folder = run / "checkpoints" / f"step-{step:08d}"
        weights = next(f for n in ("ema", "model") if (f := folder / f"{n}.safetensors").is_file())
        assert margin == pytest.approx(least_distance(load_file(weights)["embed.weight"]) / 2)
    assert len({half, *found.values()}) == 3
    assert math.isfinite(found[6])
    page = (run / "report.html").read_text()
    assert "embed: half the least distance of codewords" in page
