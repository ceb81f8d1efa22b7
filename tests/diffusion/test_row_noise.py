"""Rows with seeds of their own: the same alone, in any batch and with padding on any side, and with the right law."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.sampling._unmasking import MEASURES, TIED, entropy_of, in_order
from sedd_graph_registry.sampling.exact import FirstHitting, Uniformization
from sedd_graph_registry.sampling.masked import Confidence
from sedd_graph_registry.sampling.steps import Analytic, Ancestral
from torch import Tensor

from sedd_graph.diffusion.tokens.row_noise import RowNoise
from sedd_graph.diffusion.tokens.walk import WalkSettings
from tests.diffusion.test_noise_tape import ANY, MASKED, SCHEDULE, STATES, TABLE, each, kernel_of
from tests.diffusion.test_samplers import FLOOR, L, distance, make, perfect, world

CPU, LENGTHS = torch.device("cpu"), torch.tensor([9, 4, 7, 9, 1, 6])
SEEDS = torch.arange(len(LENGTHS)) + 77


def network(kernel: Any, visible: Tensor) -> Callable[..., dict[str, Tensor]]:
    """A network whose prediction depends on all visible tokens of the row, and on places counted without padding."""

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        seen = visible[rows] if len(visible) > 1 else visible.expand(len(x), -1)
        places = (seen.cumsum(-1) - 1).clamp(min=0)
        own = TABLE[x, places].double()
        logits = own + (own * seen[..., None]).sum(1, keepdim=True) / seen.sum(1)[:, None, None]
        if kernel.mask is not None:
            logits[..., kernel.mask] = -torch.inf
        found = logits.log_softmax(-1).clamp(min=-1e6)
        if kernel.carries_over:
            carried = torch.where(torch.nn.functional.one_hot(x, kernel.states) > 0, 0.0, -1e6).double()
            found = torch.where((x == kernel.mask)[..., None], found, carried)
        return {"log_x0": found if at is None else found.gather(1, at[..., None].expand(-1, -1, STATES))}

    return denoise


def drawn(sampler: Any, kernel: Any, seeds: Tensor, visible: Tensor) -> list[list[int]]:
    """The visible tokens of each row, of which the first is given where a row has several."""
    allowed = torch.arange(kernel.states) != 2
    if kernel.mask is not None:
        allowed[kernel.mask] = False
    steps = None if sampler.steps is None else 5
    noise = RowNoise.of(kernel, seeds, visible, allowed=allowed, device=CPU)
    x = noise.prepare(kernel, SCHEDULE, sampler.times(kernel, steps or 1), visible.shape[1])
    first = (visible.cumsum(-1) == 1) & visible & (visible.sum(-1, keepdim=True) > 1)
    x = torch.where(first, 4, x)
    settings = WalkSettings(
        free=visible & ~first,
        kernel=kernel,
        schedule=SCHEDULE,
        generator=noise.generator,
        draws=noise,
        allowed=allowed,
    )
    out = sampler.run(network(kernel, visible), x, settings, steps=steps)
    return [row[own].tolist() for row, own in zip(out, visible, strict=True)]


@pytest.mark.parametrize(
    ("sampler", "kernel"),
    [*(each(s, Absorb) for s in MASKED), *(each(s, Uniform) for s in ANY)],
)
def test_a_row_depends_neither_on_its_neighbours_nor_on_padding(sampler: Any, kernel: Any) -> None:
    check_alone(make(sampler), kernel_of(kernel), 3 if sampler is Uniformization else len(SEEDS))


def check_alone(made: Any, kernel: Any, count: int = len(SEEDS)) -> list[list[int]]:
    """Return ``count`` rows that are drawn each by itself, and assert that they are the same in batches with padding."""
    seeds, lengths = SEEDS[:count], LENGTHS[:count]
    right = torch.arange(int(lengths.max())) < lengths[:, None]
    alone = [
        drawn(made, kernel, seed[None], torch.ones(1, int(length), dtype=torch.bool))[0]
        for seed, length in zip(seeds, lengths, strict=True)
    ]
    assert drawn(made, kernel, seeds, right) == alone
    assert drawn(made, kernel, seeds, right.flip(1)) == alone  # padding on the left
    order = torch.tensor([2, 0, 1] if count == 3 else [3, 5, 1, 0, 4, 2])
    assert drawn(made, kernel, seeds[order], right[order]) == [alone[i] for i in order]
    assert all(2 not in row for row in alone)
    other = drawn(made, kernel, seeds + 1000, right)
    assert sum(a != b for a, b in zip(alone, other, strict=True)) >= count - 2  # the seed is what decides
    return alone


@pytest.mark.parametrize(
    ("sampler", "kernel"),
    [(FirstHitting, Absorb), (Confidence, Absorb), (Ancestral, Absorb), (Analytic, Uniform)],
    ids=lambda cls: cls.__name__,
)
def test_rows_have_the_law_of_the_data(sampler: Any, kernel: Any) -> None:
    config = {"by": "random", "steps": 3} if sampler is Confidence else {}
    made, (k, schedule) = make(sampler, **config), world(kernel)
    rows = 20_000
    visible, allowed = torch.ones(rows, L, dtype=torch.bool), torch.arange(k.states) != k.mask
    seeds = torch.arange(rows) * 7919
    # the prior of each row has a generator of its own: here one for all, which is faster
    start = k.prior(rows, L, generator=torch.Generator().manual_seed(3), allowed=None)
    noise = RowNoise(seeds, visible, device=CPU, start=start)
    steps = None if made.steps is None else made.steps if config else 48
    x = noise.prepare(k, schedule, made.times(k, steps or 1), L)
    free = torch.ones_like(visible)
    settings = WalkSettings(
        free=free, kernel=k, schedule=schedule, generator=noise.generator, draws=noise, allowed=allowed
    )
    out = made.run(perfect(k, schedule), x, settings, steps=None if config else steps)
    assert distance(out) < 1.3 * FLOOR + (0 if sampler in (FirstHitting, Confidence) else 1.5 / 48)


def test_the_prior_of_each_row_has_its_own_seed() -> None:
    k = kernel_of(Uniform)
    visible = torch.ones(1500, 3, dtype=torch.bool)
    allowed = torch.ones(STATES, dtype=torch.bool)
    start = RowNoise.of(k, torch.arange(1500), visible, allowed=allowed, device=CPU).start
    assert start is not None
    counts = torch.stack([torch.bincount(start[:, i], minlength=STATES) for i in range(3)]).double()
    assert float(((counts - 1500 / STATES) ** 2 / (1500 / STATES)).sum()) < 60  # chi-square, 24 degrees of freedom


def test_each_row_is_noised_with_its_own_seed() -> None:
    k, rows = kernel_of(Uniform), 1500
    visible = torch.ones(rows, 2, dtype=torch.bool)
    noise = RowNoise(torch.arange(rows) + 5, visible, device=CPU, start=torch.zeros(rows, 2, dtype=torch.int64))
    noise.prepare(k, SCHEDULE, None, 2)
    sigma = torch.full((rows,), 0.8)
    x = torch.full((rows, 2), 3)
    out = noise.noisy(k, x, sigma, corrupt=torch.tensor([[True, False]]).expand(rows, 2))
    assert bool((out[:, 1] == 3).all())
    law = k.transition_matrix(torch.tensor(0.8, dtype=torch.float64))[:, 3] * rows
    assert float(((torch.bincount(out[:, 0], minlength=STATES) - law) ** 2 / law).sum()) < 30  # chi-square, 8 degrees
    again = noise.noisy(k, x, sigma, corrupt=visible)  # another call, another draw
    assert 0.3 < float((again[:, 0] != out[:, 0]).double().mean()) < 0.8


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_measures_of_confidence_order_positions_as_their_names_say(name: str) -> None:
    """Compared with float64 at ordinary predictions, and resolved by float32 where 1 - p is far below its rounding."""
    generator = torch.Generator().manual_seed(0)
    logits = (
        torch.randn(500, 9, generator=generator, dtype=torch.float64) * torch.rand(500, 1, generator=generator) * 20
    )
    clean = logits.softmax(-1)
    tokens = clean.multinomial(1, generator=generator)[:, 0]
    best, index = clean.topk(2, dim=-1)
    rest = clean.scatter(-1, index[:, :1], 0.0).sum(-1)  # 1 - p of the most likely token
    expected = {
        "probability": -(1 - clean.gather(-1, tokens[:, None])[:, 0]),
        "margin": -(rest + best[:, 1]),
        "entropy": torch.xlogy(clean, clean).sum(-1) + best[:, 0] * (torch.log1p(-rest) - best[:, 0].log()),
    }[name]
    found = MEASURES[name](clean.float(), tokens)
    rough = MEASURES[name](clean.float().nextafter(torch.ones(())), tokens)
    assert (found - rough).abs().max() < TIED / 4  # rounding does not reach the tolerance
    order = found.argsort()
    apart = (found[order].diff() > TIED) & (expected[order].diff().abs() > 1e-15)
    assert (expected[order].diff()[apart] > 0).all()
    assert apart.sum() > 250


def test_ties_of_confidence_are_broken_by_position() -> None:
    rank = torch.tensor([[0.5, 0.5 - TIED / 9, torch.inf, -2.0, 0.5 + TIED / 9, torch.inf, 0.6]], dtype=torch.float64)
    assert in_order(rank).tolist() == [[1, 1, 3, 0, 1, 3, 2]]
    assert in_order(rank[:, :1]).tolist() == [[0]]
    even = torch.full((1, 4), 0.25)
    assert torch.allclose(entropy_of(even, torch.zeros(1, dtype=torch.int64)), torch.tensor(4.0).log().double())
