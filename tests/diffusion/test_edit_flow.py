"""Edit Flows: columns against plain Python, rates, bounds and gradients against enumeration, and deletion where noise is empty."""

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sedd_graph_registry.noise.schedules import Cubic
from sedd_graph_registry.strings.birth_death import Delete
from sedd_graph_registry.strings.edit_flow import ColumnDraw, EditFlow, EditFlowLoss
from sedd_graph_registry.strings.objectives import DISE, RatioDraw
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.strings.columns import BLANK, Remaining, align_optimal, align_padded, partway
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.edit_flow import EditFlowTable

CONTEXT = Context({"n": 3})
LAW = {"frequencies": (0.6, 0.4), "smoothing": 1e-6}
LOSS = EditFlowLoss(EditFlowLoss.Config(), CONTEXT)


def kernel(mean_length: float = 1.0, longest: int | None = 2, **config: Any) -> EditFlow:
    return EditFlow(EditFlow.Config(**LAW, mean_length=mean_length, longest=longest, **config), CONTEXT)


def padded(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[BLANK] * (width - len(row))] for row in rows]).view(len(rows), width)


def spelled(rows: Tensor) -> list[list[int]]:
    return [[v for v in row if v != BLANK] for row in rows.tolist()]


def texts(strings: Strings) -> list[list[int]]:
    return [row[1 : n + 1] for row, n in zip(strings.tokens.tolist(), strings.lengths.tolist(), strict=True)]


def random_pairs(rows: int, longest: int) -> tuple[list[list[int]], list[list[int]]]:
    g = torch.Generator().manual_seed(5)
    return tuple(  # type: ignore[return-value]
        [
            torch.randint(0, 3, (int(torch.randint(0, longest + 1, (), generator=g)),), generator=g).tolist()
            for _ in range(rows)
        ]
        for _ in range(2)
    )


# -- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", [align_optimal, align_padded])
def test_columns_spell_both_strings_with_as_few_edits_as_said(align: Any) -> None:
    noise, clean = random_pairs(60, 8)
    columns = align(padded(noise, 8), padded(clean, 8))
    assert spelled(columns.noise) == noise
    assert spelled(columns.clean) == clean

    @functools.cache
    def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    edits = (columns.noise != columns.clean).sum(-1).tolist()
    least = [distance(tuple(a), tuple(b)) for a, b in zip(noise, clean, strict=True)]
    by_place = [sum(x != y for x, y in itertools.zip_longest(a, b)) for a, b in zip(noise, clean, strict=True)]
    assert edits == (least if align is align_optimal else by_place)
    assert least != by_place


def test_nothing_has_no_columns() -> None:
    empty = torch.zeros(2, 0, dtype=torch.int64)
    strings, left = partway(align_optimal(empty, empty), empty.bool(), start=3)
    assert strings.tokens.tolist() == [[3], [3]]
    assert left.place.shape == (2, 0)


def test_what_is_left_to_do_makes_the_text() -> None:
    """The edits, made by plain Python on the strings that are there."""
    noise, clean = random_pairs(80, 6)
    columns = align_optimal(padded(noise, 6), padded(clean, 6))
    moved = torch.rand(columns.noise.shape, generator=torch.Generator().manual_seed(6)) < 0.5
    strings, left = partway(columns, moved, start=3)
    kinds = [0, 0, 0]
    for row, text in enumerate(texts(strings)):
        done: list[list[int]] = [[], *([v] for v in text)]  # by position, what stands there in the end and what follows
        for column in range(columns.noise.shape[1]):
            place, token = int(left.place[row, column]), int(left.token[row, column])
            which = [bool(x[row, column]) for x in (left.insert, left.delete, left.substitute)]
            kinds = [a + b for a, b in zip(kinds, which, strict=True)]
            if which[0]:
                done[place].append(token)
            elif which[1]:
                done[place].remove(text[place - 1])
            elif which[2]:
                done[place][done[place].index(text[place - 1])] = token
        assert [v for part in done for v in part] == clean[row]
    assert min(kinds) > 20


def test_what_does_not_fit_is_counted_and_its_edits_are_left_out() -> None:
    columns = align_padded(padded([[0, 1, 2, 0]], 4), padded([[1, 1, 0]], 4))
    still = torch.zeros(1, 4, dtype=torch.bool)
    strings, left = partway(columns, still, start=3, width=3)
    assert strings.tokens.tolist() == [[3, 0, 1]]
    assert strings.cut == 2
    assert [int(x.sum()) for x in left[2:]] == [0, 0, 1]  # the third is cut off with the token that it replaces
    assert int(left.place.max()) < 3


def test_rows_do_not_depend_on_how_a_batch_is_split() -> None:
    batch = Batch.of(torch.randint(0, 2, (6, 5), generator=torch.Generator().manual_seed(1)))
    made, sigma = kernel(longest=None), torch.linspace(0.1, 3, 6)
    whole, _ = made.sample(batch, sigma, random=Randomness(torch.Generator().manual_seed(2)), width=9)
    for start in (0, 3):
        part = Batch(*(x[start : start + 3] for x in (batch.tokens, batch.attend, batch.corrupt, batch.loss)))
        random = Randomness(torch.Generator().manual_seed(2), start=start, total=6)
        found, _ = made.sample(part, sigma[start : start + 3], random=random, width=9)
        assert torch.equal(found.tokens, whole.tokens[start : start + 3])


def test_noise_has_its_law() -> None:
    found, lengths = kernel(2.0, 4).noise(40_000, longest=None, random=Randomness(torch.Generator().manual_seed(3)))
    share = torch.tensor([(2 / 3) ** k for k in range(5)])
    assert torch.allclose(torch.bincount(lengths, minlength=5) / 40_000, share / share.sum(), atol=0.01)
    assert float((found == 0).sum() / (found != BLANK).sum()) == pytest.approx(0.6, abs=0.01)
    fewer = kernel(2.0, 4).prior(1000, longest=2, generator=torch.Generator().manual_seed(4), allowed=torch.tensor([False, True]))  # fmt: skip
    assert int(fewer.lengths.max()) == 2
    assert set(itertools.chain(*texts(fewer))) == {1}


# -- rates and bounds, enumerated --------------------------------------------------------------------------------------


def rates(toy: EditFlowTable, sigma: float, push: dict[str, Tensor] | None = None) -> Tensor:
    """The generator of the reverse process at ``sigma`` per unit of kappa, [s, s], of a perfect network or one whose logs are
    off by ``push``; edits are made on tuples."""
    level = torch.tensor([sigma], dtype=torch.float64)
    law, index = toy.at(level)[0], {s: i for i, s in enumerate(toy.strings)}
    made = torch.zeros(len(law), len(law), dtype=torch.float64)
    for kind, name in enumerate(toy.kernel.reads):
        said = toy.expected(name, level)[0]
        for case in said.nonzero().tolist():
            i, place, *token = case
            s, before = toy.strings[i], place - (kind > 0)
            to = index[(*s[:before], *token, *s[before + (kind > 0) :])]
            factor = 1.0 if push is None else float(push[name][tuple(case)].exp())
            made[to, i] += float(said[tuple(case)] / law[i]) * factor / -np.expm1(-sigma)
    return made - torch.diag(made.sum(0))


def generated(toy: EditFlowTable, steps: int, push: dict[str, Tensor] | None = None) -> Tensor:
    """The law that these rates make of noise: the master equation from kappa = 0, on a clock of -log(1 - kappa)."""
    law, clock = toy.first.clone(), torch.linspace(0, 12, steps + 1, dtype=torch.float64)
    for now, after in itertools.pairwise(clock):
        middle = float((now + after) / 2)
        sigma = -np.log(-np.expm1(-middle))
        law = torch.matrix_exp(float(after - now) * np.exp(-middle) * rates(toy, float(sigma), push)) @ law
    return law


def test_the_rates_carry_noise_to_text() -> None:
    toy = EditFlowTable(kernel())
    coarse, fine = generated(toy, 48), generated(toy, 96)
    found = (4 * fine - coarse) / 3  # errors of the middle of a step fall as its square
    assert float((found - toy.law).abs().max()) < 2e-5


def nats(toy: EditFlowTable, sigma: float, push: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of every case at ``sigma`` per unit of kappa, and the chance of the case, both [e]."""
    level = torch.full((len(toy.pairs),), sigma, dtype=torch.float64)
    outputs = toy.outputs(toy.there, level)
    width = toy.there.tokens.shape[1]
    outputs = {k: v + push[k][toy.here, :width].float() for k, v in outputs.items()}
    weights = (toy.kernel.weights(level) * level.exp()[:, None]).float()
    draw = ColumnDraw(toy.there.tokens, toy.there.attend, level.float(), left=toy.left, weights=weights)
    chance = toy.pairs * toy.basis(level[:1])[0, toy.moved]
    return LOSS.loss(outputs, draw, toy.kernel).double(), chance


def bound(toy: EditFlowTable, push: dict[str, Tensor]) -> Tensor:
    """The bound of each string of the toy, [s]."""
    clean = torch.tensor([b for _, b in toy.ends]).repeat_interleave(len(toy.pairs) // len(toy.ends))
    total = torch.zeros(len(toy.strings), dtype=torch.float64)
    for node, weight in zip(*np.polynomial.legendre.leggauss(24), strict=True):
        u = (node + 1) / 2
        loss, chance = nats(toy, -float(np.log1p(-(u**3))), push)
        total.index_add_(0, clean, loss * chance * weight / 2 * 3 * u**2)
    return total / toy.law.clamp(min=1e-300)


def pushes(toy: EditFlowTable, size: float) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(8)
    return {k: size * torch.randn(v.shape[:1] + v.shape[2:], generator=g, dtype=torch.float64) for k, v in toy.todo.items()}  # fmt: skip


@pytest.mark.parametrize("mean_length", [0.0, 1.0])
def test_the_bound_holds_for_a_wrong_network_and_is_tight_where_noise_is_empty(mean_length: float) -> None:
    toy = EditFlowTable(kernel(mean_length))
    some = toy.law > 0
    perfect = float((toy.law * bound(toy, pushes(toy, 0.0))).sum())
    assert perfect == pytest.approx(toy.bound(0.0), abs=2e-3)
    if mean_length:
        assert perfect > toy.entropy + 0.2
    else:
        assert perfect == pytest.approx(toy.entropy, abs=1e-3)
    wrong = pushes(toy, 0.3)
    gap = (bound(toy, wrong) + generated(toy, 48, wrong).log())[some]
    assert bool((gap > -2e-3).all())
    assert float(gap.max()) > 0.02


def test_the_enumerated_rates_are_the_minimum() -> None:
    toy = EditFlowTable(kernel())
    push = {k: v.requires_grad_() for k, v in pushes(toy, 0.0).items()}
    for size in (0.0, 0.3):
        loss, chance = nats(toy, 0.7, {k: v + size for k, v in push.items()})
        slopes = torch.autograd.grad((loss * chance).sum(), list(push.values()))
        worst = max(float(s.abs().max()) for s in slopes)
        assert (worst < 1e-6) if size == 0.0 else (worst > 1e-3)


def test_with_empty_noise_it_is_deletion() -> None:
    """The same bound as DISE's of exact ratios, for any network: along a path the logs of the ratios add up to 0."""
    toy = EditFlowTable(kernel(0.0))
    push, delete, dise = pushes(toy, 0.5), Delete(Delete.Config(), CONTEXT), DISE(DISE.Config(), CONTEXT)
    mine, each = bound(toy, push), len(toy.pairs) // len(toy.ends)
    clean = torch.tensor([b for _, b in toy.ends]).repeat_interleave(each)
    other, width = torch.zeros_like(mine), toy.there.tokens.shape[1]
    for node, weight in zip(*np.polynomial.legendre.leggauss(24), strict=True):
        u = (node + 1) / 2
        sigma = torch.full((len(toy.pairs),), -float(np.log1p(-(u**3))), dtype=torch.float64)
        target = delete.target(toy.batch(clean), toy.there, sigma)
        weights = delete.weights(sigma) * sigma.exp()[:, None]
        draw = RatioDraw(
            toy.there.tokens,
            toy.there.attend,
            sigma.float(),
            target.missing,
            target.symbols,
            target.fresh,
            target.spurious,
            weights.float(),
            (weights * target.constant).sum(-1).float(),
        )
        said = toy.outputs(toy.there, sigma)["log_insert"] + push["log_insert"][toy.here, :width].float()
        chance = toy.pairs * toy.basis(sigma[:1])[0, toy.moved]
        loss = dise.loss({"log_insert": said}, draw, delete).double()
        other.index_add_(0, clean, loss * chance * weight / 2 * 3 * u**2)
    some = toy.law > 0
    assert torch.allclose(mine[some], (other / toy.law.clamp(min=1e-300))[some], atol=2e-3)


# -- the objective -----------------------------------------------------------------------------------------------------


def test_training_holds_weights_down_and_bounds_do_not() -> None:
    batch, schedule = Batch.of(torch.zeros(256, 3, dtype=torch.int64)), Cubic(Cubic.Config(), CONTEXT)
    made = kernel()
    random = Randomness(torch.Generator().manual_seed(0))
    free = EditFlowLoss(EditFlowLoss.Config(max_weight=None), CONTEXT)
    held = [float(o.corrupt(batch, made, schedule, random=random).weights.max()) for o in (LOSS, free)]
    assert held[0] <= 20 < 100 < held[1]
    # 1/t is above 20 below t = 0.05, and a little less with the cube
    assert LOSS.capped(made, schedule) == pytest.approx(0.048, abs=2e-3)
    assert free.capped(made, schedule) == 0.0
    assert float(LOSS.bound_draw(batch, made, schedule, random=random).weights.max()) > 20
    t = torch.full((256,), 0.5)
    there = LOSS.corrupt(batch, made, schedule, random=random, t=t)
    # kappa = (1 - t)^3 at t = 1/2: kappa' / (1 - kappa) = 3/4 / (7/8)
    assert there.weights[0].tolist() == pytest.approx([6 / 7] * 3, rel=1e-3)


def test_a_loss_by_hand() -> None:
    """One row, a b with a gap to fill, one token to go and one to change: w (sum u - edits - sum log u)."""
    left = Remaining(
        torch.tensor([[0, 1, 2]]), torch.tensor([[1, 0, 0]]), *(torch.tensor([[i == k for i in range(3)]]) for k in range(3))
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    log_u = {"log_insert": torch.randn(1, 4, 2, generator=g), "log_delete": torch.randn(1, 4, generator=g), "log_substitute": torch.randn(1, 4, 2, generator=g)}  # fmt: skip
    draw = ColumnDraw(
        torch.tensor([[2, 0, 1, 2]]), torch.tensor([[True, True, True, False]]), torch.ones(1), left=left, weights=torch.full((1, 3), 3.0)
    )  # fmt: skip
    i, d, s = log_u["log_insert"][0], log_u["log_delete"][0], log_u["log_substitute"][0]
    total = i[:3].exp().sum() + d[1:3].exp().sum() + s[1:3].exp().sum()
    by_hand = 3 * (total - 3 - i[0, 1] - d[1] - s[2, 0])
    assert float(LOSS.loss(log_u, draw, kernel())) == pytest.approx(float(by_hand), rel=1e-5)
