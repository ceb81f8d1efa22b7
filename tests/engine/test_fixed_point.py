"""Inversion of x + g(x): counts against the theory, bounds that lie, volumes against slogdet."""

import math
from collections.abc import Callable

import pytest
import torch
from sedd_graph_registry.bijective.contraction import L2Attention
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian

from sedd_graph.component.base import Context
from sedd_graph.engine.fixed_point import Iteration, NotConverged, log_det, solve
from sedd_graph.errors import SeddGraphError, UserError

Map = Callable[[Tensor], Tensor]


def network(c: float, d: int = 6, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Map, list[Tensor]]:
    """Two layers and a tanh with Lipschitz constant at most ``c``, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(d, d, generator=generator, dtype=torch.float64) for _ in range(2)]
    weights = [(w * math.sqrt(c) / torch.linalg.matrix_norm(w, 2)).to(dtype) for w in weights]
    return (lambda z: torch.tanh(z @ weights[0]) @ weights[1]), weights


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("c", "count"), [(0.5, 20), (0.7, 39), (0.9, 132), (0.97, 454)])
def test_plain_steps_are_as_many_as_the_theory_says(c: float, count: int) -> None:
    """math.md G12, on the map for which the theory is tight."""
    found = solve(lambda z: -c * z, normal(3, 4), Iteration(lipschitz=c, tolerance=1e-6, history=0))
    assert found.evaluations == count
    assert solve(lambda z: -c * z, normal(3, 4), Iteration(lipschitz=c, tolerance=1e-6)).evaluations <= 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [0.0, 0.3, 0.9, 0.99])
def test_finds_what_went_in(c: float, dtype: torch.dtype) -> None:
    g, _ = network(c, dtype=dtype)
    x = normal(4, 3, 6, dtype=dtype) * torch.tensor([1e-3, 1.0, 10.0, 0.0], dtype=dtype)[:, None, None]
    for history in (0, 5):
        found = solve(g, x + g(x), Iteration(lipschitz=c, history=history))
        for row in range(4):
            assert (found.x[row] - x[row]).norm() <= found.error * (x + g(x))[row].norm() + 1e-30


def test_acceleration_pays_where_the_plain_iteration_is_slow() -> None:
    basis, _ = torch.linalg.qr(normal(30, 30))
    symmetric = basis @ torch.diag(torch.linspace(-0.97, 0.97, 30, dtype=torch.float64)) @ basis.T
    y = normal(2, 30)
    plain = solve(lambda z: z @ symmetric, y, Iteration(lipschitz=0.97, tolerance=1e-8, history=0))
    fast = solve(lambda z: z @ symmetric, y, Iteration(lipschitz=0.97, tolerance=1e-8))
    assert fast.evaluations < plain.evaluations / 3
    exact = torch.linalg.solve(torch.eye(30, dtype=torch.float64) + symmetric, y.T).T
    assert (fast.x - exact).norm() <= 1e-8 * exact.norm()


def test_each_sequence_goes_its_own_way() -> None:
    """What one row of a batch needs changes nothing in another's answer."""
    g, _ = network(0.9)
    x = normal(3, 6) * torch.tensor([1.0, 50.0, 0.01]).double()[:, None]
    y = x + g(x)
    together = solve(g, y, Iteration(lipschitz=0.9, tolerance=1e-9)).x
    for row in range(3):
        alone = solve(g, y[row : row + 1], Iteration(lipschitz=0.9, tolerance=1e-9)).x[0]
        assert (together[row] - alone).norm() <= 2e-9 * y[row].norm()


def test_safeguard_holds_on_maps_that_mislead_acceleration() -> None:
    """Kinks make the last steps poor advice; the count stays within twice the plain one's guarantee."""
    for seed in range(20):
        directions = normal(40, 8, seed=seed)
        weights = directions * 0.9 / torch.linalg.matrix_norm(directions, 2)

        def g(z: Tensor) -> Tensor:
            return (z @ weights.T * 30).abs().remainder(1.0).sub(0.5).abs().div(30) @ weights

        y = normal(2, 8, seed=seed + 100) * 0.1
        found = solve(g, y, Iteration(lipschitz=0.81, tolerance=1e-9))
        assert (found.x + g(found.x) - y).norm() <= 1e-9 * y.norm() * 2
        assert found.evaluations <= 8 + 2 * math.log(1e-9 * 0.19 / 8) / math.log(0.81)


def test_no_silence() -> None:
    y = normal(2, 3)
    with pytest.raises(UserError, match="from 0 to below 1, not 1"):
        solve(lambda z: z, y, Iteration(lipschitz=1.0))
    with pytest.raises(NotConverged, match=r"the map's real constant is larger than 0.9") as caught:
        solve(lambda z: 1.05 * z.roll(1, -1), normal(2, 40), Iteration(lipschitz=0.9))
    assert isinstance(caught.value, SeddGraphError)
    with pytest.raises(NotConverged, match="after 3 evaluations the relative error is bounded by"):
        solve(lambda z: -0.9 * z, y, Iteration(lipschitz=0.9, max_evaluations=3, history=0))
    with pytest.raises(NotConverged, match="not finite at evaluation 1"):
        solve(lambda z: z / 0, y, Iteration(lipschitz=0.9))
    with pytest.raises(UserError, match=r"float32 cannot reach a tolerance of 1.0e-08 .* use 2.4e-06 or more"):
        solve(lambda z: 0.9 * z, y.float(), Iteration(lipschitz=0.9, tolerance=1e-8))
    with pytest.raises(UserError, match="at least 2 probes"):
        log_det(lambda z: 0.9 * z, y, lipschitz=0.9, probes=1)


def test_a_constant_that_holds_only_near_zero_is_refuted() -> None:
    """Declared 0.5; the slope is 0.4 near 0 and 3 beyond 1, where the iteration does converge, to one of many solutions."""

    def g(z: Tensor) -> Tensor:
        return torch.where(z.abs() < 1, 0.4 * z, 0.4 * z + 2.6 * (z - z.sign()))

    near = normal(2, 6) * 0.05
    found = solve(g, near + g(near), Iteration(lipschitz=0.5)).x
    assert torch.allclose(found, near, atol=1e-12)
    far = normal(2, 6) * 5
    with pytest.raises(NotConverged, match=r"points move apart [0-9.]+-fold, so that it is no contraction"):
        solve(g, far + g(far), Iteration(lipschitz=0.5))


def test_the_error_bound_uses_the_constant_that_is_measured() -> None:
    """A map with constant 0.95 declared as 0.1: the reported error still covers the real one."""
    x = normal(3, 6)
    found = solve(
        lambda z: -0.95 * z, 0.05 * x, Iteration(lipschitz=0.1, tolerance=1e-3, max_evaluations=400, history=0)
    )
    assert (found.x - x).norm(dim=1).max() <= found.error * x.norm(dim=1).max()
    assert found.error <= 1e-3


def test_what_is_returned_has_been_evaluated() -> None:
    """The residual of the answer itself is what the error bound is computed from."""
    g, _ = network(0.9)
    y = normal(2, 6)
    seen: list[Tensor] = []

    def recorded(z: Tensor) -> Tensor:
        seen.append(z)
        return g(z)

    found = solve(recorded, y, Iteration(lipschitz=0.9, tolerance=1e-6))
    for row in range(2):
        assert any(torch.equal(found.x[row], z[row]) for z in seen)
        assert (found.x + g(found.x) - y)[row].norm() <= found.error * (1 - 0.9) * y[row].norm() * 1.5


# -- the change of volume ---------------------------------------------------------------------------------------------


def exact(g: Map, x: Tensor) -> Tensor:
    found = []
    for row in x:
        matrix = jacobian(lambda v: (v + g(v[None])[0]).flatten(), row).flatten(1)
        found.append(torch.linalg.slogdet(matrix.view(row.numel(), -1)).logabsdet)
    return torch.stack(found)


def test_log_det_exact() -> None:
    g, weights = network(0.9)
    x = normal(3, 2, 6)
    found = log_det(g, x, lipschitz=0.9)
    assert torch.allclose(found.value, exact(g, x), atol=1e-10)
    assert not found.variance.any()
    assert (found.value >= 12 * math.log(1 - 0.9)).all()
    assert (found.value <= 12 * math.log(1 + 0.9)).all()
    assert not log_det(lambda z: torch.zeros_like(z), x, lipschitz=0.5).value.any()
    weights[0].requires_grad_()
    assert gradcheck(
        lambda v, w: log_det(lambda z: torch.tanh(z @ w) @ weights[1], v, lipschitz=0.9).value,
        (
            x.requires_grad_(),
            weights[0],
        ),
    )


@pytest.mark.parametrize("c", [0.5, 0.9])
def test_roulette_is_unbiased_and_reports_its_variance(c: float) -> None:
    g, _ = network(c)
    x, probes, rounds = normal(2, 6), 20, 100
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found = [
            log_det(g, x, lipschitz=c, exact_up_to=0, probes=probes, certain_terms=1, generator=generator)
            for _ in range(rounds)
        ]
    values, variances = (torch.stack([getattr(f, n) for f in found]) for n in ("value", "variance"))
    error = (values.mean(0) - exact(g, x)).abs()
    assert (error <= 4 * values.std(0) / math.sqrt(rounds)).all()
    assert (error > 0).all()
    # reported and seen variances agree: their ratio is near one with 100 rounds
    assert ((variances.mean(0) / values.var(0)).log().abs() <= math.log(2)).all()


def test_roulette_gradient_is_unbiased() -> None:
    g, (first, _) = network(0.7)
    first.requires_grad_()
    x = normal(1, 6)
    wanted = torch.autograd.grad(log_det(g, x, lipschitz=0.7).value.sum(), first)[0]
    generator, rounds, found = torch.Generator().manual_seed(0), 300, []
    for _ in range(rounds):
        estimate = log_det(g, x, lipschitz=0.7, exact_up_to=0, probes=2, certain_terms=3, generator=generator)
        found.append(torch.autograd.grad(estimate.value.sum(), first)[0])
    values = torch.stack(found)
    z = (values.mean(0) - wanted) / (values.std(0) / math.sqrt(rounds))
    assert z.abs().max() <= 4.5  # the largest of 36
    assert values.std(0).min() > 0


def test_attention_as_the_branch() -> None:
    """Single-stream attention, inverted, with its log-determinant and padding: the whole of what an i-ResNet layer needs."""
    torch.manual_seed(0)
    attention = L2Attention(L2Attention.Config(heads=2, bound=0.9), Context({"r": 2})).double()
    attend = torch.tensor([[True] * 5, [True, True, True, False, False]])
    x = normal(2, 5, 4)

    def g(z: Tensor) -> Tensor:
        return attention(z, attend[: len(z)] if len(z) == 2 else attend[:1])

    found = solve(g, x + g(x), Iteration(lipschitz=0.9)).x
    assert (found - x).abs().max() <= 1e-12
    value = log_det(g, x, lipschitz=0.9).value
    short = log_det(attention, x[1:, :3], lipschitz=0.9).value
    assert torch.allclose(value[1:], short, atol=1e-10)
    assert torch.allclose(value[:1], exact(lambda z: attention(z), x[:1]), atol=1e-10)
    value.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
