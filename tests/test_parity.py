"""The public SEDD and MDLM code, by reference files: networks, losses, rates and step probabilities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.schedules import Geometric, LogLinear
from sedd_graph_registry.objectives.bounds import Nelbo, ScoreEntropy

import sedd_graph
from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.errors import UserError
from sedd_graph.runs.import_weights import import_run, import_weights
from tests.conftest import PARITY

NETWORKS = [
    ("sedd_absorb", "sedd", "absorb", "log_score"),
    ("sedd_uniform", "sedd", "uniform", "log_score"),
    ("mdlm_subs", "mdlm", None, "log_x0"),
]


def run_folder(tmp_path: Path, file: str, kind: Any, kernel: str | None) -> Path:
    return import_run(
        kind, PARITY / f"{file}.safetensors", out=tmp_path / file, runs=tmp_path, kernel=kernel, say=lambda _: None
    )


@pytest.mark.parametrize(("file", "kind", "kernel", "output"), NETWORKS)
@pytest.mark.parametrize(
    "compile", ["off", pytest.param("block", marks=pytest.mark.slow), pytest.param("whole", marks=pytest.mark.slow)]
)
def test_network(tmp_path: Path, file: str, kind: Any, kernel: str | None, output: str, compile: Any) -> None:
    reference = load_file(PARITY / f"{file}.safetensors")
    engine = sedd_graph.build(run_folder(tmp_path, file, kind, kernel), device="cpu", compile=compile)
    engine.model.eval()
    found = engine.model(tokens=reference["xt"], sigma=reference["sigma"])[output]
    expected = reference[output]
    real = expected > -1e5  # the floor that stands for log 0 is compared by its size only
    assert (found[real] - expected[real]).norm() <= 1e-5 * expected[real].norm()
    assert bool((found[~real] < -9e5).all())
    if compile == "whole":
        batch = Batch.of(reference["x0"])
        sigma, t = reference["sigma"], reference["t"]
        ones = torch.ones_like(t)
        schedule = engine.process.schedule
        draw = Draw(reference["xt"], t, sigma, schedule.dsigma(t), ones)
        torch.testing.assert_close(engine.trained(draw, batch)[0], reference["loss_per_sequence"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "kernel", "schedule", "states"),
    [("sedd_absorb", Absorb, LogLinear, 28), ("sedd_uniform", Uniform, Geometric, 27)],
)
def test_sedd_process(file: str, kernel: Any, schedule: Any, states: int) -> None:
    reference = load_file(PARITY / f"{file}.safetensors")
    k, s = kernel(kernel.Config(), Context({"n": states})), schedule(schedule.Config(), Context({}))
    t, xt, x0, sigma = (reference[n] for n in ("t", "xt", "x0", "sigma"))
    torch.testing.assert_close(s.sigma(t), sigma, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s.dsigma(t), reference["dsigma"], rtol=1e-5, atol=1e-5)
    entropy = k.score_entropy(reference["log_score"], xt, x0, sigma)
    torch.testing.assert_close(entropy, reference["score_entropy_per_token"], rtol=1e-4, atol=1e-6)
    objective = ScoreEntropy(ScoreEntropy.Config(), Context({"n": states}))
    draw = objective.corrupt(Batch.of(x0), k, s, random=None, t=t, xt=xt)
    loss = objective.loss({"log_score": reference["log_score"]}, draw, Batch.of(x0), k, s)
    torch.testing.assert_close(loss, reference["loss_per_sequence"], rtol=1e-4, atol=1e-4)
    score = reference["log_score"].exp()
    rate = k.reverse_rate(score, xt, sigma) * (0.05 * reference["dsigma"])[:, None, None]
    rate = rate.scatter(-1, xt[..., None], -rate.sum(-1, keepdim=True))
    torch.testing.assert_close(rate, reference["euler_step_rate"], rtol=1e-4, atol=1e-6)
    probabilities = k.analytic(score, xt, s.sigma(t), s.sigma(t - 0.05))
    torch.testing.assert_close(probabilities, reference["analytic_step_probs"], rtol=1e-4, atol=1e-5)


def test_mdlm_loss() -> None:
    reference = load_file(PARITY / "mdlm_subs.safetensors")
    k, s = Absorb(Absorb.Config(), Context({"n": 28})), LogLinear(LogLinear.Config(), Context({}))
    objective = Nelbo(Nelbo.Config(), Context({"n": 28}))
    batch = Batch.of(reference["x0"])
    draw = objective.corrupt(batch, k, s, random=None, t=reference["t"], xt=reference["xt"])
    loss = objective.loss({"log_x0": reference["log_x0"]}, draw, batch, k, s)
    torch.testing.assert_close(loss, reference["loss_per_sequence"], rtol=1e-4, atol=1e-4)


def released() -> dict[str, torch.Tensor]:
    found = load_file(PARITY / "sedd_absorb.safetensors")
    return {k.removeprefix("weights."): v for k, v in found.items() if k.startswith("weights.")}


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"model": w, "step": 3}, lambda w: {"ema": {"model": w}}])
def test_torch_files(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(released()), tmp_path / "checkpoint.pth")
    found = import_weights("sedd", tmp_path / "checkpoint.pth", kernel="absorb")
    assert found.weights["trunk.1.feed.gate.linear.bias"].shape == (64,)


def test_hub_folder_in_parts(tmp_path: Path) -> None:
    weights = released()
    names = sorted(weights)
    save_file({k: weights[k] for k in names[:10]}, tmp_path / "a.safetensors")
    save_file({k: weights[k] for k in names[10:]}, tmp_path / "b.safetensors")
    parts = {k: "a.safetensors" if i < 10 else "b.safetensors" for i, k in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(__import__("json").dumps({"weight_map": parts}))
    assert len(import_weights("sedd", tmp_path, kernel="absorb").weights) > 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"blocks.0.extra": torch.zeros(1)}, "tensors that the network does not have: blocks.0.extra"),
        (
            lambda w: {k: v for k, v in w.items() if k != "blocks.1.norm2.weight"},
            "has no tensor 'blocks.1.norm2.weight'",
        ),
        (lambda w: w | {"rotary_emb.inv_freq": torch.ones(8)}, "rotary_emb.inv_freq is not the usual one"),
        (
            lambda w: w | {"blocks.0.norm1.weight": torch.ones(3)},
            "trunk.0.attend.norm.weight comes out as [3], not [64]",
        ),
    ],
)
def test_nothing_is_passed_over(tmp_path: Path, change: Any, message: str) -> None:
    save_file(change(released()), tmp_path / "w.safetensors")
    with pytest.raises(UserError) as error:
        import_run(
            "sedd", tmp_path / "w.safetensors", out=tmp_path / "o", runs=tmp_path, kernel="absorb", say=lambda _: None
        )
    assert message in str(error.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "trapped").touch, ())

    torch.save({"model": Trap()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="cannot be read as plain weights"):
        import_weights("sedd", tmp_path / "w.pth")
    assert not (tmp_path / "trapped").exists()
