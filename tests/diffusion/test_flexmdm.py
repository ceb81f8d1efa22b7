"""FlexMDM: closed forms against integrals, targets and bounds against enumeration, draws and samplers against both."""

import itertools
import math
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.strings.flexmdm import FlexLoss, FlexTau, FlexThinning, MaskDelete
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.strings.flexmdm import FlexDraw, FlexTarget
from sedd_graph.diffusion.strings.sampler import StringSettings
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.diffusion.strings.subsequence import embed
from sedd_graph.verify.flexmdm import MASK, FlexTable
from tests.diffusion.strings import batch, strings

DOUBLE = torch.float64


def kernel(pace: float = 1.0, tokens: int = 2) -> MaskDelete:
    return MaskDelete(MaskDelete.Config(pace=pace), Context({"n": tokens + 2}))


def loss(**config: Any) -> FlexLoss:
    return FlexLoss(FlexLoss.Config(**config), Context({"n": 4}))


# -- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pace", [1.0, 1.0 + 1e-7, 2.5, 40.0])
def test_masks_are_those_of_the_papers_two_schedules(pace: float) -> None:
    """Put in by a(s) = s, filled by 1 - b = (1 - a)^pace, given that it is there: an integral over when it was put in."""
    for s in (0.02, 0.3, 0.9, 0.9999):
        near = [u for u in (1 - 2 * (1 - s), 1 - 20 * (1 - s)) if u > 0]  # where large powers are
        exact = quad(lambda u, s=s: ((1 - s) / (1 - u)) ** pace, 0, s, epsabs=1e-13, points=near)[0]
        sigma = torch.tensor([-math.log(s)], dtype=DOUBLE)
        assert float(kernel(pace).masked(sigma)) == pytest.approx(exact, rel=1e-6)
        if pace == 1.0:
            assert exact == pytest.approx(-(1 - s) * math.log(1 - s), rel=1e-9)


def test_steps_are_what_rates_come_to() -> None:
    made = kernel(3.0)
    sigma = torch.linspace(2.0, 0.5, 200_001, dtype=DOUBLE)
    passed = torch.trapezoid(made.weights(sigma), -sigma[:, None], dim=0)
    assert torch.allclose(1 - torch.exp(-passed), made.leap(sigma[:1], sigma[-1:])[0], atol=1e-9)


def test_the_loss_is_the_papers() -> None:
    """a'/(1 - a) = b'/(1 - b) = 1/t where both schedules are linear, in float64 and by loops, at both ends of time too."""
    made, schedule = kernel(tokens=3), LogLinear(LogLinear.Config(), Context({"n": 5}))
    rows = batch([[0, 1, 2, 1, 0, 2, 2, 1]] * 3)
    objective = loss(targets="sampled")
    t = torch.tensor([1e-4, 0.5, 1.0])
    draw = objective.corrupt(rows, made, schedule, random=Randomness(torch.Generator().manual_seed(1)), t=t)
    generator = torch.Generator().manual_seed(2)
    log_gap = torch.randn(3, 9, generator=generator)
    log_x0 = torch.randn(3, 9, 4, generator=generator).log_softmax(-1)
    found = objective.loss({"log_gap": log_gap, "log_x0": log_x0}, draw, made)
    again = made.sample(rows, schedule.sigma(t), random=Randomness(torch.Generator().manual_seed(1)), width=9)
    assert torch.equal(again.tokens, draw.xt)
    assert again.kept is not None
    for row in range(3):
        kept = [i for i, k in enumerate(again.kept[row].tolist()) if k]
        total = 0.0
        for place, (last, here) in enumerate(itertools.pairwise([-1, *kept, 8])):
            g, said = here - last - 1, math.exp(float(log_gap[row, place]))
            total += said - g + (g * math.log(g / said) if g else 0.0)
            if place and int(draw.xt[row, place]) == made.mask:
                total -= float(log_x0[row, place, int(rows.tokens[row, last])])
        assert float(found[row]) == pytest.approx(total / float(t[row]), rel=1e-5)


# -- targets -----------------------------------------------------------------------------------------------------------


def ways(clean: list[int], noisy: list[int], mask: int, spared: int = 0) -> list[tuple[int, ...]]:
    """Every choice of clean tokens that reads as ``noisy``, the first ``spared`` standing for themselves."""
    return [
        chosen
        for chosen in itertools.combinations(range(len(clean)), len(noisy))
        if chosen[:spared] == tuple(range(spared))
        and all((noisy[j] == mask and i >= spared) or clean[i] == noisy[j] for j, i in enumerate(chosen))
    ]


def check_target(
    target: FlexTarget, row: int, found: list[tuple[int, ...]], clean: list[int], noisy: list[int]
) -> None:
    """Means over ``found``."""
    for place in range(len(noisy) + 1):
        gaps = [([*c, len(clean)][place] - [-1, *c][place] - 1) for c in found]
        assert float(target.missing[row, place]) == pytest.approx(sum(gaps) / len(gaps), abs=1e-6)
    for place, state in enumerate(noisy):
        for token in set(clean):
            share = sum(clean[c[place]] == token for c in found) / len(found) if state == 3 else 0.0
            here = target.symbols[row, :, place + 1] == token
            assert float(target.filled[row, here, place + 1].sum()) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("spared", [0, 2])
def test_targets_are_means_over_all_ways(spared: int) -> None:
    generator = torch.Generator().manual_seed(4 + spared)
    pairs = []
    for _ in range(12):
        clean = torch.randint(
            0, 3, (int(torch.randint(spared, 9, (), generator=generator)),), generator=generator
        ).tolist()
        keep = [i for i in range(len(clean)) if i < spared or float(torch.rand((), generator=generator)) < 0.6]
        hide = [i >= spared and float(torch.rand((), generator=generator)) < 0.5 for i in keep]
        pairs.append((clean, [3 if hidden else clean[i] for i, hidden in zip(keep, hide, strict=True)]))
    made = kernel(tokens=3)
    target = made.target(batch([c for c, _ in pairs], spared), strings([x for _, x in pairs], made.start))
    for row, (clean, noisy) in enumerate(pairs):
        check_target(target, row, ways(clean, noisy, made.mask, spared), clean, noisy)


def test_a_thousand_tokens_do_not_overflow() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 2, (1024,), generator=generator)
    noisy = torch.where(torch.rand(1024, generator=generator) < 0.5, 2, clean)[
        torch.rand(1024, generator=generator) < 0.5
    ]
    fits = (clean[:, None] == noisy) | (noisy == 2)
    found = embed(fits[None], torch.tensor([1024]), torch.tensor([len(noisy)]))
    assert float(found.missing.sum()) == pytest.approx(1024 - len(noisy), abs=1e-6)
    assert torch.allclose(found.stands.sum(1), torch.ones(1, len(noisy)), atol=1e-5)
    # nothing but masks: any of the C(n, m) choices
    every = embed(torch.ones(1, 1024, 512, dtype=torch.bool), torch.tensor([1024]), torch.tensor([512]))
    assert float(every.log_count) == pytest.approx(math.log(math.comb(1024, 512)), rel=1e-12)


def test_sampled_targets_have_the_mean_of_the_exact_ones() -> None:
    made, rows = kernel(), batch([[0, 1, 1, 0]] * 20_000)
    level = torch.full((len(rows),), 0.7)
    noisy = made.sample(rows, level, random=Randomness(torch.Generator().manual_seed(0)), width=5)
    drawn, exact = made.sampled_target(rows, noisy), made.target(rows, noisy)

    def dense(target: FlexTarget) -> Tensor:
        found = torch.zeros(len(rows), 5, 3)
        return found.scatter_add(2, target.symbols.transpose(1, 2), target.filled.transpose(1, 2))

    for code in ([0, MASK], [MASK], [MASK, 0], [MASK, MASK], []):
        same = (noisy.lengths == len(code)) & (noisy.tokens[:, 1 : 1 + len(code)] == torch.tensor(code)).all(-1)
        slack = 5 / math.sqrt(int(same.sum()))
        assert torch.allclose(drawn.missing[same].mean(0), exact.missing[same][0], atol=slack)
        assert torch.allclose(dense(drawn)[same].mean(0), dense(exact)[same][0], atol=slack)


def test_rows_do_not_depend_on_how_a_batch_is_split() -> None:
    rows, made = batch([[0, 1, 1, 0], [1, 1], [0], [1, 0, 1]]), kernel()
    level = torch.full((4,), 0.7)

    def drawn(start: int, stop: int) -> Tensor:
        random = Randomness(torch.Generator().manual_seed(5), start=start, total=4)
        return made.sample(rows.rows(start, stop), level[start:stop], random=random, width=5).tokens

    assert torch.equal(drawn(0, 4), torch.cat([drawn(0, 2), drawn(2, 4)]))


# -- bounds ------------------------------------------------------------------------------------------------------------


class Pushed(FlexTable):
    """The same, whose network is wrong: what it says is moved by ``push`` [s, w] and ``tilt`` [s, w, v + 1]."""

    def __init__(self, made: MaskDelete, scale: float) -> None:
        super().__init__(made)
        generator = torch.Generator().manual_seed(2)
        self.push = scale * torch.randn(len(self.strings), 4, generator=generator)
        self.tilt = scale * torch.randn(len(self.strings), 4, 3, generator=generator)

    def outputs(self, strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        found, index = super().outputs(strings, sigma), self.number(strings)
        return {
            "log_gap": found["log_gap"] + self.push[index],
            "log_x0": (found["log_x0"] + self.tilt[index]).log_softmax(-1),
        }


def integral(toy: FlexTable, *, sampled: bool = False) -> Tensor:
    """The bound of each clean string, float64 [s], by quadrature over all noise and all noisy strings. With ``sampled``
    targets the mean is over ways, too: what the paper's loss comes to."""
    grid = torch.linspace(-14.0, 14.0, 113, dtype=DOUBLE)
    sigma = torch.nn.functional.softplus(grid)
    x0, s = toy.ways.nonzero().unbind(1)
    rows = toy.rows(s)
    target = toy.kernel.target(toy.batch(x0), rows)
    constant = target.constant.double()
    if sampled:
        constant = torch.stack([more_gaps(toy)[x0, s], torch.zeros(len(s), dtype=DOUBLE)], -1)
    objective, total = loss(), torch.zeros(len(toy.strings), dtype=DOUBLE)
    eye = torch.eye(len(toy.strings), dtype=DOUBLE)
    law = torch.stack([toy.at(sigma, eye[i]) for i in range(len(eye))], 1)
    for level, value in enumerate(sigma):
        pace = toy.kernel.weights(value.expand(len(s)))
        draw = FlexDraw(
            rows.tokens,
            rows.attend,
            value.expand(len(s)),
            target.missing,
            target.filled,
            target.symbols,
            pace.float(),
            (pace * constant).sum(-1).float(),
        )
        nats = objective.loss(toy.outputs(rows, value.expand(len(s))), draw, toy.kernel).double()
        edge = 0.5 if level in (0, len(grid) - 1) else 1.0
        share = edge * float(grid[1] - grid[0]) * -torch.expm1(-value)  # d sigma by that of the grid
        total.index_add_(0, x0, share * law[level, x0, s] * nats)
    return total


def more_gaps(toy: FlexTable) -> Tensor:
    """The mean over ways of g log g - g, summed over gaps, [x0, s]."""
    found = torch.zeros_like(toy.ways)
    for x0, s in toy.ways.nonzero().tolist():
        every = ways(list(toy.strings[x0]), list(toy.strings[s]), MASK)
        for c in every:
            gaps = [b - a - 1 for a, b in itertools.pairwise([-1, *c, len(toy.strings[x0])])]
            found[x0, s] += sum(g * math.log(g) - g if g else 0.0 for g in gaps) / len(every)
    return found


def test_the_bound_is_tight_and_the_papers_is_not() -> None:
    toy = FlexTable(kernel())
    exact, aligned = (float((toy.law * integral(toy, sampled=sampled)).sum()) for sampled in (False, True))
    assert exact == pytest.approx(toy.entropy, abs=2e-3)
    assert toy.entropy + 0.5 < aligned < toy.entropy + 1.5


def test_the_bound_of_a_wrong_model_is_above_its_nll() -> None:
    toy = Pushed(kernel(2.0), 0.3)
    grid = torch.linspace(14.0, -14.0, 449, dtype=DOUBLE)
    sigma, middle = (torch.nn.functional.softplus(x) for x in (grid, (grid[1:] + grid[:-1]) / 2))
    law = torch.nn.functional.one_hot(torch.tensor(0), len(toy.strings)).double()
    for step in torch.linalg.matrix_exp(toy.generator(middle) * (sigma[:-1] - sigma[1:])[:, None, None]):
        law = step @ law
    support = toy.law > 0
    gap = (integral(toy) + law.log())[support]
    assert bool((gap > -2e-3).all())
    assert float(gap.max()) > 0.01  # and the push is felt


def test_the_loss_is_least_at_the_enumerated_means() -> None:
    toy, objective = FlexTable(kernel(2.0)), loss()
    x0, s = toy.ways.nonzero().unbind(1)
    rows, level = toy.rows(s), torch.full((len(s),), 0.7, dtype=DOUBLE)
    target = toy.kernel.target(toy.batch(x0), rows)
    eye = torch.eye(len(toy.strings), dtype=DOUBLE)
    chance = toy.law[x0] * torch.stack([toy.at(level[:1], eye[i])[0] for i in range(len(eye))])[x0, s]
    draw = FlexDraw(
        rows.tokens, rows.attend, level, target.missing, target.filled, target.symbols, torch.ones(len(s), 2), level * 0
    )
    every = toy.rows(torch.arange(len(toy.strings)))
    best = toy.outputs(every, torch.full((len(toy.strings),), 0.7))

    def gradients(moved: float) -> float:
        gap, logits = (
            (best[name].clamp(min=-60) + moved).requires_grad_()
            if name == "log_gap"
            else best[name].clone().requires_grad_()
            for name in ("log_gap", "log_x0")
        )
        logits.data[..., 0] += moved
        nats = objective.loss({"log_gap": gap[s], "log_x0": logits.log_softmax(-1)[s]}, draw, toy.kernel)
        found = torch.autograd.grad((chance * nats).sum(), (gap, logits))
        return max(float(g.abs().max()) for g in found)

    assert gradients(0.0) < 1e-6
    assert gradients(0.3) > 1e-3


# -- samplers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [FlexTau, FlexThinning])
def test_no_mask_comes_out_and_what_is_given_stays(sampler: type[FlexTau] | type[FlexThinning]) -> None:
    """A network that wants more than there is room for, and a token that is forbidden."""
    made, schedule = kernel(tokens=3), LogLinear(LogLinear.Config(), Context({"n": 5}))
    given = strings([[0, 2]] * 200, made.start)
    shut = torch.tensor([True, False, True]).expand(200, 3)
    allowed = torch.tensor([True, True, False])
    runner = sampler(sampler.Config(), Context({"n": 5}))

    def rates(strings: Strings, sigma: Tensor) -> dict[str, Tensor]:
        shape = strings.tokens.shape
        # nearly sure of the forbidden token
        log_x0 = torch.tensor([0.0, 0.0, 30.0, -1e6]).log_softmax(-1).expand(*shape, 4)
        return {"log_gap": torch.full(shape, 1.0), "log_x0": log_x0}

    out = runner.run(
        rates,
        given,
        StringSettings(
            fixed=torch.ones(200, 3, dtype=torch.bool),
            shut=shut,
            longest=4,
            kernel=made,
            schedule=schedule,
            generator=torch.Generator().manual_seed(0),
            allowed=allowed,
        ),
    )
    inside = out.tokens[:, 1:]
    ends = out.lengths
    assert bool((ends == 4).all())
    assert bool((inside[:, 0] == 0).all())
    assert bool((inside.gather(1, ends[:, None] - 1) == 2).all())
    middle = (torch.arange(inside.shape[1]) > 0) & (torch.arange(inside.shape[1]) < ends[:, None] - 1)
    assert set(inside[middle].tolist()) == {0, 1}
    if sampler is FlexTau:
        assert runner.cut > 0
