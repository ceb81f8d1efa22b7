"""LangFlow: the Gumbel schedule and its fit, the evidence in the logits, the Euler step, likelihoods of rows with prompts."""

import dataclasses
import math

import pytest
import torch
from sedd_graph_registry.network.projection import SelfConditioning
from sedd_graph_registry.noise.schedules_gumbel import Gumbel
from sedd_graph_registry.vectors.ode import Ode
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.flow import Flow
from sedd_graph.diffusion.vectors.gaussian import log_snr
from sedd_graph.diffusion.vectors.sampler import VectorWalk, VectorWalkSettings
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.families import vectors
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.runs.check import check
from sedd_graph.verify.vectors_toy import Toy, placed
from tests.conftest import ROOT
from tests.verify.planted_flow import parts

DOUBLE = torch.float64


def schedule(**config: float) -> Gumbel:
    return Gumbel(Gumbel.Config(**config), Context({}))


def gammas(made: Gumbel, t: Tensor) -> Tensor:
    return -log_snr(made.sigma(t))


def test_uniform_times_are_gumbel_quantiles() -> None:
    made = schedule()
    t = torch.linspace(0, 1, 101, dtype=DOUBLE)
    known = torch.distributions.Gumbel(torch.tensor(4.72, dtype=DOUBLE), torch.tensor(0.85, dtype=DOUBLE))
    assert torch.allclose(gammas(made, t), known.icdf(1e-5 + (1 - 2e-5) * t), atol=1e-9)


def test_the_fit_finds_the_curve_of_the_cross_entropy() -> None:
    made, truth = schedule(), (2.5, 1.3, 4.0)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for step in range(400):
        u = torch.rand(64, generator=torch.Generator().manual_seed(step), dtype=DOUBLE)
        sigma = made.sigma(u)
        nats = truth[2] * torch.exp(-torch.exp((truth[0] + log_snr(sigma)) / truth[1]))
        optimizer.zero_grad()
        made.fit(sigma, nats).mean().backward()
        optimizer.step()
    assert [float(v.detach()) for v in made.fitted()] == pytest.approx(truth, rel=0.05)


def test_noise_levels_have_no_gradient_to_the_schedule() -> None:
    made = schedule()
    t = torch.rand(8, dtype=DOUBLE)
    assert not made.sigma(t).requires_grad
    assert not made.dsigma(t).requires_grad


def test_logits_get_the_evidence_of_the_published_code() -> None:
    made = parts()
    gamma = torch.tensor([0.3, 4.0], dtype=DOUBLE)
    x = torch.randn(2, 5, made.kernel.width)
    found = made.kernel.translate({"logits": torch.zeros(2, 5, 3)}, x, torch.nn.functional.softplus(gamma)).logits
    skip = torch.exp((torch.nn.functional.softplus(-gamma) - gamma) / 2).float()
    assert found is not None
    assert torch.allclose(found, skip[:, None, None] * (x @ made.kernel.table().T), rtol=1e-4, atol=1e-4)


def test_an_euler_step_is_that_of_the_published_code() -> None:
    made = parts()
    sampler = Ode(Ode.Config(method="euler"), Context({}))
    toy = Toy(placed(made), 2)
    seen: list[Tensor] = []
    settings = VectorWalkSettings(
        kernel=made.kernel,
        schedule=made.schedule,
        generator=torch.Generator().manual_seed(0),
        tokens=torch.zeros(6, 2, dtype=torch.int64),
        free=torch.ones(6, 2, dtype=torch.bool),
        on_step=lambda *_: seen.append(walk.x.clone()) if seen else None,
    )
    walk = VectorWalk(toy.denoiser(made.objective, "logits", 6), settings, clamp=False)
    seen.append(walk.x.clone())
    times = torch.tensor([0.7, 0.4], dtype=DOUBLE)
    here, there = (-log_snr(made.schedule.sigma(times))).tolist()
    with torch.no_grad():
        x0 = toy.denoiser(made.objective, "logits", 6)(walk.x, times[:1].expand(6)).x0
        sampler.walk(walk, times)
    softplus = torch.nn.functional.softplus
    scale = float(torch.exp((softplus(torch.tensor(here)) - softplus(torch.tensor(there))) / 2))
    end = math.sqrt(1 / (1 + math.exp(there))) * x0
    assert torch.allclose(seen[1], end.lerp(seen[0] * scale, math.exp((there - here) / 2)), atol=1e-5)


def test_self_conditioning_begins_as_the_identity() -> None:
    made = SelfConditioning(SelfConditioning.Config(), Context({"d": 4, "w": 3}))
    x = torch.randn(2, 5, 4)
    assert torch.equal(made(x, torch.randn(2, 5, 3)), x)


def flow(probes: int = 1) -> tuple[Toy, Flow]:
    toy = Toy(placed(parts()), 2)
    found = toy.parts.objective.flow(toy.parts.kernel, toy.parts.schedule)
    assert found is not None
    return toy, dataclasses.replace(found, steps=6, probes=probes)


@torch.no_grad()
def test_given_positions_have_no_part_in_the_likelihood() -> None:
    toy, made = flow()
    given = Batch.of(toy.rows[:4])
    given = dataclasses.replace(given, corrupt=torch.zeros_like(given.corrupt))
    found = made.likelihood(toy.denoiser(toy.parts.objective, "logits", 4), given, Randomness(torch.Generator()))
    assert found.nats.tolist() == [0.0] * 4


@torch.no_grad()
def test_the_divergence_counts_both_evaluations_of_a_self_conditioned_network() -> None:
    toy, made = flow(probes=0)
    kernel, rows = toy.parts.kernel, Batch.of(toy.rows[:1])
    denoise = Denoiser(
        lambda inputs: {"x0": 0.3 * inputs["x"] + 0.5 * inputs["estimate"]},
        kernel,
        toy.parts.schedule,
        rows.attend,
        self_conditioned=True,
    )
    one = dataclasses.replace(made, steps=1, method="euler", probes=0)
    found = one.likelihood(denoise, rows, Randomness(torch.Generator()))
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    start, end = torch.exp(log_snr(toy.parts.schedule.sigma(t)) / 2)
    deviation = torch.sqrt(-torch.expm1(-toy.parts.schedule.sigma(t)))[0]
    size = rows.tokens.numel() * kernel.width
    # x = deviation * y, and the estimate is (0.3 + 0.5 * 0.3) x
    assert float(found.volume) == pytest.approx(float((start - end) * deviation * 0.45 * size), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["process.op=gaussian", "process.schedule={op: stepwise}"], "continuous time"),
        (["process.schedule={op: learned}"], "fitted to the cross-entropy"),
        (["process.schedule.scale=0"], "scale"),
        (["process.width=64"], "width"),
    ],
)
def test_unsuitable_parts_are_refused(changes: list[str], message: str) -> None:
    def made() -> None:
        plan = check(ROOT / "blueprints" / "langflow-tiny.yaml", changes).plan
        assert isinstance(plan, ProcessPlan)
        vectors.make_parts(plan, discover())

    with pytest.raises(BlueprintError, match=message):
        made()


def test_a_process_of_tokens_refuses_a_fitted_schedule() -> None:
    with pytest.raises(BlueprintError, match="fitted to losses of vectors"):
        check(ROOT / "blueprints" / "mdlm-tiny.yaml", ["process.schedule={op: gumbel}"])


def test_a_narrow_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        type(parts().kernel).Config(vocab=3, width=1)


def test_an_unknown_likelihood_is_refused() -> None:
    process = vectors.VectorProcess.__new__(vectors.VectorProcess)
    made = parts()
    process.objective, process.kernel, process.schedule = made.objective, made.kernel, made.schedule
    assert process.likelihoods == ("bound", "ode")
    process.choose_likelihood("ode")
    assert process.caveat is not None
    assert "32 Heun steps" in process.caveat
    with pytest.raises(UserError, match="'exact' is not one of this model's: bound, ode"):
        process.choose_likelihood("exact")
