"""The public Diffusion-LM code, by a reference file: network, schedule, losses, reverse steps and the clamping trick."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sedd_graph_registry.noise.schedules_gaussian import named_betas
from torch import Tensor

import sedd_graph
from sedd_graph.cli.main import run
from sedd_graph.diffusion.batch import Batch
from sedd_graph.diffusion.vectors.gaussian import posterior
from sedd_graph.diffusion.vectors.objective import VectorDraw
from sedd_graph.diffusion.vectors.sampler import VectorWalk, VectorWalkSettings, reverse
from sedd_graph.errors import UserError
from sedd_graph.families.vectors import VectorProcess
from sedd_graph.runs.import_weights import import_run, import_weights
from tests.conftest import PARITY

FILE = PARITY / "diffusion_lm.safetensors"
TOTAL = 2000


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("imported")
    made = import_run("diffusion-lm", FILE, out=folder / "run", runs=folder, kernel=None, heads=4, say=lambda _: None)
    built = sedd_graph.build(made, device="cpu", compile="off")
    built.model.eval()
    return built


def times(reference: dict[str, Tensor]) -> Tensor:
    """Times of the reference's steps, which it counts from 0."""
    return (reference["t"].double() + 1) / TOTAL


def draw(reference: dict[str, Tensor]) -> VectorDraw:
    rows = len(reference["t"])
    noise = reference["noise_x_start"], reference["noise"]
    return VectorDraw(times(reference), *noise, torch.full((rows,), float(TOTAL)), torch.zeros(rows, dtype=torch.bool))


def close(found: Tensor, expected: Tensor, relative: float) -> None:
    assert float((found.detach() - expected).norm() / expected.norm()) <= relative


def test_schedule(reference: dict[str, Tensor], engine: Any) -> None:
    assert np.abs(named_betas("sqrt", TOTAL) - reference["betas"].numpy()).max() <= 1e-12
    process: VectorProcess = engine.process
    t = torch.arange(1, TOTAL + 1, dtype=torch.float64) / TOTAL
    level = torch.exp(-process.kernel.sigma(process.schedule, t))
    assert float((level - reference["alphas_cumprod"]).abs().max()) <= 1e-12
    assert process.kernel.start_variance(process.schedule) == pytest.approx(0.1210012831880857**2, rel=1e-12)


def test_network_and_losses(reference: dict[str, Tensor], engine: Any) -> None:
    process: VectorProcess = engine.process
    kernel, schedule, objective = process.parts[:3]
    batch, drawn = Batch.of(reference["input_ids"]), draw(reference)
    _, x0, xt = objective.vectors(drawn, batch, kernel, schedule)
    close(x0, reference["x_start"], 1e-6)
    close(xt, reference["x_t"], 1e-6)
    inputs = kernel.inputs(xt, drawn.t, kernel.sigma(schedule, drawn.t))
    torch.testing.assert_close(inputs["timestep"], reference["scaled_t"], rtol=1e-6, atol=1e-6)
    denoise = process.denoiser(engine.network.run, engine.model, batch.attend)
    close(denoise(reference["x_t"], drawn.t).x0, reference["model_output"], 1e-5)
    close(kernel.logits(x0), reference["logits"], 1e-5)
    loss = process.loss(engine.model, drawn, batch, None)[0] / batch.width
    torch.testing.assert_close(loss, reference["loss.loss"], rtol=1e-5, atol=1e-6)
    rest = objective.last(x0, kernel, schedule) + objective.rounding(x0, batch, kernel)
    torch.testing.assert_close(loss - rest.mean(-1), reference["loss.mse"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("clamp", [False, True])
def test_one_reverse_step(reference: dict[str, Tensor], engine: Any, clamp: bool) -> None:
    process: VectorProcess = engine.process
    t, rows = times(reference), len(reference["t"])
    tokens = reference["input_ids"]
    settings = VectorWalkSettings(
        kernel=process.kernel,
        schedule=process.schedule,
        generator=torch.Generator().manual_seed(0),
        tokens=tokens,
        free=torch.ones_like(tokens, dtype=torch.bool),
    )
    denoise = process.denoiser(engine.network.run, engine.model, settings.free)
    walk = VectorWalk(denoise, settings, clamp=clamp)
    walk.x = reference["x_t"]
    with torch.no_grad():
        estimate = walk.estimate(t)
        mean, variance = reverse(walk, estimate, t - 1 / TOTAL, t)
    if clamp:
        assert torch.equal(estimate.x0, reference["clamped_x_start"])
    close(mean, reference["clamped_mean" if clamp else "step_mean"], 1e-5)
    later = torch.arange(rows) > 0  # the published code gives the last step, which draws no noise, another variance
    assert variance is not None
    torch.testing.assert_close(variance[later].float(), reference["step_variance"][later, 0, 0])
    sigma = process.kernel.sigma(process.schedule, torch.tensor([1 / TOTAL, 2 / TOTAL], dtype=torch.float64))
    torch.testing.assert_close(posterior(sigma[:1], sigma[1:]).variance.float(), reference["step_variance"][:1, 0, 0])


def weights(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("weights."): v for k, v in reference.items() if k.startswith("weights.")}


@pytest.mark.parametrize(
    ("change", "heads", "message"),
    [
        (lambda w: w, None, "has a width of 64: say --heads"),
        (lambda w: w, 5, "--heads 5 does not divide the width 64"),
        (lambda w: w | {"extra": torch.zeros(1)}, 4, "tensors that the network does not have: extra"),
        (lambda w: {k: v for k, v in w.items() if "layer.1.output.dense.b" not in k}, 4, "has no tensor"),
        (lambda w: w | {"lm_head.weight": w["word_embedding.weight"] + 1}, 4, "must be tied"),
        (lambda w: w | {"LayerNorm.bias": torch.zeros(3)}, 4, "norm.bias comes out as [3], not [64]"),
    ],
)
def test_nothing_is_passed_over(
    tmp_path: Path, reference: dict[str, Tensor], change: Any, heads: int | None, message: str
) -> None:
    save_file(change(weights(reference)), tmp_path / "w.safetensors")
    with pytest.raises(UserError) as error:
        import_run(
            "diffusion-lm",
            tmp_path / "w.safetensors",
            out=tmp_path / "o",
            runs=tmp_path,
            kernel=None,
            heads=heads,
            say=lambda _: None,
        )
    assert message in str(error.value)


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds weights of diffusion-lm"):
        import_weights("sedd", FILE)
    with pytest.raises(UserError, match="holds weights of sedd, mdlm or duo"):
        import_weights("diffusion-lm", PARITY / "sedd_absorb.safetensors", heads=4)


def test_the_command_imports_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(["import", "diffusion-lm", str(FILE), "--heads", "4", "-o", str(out)]) == 0
    assert "gaussian with stepwise, 40 tokens as vectors of 16" in capsys.readouterr().out
    built = sedd_graph.build(out, device="cpu", compile="off")
    found = built.sample(2, 8, steps=3, seed=1)
    assert found.shape == (2, 8)
    assert torch.equal(found, built.sample(2, 8, steps=3, seed=1))
