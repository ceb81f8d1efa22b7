"""ELF: its noise, loss and steps are those of the published rectified flow; prompts leak nothing; what needs a table is refused."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.schedules_logit_normal import LogitNormal
from sedd_graph_registry.vectors.elf import Elf

import sedd_graph
from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.flow import advance, root_snr
from sedd_graph.diffusion.vectors.gaussian import log_snr
from sedd_graph.errors import BlueprintError
from sedd_graph.runs.check import check
from tests.conftest import ROOT
from tests.verify.planted_context import parts

TINY = ROOT / "blueprints" / "elf-tiny.yaml"
SMALL = ["params.dim=16", "params.heads=2", "params.depth=1", "params.cond=8", "params.width=6", "params.tokens=12"]
SMALL += ["data=null", "train=null"]


def test_uniform_times_give_the_published_distribution_of_tau() -> None:
    schedule = LogitNormal(LogitNormal.Config(mean=-1.5, std=0.8, noise_scale=2.0, cutoff=1e-9), Context({"n": 2}))
    quantile = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64)
    tau = torch.sigmoid(-1.5 + 0.8 * torch.special.ndtri(quantile))
    snr = (tau / (2.0 * (1 - tau))).square()  # of z = tau x + 2 (1 - tau) noise
    assert torch.allclose(log_snr(schedule.sigma(1 - quantile)), snr.log(), atol=1e-6)
    assert torch.allclose(schedule.time(schedule.sigma(1 - quantile)), 1 - quantile, atol=1e-12)


def test_a_step_of_the_ode_is_that_of_the_rectified_flow() -> None:
    generator = torch.Generator().manual_seed(0)
    z, x = (torch.randn(1, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    tau, then, scale = 0.3, 0.45, 2.0
    moved = z + (then - tau) * (x - z) / (1 - tau)  # the published Euler step, x being the network's estimate

    def coordinates(z: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
        s = torch.tensor([tau / (scale * (1 - tau))], dtype=torch.float64)
        return z / (scale * (1 - tau)), s  # y = s x + noise

    y, start = coordinates(z, tau)
    expected, end = coordinates(moved, then)
    assert torch.allclose(advance(y, start, end, x), expected, atol=1e-12)
    assert torch.allclose(root_snr(torch.nn.functional.softplus(-2 * start.log())), start, atol=1e-12)


def test_the_loss_is_the_published_one() -> None:
    """Squared error of the velocity of the rectified flow, and cross-entropy at positions with noise of their own."""
    made = parts()
    rows = torch.randint(0, 3, (40, 5), generator=torch.Generator().manual_seed(1))
    batch = Batch.of(rows)
    draw: Any = made.objective.draw(
        batch, made.kernel, made.schedule, random=Randomness(torch.Generator().manual_seed(2))
    )
    seen: dict[str, torch.Tensor] = {}

    def run(inputs: Any) -> dict[str, torch.Tensor]:
        seen.update(inputs)
        return {
            "x0": inputs["x"] * 0.5,
            "logits": torch.stack([inputs["x"][..., 0], inputs["x"][..., 1], 0 * inputs["x"][..., 0]], -1),
        }

    denoise = Denoiser(run, made.kernel, made.schedule, torch.ones(40, 5, dtype=torch.bool))
    losses = made.objective.loss(denoise, draw, batch, made.kernel, made.schedule)
    assert seen["decode"].sum() == 8  # a fifth
    assert torch.equal(seen["decode"].bool(), draw.decoded)
    clean = made.kernel.embed(rows)
    for i in range(40):
        x, at = seen["x"][i], float(seen["t"][i])
        if draw.decoded[i]:
            assert at == 0
            logits = torch.stack([x[:, 0], x[:, 1], 0 * x[:, 0]], -1)
            expected = -logits.log_softmax(-1).gather(-1, rows[i, :, None]).sum()
        else:
            snr = float(log_snr(made.schedule.sigma(torch.tensor([at], dtype=torch.float64))).exp())
            tau = 2 * math.sqrt(snr) / (1 + 2 * math.sqrt(snr))
            z = x * math.sqrt(tau**2 + (2 * (1 - tau)) ** 2)
            velocity = ((0.5 * x - z) - (clean[i] - z)) / max(1 - tau, 0.05)
            expected = velocity.square().mean(-1).sum()
        assert torch.allclose(losses[i], expected, rtol=1e-3)


def test_the_levels_of_decoding_are_the_published_ones() -> None:
    found = Elf(Elf.Config(), Context({"n": 3})).decoding
    logits = 0.8 + 0.8 * torch.randn(200_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tau = logits.sigmoid()
    levels = 2 * (tau / (5 * (1 - tau))).log()
    assert found.share == 0.2
    assert abs(float(levels.mean()) - found.mean) < 0.02
    assert abs(float(levels.std()) - found.std) < 0.02


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("sample.clamp=true", "take clamp: false"),
        ("sample={op: reversible_heun}", "take another sampler"),
        ("objective={op: langflow}", "it reads logits"),
        (
            "sample.classifier={op: embedding_counts, label: 0, counts: [[1,1,1,1,1,1,1,1,1,1,1,1],[2,1,1,1,1,1,1,1,1,1,1,1]]}",
            "leave it out",
        ),
        ("process.width=7", "must have the width 7"),
        ("process.vocab=9", "reads a last axis of 9 [(]tokens[)], not 12"),
    ],
)
def test_what_needs_a_table_is_refused(change: str, told: str) -> None:
    with pytest.raises(BlueprintError, match=told):
        check(TINY, [*SMALL, change])


def test_training_sampling_and_filling_in(tmp_path: Path) -> None:
    engine = sedd_graph.build(TINY, overrides=[*SMALL, "sample.steps=3"], device="cpu", compile="off")
    rows = torch.randint(0, 12, (4, 6), generator=torch.Generator().manual_seed(4))
    engine.loss(rows).mean().backward()
    without = [n for n, p in engine.model.named_parameters() if p.grad is None]
    assert not without
    assert not [name for name in engine.model.state_dict() if "kernel" in name]
    prompt = torch.full((1, 6), -1)
    prompt[0, :3] = rows[0, :3]
    drawn = engine.sample(batch=2, length=6, prompt=prompt, seed=0)
    assert (drawn[:, :3] == rows[0, :3]).all()
    assert drawn.shape == (2, 6)


def test_a_prompt_is_seen_without_the_rest_in_training() -> None:
    made = parts()
    rows = torch.tensor([[0, 1, 2, 0]])
    free = torch.tensor([[False, False, True, True]])
    every = torch.ones_like(free)
    batch = Batch(rows, every, free, free)
    other = dataclasses.replace(batch, tokens=torch.tensor([[0, 1, 1, 1]]))
    draws: list[Any] = [
        made.objective.draw(b, made.kernel, made.schedule, random=Randomness(torch.Generator().manual_seed(5)))
        for b in (batch, other)
    ]
    assert torch.equal(draws[0].noisy[:, :2], draws[1].noisy[:, :2])
    assert not torch.equal(draws[0].clean[:, 2], draws[1].clean[:, 2])
