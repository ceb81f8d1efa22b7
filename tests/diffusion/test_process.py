"""The mathematics against enumeration, closed forms and golden numbers."""

import math
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.schedules import Cosine, Geometric, LogLinear, Polynomial
from sedd_graph_registry.objectives.bounds import MaskedCount, Nelbo, ScoreEntropy

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.numerics import log1mexp, log_expm1


def kernel(cls: Any, n: int) -> Any:
    return cls(cls.Config(), Context({"n": n}))


SCHEDULES = [LogLinear, Geometric, Cosine, Polynomial]


def brute_score_entropy(k: Any, score: torch.Tensor, z: int, x0: int, sigma: float) -> float:
    """Definition 3.1 of SEDD term by term: sum_y Q[z, y] (s - r log s + K(r))."""
    q, p = k.rate_matrix(sigma), k.transition_matrix(sigma)
    total = 0.0
    for y in range(k.states):
        if y != z and q[z, y] > 0:
            r, s = float(p[y, x0] / p[z, x0]), float(score[y])
            total += float(q[z, y]) * (s - (r * math.log(s) if r else 0) + (r * (math.log(r) - 1) if r else 0))
    return total


def test_golden_1_absorb() -> None:
    k = kernel(Absorb, 4)
    log_score = torch.tensor([[[0.2, 0.5, 0.1, 1.0]]], dtype=torch.float64).log()
    found = k.score_entropy(
        log_score, torch.tensor([[3]]), torch.tensor([[1]]), torch.tensor([1.0], dtype=torch.float64)
    )
    assert found.item() == pytest.approx(0.306380350, abs=1e-8)


@pytest.mark.parametrize(("x0", "value"), [(0, 0.585938614), (3, 1.071734047)])
def test_golden_2_uniform(x0: int, value: float) -> None:
    k = kernel(Uniform, 5)
    log_score = torch.tensor([[[0, 0.3, -0.2, 0.1, 0.5]]], dtype=torch.float64)
    found = k.score_entropy(
        log_score, torch.tensor([[0]]), torch.tensor([[x0]]), torch.tensor([0.7], dtype=torch.float64)
    )
    assert found.item() == pytest.approx(value, abs=1e-8)


@pytest.mark.parametrize(("z", "value"), [(1, 2.650761188), (2, 0.581481630)])
def test_golden_3_uniform_mean(z: int, value: float) -> None:
    # alpha = .6, alpha' = -1: dsigma = 1 / .6
    k = kernel(Uniform, 4)
    log_x0 = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]], dtype=torch.float64).log()
    sigma = torch.tensor([-math.log(0.6)], dtype=torch.float64)
    assert k.nelbo(log_x0, torch.tensor([[z]]), torch.tensor([[2]]), sigma).item() / 0.6 == pytest.approx(
        value, abs=1e-7
    )


def test_golden_4_and_5_posteriors() -> None:
    k = kernel(Uniform, 3)
    z = torch.tensor([[0]])
    # one token, so the leave-one-out posterior is the data law itself
    found = k.posterior(
        torch.tensor([[[0.6, 0.3, 0.1]]], dtype=torch.float64),
        z,
        torch.tensor([1.3], dtype=torch.float64),
        torch.tensor([0.5], dtype=torch.float64),
    )
    assert found[0, 0].tolist() == pytest.approx([0.77172262, 0.14156003, 0.08671735], abs=1e-8)
    sure = torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64)
    levels = [torch.tensor([-math.log(a)], dtype=torch.float64) for a in (0.3, 0.7)]
    assert k.posterior(sure, z, *levels)[0, 0].tolist() == pytest.approx([0.26530612, 0.65306122, 0.08163265], abs=1e-8)


@pytest.mark.parametrize("cls", [Absorb, Uniform])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0])
def test_score_entropy_is_its_definition_and_zero_at_the_truth(cls: Any, sigma: float) -> None:
    k = kernel(cls, 5)
    generator = torch.Generator().manual_seed(0)
    p = k.transition_matrix(sigma)
    for z in range(5):
        for x0 in range(k.data_tokens):
            if p[z, x0] == 0:
                continue
            score = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
            score[z] = 1
            args = (torch.tensor([[z]]), torch.tensor([[x0]]), torch.tensor([sigma], dtype=torch.float64))
            found = k.score_entropy(score.log()[None, None], *args).item()
            assert found == pytest.approx(brute_score_entropy(k, score, z, x0, sigma), abs=1e-9)
            assert found >= 0
            truth = (p[:, x0] / p[z, x0]).clamp(min=1e-300)
            assert k.score_entropy(truth.log()[None, None], *args).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("cls", [Absorb, Uniform])
def test_the_mean_form_is_the_score_entropy_of_its_score(cls: Any) -> None:
    k = kernel(cls, 6)
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(40, 3, 6, generator=generator, dtype=torch.float64)
    if k.mask is not None:
        raw[..., k.mask] = -1e6
    log_x0 = raw.log_softmax(-1)
    x0 = torch.randint(0, k.data_tokens, (40, 3), generator=generator)
    sigma = torch.rand(40, generator=generator, dtype=torch.float64) * 3 + 0.01
    xt = k.sample(x0, sigma.float(), random=Randomness(generator), corrupt=torch.ones_like(x0, dtype=torch.bool))
    by_score = k.score_entropy(k.log_score(log_x0, xt, sigma), xt, x0, sigma)
    torch.testing.assert_close(k.nelbo(log_x0, xt, x0, sigma), by_score, rtol=1e-8, atol=1e-9)


def test_absorb_score_entropy_is_cross_entropy_and_a_penalty() -> None:
    # SE = k (CE(c / Z) + Z - 1 - log Z)
    k, sigma = kernel(Absorb, 5), torch.tensor([0.8], dtype=torch.float64)
    c = torch.tensor([0.3, 0.9, 0.2, 0.4], dtype=torch.float64)
    inverse = 1 / math.expm1(0.8)
    log_score = torch.cat([(inverse * c).log(), torch.zeros(1, dtype=torch.float64)])[None, None]
    total = float(c.sum())
    expected = inverse * (-math.log(float(c[1]) / total) + total - 1 - math.log(total))
    assert k.score_entropy(log_score, torch.tensor([[4]]), torch.tensor([[1]]), sigma).item() == pytest.approx(expected)


@pytest.mark.parametrize("cls", [Absorb, Uniform])
def test_analytic_step_is_the_posterior_of_one_token(cls: Any) -> None:
    k, n = kernel(cls, 4), 4
    p0 = torch.tensor([0.5, 0.3, 0.2] + ([0.0] if k.mask is not None else []), dtype=torch.float64)
    if k.mask is None:
        p0, n = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), 4
    now, below = 1.1, 0.4
    levels = [torch.tensor([s], dtype=torch.float64) for s in (now, below)]
    for z in range(n):
        marginal = k.transition_matrix(now) @ p0
        if marginal[z] == 0:
            continue
        score = (marginal / marginal[z])[None, None]
        found = k.analytic(score, torch.tensor([[z]]), *levels)[0, 0]
        # Bayes: p(y at s | z at t) = P[z, y] p_s(y) / p_t(z)
        exact = k.transition_matrix(now - below)[z] * (k.transition_matrix(below) @ p0) / marginal[z]
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("cls", SCHEDULES)
@pytest.mark.parametrize("t", [1e-6, 1e-3, 0.5, 1.0])
def test_float32_is_as_good_as_float64(cls: Any, t: float) -> None:
    s = cls(cls.Config(), Context({}))
    one, two = torch.tensor([t]), torch.tensor([t], dtype=torch.float64)
    for name in ("sigma", "dsigma"):
        assert getattr(s, name)(one).item() == pytest.approx(getattr(s, name)(two).item(), rel=2e-5)
    weight, exact = (s.dsigma(x) / torch.expm1(s.sigma(x)) for x in (one, two))
    assert weight.item() == pytest.approx(exact.item(), rel=2e-5)


def test_the_loglinear_weight_is_one_over_t() -> None:
    s, t = LogLinear(LogLinear.Config(), Context({})), torch.tensor([1e-6, 1e-3, 0.3, 1.0])
    torch.testing.assert_close(s.dsigma(t) / torch.expm1(s.sigma(t)), 1 / t)


@pytest.mark.parametrize("sigma", [1e-7, 1e-4, 0.5, 30.0])
def test_stable_logarithms(sigma: float) -> None:
    single, double = torch.tensor(sigma), torch.tensor(sigma, dtype=torch.float64)
    assert log1mexp(single).item() == pytest.approx(torch.log(-torch.expm1(-double)).item(), rel=1e-6, abs=1e-12)
    assert log_expm1(single).item() == pytest.approx(torch.log(torch.expm1(double)).item(), rel=1e-6)


def test_uniform_loss_at_a_large_vocabulary_and_little_noise_is_finite() -> None:
    n, k = 50257, kernel(Uniform, 50257)
    log_score = (torch.randn(1, 3, n) * 0.1).requires_grad_()
    x = torch.tensor([[1, 2, 3]])
    loss = k.score_entropy(log_score, x, torch.tensor([[1, 2, 4]]), torch.tensor([1e-5]))
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert log_score.grad is not None
    assert bool(log_score.grad.isfinite().all())
    # 1 - n/(e + n), as the public code has it, is 0 or hundreds of times too large here, by how the division is rounded
    naive = 1 - n / (torch.expm1(torch.tensor([1e-5])) + n)
    true = 1e-5 / n
    assert abs(naive.item() / true - 1) > 0.9


@pytest.mark.parametrize("objective", [ScoreEntropy, Nelbo, MaskedCount])
def test_roles(objective: Any) -> None:
    made = objective(objective.Config(), Context({"n": 6}))
    k, s = kernel(Absorb, 6), LogLinear(LogLinear.Config(), Context({}))
    tokens = torch.randint(0, 5, (64, 10))
    corrupt = torch.arange(10) < 7
    corrupt = corrupt.expand(64, 10) & (torch.arange(10) > 1)
    batch = Batch(tokens, torch.ones_like(corrupt), corrupt, corrupt)
    draw = made.corrupt(batch, k, s, random=Randomness(torch.Generator().manual_seed(0)))
    assert bool((draw.xt == tokens)[~corrupt].all())
    assert bool((draw.xt == k.mask)[corrupt].any())
    log_x0 = torch.randn(64, 10, 6).log_softmax(-1)
    loss = made.loss({"log_x0": log_x0}, draw, batch, k, s)
    log_x0[(~corrupt)[..., None].expand(64, 10, 6)] = -5.0
    assert torch.equal(loss, made.loss({"log_x0": log_x0}, draw, batch, k, s))


@pytest.mark.parametrize("objective", [ScoreEntropy, MaskedCount])
def test_a_draw_does_not_depend_on_how_the_batch_is_split(objective: Any) -> None:
    made = objective(objective.Config(), Context({"n": 6}))
    k, s = kernel(Absorb, 6), LogLinear(LogLinear.Config(), Context({}))
    tokens = torch.randint(0, 5, (8, 12))

    def draw(start: int, stop: int) -> Any:
        random = Randomness(torch.Generator().manual_seed(3), start=start, total=8)
        return made.corrupt(Batch.of(tokens[start:stop]), k, s, random=random)

    whole, parts = draw(0, 8), [draw(0, 2), draw(2, 6), draw(6, 8)]
    for name in ("xt", "t", "sigma", "weight"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))


def test_count_form_equals_the_integral_over_time() -> None:
    """Two estimates of one bound for a fixed, arbitrary prediction, by Monte Carlo."""
    k, s = kernel(Absorb, 4), LogLinear(LogLinear.Config(), Context({}))
    tokens = torch.randint(0, 3, (40_000, 3), generator=torch.Generator().manual_seed(0))
    batch, values = Batch.of(tokens), {}
    for cls in (Nelbo, MaskedCount):
        made = cls(cls.Config(), Context({"n": 4}))
        draw = made.corrupt(batch, k, s, random=Randomness(torch.Generator().manual_seed(1)))
        seen = (draw.xt == 3).float().sum(-1)
        logits = torch.stack([seen, 0.5 * seen, 1 - seen, seen * 0 - 1e6], -1)[:, None].expand(-1, 3, -1)
        nats = made.loss({"log_x0": logits.log_softmax(-1)}, draw, batch, k, s)
        values[cls.__name__] = (nats.mean().item(), nats.std().item() / 200)
    (a, ea), (b, eb) = values.values()
    assert abs(a - b) < 5 * math.hypot(ea, eb)
    assert eb < ea  # and the count form varies less
