"""A schedule that is learned: sound at any parameters, no part of the bound, and of little variance once trained."""

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf
from safetensors.torch import load_file
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.schedules import LogLinear, Polynomial
from sedd_graph_registry.noise.schedules_learned import GAIN, LEAST, Learned
from sedd_graph_registry.objectives.bounds import Nelbo
from torch import Tensor

import sedd_graph
from sedd_graph.component.base import Context
from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import open_data
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.schedule_loss import steadied
from sedd_graph.engine.process import SCHEDULE
from sedd_graph.errors import BlueprintError
from sedd_graph.runs.check import check
from sedd_graph.runs.open import open_run
from sedd_graph.training.loop import train
from sedd_graph.verify.noise import check_schedule
from tests.conftest import ROOT

DOUBLE = torch.float64
LEVELS, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(400))
LOG_LOW = math.log(1e-3)
"""Below this share of masked tokens the second moment is not looked at: under most schedules it has none."""


def made(raw: list[float] | Tensor | None = None, pieces: int = 8) -> Learned:
    schedule = Learned(Learned.Config(pieces=pieces), Context({}))
    if raw is not None:
        with torch.no_grad():
            schedule.raw.copy_(torch.as_tensor(raw))
    return schedule


def drawn(seed: int, spread: float, pieces: int = 8) -> Learned:
    return made(torch.randn(pieces, generator=torch.Generator().manual_seed(seed)) * spread, pieces)


@pytest.mark.parametrize("pieces", [2, 8, 32])
@pytest.mark.parametrize("spread", [0.0, 0.1, 10.0])
def test_it_is_a_schedule_at_any_parameters(pieces: int, spread: float) -> None:
    for seed in range(4):
        schedule = drawn(seed, spread, pieces)
        assert not [c for c in check_schedule(schedule, "quick") if not c.holds]
        t = torch.linspace(0.01, 0.99, 9, dtype=DOUBLE, requires_grad=True)
        (slope,) = torch.autograd.grad(schedule.sigma(t).sum(), t)
        torch.testing.assert_close(schedule.dsigma(t), slope)
        ends = schedule.sigma(torch.tensor([0.0, 1.0])).tolist()
        assert ends == pytest.approx([0.0, math.log(1000)], abs=1e-5)  # whatever the parameters


@pytest.mark.parametrize("t", [1e-6, 0.01, 0.3, 0.7, 0.9999, 1 - 2**-20])
@pytest.mark.parametrize("raw", [[0.0] * 8, [-0.3, 0.2, 0.05, 0.0, 0.1, -0.2, 0.4, -0.9]])
def test_float32_is_the_polynomial_in_50_digits(raw: list[float], t: float) -> None:
    with mpmath.workdps(50):
        weights = [mpmath.exp(GAIN * mpf(torch.tensor(r).item())) for r in raw]
        steps = [(1 - mpf(str(LEAST))) * w / sum(weights) + mpf(str(LEAST)) / 8 for w in weights]

        def sigma(x: mpf) -> mpf:
            # a mixture of the distribution functions of Beta(i + 1, 8 - i)
            grown = sum(p * mpmath.betainc(i + 1, 8 - i, 0, x, regularized=True) for i, p in enumerate(steps))
            return -mpmath.log(1 - (1 - mpf("0.001")) * grown)

        single = torch.tensor([t])
        exact = mpf(single.item())
        wanted = float(sigma(exact)), float(mpmath.diff(sigma, exact, h=mpf("1e-15")))
    schedule = made(raw)
    for at, tolerance in ((single, 2e-5), (single.double(), 1e-7)):  # the parameters are float32
        found = schedule.sigma(at).item(), schedule.dsigma(at).item()
        assert found == pytest.approx(wanted, rel=tolerance)


def test_at_first_it_is_loglinear() -> None:
    t = torch.linspace(0, 1, 11)
    loglinear = LogLinear(LogLinear.Config(), Context({}))
    torch.testing.assert_close(made().sigma(t), loglinear.sigma(t))
    torch.testing.assert_close(made().dsigma(t), loglinear.dsigma(t))


# -- a toy of two positions, enumerated ---------------------------------------------------------------------------------


def losses(kernel: Kernel, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """For all that two clean tokens can be seen as at noise ``sigma`` [s]: chances and losses without dsigma, each [s, x, z].

    The network is a table that looks at both positions and is wrong.
    """
    n, m = kernel.states, kernel.data_tokens
    table = torch.randn(n, n, 2, n, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    table[..., m:] = -1e6
    clean = torch.tensor(list(itertools.product(range(m), repeat=2)))
    seen = torch.tensor(list(itertools.product(range(n), repeat=2)))
    p = kernel.transition_matrix(sigma)
    chance = torch.stack([p[:, seen[:, i][:, None], clean[:, i]] for i in range(2)]).prod(0).transpose(1, 2)
    carried = torch.nn.functional.one_hot(seen, n).to(DOUBLE).log().clamp(min=-1e6)
    said = table[seen[:, 0], seen[:, 1]].log_softmax(-1)
    if kernel.mask is not None:
        said = torch.where((seen == kernel.mask)[..., None], said, carried)
    s, x, z = len(sigma), len(clean), len(seen)
    nats = kernel.nelbo(
        said.expand(s, x, z, 2, n).reshape(-1, 2, n),
        seen.expand(s, x, z, 2).reshape(-1, 2),
        clean[:, None].expand(s, x, z, 2).reshape(-1, 2),
        sigma[:, None, None].expand(s, x, z).reshape(-1),
    )
    possible = chance > 0
    return chance / x, torch.where(possible, nats.sum(-1).reshape(s, x, z), 0.0)


def absorb() -> Absorb:
    return Absorb(Absorb.Config(), Context({"n": 4}))


@torch.no_grad()
def bound(kernel: Kernel, schedule: Schedule, low: float = 1e-9) -> float:
    """Over all of time from ``low`` on, by quadrature."""
    t = low + (1 - low) * (LEVELS + 1) / 2
    chance, nats = losses(kernel, schedule.sigma(t))
    return float((WEIGHTS / 2 * (1 - low) * schedule.dsigma(t) * (chance * nats).sum((1, 2))).sum())


@pytest.mark.parametrize("kernel", [Absorb, Uniform])
def test_no_bound_depends_on_it(kernel: type[Kernel]) -> None:
    noise = kernel(kernel.Config(), Context({"n": 4}))
    wanted = bound(noise, LogLinear(LogLinear.Config(), Context({})))
    for seed, spread in enumerate((0.03, 0.1, 0.3, 5.0)):
        assert bound(noise, drawn(seed, spread)) == pytest.approx(wanted, rel=1e-5)


def moments() -> tuple[Tensor, Tensor, Tensor]:
    """At even levels of log of the masked share: sigma, weights of quadrature over sigma, and E[(nats / dsigma) ** 2]."""
    share = torch.exp(LOG_LOW * (1 - LEVELS) / 2) * (1 - 1e-3)
    sigma = -torch.log1p(-share)
    chance, nats = losses(absorb(), sigma)
    return sigma, WEIGHTS * -LOG_LOW / 2 * share / (1 - share), (chance * nats.square()).sum((1, 2))


@torch.no_grad()
def second_moment(schedule: Schedule) -> float:
    """E[nats ** 2]: the integral over sigma of its moment there times dsigma, at the time when noise is sigma."""
    sigma, weight, moment = moments()
    return float((weight * moment * schedule.dsigma(schedule.time(sigma))).sum())


def test_the_gradient_is_that_of_the_second_moment() -> None:
    """By finite differences of the integral over noise, no draw or autograd in it."""
    schedule, step = drawn(3, 0.05), 1e-3
    wanted = []
    for i in range(8):
        ends = []
        for sign in (1, -1):
            moved = made(schedule.raw.detach() + sign * step * torch.eye(8)[i])
            ends.append(second_moment(moved))
        wanted.append((ends[0] - ends[1]) / (2 * step))
    # the estimate, in the mean over all times and draws: the same levels of noise, each as often as the schedule is there
    sigma, weight, _ = moments()
    with torch.no_grad():
        t = schedule.time(sigma)
        rate = schedule.dsigma(t)
        chance, nats = losses(absorb(), sigma)
        nats = nats * rate[:, None, None]
    often = (weight / rate)[:, None, None] * chance
    flat = steadied(nats.reshape(-1), t[:, None, None].expand_as(nats).reshape(-1), schedule)
    assert not flat.detach().any()  # a gradient, and no value
    (found,) = torch.autograd.grad((often.reshape(-1) * flat).sum(), schedule.raw)
    assert (2 * found).tolist() == pytest.approx(wanted, rel=2e-3, abs=2e-2)


def test_training_makes_the_loss_vary_as_little_as_the_best_does() -> None:
    """From draws, as in training; beside a search over powers of t, and the least that any schedule could have."""
    schedule, kernel, objective = made(), absorb(), Nelbo(Nelbo.Config(), Context({"n": 4}))
    table = torch.randn(4, 4, 2, 4, generator=torch.Generator().manual_seed(0))
    table[..., 3] = -1e6
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([schedule.raw], lr=0.005)
    before = second_moment(schedule)
    for step in range(150):
        x0 = torch.randint(0, 3, (256, 2), generator=generator)
        batch = Batch.of(x0)
        draw = objective.corrupt(batch, kernel, schedule, random=Randomness(generator))
        assert not draw.sigma.requires_grad
        said = table[draw.xt[:, 0], draw.xt[:, 1]].log_softmax(-1)
        nats = objective.loss({"log_x0": said}, draw, batch, kernel, schedule)
        optimizer.param_groups[0]["lr"] = 0.005 * (1 - step / 150)
        optimizer.zero_grad()
        steadied(nats, draw.t, schedule).mean().backward()
        optimizer.step()
    _, weight, moment = moments()
    square = bound(absorb(), made()) ** 2
    least = float((weight * moment.sqrt()).sum()) ** 2 - square
    powers = np.linspace(0.5, 4, 15)
    best = min(second_moment(Polynomial(Polynomial.Config(power=p), Context({}))) - square for p in powers)
    after = second_moment(schedule) - square
    print(f"variance {before - square:.3f} before, {after:.3f} after; powers {best:.3f}, least {least:.3f}")
    assert after < 1.05 * best
    assert after < 0.6 * (before - square)


# -- from a blueprint ---------------------------------------------------------------------------------------------------

LEARNED = ("schedule: {op: loglinear}", "schedule: {op: learned}")


def test_it_is_trained_averaged_kept_and_gone_on_with(small: Callable[..., Path], tmp_path: Path) -> None:
    path = small(LEARNED, ("{op: masked_count}", "{op: nelbo}"), ("warmup: 2", "warmup: 2, ema: 0.9, accumulate: 2"))
    report, name, run = check(path), f"{SCHEDULE}.raw", tmp_path / "run"
    assert isinstance(report.data, DataConfig)
    data = open_data(report.data, root=tmp_path)

    def trained(*, resume: bool) -> None:
        engine = sedd_graph.build(path, device="cpu", compile="off")
        train(engine, data, report.train, run=run, resume=resume, say=lambda text: None)
        if not resume:
            engine.save(run)

    def raw(step: int, file: str = "model") -> Tensor:
        return load_file(run / "checkpoints" / f"step-0000000{step}" / f"{file}.safetensors")[name]

    trained(resume=False)
    assert bool(raw(3).any())
    assert not torch.equal(raw(6), raw(3))
    assert not torch.equal(raw(6), raw(6, "ema"))
    engine = open_run(run, device=torch.device("cpu")).engine
    assert isinstance(engine.process.schedule, Learned)
    assert torch.equal(engine.process.schedule.raw, raw(6, "ema"))
    assert engine.sample(2, 8, steps=3, seed=0).shape == (2, 8)
    wanted = raw(6)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    trained(resume=True)
    assert torch.equal(raw(6), wanted)


def test_the_network_learns_what_it_would_have() -> None:
    """The gradient of the schedule is beside that of the network, not in it."""
    path, sizes = ROOT / "blueprints" / "mdlm-tiny.yaml", ["params.dim=16", "params.heads=2", "params.depth=1", "params.cond=8", "params.dropout=0"]  # fmt: skip
    rows, found = torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(0)), []
    for op in ("loglinear", "learned"):
        changed = [*sizes, "data=null", "train=null", f"process.schedule={{op: {op}}}"]
        engine = sedd_graph.build(path, changed, device="cpu", compile="off")
        torch.manual_seed(5)
        loss = engine.loss(rows)
        loss.mean().backward()
        found.append((loss.detach(), {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}))
    (plain, before), (ours, after) = found
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert set(after) - set(before) == {f"{SCHEDULE}.raw"}
    for name, grad in before.items():
        torch.testing.assert_close(after[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("masked_count", "'learned' learns from losses that are integrals over time, such as nelbo's and score_entropy's; 'masked_count' is not one"),
        ("{op: d3pm, steps: 8}", "'d3pm' is not one: take another schedule, such as loglinear"),
    ],
)  # fmt: skip
def test_an_objective_without_time_is_refused(small: Callable[..., Path], objective: str, said: str) -> None:
    goal = objective if "{" in objective else f"{{op: {objective}}}"
    with pytest.raises(BlueprintError, match=r"process\.schedule") as caught:
        check(small(LEARNED, ("{op: masked_count}", goal)))
    assert said in str(caught.value)


def test_so_is_noise_that_changes_lengths() -> None:
    with pytest.raises(BlueprintError, match="'learned' learns from losses of rows of one length"):
        check(ROOT / "blueprints" / "did-tiny.yaml", ["process.schedule={op: learned}"])
    with pytest.raises(BlueprintError, match="'genmd4' is not one"):
        check(ROOT / "blueprints" / "genmd4-tiny.yaml", ["process.schedule={op: learned}"])
