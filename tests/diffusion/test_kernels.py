"""Kernels beyond masks and even draws: goldens, published forms, enumeration, sizes, and what is refused."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import scipy.linalg
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Interpolating, Mixture, Uniform, Unigram
from sedd_graph_registry.noise.masking import LearnedPower, Power, Spindle
from sedd_graph_registry.noise.neighbours import Neighbours
from sedd_graph_registry.noise.rate_matrix import Ordinal, Rates
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.errors import UserError

DOUBLE = torch.float64
RING = ((0, 1, 0), (0, 0, 2), (3, 0.5, 0))
EVERY: list[tuple[Any, dict[str, Any]]] = [
    (Absorb, {}),
    (Uniform, {}),
    (Unigram, {"frequencies": (5, 1, 3)}),
    (Mixture, {"uniform": 0.7}),
    (Mixture, {"uniform": 0.4, "decay": 0.0}),
    (Power, {"frequencies": (5, 1, 3), "gamma": 0.7}),
    (Spindle, {"frequencies": (5, 1, 3)}),
    (Ordinal, {"beta": 1.0}),
    (Rates, {"table": RING}),
    (LearnedPower, {"frequencies": (5, 1, 3), "gamma": 0.7}),
    (Neighbours, {"neighbours": 1, "even": 0.1}),
]


def made(cls: Any, states: int, **config: Any) -> Any:
    return cls(cls.Config(**config), Context({"n": states}))


def toy(cls: Any, config: dict[str, Any], tokens: int = 3) -> Any:
    return made(cls, tokens + (cls in (Absorb, Mixture, Power, Spindle, LearnedPower)), **config)


def level(sigma: float) -> Tensor:
    return torch.tensor([sigma], dtype=DOUBLE)


# -- goldens ------------------------------------------------------------------------------------------------------------


class Golden11(Interpolating, kind="kernel"):
    """alpha = .6, b = [.05, .05, .05, .25], b' = [.1, .1, .1, .7] and alpha' = -1, all in t."""

    class Config(Absorb.Config):
        pass

    @property
    def mask(self) -> int:
        return 3

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        spread = torch.tensor([[0.05, 0.05, 0.05, 0.25]], dtype=DOUBLE)
        slope = torch.tensor([[0.1, 0.1, 0.1, 0.7]], dtype=DOUBLE) * 0.6  # d sigma / dt = 1 / .6
        # b = (1 - alpha) pi: b' = alpha pi + (1 - alpha) pi'
        pi = spread / 0.4
        return pi, (slope - 0.6 * pi) / 0.4


@pytest.mark.parametrize(("z", "value"), [(3, 1.183148081), (1, 3.697215524)])
def test_golden_11(z: int, value: float) -> None:
    k = made(Golden11, 4)
    log_x0 = torch.tensor([[[0.5, 0.3, 0.2, 0.0]]], dtype=DOUBLE).log().clamp(min=-1e6)
    for loss in (
        k.nelbo(log_x0, torch.tensor([[z]]), torch.tensor([[0]]), level(-math.log(0.6))),
        k.score_entropy(
            k.log_score(log_x0, torch.tensor([[z]]), level(-math.log(0.6))),
            torch.tensor([[z]]),
            torch.tensor([[0]]),
            level(-math.log(0.6)),
        ),
    ):
        assert loss.item() / 0.6 == pytest.approx(value, abs=1e-8)


class Golden10(Power, kind="kernel"):
    """w = [.5, 1, 2]."""

    class Config(Power.Config):
        pass

    def trait_of(self, surprisal: Tensor, frequencies: Tensor) -> Tensor:
        return torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)


def test_golden_10() -> None:
    """GenMD4 at t = .4, where 1 - exp(-sigma) = t and d sigma / dt = 1 / (1 - t)."""
    k, t = made(Golden10, 4), 0.4
    sigma = -math.log1p(-t)
    # the golden's belief knows of the mask: the prediction is what is left when that is taken out again
    belief = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE)
    guess = belief / t ** torch.tensor([0.5, 1, 2], dtype=DOUBLE)
    log_x0 = torch.cat([(guess / guess.sum()).log(), torch.tensor([-1e6], dtype=DOUBLE)])[None, None]
    z, x0 = torch.tensor([[3]]), torch.tensor([[2]])
    assert k.nelbo(log_x0, z, x0, level(sigma)).item() / (1 - t) == pytest.approx(5.422189562, abs=1e-8)
    score = k.log_score(log_x0, z, level(sigma))
    assert k.score_entropy(score, z, x0, level(sigma)).item() / (1 - t) == pytest.approx(5.422189562, abs=1e-8)


def duo(log_xhat: Tensor, z: int, x0: int, alpha: float) -> float:
    """The uniform bound per unit of sigma as UDLM and Duo write it (arXiv 2506.10892, appendix; math: section 2.4)."""
    n = len(log_xhat)
    xbar = n * alpha * log_xhat.exp() + 1 - alpha
    eq, c = float(z == x0), (1 - alpha) / (n * alpha + 1 - alpha)
    top = 1 - alpha + n * alpha * eq
    t2 = -(eq * c + 1 - eq) * float(xbar.log().sum() - n * xbar[z].log())
    t2 -= (1 - eq) * n * alpha / (1 - alpha) * float(xbar[x0].log() - xbar[z].log())
    t2 += ((n - 1) * c * eq - (1 - eq) / c) * math.log(c)
    return -(1 / n) * (n * (1 / top - 1 / float(xbar[z])) - t2)


@pytest.mark.parametrize("alpha", [0.05, 0.6, 0.98])
def test_four_uniform_losses_agree(alpha: float) -> None:
    """Ours for predictions, ours for scores, the sum over states, and UDLM's closed form."""
    n = 6
    k, sigma = made(Uniform, n), level(-math.log(alpha))
    log_x0 = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).log_softmax(-1)
    for z, x0 in itertools.product(range(n), repeat=2):
        args = (torch.tensor([[z]]), torch.tensor([[x0]]), sigma)
        found = k.nelbo(log_x0[None, None], *args).item()
        by_score = k.score_entropy(k.log_score(log_x0[None, None], args[0], sigma), *args).item()
        mixed = alpha * log_x0.exp() + (1 - alpha) / n
        p = k.transition_matrix(-math.log(alpha))
        s, r = mixed / mixed[z], p[:, x0] / p[z, x0]
        brute = float((s - r * s.log() + r * r.log() - r).sum()) / n
        assert found == pytest.approx(brute, abs=1e-12)
        assert by_score == pytest.approx(brute, abs=1e-12)
        assert duo(log_x0, z, x0, alpha) == pytest.approx(brute, abs=1e-11)


def test_absorb_is_the_family_with_its_zeros_left_out() -> None:
    k, generator = made(Absorb, 5), torch.Generator().manual_seed(1)
    log_x0 = torch.randn(16, 3, 5, generator=generator, dtype=DOUBLE)
    log_x0[..., 4] = -1e6
    log_x0 = log_x0.log_softmax(-1)
    x0 = torch.randint(0, 4, (16, 3), generator=generator)
    sigma = torch.rand(16, generator=generator, dtype=DOUBLE) * 3 + 0.01
    xt = torch.full_like(x0, 4)
    for name, args in {
        "nelbo": (log_x0, xt, x0, sigma),
        "score_entropy": (log_x0, xt, x0, sigma),
        "posterior": (log_x0.exp(), xt, sigma, sigma / 3),
        "analytic": (k.log_score(log_x0, xt, sigma).exp(), xt, sigma, sigma / 3),
        "reverse_rate": (log_x0.exp(), xt, sigma),
    }.items():
        torch.testing.assert_close(
            getattr(k, name)(*args), getattr(Interpolating, name)(k, *args), rtol=1e-9, atol=1e-12
        )
    assert torch.equal(k.rate_matrix(1.0), Interpolating.rate_matrix(k, 1.0))


def test_power_without_a_power_is_absorb() -> None:
    power, absorb = made(Power, 5, gamma=0.0), made(Absorb, 5)
    log_x0 = torch.randn(8, 2, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).masked_fill(
        torch.arange(5) == 4, -1e6
    )
    log_x0, xt, x0 = log_x0.log_softmax(-1), torch.full((8, 2), 4), torch.ones(8, 2, dtype=torch.int64)
    sigma = torch.linspace(1e-6, 9, 8, dtype=DOUBLE)
    torch.testing.assert_close(power.nelbo(log_x0, xt, x0, sigma), absorb.nelbo(log_x0, xt, x0, sigma))
    torch.testing.assert_close(power.transition_matrix(sigma), absorb.transition_matrix(sigma), rtol=1e-9, atol=1e-12)


# -- the bound, by enumeration ---------------------------------------------------------------------------------------------


def law_of_pairs() -> Tensor:
    weights = torch.rand(3, 3, generator=torch.Generator().manual_seed(7), dtype=DOUBLE) + 0.05
    return weights / weights.sum()


@torch.no_grad()
def guessed(k: Any, law: Tensor, sigma: float, tilt: float) -> Tensor:
    """A network's log_x0 for all pairs of states, [n n, 2, n]: the leave-one-out posterior, tilted."""
    n = k.states
    pairs = torch.tensor(list(itertools.product(range(n), repeat=2)))
    joint = torch.zeros(n, n, dtype=DOUBLE)
    joint[:3, :3] = law
    lean = tilt * torch.tensor([1.0, -1.0, 0.5] + [0.0] * (n - 3), dtype=DOUBLE)
    p = k.transition_matrix(sigma)
    guess = torch.stack([p[pairs[:, 1]] @ joint.T, p[pairs[:, 0]] @ joint], 1)  # of each position, given the other
    if k.clamp_safe:
        seen = torch.nn.functional.one_hot(pairs, n).to(DOUBLE)
        guess = torch.where((pairs == k.mask)[..., None], guess, seen)
    # one way or the other by what the other position is seen as: no law has such posteriors
    lean = torch.where(pairs.flip(1) == 0, 1.0, -1.0)[..., None] * lean
    return (guess.clamp(min=1e-300).log().clamp(min=-1e6) + lean).log_softmax(-1)


@torch.no_grad()
def bound(k: Any, law: Tensor, tilt: float) -> tuple[float, Tensor]:
    """E over x0 of the bound on two tokens, and each x0's own: every z enumerated, sigma by Gauss-Legendre in log(1-alpha).

    The network is the exact leave-one-out posterior, tilted by ``tilt``: a model that is wrong, but still one.
    """
    n, points = k.states, 48
    nodes, weights = np.polynomial.legendre.leggauss(points)
    first, last = math.log(1e-7), math.log(25.0)
    grid = [
        (math.exp((last - first) / 2 * x + (last + first) / 2), (last - first) / 2 * w)
        for x, w in zip(nodes, weights, strict=True)
    ]
    total = torch.zeros(3, 3, dtype=DOUBLE)
    pairs = torch.tensor(list(itertools.product(range(n), repeat=2)))
    for sigma, weight in grid:
        p, log_x0 = k.transition_matrix(sigma), guessed(k, law, sigma, tilt)
        for x0 in itertools.product(range(3), repeat=2):
            chance = p[pairs[:, 0], x0[0]] * p[pairs[:, 1], x0[1]]
            can = chance > 0
            clean = torch.tensor([x0]).expand(int(can.sum()), 2)
            loss = k.nelbo(log_x0[can], pairs[can], clean, torch.full((int(can.sum()),), sigma, dtype=DOUBLE)).sum(-1)
            total[x0] += weight * sigma * float((chance[can] * loss).sum())
    return float((law * total).sum()), total


@pytest.mark.parametrize(("cls", "config"), EVERY, ids=lambda c: getattr(c, "__name__", None))
def test_with_a_perfect_network_the_bound_is_the_entropy(cls: Any, config: dict[str, Any]) -> None:
    """To 1e-4, where the proof at build has the noise of 30,000 draws: wrong terms that are small show here."""
    law, k = law_of_pairs(), toy(cls, config)
    entropy = -float((law * law.log()).sum())
    assert bound(k, law, 0.0)[0] == pytest.approx(entropy, abs=2e-4)
    # what is wrong costs something
    assert bound(k, law, 0.7)[0] > entropy + 0.01


@pytest.mark.parametrize(
    ("cls", "config"), [EVERY[0], EVERY[1], EVERY[3], EVERY[5], EVERY[7]], ids=lambda c: getattr(c, "__name__", None)
)
def test_the_bound_of_a_wrong_model_is_above_its_nll(cls: Any, config: dict[str, Any]) -> None:
    """-log p of each x0 by the reverse process itself: its master equation over all pairs, from noise down, in small steps."""
    law, k = law_of_pairs(), toy(cls, config)
    n, tilt = k.states, 0.7
    pairs = torch.tensor(list(itertools.product(range(n), repeat=2)))
    code = torch.arange(n * n)
    end = k.transition_matrix(25.0)[:, 0]
    p = (end[:, None] * end).reshape(-1)
    levels = torch.logspace(math.log10(25.0), -12, 900, dtype=DOUBLE).tolist()
    for above, below in itertools.pairwise(levels):
        sigma = math.sqrt(above * below)
        at = torch.full((n * n,), sigma, dtype=DOUBLE)
        rates = k.reverse_rate(k.log_score(guessed(k, law, sigma, tilt), pairs, at).exp(), pairs, at)
        q = torch.zeros(n * n, n * n, dtype=DOUBLE)
        for i in (0, 1):
            other = torch.arange(n).expand(n * n, n)
            to = other * n + pairs[:, 1:] if i == 0 else pairs[:, :1] * n + other
            q.index_put_((to, code[:, None].expand_as(to)), rates[:, i], accumulate=True)
        q -= torch.diag(q.sum(0))
        p = torch.linalg.matrix_exp((above - below) * q) @ p
    likelihood = p.reshape(n, n)[:3, :3]
    assert float(likelihood.sum()) == pytest.approx(1, abs=2e-3)  # the rest is masked still
    gap = bound(k, law, tilt)[1] + likelihood.log()
    assert float(gap.min()) > -3e-3  # as sure as the likelihood is
    assert float((law * gap).sum()) > 3e-3


def test_cross_entropy_at_each_tokens_own_rate_has_another_optimum() -> None:
    """Why there is the sum over all tokens in the loss of masking by token (math: section 5.1)."""
    p, rate = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE), torch.tensor([4.0, 1.0, 0.5], dtype=DOUBLE)
    trap, sound = torch.zeros(3, dtype=DOUBLE, requires_grad=True), torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    for logits, full in ((trap, False), (sound, True)):
        optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

        def closure(logits: Tensor = logits, full: bool = full, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            log_mu = logits.log_softmax(-1)
            loss = -(p * rate * log_mu).sum() + ((log_mu.exp() * rate).sum() if full else 0)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert sound.softmax(-1).tolist() == pytest.approx(p.tolist(), abs=1e-4)
    assert trap.softmax(-1).tolist() == pytest.approx((rate * p / (rate * p).sum()).tolist(), abs=1e-4)


# -- each kernel's own promises --------------------------------------------------------------------------------------------


def test_what_a_spindle_leaves_falls_evenly() -> None:
    k = made(Spindle, 4, frequencies=(4, 3, 3), smoothing=1e-6)
    law = torch.tensor([0.4, 0.3, 0.3], dtype=DOUBLE)
    surprisal = -law.log()
    for gone in (0.25, 0.5, 0.75):
        keep = k.transition_matrix(-math.log1p(-gone)).diagonal()[:3]
        assert float((law * surprisal * keep).sum() / (law * surprisal).sum()) == pytest.approx(1 - gone, abs=1e-5)


@pytest.mark.parametrize("cls", [Power, Spindle])
def test_what_says_more_is_masked_earlier(cls: Any) -> None:
    k = made(cls, 4, frequencies=(5, 3, 2))
    keep = k.transition_matrix(0.7).diagonal()[:3]
    assert bool((keep.diff() < 0).all())


def test_ordinal_is_d3pms_matrix_in_continuous_time() -> None:
    """Rates off the diagonal are proportional to D3PM's (arXiv 2107.03006, eq. 14), and P is scipy's exponential."""
    n, beta = 7, 0.3
    k = made(Ordinal, n, beta=beta)
    q = k.rate_matrix(1.0)
    published = torch.tensor(
        [[math.exp(-4 * (i - j) ** 2 / ((n - 1) ** 2 * beta)) for j in range(n)] for i in range(n)]
    )
    off = ~torch.eye(n, dtype=torch.bool)
    ratio = q[off] / published[off].to(DOUBLE)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)
    assert q.sum(1).abs().max() < 1e-12  # doubly stochastic
    torch.testing.assert_close(k.transition_matrix(0.8), torch.from_numpy(scipy.linalg.expm(0.8 * q.numpy())))
    # the clock: what is left of the slowest mode falls as exp(-sigma)
    assert sorted(np.linalg.eigvalsh(q.numpy()))[-2] == pytest.approx(-1, abs=1e-9)


def test_rates_that_are_not_reversible() -> None:
    k = made(Rates, 3, table=RING)
    assert not k.reversible
    torch.testing.assert_close(k.transition_matrix(0.8), torch.from_numpy(scipy.linalg.expm(0.8 * k.table.numpy())))
    torch.testing.assert_close(k.table @ k.stationary, torch.zeros(3, dtype=DOUBLE), atol=1e-12, rtol=0)


def test_clocks_do_not_depend_on_units() -> None:
    slow, fast = (made(Rates, 3, table=tuple(tuple(f * x for x in row) for row in RING)) for f in (1e-3, 1e3))
    torch.testing.assert_close(slow.transition_matrix(1.0), fast.transition_matrix(1.0))


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """A token of 1e-8 would never come of 24 bits; its draws are counted through the cumulative law itself."""
    k = made(Unigram, 4, frequencies=(1, 0, 0, 0), smoothing=1e-6)
    assert float(k.frequencies.min()) == pytest.approx(2.5e-7)

    class Fixed(Randomness):
        """0 for the hit; then the highest uniform that 24 bits know, and the half of its last bit."""

        def rand(self, rows: int, *shape: int) -> Tensor:
            self.number = getattr(self, "number", -1) + 1
            return torch.full((rows, *shape), (0.0, 1 - 2**-24, 0.5)[self.number])

    x0 = torch.zeros(1, 3, dtype=torch.int64)
    drawn = k.sample(x0, torch.tensor([1.0]), random=Fixed(torch.Generator()), corrupt=torch.ones_like(x0) > 0)
    assert drawn.tolist() == [[3, 3, 3]]


@pytest.mark.parametrize("cls", [Absorb, Uniform, Unigram, Mixture, Power, Spindle, LearnedPower])
def test_gpt2s_vocabulary_takes_no_square_table(cls: Any) -> None:
    """One step forward and back, a draw, and a step of each sampler: finite, at 50,257 tokens."""
    n, tokens = 50257 + (cls not in (Uniform, Unigram)), 50257
    k = made(cls, n)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, tokens, (2, 4), generator=generator)
    sigma = torch.tensor([1e-4, 2.0])
    xt = k.sample(x0, sigma, random=Randomness(generator), corrupt=torch.ones_like(x0, dtype=torch.bool))
    raw = torch.randn(2, 4, n, generator=generator, requires_grad=True)
    log_x0 = raw.masked_fill(torch.arange(n) >= tokens, -1e6).log_softmax(-1)
    loss = k.nelbo(log_x0, xt, x0, sigma) + k.score_entropy(k.log_score(log_x0, xt, sigma), xt, x0, sigma)
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert raw.grad is not None
    assert bool(raw.grad.isfinite().all())
    with torch.no_grad():
        step = k.posterior(log_x0.exp(), xt, sigma, sigma / 2)
        torch.testing.assert_close(step.sum(-1), torch.ones(2, 4))
        assert bool((step >= 0).all())
    assert k.prior(2, 4, generator=generator, allowed=None).shape == (2, 4)


@pytest.mark.parametrize(("cls", "config"), EVERY, ids=lambda c: getattr(c, "__name__", None))
def test_a_prior_has_no_disallowed_tokens(cls: Any, config: dict[str, Any]) -> None:
    k = toy(cls, config)
    allowed = torch.tensor([True, False, True] + [False] * (k.states - 3))
    drawn = k.prior(64, 8, generator=torch.Generator().manual_seed(0), allowed=allowed)
    fine = allowed.clone()
    if k.mask is not None:
        fine[k.mask] = True
    assert bool(fine[drawn].all())


@pytest.mark.parametrize(("cls", "config"), EVERY, ids=lambda c: getattr(c, "__name__", None))
def test_positions_that_are_not_corrupted_stay(cls: Any, config: dict[str, Any]) -> None:
    k = toy(cls, config)
    x0 = torch.randint(0, 3, (32, 8), generator=torch.Generator().manual_seed(0))
    corrupt = torch.arange(8).expand(32, 8) % 2 == 0
    xt = k.sample(x0, torch.full((32,), 5.0), random=Randomness(torch.Generator().manual_seed(1)), corrupt=corrupt)
    assert bool((xt == x0)[~corrupt].all())
    assert bool((xt != x0)[corrupt].any())


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "states", "config", "message"),
    [
        (Rates, 3, {"table": ((0, 0, 0), (1, 0, 0), (0, 0, 0))}, "have no unique stationary distribution"),
        (Rates, 4, {"table": RING}, "are those of 3 states, but the model has 4"),
        (Ordinal, 600, {}, "600 states are more than the 512"),
        (Unigram, 4, {"frequencies": (1, 2, 3)}, "has 3 entries, but the model has 4 data tokens"),
        (Power, 4, {"frequencies": (1, 2, 3, 4)}, "has 4 entries, but the model has 3 data tokens"),
        (Unigram, 3, {"file": "/etc/hostname"}, "not below the working directory"),
        (Unigram, 3, {"file": "../counts.npy"}, "not below the working directory"),
        (Unigram, 3, {"file": "absent.npy"}, "cannot be read"),
    ],
)
def test_refused(cls: Any, states: int, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(cls, states, **config)


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (Rates, {}, "exactly one of 'table' and 'file'"),
        (Rates, {"table": ((0, 1), (1,))}, "as many entries as there are rows"),
        (Rates, {"table": ((0, -1), (1, 0))}, "greater than or equal to 0"),
        (Rates, {"table": ((0,) * 129,) * 129}, "at most 128 items"),
        (Unigram, {"frequencies": (0, 0)}, "all are 0"),
        (Unigram, {"frequencies": (1, 2), "file": "a.npy"}, "one of 'frequencies' and 'file'"),
        (Mixture, {"decay": 1.5}, "less than or equal to 1"),
    ],
)
def test_refused_as_written(cls: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        cls.Config(**config)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("counts.npy", np.array([5, 1, 3]))
    np.save("rates.npy", np.array(RING))
    np.save("objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.save("nan.npy", np.array([1.0, np.nan]))
    np.save("negative.npy", np.array([[0.0, -1.0], [1.0, 0.0]]))
    torch.testing.assert_close(
        made(Unigram, 3, file="counts.npy").frequencies, made(Unigram, 3, frequencies=(5, 1, 3)).frequencies
    )
    torch.testing.assert_close(made(Rates, 3, file="rates.npy").table, made(Rates, 3, table=RING).table)
    for cls, file, message in (
        (Unigram, "objects.npy", "cannot be read"),
        (Unigram, "nan.npy", "not finite"),
        (Unigram, "rates.npy", "1 axes"),
        (Rates, "counts.npy", "2 axes"),
        (Rates, "negative.npy", "negative rates"),
    ):
        with pytest.raises(UserError, match=message):
            made(cls, 2, file=file)


@pytest.mark.parametrize("found", [(1, 2, 3, 4, 5, 6), (0, 0, 0, 9)])
def test_toys_keep_the_rare_and_the_common(found: tuple[float, ...]) -> None:
    cut = Unigram.toy(Unigram.Config(frequencies=found), 3)
    assert isinstance(cut, Unigram.Config)
    assert len(cut.frequencies) == 3
    assert cut.frequencies[0] == max(found)
    assert cut.frequencies[-1] == min(found)
    assert len(Rates.toy(Rates.Config(table=RING), 5).table) == 5
