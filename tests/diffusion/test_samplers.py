"""Every sampler against enumerated laws: three tokens at three positions, a perfect network, and what each claims of itself."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.schedules import Cosine, Geometric, LogLinear, Polynomial
from sedd_graph_registry.sampling.exact import FirstHitting, Uniformization, next_hit, one_of
from sedd_graph_registry.sampling.masked import Confidence, EntropyBound, ReMDM
from sedd_graph_registry.sampling.steps import Analytic, Ancestral, Euler, PredictorCorrector, Psi, TauLeaping
from torch import Tensor

import sedd_graph
from sedd_graph.component.base import Context
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.categorical import sharpen
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.diffusion.tokens.walk import Walk, WalkSettings
from sedd_graph.errors import SeddGraphError, UserError
from sedd_graph.verify.tokens import check_sampler
from sedd_graph.verify.toy import Law, Toy
from tests.conftest import ROOT

V, L, ROWS = 3, 3, 20_000
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))
WEIGHTS = torch.rand(V**L, generator=torch.Generator().manual_seed(5), dtype=torch.float64) ** 4 + 0.002
LAW = WEIGHTS / WEIGHTS.sum()
FLOOR = math.sqrt(V**L / ROWS / 2)
"""What chance alone makes of the total variation between a law and its counts, at most."""
EVEN = Law(V, 2, shares=(0.5, 0.3, 0.2))
"""Independent tokens."""
EVERY = [Ancestral, Analytic, Euler, PredictorCorrector, Psi, TauLeaping, FirstHitting, Uniformization, Confidence, EntropyBound, ReMDM]  # fmt: skip


def make(cls: Any, **config: Any) -> Any:
    return cls(cls.Config(**config), Context({"n": 4}))


def world(kernel: Any) -> tuple[Any, Any]:
    n = V + 1 if kernel is Absorb else V
    schedule: Any = LogLinear if kernel is Absorb else Geometric
    return kernel(kernel.Config(), Context({"n": n})), schedule(schedule.Config(), Context({}))


def chances(x: Tensor, sigma: Tensor, kernel: Any) -> Tensor:
    """p(x0_i = v | all x_j, j not i) for rows [b, L], by Bayes' rule over all sequences, float64 [b, L, V]."""
    joint = LAW.reshape(V, V, V)
    alpha = torch.exp(-sigma.double())[:, None, None]
    noise = torch.full((V,), 1 / V, dtype=torch.float64) if kernel.mask is None else torch.eye(V + 1).double()[V]
    # the chance to see x_j, had the clean token been v: [b, L, V]
    like = alpha * (x[..., None] == torch.arange(V)) + (1 - alpha) * noise[x][..., None]
    law = torch.stack([torch.einsum(how, joint, like[:, i], like[:, j]) for how, i, j in (("abc,rb,rc->ra", 1, 2), ("abc,ra,rc->rb", 0, 2), ("abc,ra,rb->rc", 0, 1))], 1)  # fmt: skip
    return law / law.sum(-1, keepdim=True)


def perfect(kernel: Any, schedule: Any) -> Callable[..., dict[str, Tensor]]:
    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        law = chances(x, schedule.sigma(t), kernel)
        if kernel.mask is not None:
            law = torch.cat([law, torch.zeros_like(law[..., :1])], -1)
            carried = torch.nn.functional.one_hot(x, V + 1).double()
            law = torch.where((x == kernel.mask)[..., None], law, carried)
        return {"log_x0": some(law.log().clamp(min=-1e6).float(), at)}

    return denoise


def some(outputs: Tensor, at: Tensor | None) -> Tensor:
    """``outputs`` [b, l, n] at the positions ``at`` [b, k]."""
    return outputs if at is None else outputs.gather(1, at[..., None].expand(-1, -1, outputs.shape[-1]))


def run(
    sampler: Any, kernel: Any, *, seed: int = 0, prompt: Tensor | None = None, rows: int = ROWS, **more: Any
) -> Tensor:
    k, s = world(kernel)
    generator = torch.Generator().manual_seed(seed)
    x = k.prior(rows, L, generator=generator, allowed=None)
    free = torch.ones_like(x, dtype=torch.bool)
    if prompt is not None:
        free = (prompt < 0).expand(rows, L)
        x = torch.where(free, x, prompt)
    more.setdefault("denoise", perfect(k, s))
    steps = more.pop("steps", None)
    denoise = more.pop("denoise")
    settings = WalkSettings(free=free, kernel=k, schedule=s, generator=generator, **more)
    out: Tensor = sampler.run(denoise, x, settings, steps=steps)
    return out


def distance(rows: Tensor, law: Tensor = LAW) -> float:
    code = (rows * torch.tensor([V * V, V, 1])).sum(-1)
    return float((torch.bincount(code, minlength=V**L).double() / len(rows) - law).abs().sum() / 2)


@pytest.mark.parametrize(
    ("sampler", "kernel"),
    [
        (make(FirstHitting), Absorb),
        (make(Uniformization), Absorb),
        (make(Uniformization), Uniform),
        (make(EntropyBound, gamma=0.0), Absorb),
        (make(Confidence, by="random", steps=3), Absorb),
        (make(Confidence, by="random", steps=3, block=1), Absorb),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Sampler) else v.__name__,
)
def test_exact_samplers_give_the_law_of_the_data(sampler: Any, kernel: Any) -> None:
    """One token at a time from its law given all others: any order will do, if it does not depend on what is drawn."""
    assert distance(run(sampler, kernel)) < 1.3 * FLOOR


def test_samplers_in_steps_err_at_few_and_come_near_with_many() -> None:
    for cls, kernel in (
        (Ancestral, Absorb),
        (Analytic, Uniform),
        (Euler, Absorb),
        (TauLeaping, Uniform),
        (Psi, Absorb),
    ):
        few, many = (distance(run(make(cls, steps=n), kernel)) for n in (2, 48))
        assert few > 4 * FLOOR, cls
        assert many < 1.3 * FLOOR + 1.5 / 48, cls
    # sure of what it drew, it keeps that first: likely texts come out too often, with one token a step as well
    assert distance(run(make(Confidence, steps=3), Absorb)) > 4 * FLOOR


def chain(step: Callable[[Tensor, float, float], Tensor], alphas: list[float]) -> Tensor:
    """The law after factorised steps, by enumeration of all (V + 1)^L states with masks: no draw anywhere."""
    states = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))
    k, _ = world(Absorb)
    law = torch.zeros(len(states), dtype=torch.float64)
    law[-1] = 1.0
    for now, below in itertools.pairwise(alphas):
        clean = chances(states, torch.full((len(states),), -math.log(now)), k)
        each = step(states, now, below)
        table = torch.zeros(len(states), L, V + 1, dtype=torch.float64)
        masked = states == V
        shown, again = each[..., 0], each[..., 1]
        table[..., :V] = torch.where(masked[..., None], shown[..., None] * clean, 0.0)
        table[..., V] = torch.where(masked, 1 - shown, again)
        table.scatter_add_(2, states[..., None], torch.where(masked, 0.0, 1 - again)[..., None])
        to = torch.ones(len(states), len(states), dtype=torch.float64)
        for i in range(L):
            to *= table[:, i][:, states[:, i]]
        law = law @ to
    clean_states = (states < V).all(-1)
    assert float(law[~clean_states].sum()) == pytest.approx(0, abs=1e-9)
    return law[clean_states]


@pytest.mark.parametrize(
    ("sampler", "again"),
    [
        (make(Ancestral, steps=3), lambda a, b: 0.0),
        (make(ReMDM, steps=3, eta=0.2), lambda a, b: min(0.2, (1 - b) / a)),
        (make(ReMDM, steps=3, eta=0.5, remask="rescale"), lambda a, b: 0.5 * min(1.0, (1 - b) / a)),
        # kappa = 1 - r / (1 - alpha_s)
        (make(Psi, steps=3, kappa=0.6), lambda a, b: 0.4 * (1 - b)),
    ],
    ids=["ancestral", "cap", "rescale", "psi"],
)
def test_few_steps_have_the_law_that_enumeration_gives(sampler: Any, again: Callable[[float, float], float]) -> None:
    """ReMDM's equation 6, and psi as the case of it that Duo's second paper (arXiv 2602.21185) states."""

    def step(states: Tensor, now: float, below: float) -> Tensor:
        r = again(now, below)
        shown = 1.0 if below == 1 else (below - (1 - r) * now) / (1 - now)
        return torch.tensor([shown, r], dtype=torch.float64).expand(*states.shape, 2)

    _, s = world(Absorb)
    times = torch.linspace(1, 1e-5, 4, dtype=torch.float64)
    law = chain(step, [*torch.exp(-s.sigma(times)).tolist(), 1.0])
    assert float((law - LAW).abs().sum() / 2) > 4 * FLOOR
    assert distance(run(sampler, Absorb), law) < 1.3 * FLOOR


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kernel", [Absorb, Uniform])
def test_psi_keeps_the_marginals(kernel: Any, kappa: float) -> None:
    """One token is its own law: after each step it has the noise process's, at that step's level."""
    marginals(make(Psi, steps=4, kappa=kappa), kernel, [*torch.linspace(1, 1e-5, 5).tolist(), 0.0])


@pytest.mark.parametrize("config", [{"eta": 0.3}, {"remask": "rescale", "eta": 0.9}, {"remask": "loop", "eta": 0.3}])
def test_remasking_keeps_the_marginals(config: dict[str, Any]) -> None:
    sampler = make(ReMDM, steps=6, **config)
    k, s = world(Absorb)
    walk = Walk(lambda *_: {}, torch.zeros(1, 1).long(), WalkSettings(free=torch.ones(1, 1).bool(), kernel=k, schedule=s, generator=torch.Generator()), sampler.config)  # fmt: skip
    levels = sampler.levels(walk, 6)
    alphas = [levels[0][0], *(below for _, below, _ in levels)]
    if sampler.config.remask == "loop":
        assert any(now == below == 0.9 for now, below, _ in levels)
        assert all(eta == 0.3 for now, below, eta in levels if now == below)
    marginals(sampler, Absorb, s.time(-torch.tensor(alphas, dtype=torch.float64).log()).tolist())


def marginals(sampler: Any, kernel: Any, times: list[float]) -> None:
    k, s = world(kernel)
    p0 = torch.tensor([0.6, 0.3, 0.1, 0.0][: k.states], dtype=torch.float64)
    frames: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        law = p0.expand(*x.shape, -1)
        if k.mask is not None:
            law = torch.where((x == k.mask)[..., None], law, torch.nn.functional.one_hot(x, 4).double())
        return {"log_x0": some(law.log().clamp(min=-1e6).float(), at)}

    generator = torch.Generator().manual_seed(1)
    x = k.prior(60_000, 1, generator=generator, allowed=None)
    sampler.run(denoise, x, WalkSettings(free=torch.ones_like(x).bool(), kernel=k, schedule=s, generator=generator, on_step=lambda _, x: frames.append(x)))  # fmt: skip
    assert len(frames) == len(times)
    for t, frame in zip(times, frames, strict=True):
        level = float(s.sigma(torch.tensor([t], dtype=torch.float64))) if t > 1e-6 else 0.0
        expected = k.transition_matrix(level) @ p0
        found = torch.bincount(frame[:, 0], minlength=k.states).double() / 60_000
        assert float((found - expected).abs().max()) < 0.01


def test_golden_8_and_hitting_times() -> None:
    hit = next_hit(
        torch.tensor(0.8, dtype=torch.float64).log(), torch.tensor(4), torch.tensor(0.3, dtype=torch.float64)
    )
    assert hit.exp().item() == pytest.approx(0.592066244, abs=1e-9)
    # the first of four to fall, from all masked: the largest of four uniform times, mean 4/5
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert next_hit(torch.zeros(100_000), torch.full((100_000,), 4), u).exp().mean().item() == pytest.approx(
        0.8, abs=3e-3
    )


@pytest.mark.parametrize("cls", [LogLinear, Geometric, Cosine, Polynomial])
def test_time_is_the_inverse_of_sigma(cls: Any) -> None:
    s, t = cls(cls.Config(), Context({})), torch.tensor([1e-4, 0.03, 0.5, 0.999], dtype=torch.float64)
    torch.testing.assert_close(s.time(s.sigma(t)), t, rtol=1e-9, atol=1e-12)
    assert s.time(torch.tensor([1e9, 0.0], dtype=torch.float64)).tolist() == pytest.approx([1.0, 0.0], abs=1e-12)


def test_corrections_undo_what_coarse_steps_get_wrong() -> None:
    for kernel in (Absorb, Uniform):
        plain = distance(run(make(Analytic, steps=4), kernel))
        corrected = distance(run(make(PredictorCorrector, steps=4, corrections=8), kernel))
        assert corrected < 0.7 * plain


@pytest.mark.parametrize("sites", [1, 2, 5])
@pytest.mark.parametrize("kernel", [Absorb, Uniform])
def test_a_correction_leaves_its_level_as_it_is(kernel: Any, sites: int) -> None:
    """Rows that have the marginal law of time t have it after twenty Gibbs moves."""
    k, s = world(kernel)
    generator = torch.Generator().manual_seed(3)
    level, t = s.sigma(torch.tensor([0.5])), torch.full((ROWS,), 0.5)
    p = k.transition_matrix(float(level))
    joint = torch.zeros([k.states] * L, dtype=torch.float64)
    joint[tuple(SEQUENCES.T)] = LAW
    law = torch.einsum("abc,xa,yb,zc->xyz", joint, p, p, p).reshape(-1)
    code = torch.multinomial(law, ROWS, replacement=True, generator=generator)
    x = torch.stack([code // k.states**2, code // k.states % k.states, code % k.states], -1)
    sampler = make(PredictorCorrector, sites=sites)
    walk = Walk(perfect(k, s), x, WalkSettings(free=torch.ones_like(x).bool(), kernel=k, schedule=s, generator=generator), sampler.config)  # fmt: skip
    for _ in range(20):
        sampler._correct(walk, t)
    found = (walk.x * torch.tensor([k.states**2, k.states, 1])).sum(-1)
    gap = torch.bincount(found, minlength=len(law)).double() / ROWS - law
    assert float((walk.x != x).double().mean()) > 0.1
    assert float(gap.abs().sum() / 2) < 1.3 * math.sqrt(len(law) / ROWS / 2)


@pytest.mark.parametrize("cls", [FirstHitting, Ancestral, ReMDM, Uniformization, Analytic, Psi])
def test_infilling_with_a_mask_is_exact(cls: Any) -> None:
    """Clamped tokens, no retraining: the law given the prompt."""
    prompt = torch.tensor([[-1, 1, -1]])
    sampler = make(cls) if cls in (FirstHitting, Uniformization) else make(cls, steps=32)
    out = run(sampler, Absorb, prompt=prompt)
    assert bool((out[:, 1] == 1).all())
    given = torch.where(SEQUENCES[:, 1] == 1, LAW, 0.0)
    assert distance(out, given / given.sum()) < 1.3 * math.sqrt(9 / ROWS / 2) + (0 if sampler.exact else 1 / 32)


class Two(FirstHitting, kind="sampler"):
    """Two tokens fall at a time, as if they did not know of each other."""

    class Config(FirstHitting.Config):
        pass

    def walk(self, walk: Walk, steps: int) -> None:
        t = torch.full(walk.x.shape[:1], 0.5)
        walk.put(walk.draw(walk.masked.double(), walk.clean(t)))


class Hasty(Uniformization, kind="sampler"):
    """Takes every candidate."""

    class Config(Uniformization.Config):
        pass

    def walk(self, walk: Walk, steps: int) -> None:
        draw = walk.draw
        walk.draw = lambda move, weights, **more: draw((move > 0).double(), weights, **more)
        super().walk(walk, steps)


class Blind(Analytic, kind="sampler"):
    """Looks at the rows of the first step for ever: its cache does not notice that tokens have changed."""

    class Config(Analytic.Config):
        pass

    def walk(self, walk: Walk, steps: int) -> None:
        first = walk.outputs(torch.ones(walk.x.shape[0]))
        walk.outputs = lambda t, need=None: first
        super().walk(walk, steps)


class Leaves(Analytic, kind="sampler"):
    """No noise removal."""

    class Config(Analytic.Config):
        pass

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        if s is not None and float(s[0]) > 0.3:
            super().step(walk, t, s)


class Eager(ReMDM, kind="sampler"):
    """Masks again after the last step as well, and fills in all at once."""

    class Config(ReMDM.Config):
        pass

    def walk(self, walk: Walk, steps: int) -> None:
        super().walk(walk, steps)
        walk.remask(torch.ones(walk.x.shape))
        walk.put(walk.draw(walk.masked.double(), walk.clean(torch.full(walk.x.shape[:1], 0.5))))


@pytest.mark.parametrize(
    ("cls", "kernel", "caught"),
    [
        (Two, Absorb, "sampler.law"),
        (Hasty, Uniform, "sampler.law"),
        (Blind, Absorb, "sampler.law"),
        (Leaves, Absorb, "sampler.clean"),
        (Eager, Absorb, "sampler.law"),
    ],
)
def test_broken_samplers_are_caught_by_name(cls: Any, kernel: Any, caught: str) -> None:
    k, s = world(kernel)
    parts = TokenParts(k, s, None, make(cls))  # type: ignore[arg-type]
    found = check_sampler(Toy(parts, whole=True), Toy(parts, EVEN, whole=True), "log_x0", "quick")
    assert caught in {check.name for check in found if check.holds is False}


@pytest.mark.parametrize("cls", EVERY)
def test_seeds_and_temperature(cls: Any) -> None:
    """The same seed draws the same rows; at temperature 0, under a mask, the likeliest token comes out of every sampler."""
    config = {} if "steps" not in cls.Config.model_fields else {"steps": 5}
    first, again, other = (run(make(cls, **config), Absorb, rows=200, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        law = torch.tensor([0.3, 0.6, 0.1, 0.0]).expand(*x.shape, -1)
        law = torch.where((x == V)[..., None], law, torch.nn.functional.one_hot(x, 4).float())
        return {"log_x0": some(law.log().clamp(min=-1e6), at)}

    for more in ({"temperature": 0.0}, {"top_p": 0.5}):
        cold = make(cls, **config, **more)
        assert cold.heuristic() is not None
        assert bool((run(cold, Absorb, rows=50, denoise=denoise) == 1).all())


def test_what_is_a_heuristic_says_so() -> None:
    plain = {cls.__name__ for cls in EVERY if make(cls).heuristic() is not None}
    assert plain == {"Confidence", "EntropyBound"}
    assert make(ReMDM, remask="conf").heuristic() is not None
    assert "independently" in make(ReMDM, remask="loop").claim()
    assert "steps^-0.4" in make(ReMDM).claim()
    assert "steps^-0.4" in make(Psi).claim()
    assert "steps^-1" in make(Psi, kappa=1.0).claim()
    assert "any number of steps" in make(FirstHitting).claim()
    assert {cls.__name__ for cls in EVERY if cls.exact} == {"FirstHitting", "Uniformization"}


def test_sharpen() -> None:
    w = torch.tensor([[4.0, 1.0, 0.0, 5.0]])
    assert sharpen(w, temperature=1, top_p=1).tolist() == w.tolist()
    half = sharpen(w, temperature=0.5, top_p=1)
    torch.testing.assert_close(half / half.sum(), torch.tensor([[16.0, 1, 0, 25]]).double() / 42)
    assert sharpen(w, temperature=1, top_p=0.5).tolist() == [[0, 0, 0, 5]]
    assert sharpen(w, temperature=1, top_p=0.51).tolist() == [[4, 0, 0, 5]]
    assert sharpen(w, temperature=0, top_p=0.2).tolist() == [[0, 0, 0, 5]]
    tiny = sharpen(torch.tensor([[1e-30, 3e-30]]), temperature=0.1, top_p=1)
    assert (tiny / tiny.sum())[0, 1].item() == pytest.approx(1 / (1 + 3**-10))


@pytest.mark.parametrize("sampler", [make(ReMDM, steps=32), make(Analytic, steps=64)])
def test_a_timeless_network_is_asked_about_changed_rows_alone(sampler: Any) -> None:
    rows, asked = 400, []

    def denoise(x: Tensor, t: Tensor, which: Tensor) -> dict[str, Tensor]:
        asked.append(len(which))
        assert len(x) == len(t) == len(which)
        law = perfect(*world(Absorb))(x, t, which)["log_x0"]
        return {"log_x0": law}

    plain = run(sampler, Absorb, rows=rows, denoise=denoise)
    assert sampler.evaluations == sum(asked) == rows * (sampler.config.steps + 1)
    asked.clear()
    assert torch.equal(run(sampler, Absorb, rows=rows, denoise=denoise, timeless=True), plain)
    assert sampler.evaluations == sum(asked)


def test_steps_in_which_no_mask_falls_are_not_asked_about() -> None:
    """Ancestral steps under masks: the network sees the rows, times and places at which a token shows, and no others."""
    rows, steps, asked = 400, 64, []
    k, s = world(Absorb)

    def denoise(x: Tensor, t: Tensor, which: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        assert at is not None
        asked.append((t, at.shape[1]))
        assert bool((x.gather(1, at) == V).any(1).all())
        return perfect(k, s)(x, t, which, at)

    sampler, frames = make(Ancestral, steps=steps), []
    out = run(sampler, Absorb, rows=rows, denoise=denoise, on_step=lambda n, x: frames.append(x))
    # of n even steps n (1 - (1 - 1/n)^l) see a token show (arXiv 2409.02908)
    assert sampler.evaluations == sum(len(t) for t, _ in asked)
    assert sampler.evaluations / rows == pytest.approx(steps * (1 - (1 - 1 / steps) ** L), abs=0.05)
    times = torch.linspace(1.0, 1e-5, steps + 1, dtype=torch.float64).float()
    assert set(torch.cat([t for t, _ in asked]).tolist()) <= set(times.tolist())
    assert len(frames) == steps + 2
    assert bool((frames[0] == V).all())
    assert torch.equal(frames[-1], out)
    for before, after in itertools.pairwise(frames):
        assert bool(((before == V) | (before == after)).all())
    assert torch.equal(run(sampler, Absorb, rows=rows, denoise=denoise), out)  # who looks on changes nothing


def test_rows_with_different_prompts_end_at_their_own_time() -> None:
    prompt = torch.full((64, L), -1)
    prompt[::2, 0] = 2
    prompt[::4, 1] = 0
    prompt[0] = torch.tensor([2, 0, 1])
    for cls in EVERY:
        out = run(make(cls), Absorb, rows=64, prompt=prompt)
        assert bool((out[prompt >= 0] == prompt[prompt >= 0]).all())
        assert bool((out < V).all())
    sampler = make(FirstHitting)
    run(sampler, Absorb, rows=64, prompt=prompt)
    assert sampler.evaluations == int((prompt < 0).sum())


def test_one_of_is_even() -> None:
    k, s = world(Absorb)
    places = torch.tensor([[True, False, True]]).expand(ROWS, L)
    walk = Walk(lambda *_: {}, torch.zeros(ROWS, L).long(), WalkSettings(free=places, kernel=k, schedule=s, generator=torch.Generator().manual_seed(0)), make(Ancestral).config)  # fmt: skip
    chosen = one_of(walk, places, torch.ones(ROWS).bool())
    assert bool((chosen.sum(1) == 1).all())
    assert chosen.double().mean(0).tolist() == pytest.approx([0.5, 0.0, 0.5], abs=0.02)


def test_allowed_tokens_may_differ_by_position() -> None:
    allowed = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]]).bool()
    for cls in EVERY:
        out = run(make(cls), Absorb, rows=100, allowed=allowed)
        assert bool(allowed.gather(1, out.T).all())


def test_refusals_tell_why() -> None:
    with pytest.raises(
        SeddGraphError, match=r"'first_hitting' needs a kernel that only masks, all tokens at one rate, not 'uniform'"
    ):
        sedd_graph.check("blueprints/sedd-uniform-tiny.yaml", ["sample={op: first_hitting}"])
    engine = sedd_graph.build(
        "blueprints/first.yaml", ["sample={op: first_hitting, top_p: 0.9}"], device="cpu", compile="off"
    )
    with pytest.raises(UserError, match="takes no number of steps"):
        engine.sample(1, 8, steps=4)
    assert engine.sample(3, 8, seed=0).shape == (3, 8)
    assert engine.process.sampler.evaluations == 24


def test_the_sampler_that_the_docs_write_is_exact() -> None:
    """The sampler of the how-to page; and the table of the reference names every sampler there is."""
    page, table = (ROOT / "docs" / name for name in ("how-to/sampler.md", "reference/samplers.md"))
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/how-to/sampler.md", "exec"), scope)
    sampler = make(scope["LeftToRight"])
    assert distance(run(sampler, Absorb)) < 1.3 * FLOOR
    assert sampler.evaluations == ROWS * L
    named = {c.name for c in discover().contracts() if c.kind == "sampler"}
    assert named == set(re.findall(r"^\| `(\w+)` \|", table.read_text(), flags=re.MULTILINE))
