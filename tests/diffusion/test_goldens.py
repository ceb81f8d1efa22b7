"""Goldens of the interpolating kernels, the loss at a released vocabulary, and what may never come out of a sampler."""

import math
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.schedules import Geometric, LogLinear
from sedd_graph_registry.sampling.steps import Analytic, Ancestral, Euler

import sedd_graph
from sedd_graph.component.base import Context
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.errors import UserError


def kernel(cls: Any, n: int) -> Any:
    return cls(cls.Config(), Context({"n": n}))


def interpolating(q: torch.Tensor, qhat: torch.Tensor, z: int, rate: float) -> float:
    """g/q_z [KL(q || qhat) + q_z/qhat_z - 1 - log(q_z/qhat_z)] as GIDD (arXiv 2503.04482) writes it, term by term."""
    kl = sum(float(a) * math.log(float(a / b)) for a, b in zip(q, qhat, strict=True) if a > 0)
    ratio = float(q[z] / qhat[z])
    return rate / float(q[z]) * (kl + ratio - 1 - math.log(ratio))


def test_golden_11_is_the_general_form() -> None:
    """G11 mixes masks and substitutions, which no kernel here does: it fixes the reference that the two limits are held to."""
    b = torch.tensor([0.05, 0.05, 0.05, 0.25], dtype=torch.float64)
    slope = torch.tensor([0.1, 0.1, 0.1, 0.7], dtype=torch.float64)
    q, qhat = b.clone(), 0.6 * torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64) + b
    q[0] += 0.6
    rate = slope + b / 0.6
    assert interpolating(q, qhat, 3, float(rate[3])) == pytest.approx(1.183148081, abs=1e-8)
    assert interpolating(q, qhat, 1, float(rate[1])) == pytest.approx(3.697215524, abs=1e-8)


@pytest.mark.parametrize("cls", [Absorb, Uniform])
@pytest.mark.parametrize("alpha", [0.02, 0.6, 0.97])
def test_both_kernels_are_limits_of_the_general_form(cls: Any, alpha: float) -> None:
    k = kernel(cls, 4)
    xhat = torch.tensor([0.5, 0.3, 0.2, 0.0] if k.mask else [0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    prior = torch.tensor([0, 0, 0, 1.0] if k.mask else [0.25] * 4, dtype=torch.float64)
    b = (1 - alpha) * prior
    sigma = torch.tensor([-math.log(alpha)], dtype=torch.float64)
    for x0 in range(3):
        q = b.clone()
        q[x0] += alpha
        for z in range(4):
            if prior[z] == 0:
                continue
            found = k.nelbo(xhat.log().clamp(min=-1e6)[None, None], torch.tensor([[z]]), torch.tensor([[x0]]), sigma)
            # per unit of sigma the rate into z is its share of the prior
            expected = interpolating(q, alpha * xhat + b, z, float(prior[z]))
            assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("form", ["score_entropy", "nelbo"])
@pytest.mark.parametrize("sigma", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("moved", [False, True])
def test_uniform_at_gpt2s_vocabulary(form: str, sigma: float, moved: bool) -> None:
    """Finite in float32 and within 1e-5 of float64; finite gradients."""
    n = 50257
    k = kernel(Uniform, n)
    raw = torch.randn(1, 2, n, generator=torch.Generator().manual_seed(0))
    x0 = torch.tensor([[1, 50256]])
    xt = torch.tensor([[2, 7]]) if moved else x0
    values = []
    level = torch.tensor([sigma])
    for dtype in (torch.float32, torch.float64):
        leaf = raw.clone().to(dtype).requires_grad_()
        head = leaf.log_softmax(-1) if form == "nelbo" else leaf
        loss = getattr(k, form)(head, xt, x0, level.to(dtype))
        assert loss.dtype == dtype
        loss.sum().backward()
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
        assert bool(leaf.grad.abs().sum() > 0)
        values.append(loss.detach().double())
    assert bool(values[0].isfinite().all())
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("sampler", [Euler, Analytic, Ancestral])
@pytest.mark.parametrize("cls", [Absorb, Uniform])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_nothing_forbidden_comes_out(sampler: Any, cls: Any, steps: int) -> None:
    """Whatever the network says: here that the forbidden tokens, and the mask, are all but certain."""
    n, rows, length = 9, 64, 12
    k: Kernel = kernel(cls, n)
    schedule: Any = LogLinear if k.mask is not None else Geometric
    made, s = sampler(sampler.Config(steps=steps), Context({"n": n})), schedule(schedule.Config(), Context({}))
    allowed = torch.ones(n, dtype=torch.bool)
    allowed[[0, 3]] = False
    if k.mask is not None:
        allowed[k.mask] = False
    generator = torch.Generator().manual_seed(steps)
    favoured = torch.where(allowed, -30.0, 5.0)
    seen: list[torch.Tensor] = []

    def denoise(
        x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor, at: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        noise = torch.randn(*(x if at is None else at).shape, n, generator=generator)
        return {"log_x0": (favoured + noise).log_softmax(-1)}

    x = k.prior(rows, length, generator=generator, allowed=allowed)
    free = torch.rand(rows, length, generator=generator) < 0.7
    prompt = torch.zeros_like(x)  # a prompt may hold what may not be generated, and it stays
    out = made.run(
        denoise,
        torch.where(free, x, prompt),
        WalkSettings(
            free=free,
            kernel=k,
            schedule=s,
            generator=generator,
            allowed=allowed,
            on_step=lambda _, x: seen.append(x),
        ),
    )
    assert len(seen) == steps + 2
    assert bool(allowed[out[free]].all())
    assert bool((out[~free] == 0).all())
    states = allowed.clone()
    if k.mask is not None:
        states[k.mask] = True  # on the way there are masks still
    assert all(bool(states[x[free]].all()) for x in seen)


@pytest.mark.parametrize("name", ["sedd-tiny", "sedd-uniform-tiny", "mdlm-tiny"])
def test_engine_with_prompt(name: str) -> None:
    engine = sedd_graph.build(
        f"blueprints/{name}.yaml", ["params.depth=1", "params.dim=32"], device="cpu", compile="off"
    )
    engine.process.allowed[[0, 5, 127]] = False
    torch.manual_seed(0)
    with torch.no_grad():  # a network that has strong wrong opinions
        for parameter in engine.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    prompt = torch.full((8, 16), -1)
    prompt[:, :3] = torch.tensor([5, 0, 9])
    attend = torch.ones(8, 16, dtype=torch.bool)
    out = engine.sample(8, 16, steps=5, prompt=prompt, attend=attend, seed=0)
    assert bool((out[:, :3] == torch.tensor([5, 0, 9])).all())
    assert bool(engine.process.allowed[out[:, 3:]].all())
    given = torch.arange(16).clamp(min=1).expand(2, 16)  # nothing is free
    assert torch.equal(engine.sample(2, 16, steps=5, prompt=given), given)
    attend[4:, 12:] = False  # padding, which this network would read
    with pytest.raises(UserError, match="no input 'attend'"):
        engine.sample(8, 16, steps=5, prompt=prompt, attend=attend, seed=0)
