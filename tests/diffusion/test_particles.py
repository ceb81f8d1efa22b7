"""Importance weights of rows under conditions, against enumerated laws: three tokens at three positions."""

import itertools
import math
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb
from sedd_graph_registry.sampling.exact import FirstHitting, Uniformization
from sedd_graph_registry.sampling.steps import Analytic, Ancestral
from torch import Tensor

import sedd_graph
from sedd_graph.diffusion.draws import Draws
from sedd_graph.diffusion.tokens.block_diffusion import write_blocks
from sedd_graph.diffusion.tokens.particles import choose
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.errors import BlueprintError, UserError
from tests.conftest import ROOT
from tests.diffusion.test_conditions import MATCHES, matching
from tests.diffusion.test_samplers import LAW, SEQUENCES, L, V, chain, make, perfect, run, some, world

ROWS = 12_000
EVERY = torch.ones(V + 1, dtype=torch.bool)
ALLOW = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
ALLOWED = ALLOW[torch.arange(L), SEQUENCES].all(-1)
CONDITIONS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "allow": ({"allowed": ALLOW}, ALLOWED),
    "matching": ({"matching": matching()}, MATCHES),
    "both": ({"matching": matching(), "allowed": ALLOW}, MATCHES & ALLOWED),
}


def codes(rows: Tensor) -> Tensor:
    return (rows * torch.tensor([V * V, V, 1])).sum(-1)


def few_steps() -> Tensor:
    """The law of ancestral samples at three steps without conditions, by enumeration."""

    def step(states: Tensor, now: float, below: float) -> Tensor:
        shown = 1.0 if below == 1 else (below - now) / (1 - now)
        return torch.tensor([shown, 0.0], dtype=torch.float64).expand(*states.shape, 2)

    _, s = world(Absorb)
    return chain(step, [*torch.exp(-s.sigma(torch.linspace(1, 1e-5, 4, dtype=torch.float64))).tolist(), 1.0])


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *itertools.product([FirstHitting, Ancestral], CONDITIONS),
        (Analytic, "both"),
        (Uniformization, "both"),
    ],
)
def test_weights_are_the_ratio_of_the_law_without_the_condition(cls: Any, name: str) -> None:
    """The mean of the weight over all runs that end in a row is the probability of the row without the condition."""
    check_weights(*((make(cls), LAW) if cls.exact else (make(cls, steps=3), few_steps())), name)


def check_weights(sampler: Any, law: Tensor, name: str) -> None:
    """``law``: of samples without the condition."""
    more, holds = CONDITIONS[name]
    out = run(sampler, Absorb, rows=ROWS, unconditioned=EVERY, **more)
    weight, code = sampler.log_weight.exp(), codes(out)
    assert bool(holds[code].all())
    total = torch.zeros(V**L, dtype=torch.float64).index_add(0, code, weight) / ROWS
    square = torch.zeros(V**L, dtype=torch.float64).index_add(0, code, weight**2) / ROWS
    error = ((square - total**2).clamp(min=0) / ROWS).sqrt()
    gap = (total - law).abs()[holds]
    assert bool((gap < 4.5 * error[holds] + 1e-9).all())
    assert float(weight.mean()) == pytest.approx(float(law[holds].sum()), abs=4.5 * float(weight.std()) / math.sqrt(ROWS))  # fmt: skip


@pytest.mark.parametrize("name", CONDITIONS)
def test_chosen_rows_have_the_law_given_the_condition(name: str) -> None:
    more, holds = CONDITIONS[name]
    law = LAW * holds / LAW[holds].sum()
    sampler, particles = make(FirstHitting), 16
    out = run(sampler, Absorb, rows=3000 * particles, unconditioned=EVERY, **more)
    one = torch.bincount(codes(out), minlength=V**L) / len(out)
    chosen = choose(sampler.log_weight, particles, draws=Draws(torch.Generator().manual_seed(0)))
    many = torch.bincount(codes(out[chosen.index]), minlength=V**L) / 3000
    plain, corrected = (float((found - law).abs().sum() / 2) for found in (one, many))
    chance = math.sqrt(float(holds.sum()) / 3000 / 2)
    assert plain > 3 * chance
    assert corrected < 1.3 * chance + 0.15 * plain
    assert 1 < chosen.effective < particles


def test_weights_of_blocks_are_their_product() -> None:
    """Two blocks that do not depend on each other, under a pattern over both: the mean weight is the chance of a match."""
    k, s = world(Absorb)
    generator = torch.Generator().manual_seed(0)
    x = torch.full((ROWS, 2 * L), V)
    pattern = matching("(ab|b)*a(a|b)*b")
    settings = WalkSettings(free=x == V, kernel=k, schedule=s, generator=generator, matching=pattern, unconditioned=EVERY)  # fmt: skip
    sampler, right = make(FirstHitting), perfect(k, s)
    write_blocks(sampler, lambda _: right, x, settings, block=L)
    weight = sampler.log_weight.exp()
    rows = torch.tensor(list(itertools.product(range(V), repeat=2 * L)))
    fits = torch.tensor([pattern.matches(row[None]) for row in rows])
    law = LAW[codes(rows[:, :L])] * LAW[codes(rows[:, L:])]
    assert float(weight.mean()) == pytest.approx(float(law[fits].sum()), abs=4.5 * float(weight.std()) / math.sqrt(ROWS))  # fmt: skip


def test_rows_that_the_model_gives_no_probability_are_chosen_only_for_want_of_others() -> None:
    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        law = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(*x.shape, -1)
        law = torch.where((x == V)[..., None], law, torch.nn.functional.one_hot(x, V + 1).float())
        return {"log_x0": some(law.log().clamp(min=-1e6), at)}

    sampler = make(FirstHitting)
    run(sampler, Absorb, rows=20, denoise=denoise, unconditioned=EVERY, matching=matching("bbb"))
    assert sampler.log_weight.tolist() == [-math.inf] * 20
    chosen = choose(torch.tensor([-math.inf, 0.0, -math.inf, -math.inf]), 2, draws=Draws(torch.Generator()))
    assert chosen.index[0] == 1
    assert chosen.index[1] in (2, 3)


def test_particles_of_a_model() -> None:
    engine = sedd_graph.build(ROOT / "blueprints" / "mdlm-tiny.yaml", ["params.depth=1", "data.length=16"], device="cpu", compile="off")  # fmt: skip
    conditions = engine.process.conditions({"forbid": [3, 4], "particles": 4})
    prompt = torch.full((3, 8), -1)
    prompt[:, 0] = torch.tensor([5, 6, 7])
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    request: dict[str, Any] = {"length": 8, "steps": 4, "seed": 1, "prompt": prompt}
    made = engine.generate(sedd_graph.engine.samples.SampleRequest(batch=3, conditions=conditions, **request))
    assert made.rows.shape == (3, 8)
    assert made.rows[:, 0].tolist() == [5, 6, 7]
    assert not bool(((made.rows == 3) | (made.rows == 4)).any())
    assert 1 <= made.facts["effective_particles"] <= 4
    with pytest.raises(UserError, match="no trajectory"):
        engine.sample(3, conditions=conditions, on_step=lambda *_: None, **request)
    for more in (["sample.op=confidence"], ["sample.top_p=0.9"]):
        with pytest.raises(BlueprintError, match="for particles"):
            sedd_graph.build(ROOT / "blueprints" / "mdlm-tiny.yaml", [*more, "sample.particles=4"], device="cpu", compile="off")  # fmt: skip
