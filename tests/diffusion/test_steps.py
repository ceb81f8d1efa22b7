"""Kernels in discrete time: step matrices by numpy and scipy, products, samplers that skip steps, refusals.

Axes: T steps, n states.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import scipy.linalg
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.schedules_steps import Betas, LinearBetas, StepsTaken
from sedd_graph_registry.noise.steps import Steps
from sedd_graph_registry.objectives.bounds import Nelbo
from sedd_graph_registry.objectives.discrete_time import D3PM
from sedd_graph_registry.sampling.steps import Ancestral, Euler, Psi
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.errors import BlueprintError, UserError
from sedd_graph.runs.check import check
from tests.conftest import ROOT

N, T = 6, 10
DOUBLE = torch.float64
BLUEPRINT = ROOT / "blueprints" / "d3pm-gaussian-tiny.yaml"


def steps(n: int = N, **config: Any) -> Steps:
    return Steps(Steps.Config.model_validate({"steps": T, "beta_last": 0.5, **config}), Context({"n": n}))


def gaussian(n: int, beta: float, *, text: bool = False) -> np.ndarray:
    """D3PM's code, image (``text``: text) version: weights of differences, and the rest on the diagonal."""
    values = np.linspace(0, n - 1, n) * 2 / (n - 1) if not text else np.linspace(0, n, n) * 2 / (n - 1)
    values = -(values**2) / beta
    values = np.concatenate([values[:0:-1], values])
    weights = np.exp(values - values.max()) / np.exp(values - values.max()).sum()
    found = np.array([[weights[n - 1 + i - j] if i != j else 0.0 for j in range(n)] for i in range(n)])
    found += np.diag(1 - found.sum(0))
    return found


@pytest.mark.parametrize(("scale", "end"), [("images", True), ("text", False)])
def test_gaussian_matrices_and_their_products(scale: str, end: bool) -> None:
    k = steps(scale=scale, end=end)
    betas = np.linspace(1e-4, 0.5, T, endpoint=end)
    product = np.eye(N)
    for i, beta in enumerate(betas, start=1):
        matrix = gaussian(N, beta, text=scale == "text")
        np.testing.assert_allclose(k.transition_matrix(i, i - 1).numpy(), matrix, atol=1e-13)
        product = matrix @ product
        np.testing.assert_allclose(k.transition_matrix(i).numpy(), product, atol=1e-13)
    first, last = k.transition_matrix(3, 0), k.transition_matrix(9, 6)
    assert float((first @ last - last @ first).abs().max()) > 1e-6  # they do not commute
    np.testing.assert_allclose(last.numpy(), np.linalg.multi_dot([gaussian(N, b, text=scale == "text") for b in betas[8:5:-1]]), atol=1e-13)  # fmt: skip


def test_rates_of_neighbours_are_exponentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    points = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    np.save("points.npy", points)
    k = steps(9, form="nearest_rate", file="points.npy", neighbours=3, beta_first=0.1, beta_last=1.0)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    near = np.argsort(-(unit @ unit.T) - 9 * np.eye(9) * -1, axis=1)[:, :3]
    a = np.zeros((9, 9))
    np.put_along_axis(a, near, 1.0, axis=1)
    rates = (a + a.T) / 6
    rates -= np.diag(rates.sum(0))
    betas = np.linspace(0.1, 1.0, T)
    np.testing.assert_allclose(k.transition_matrix(4).numpy(), scipy.linalg.expm(betas[:4].sum() * rates), atol=1e-7)
    torch.testing.assert_close(k.law, torch.full((9,), 1 / 9, dtype=DOUBLE))


def test_a_table_from_a_file_has_its_own_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = np.random.default_rng(1).random((T, N, N))
    table /= table.sum(1, keepdims=True)
    np.save("table.npy", table)
    k = Steps(Steps.Config(form="table", file="table.npy", steps=T, mask=True), Context({"n": N}))
    product = np.linalg.multi_dot(list(table[::-1]))
    np.testing.assert_allclose(k.transition_matrix(T).numpy(), product, atol=1e-12)
    np.testing.assert_allclose(k.law.numpy(), product[:, :-1].mean(1), atol=1e-12)  # clean text has no mask
    assert k.mask == N - 1
    x0 = torch.tensor([[0, 3]])
    exact = scipy.stats.entropy(product[:, [0, 3]], product[:, :-1].mean(1)[:, None].repeat(2, 1))
    np.testing.assert_allclose(k.prior_divergence(x0, torch.tensor([float(T)])).numpy()[0], exact, atol=1e-9)
    np.save("table.npy", table * 1.01)
    with pytest.raises(UserError, match=r"column 0 of step 1 of table.npy sums to 1.01"):
        Steps(Steps.Config(form="table", file="table.npy", steps=T), Context({"n": N}))
    with pytest.raises(UserError, match="must hold 3 square matrices"):
        Steps(Steps.Config(form="table", file="table.npy", steps=3), Context({"n": N}))


def test_posterior_is_bayes_over_skipped_steps() -> None:
    k = steps()
    now, below = torch.tensor([9.0, 4.0]), torch.tensor([5.0, 0.0])
    guess = torch.rand(2, 3, N, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    guess = guess / guess.sum(-1, keepdim=True)
    x = torch.tensor([[0, 2, 5], [1, 1, 4]])
    found = k.posterior(guess, x, now, below)
    for b, (i, j) in enumerate(((9, 5), (4, 0))):
        between, before = k.transition_matrix(i, j), k.transition_matrix(j)
        for c in range(3):
            joint = between[x[b, c]] * (before @ guess[b, c])
            torch.testing.assert_close(found[b, c], joint / joint.sum())


def test_compiled_code_has_single_steps_and_no_wrong_products() -> None:
    k = steps()
    guess, x = torch.full((2, 3, N), 1 / N), torch.tensor([[0, 2, 5], [1, 1, 4]])
    compiled = torch.compile(k.posterior, fullgraph=True, backend="eager")
    now, below = torch.tensor([9.0, 4.0]), torch.tensor([8.0, 0.0])
    torch.testing.assert_close(compiled(guess, x, now, below), k.posterior(guess, x, now, below))
    assert bool(compiled(guess, x, now, below - 2).isnan()[0].all())  # not a wrong number


@pytest.mark.parametrize("count", [1, 3, T])
def test_ancestral_steps_are_a_subset_of_the_grid(count: int) -> None:
    k, seen = steps(), list[float]()

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Any = None) -> dict[str, Tensor]:
        seen.append(float(t[0]) * T)
        return {"log_x0": torch.full((*x.shape, N), 1 / N).log()}

    generator = torch.Generator().manual_seed(0)
    x = k.prior(4, 5, generator=generator, allowed=None)
    settings = WalkSettings(
        free=torch.ones_like(x) > 0,
        kernel=k,
        schedule=StepsTaken(StepsTaken.Config(steps=T), Context({})),
        generator=generator,
    )
    sampler = Ancestral(Ancestral.Config(steps=count), Context({}))
    sampler.run(denoise, x, settings)
    assert np.round(seen, 5).tolist() == {1: [10], 3: [10, 7, 3], T: list(range(T, 0, -1))}[count]
    with pytest.raises(UserError, match="11 steps are more than the 10 of the kernel"):
        sampler.run(denoise, x, settings, steps=11)


def test_what_needs_continuous_time_refuses_it() -> None:
    k = steps()
    assert Nelbo(Nelbo.Config(), Context({})).lacks(k) == "a kernel in continuous time"
    for cls in (Euler, Psi):
        assert cls(cls.Config(), Context({})).lacks(k) == "a kernel in continuous time"
    assert Ancestral(Ancestral.Config(steps=11), Context({})).lacks(k) == "a kernel of at least as many steps as it takes (11)"  # fmt: skip
    assert D3PM(D3PM.Config(steps=9), Context({})).lacks(k) == "a kernel of 9 steps, as 'steps' declares"
    assert "continuous time" in str(D3PM(D3PM.Config(steps=T, last="clipped"), Context({})).lacks(k))
    assert D3PM(D3PM.Config(steps=T), Context({})).lacks(k) is None
    for method in ("rate_matrix",):
        with pytest.raises(UserError, match="steps is a kernel in discrete time, without rates"):
            getattr(k, method)(1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["process.schedule={op: loglinear}"], "has its own schedule: leave 'schedule' out"),
        (["process={op: absorb}"], "the kernel 'absorb' needs a schedule"),
        (["process.beta_last=200"], "a beta of 200 is more than the 100"),
        (["process.seed=1"], "form 'gaussian' does not read seed"),
        (["process={op: steps, betas: [0.1, 0.2], steps: 3}"], "2 betas are given for 3 steps"),
        (["process={op: steps, form: nearest, beta_last: 1.5}"], "a beta of 1.5 is more than the 1"),
        (["process={op: steps, form: table}"], "needs exactly one of 'table' and 'file'"),
        (["process={op: steps, form: table, table: [[[1, 0], [0]]]}"], "every matrix must have 2 rows of 2 entries"),
    ],
)
def test_wrong_blueprints(changes: list[str], message: str) -> None:
    with pytest.raises(BlueprintError, match=message.replace("[", r"\[")):
        check(BLUEPRINT, changes)


def test_tables_beyond_the_bound_are_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"1,000 steps of 512 states need tables of 3.91 GiB .* more than the 2 GiB"):
        steps(512, steps=1000)
    with pytest.raises(UserError, match="50,257 states are more than the 4,096"):
        steps(50257, steps=1)


def test_disconnected_neighbours_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("points.npy", np.array([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2]]))
    with pytest.raises(UserError, match="falls into 2 pieces"):
        steps(form="nearest", file="points.npy", neighbours=1)


def test_a_mask_with_a_probability_is_bayes() -> None:
    """Predictions with mass on the mask, as D3PM's logits have: the general formula over all states."""
    k = Absorb(Absorb.Config(), Context({"n": 4}))
    guess = torch.tensor([0.2, 0.1, 0.3, 0.4], dtype=DOUBLE).expand(1, 2, 4)
    x, now, below = torch.tensor([[3, 1]]), torch.tensor([0.9], dtype=DOUBLE), torch.tensor([0.3], dtype=DOUBLE)
    for lower in (below, torch.zeros_like(below)):
        before = k.transition_matrix(lower.clamp(min=1e-12))[0] if float(lower) else torch.eye(4, dtype=DOUBLE)
        joint = k.transition_matrix(0.9, float(lower))[x[0]] * (before @ guess[0, 0])
        torch.testing.assert_close(k.posterior(guess, x, now, lower)[0], joint / joint.sum(-1, keepdim=True))


def test_betas_are_those_of_the_list() -> None:
    values = [0.1, 0.02, 1.0, 0.5]
    s = Betas(Betas.Config(values=tuple(values), largest=0.99), Context({}))
    for dtype in (torch.float32, DOUBLE):
        alpha = torch.exp(-s.sigma(torch.arange(5, dtype=dtype) / 4))
        np.testing.assert_allclose(alpha, np.cumprod([1, 0.9, 0.98, 0.01, 0.5]), rtol=1e-6)
    linear = LinearBetas(LinearBetas.Config(steps=1000), Context({}))
    alpha = torch.exp(-linear.sigma(torch.arange(1001, dtype=DOUBLE) / 1000))
    np.testing.assert_allclose(alpha[1:], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), rtol=1e-9)
    with pytest.raises(pydantic.ValidationError):
        Betas.Config(values=(0.0, 0.5))


def test_the_prior_term_is_that_of_scipy() -> None:
    k = Uniform(Uniform.Config(), Context({"n": 5}))
    seen = k.transition_matrix(1.3)[:, 2].numpy()
    found = k.prior_divergence(torch.tensor([[2]]), torch.tensor([1.3]))
    np.testing.assert_allclose(found, scipy.stats.entropy(seen, np.full(5, 0.2)), rtol=1e-6)


def test_forms_of_the_auxiliary_term_differ_where_a_token_informs_of_itself() -> None:
    k, s = (
        Uniform(Uniform.Config(), Context({"n": 5})),
        LinearBetas(LinearBetas.Config(steps=T, beta_last=0.9), Context({})),
    )
    batch = Batch.of(torch.randint(0, 5, (8, 6), generator=torch.Generator().manual_seed(0)))
    log_x0 = torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(1)).log_softmax(-1)

    def loss(**config: Any) -> Tensor:
        objective = D3PM(D3PM.Config(steps=T, **config), Context({}))
        draw = objective.corrupt(batch, k, s, random=Randomness(torch.Generator().manual_seed(2)))
        found: Tensor = objective.loss({"log_x0": log_x0}, draw, batch, k, s)
        return found

    raw = -log_x0.gather(-1, batch.tokens[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(loss(auxiliary=0.1) - loss(), 0.1 * T * raw, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(loss(auxiliary=0.1, auxiliary_form="posterior"), loss(auxiliary=0.1), rtol=1e-2)
