"""Lipschitz bounds of the contractions, against Jacobians, numpy and scipy: never exceeded, and exact for linear maps."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sedd_graph_registry.bijective import contraction
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian

from sedd_graph.component.base import Component
from tests.registry.bijections import CONTRACTIONS, Case, inputs, make

special = pytest.importorskip("scipy.special")

ATTENTIONS = [case for case in CONTRACTIONS if case.cls is contraction.L2Attention]


def slope(component: Component, x: Tensor, attend: Tensor | None = None) -> float:
    """Return the spectral norm of the Jacobian at ``x`` [1, l, d]."""
    rest = [] if attend is None else [attend]
    matrix = jacobian(lambda v: component(v, *rest).flatten(), x).flatten(1)
    return float(torch.linalg.matrix_norm(matrix, 2))


def bound(component: Component) -> float:
    cls = type(component)
    return cls.algebra(component.config, cls.signature(component.config, {})).lipschitz["x", "out"]


@pytest.mark.parametrize("case", CONTRACTIONS, ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_bound_is_never_exceeded(case: Case, scale: float) -> None:
    for seed in range(5):
        for moved in (0.0, 3.0):
            component, x = make(case, moved=moved), inputs(case, 1, 4, seed=seed, scale=scale)[0]
            assert slope(component, x) <= bound(component) * (1 + 1e-12)


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
@pytest.mark.parametrize("hidden", [0, 2])
def test_attention_bound_holds_under_gradient_ascent(case: Case, hidden: int) -> None:
    """Gradient ascent on the norm of the Jacobian, from several starts, stays below the bound."""
    component = make(case, moved=1.0)
    attend = torch.arange(5)[None] < 5 - hidden
    for seed in range(3):
        x = inputs(case, 1, 5, seed=seed)[0].requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.1)
        for _ in range(25):
            matrix = jacobian(lambda v: component(v, attend).flatten(), x, create_graph=True).flatten(1)
            optimizer.zero_grad()
            (-torch.linalg.matrix_norm(matrix, 2)).backward()
            optimizer.step()
        assert slope(component, x.detach(), attend) <= bound(component)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "d"), [(5, 8), (12, 4), (64, 64), (1, 3)])
def test_linear_bound_is_exact(dtype: torch.dtype, width: int, d: int) -> None:
    case = Case(contraction.LipschitzLinear, {"width": width, "bound": 0.7}, d, False)
    large: Any = make(case, dtype=dtype, moved=1.0)
    small: Any = make(case, dtype=dtype, moved=0.0)
    found = np.linalg.norm(large.effective(dtype).detach().double().numpy(), 2)
    assert 0.7 * (1 - (1e-5 if dtype == torch.float32 else 1e-12)) <= found <= 0.7
    with torch.no_grad():
        small.weight.mul_(0.5 / float(np.linalg.norm(small.weight.double().numpy(), 2)))
    # a weight below its bound is not scaled
    assert torch.allclose(
        small.effective(dtype),
        small.weight,
        rtol=2 * contraction.rounding_margin(torch.Size([width, d]), dtype) + 1e-15,
    )


def test_linear_gradients_include_those_of_the_norm() -> None:
    case = Case(contraction.LipschitzLinear, {"width": 3, "bound": 0.7}, 4, False)
    component, x = make(case, moved=1.0), inputs(case, 1, 2)[0]
    assert gradcheck(lambda *p: component(x), tuple(component.parameters()))
    with torch.no_grad():
        component.weight.copy_(torch.eye(3, 4) * 5)  # all singular values equal
    component(x).sum().backward()
    assert component.weight.grad.isfinite().all()
    with torch.no_grad():
        component.weight.zero_()
    component(x).sum().backward()
    assert component.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["relu", "tanh", "elu", "lip_swish"])
def test_slopes_of_activations(kind: str) -> None:
    component = make(Case(contraction.LipschitzAct, {"activation": kind}, 1, False))
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)[:, None].requires_grad_()
    steepest = torch.autograd.grad(component(x).sum(), x)[0].abs().max()
    assert (0.999 if kind == "lip_swish" else 1 - 1e-6) <= steepest <= 1


def naive(component: Any, x: Tensor) -> Tensor:
    """Attention by squared distances from its definition, before the scaling to its bound."""
    heads = []
    for w, m in zip(component.query, component.value, strict=True):
        q = x @ w
        distance = (q[:, None] - q[None]).square().sum(-1) / math.sqrt(w.shape[1])
        heads.append(torch.softmax(-distance, dim=-1) @ q @ m)
    return torch.cat(heads, -1) @ component.out


def certified(component: Any, n: int) -> float:
    """Theorem 3.2 of arXiv 2006.04710 with A W^V = W M, by numpy and scipy."""
    two = [[np.linalg.norm(w.detach().numpy(), 2) for w in p] for p in (component.query, component.value)]
    heads = math.sqrt(sum((a * b) ** 2 for a, b in zip(*two, strict=True)))
    lambert = special.lambertw((n - 1) / math.e).real
    return math.sqrt(n) * (4 * lambert + 1) * np.linalg.norm(component.out.detach().numpy(), 2) * heads


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_attention_is_its_definition_scaled_to_its_bound(case: Case, n: int) -> None:
    component, x = make(case), inputs(case, 2, n)[0]
    factor = min(1.0, component.config.bound / certified(component, n))
    expected = torch.stack([naive(component, row) for row in x]) * factor
    assert torch.allclose(component(x), expected, rtol=1e-9, atol=1e-14)
    with torch.no_grad():
        component.out.mul_(1e-4)  # below the bound: not scaled
    assert torch.allclose(component(x), torch.stack([naive(component, row) for row in x]), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention_ignores_hidden_positions(case: Case) -> None:
    component, x = make(case), inputs(case, 2, 6)[0]
    attend = torch.tensor([[True, False, True, True, False, True], [False] * 6])
    out = component(x, attend)
    assert torch.allclose(out[0, attend[0]], component(x[:1, attend[0]])[0], atol=1e-14)
    assert not out[~attend].any()
    assert out.isfinite().all()


def test_lambert_is_scipys_from_above() -> None:
    x = torch.logspace(-12, 12, 200, dtype=torch.float64)
    found, expected = contraction._lambert(x), torch.from_numpy(special.lambertw(x.numpy()).real)
    assert torch.allclose(found, expected, rtol=1e-14)
    assert contraction._lambert(torch.zeros(1, dtype=torch.float64)) == 0
