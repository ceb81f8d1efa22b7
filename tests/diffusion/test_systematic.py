"""``positions: systematic``: the positions that change are spread over the row, each with its own probability."""

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.masking import Power
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.noise.steps import Steps
from sedd_graph_registry.sampling.masked import ReMDM
from sedd_graph_registry.sampling.steps import Analytic, Ancestral, Euler, PredictorCorrector, Psi
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.draws import systematic
from sedd_graph.diffusion.tokens.noise_tape import NoiseTape
from sedd_graph.diffusion.tokens.row_noise import RowNoise
from tests.diffusion.test_noise_tape import CPU, ROWS, all_held, denoise_with, kernel_of, text_for, walked
from tests.diffusion.test_particles import CONDITIONS, check_weights
from tests.diffusion.test_row_noise import check_alone
from tests.diffusion.test_samplers import FLOOR, LAW, V, chances, distance, make, perfect, run, world

GRID = 2**14
STARTS = (torch.arange(GRID, dtype=torch.float64)[:, None] + 0.5) / GRID
STEPPING = (Ancestral, Analytic, Euler, PredictorCorrector, Psi)
CASES = [*itertools.product(STEPPING, (Absorb, Uniform)), (ReMDM, Absorb)]


def chosen(move: Tensor) -> Tensor:
    """The chosen positions of all starts on the grid, bool [GRID, l]."""
    return systematic(STARTS, move.expand(GRID, -1)) < move


def test_each_position_has_its_own_probability_and_rows_their_number() -> None:
    move = torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    move[::7], move[3], move[4] = 0.0, 1.0, 1.0
    found = chosen(move)
    assert float((found.double().mean(0) - move).abs().max()) < 2 / GRID
    assert bool(found[:, 3:5].all())
    assert not bool(found[:, ::7].any())
    number, mean = found.sum(1), float(move.sum())
    assert set(number.tolist()) == {math.floor(mean), math.ceil(mean)}


def test_positions_near_each_other_are_never_chosen_together() -> None:
    move = torch.rand(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 0.4
    together = torch.einsum("gi,gj->ij", chosen(move).double(), chosen(move).double()) > 0
    for i, j in itertools.combinations(range(40), 2):
        mass = float(move[i : j + 1].sum())
        if mass <= 1:
            assert not together[i, j], (i, j)
    assert bool(together.triu(1).any())  # others are


def test_one_position_is_changed_as_an_independent_one_is() -> None:
    u = systematic(STARTS, torch.full((GRID, 1), 0.3))
    assert torch.equal(u.flatten().sort().values, (1 - STARTS.flatten() - 0.5 / 2**40).sort().values)


def test_positions_that_do_not_change_do_not_matter() -> None:
    """Given tokens and padding, anywhere in the row."""
    move = torch.rand(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wide = torch.zeros(30, dtype=torch.float64)
    at = torch.tensor([0, 1, 4, 5, 9, 10, 11, 15, 20, 21, 28, 29])
    wide[at] = move
    assert torch.equal(chosen(wide)[:, at], chosen(move))


def subsets(move: list[float]) -> dict[tuple[int, ...], float]:
    """The law of the positions that systematic sampling chooses: the intervals of the start on which they are the same."""
    ends = [0.0, *itertools.accumulate(move)]
    cuts = sorted({0.0, 1.0, *(1 - end % 1.0 for end in ends)})
    law = dict[tuple[int, ...], float]()
    for low, high in itertools.pairwise(cuts):
        start = (low + high) / 2
        found = tuple(
            i for i, (a, b) in enumerate(itertools.pairwise(ends)) if math.floor(b + start) > math.floor(a + start)
        )
        law[found] = law.get(found, 0.0) + high - low
    return law


@functools.cache
def few_steps() -> Tensor:
    """The law of four masked steps with a perfect network, by enumeration of starts and tokens: no draw anywhere."""
    kernel, schedule = world(Absorb)
    times = torch.linspace(1, 1e-5, 5, dtype=torch.float64)
    alphas = [*torch.exp(-schedule.sigma(times)).tolist(), 1.0]
    states = torch.tensor(list(itertools.product(range(V + 1), repeat=3)))
    number = {tuple(state): i for i, state in enumerate(states.tolist())}
    law = torch.zeros(len(states), dtype=torch.float64)
    law[-1] = 1.0
    for now, below in itertools.pairwise(alphas):
        clean = chances(states, torch.full((len(states),), -math.log(now)), kernel)
        after = torch.zeros_like(law)
        for i, state in enumerate(states.tolist()):
            shown = [(below - now) / (1 - now) if token == V else 0.0 for token in state]
            for places, share in subsets(shown).items():
                for tokens in itertools.product(range(V), repeat=len(places)):
                    new, weight = list(state), float(law[i]) * share
                    for place, token in zip(places, tokens, strict=True):
                        new[place], weight = token, weight * float(clean[i, place, token])
                    after[number[tuple(new)]] += weight
        law = after
    found: Tensor = law[(states < V).all(-1)]
    return found


@pytest.mark.parametrize("cls", [Ancestral, Analytic, ReMDM])
def test_few_steps_have_the_law_that_enumeration_gives(cls: Any) -> None:
    """Whether the step in which a token is unmasked is drawn first (``ancestral``) or not."""
    more = {"eta": 0.0} if cls is ReMDM else {}
    sampler = make(cls, steps=4, positions="systematic", **more)
    law = few_steps()
    assert distance(run(sampler, Absorb), law) < 1.3 * FLOOR
    apart = float((law - LAW).abs().sum() / 2)
    independent = distance(run(make(cls, steps=4, **more), Absorb))
    assert apart < 0.6 * independent


@pytest.mark.parametrize("name", CONDITIONS)
def test_importance_weights_are_those_of_its_own_law(name: str) -> None:
    check_weights(make(Ancestral, steps=4, positions="systematic"), few_steps(), name)


def test_the_network_is_not_evaluated_more_often() -> None:
    few, many = make(Ancestral, steps=64), make(Ancestral, steps=64, positions="systematic")
    run(few, Absorb)
    run(many, Absorb)
    assert many.evaluations <= 3.0 * 20_000  # as often as there are tokens, at most
    assert few.evaluations <= many.evaluations  # apart from each other, they are seldom unmasked together


@pytest.mark.parametrize(("cls", "kernel"), CASES)
def test_rows_depend_neither_on_their_neighbours_nor_on_padding(cls: Any, kernel: Any) -> None:
    k = kernel_of(kernel)
    assert check_alone(make(cls, positions="systematic"), k) != check_alone(make(cls), k)


@pytest.mark.parametrize(("cls", "kernel"), CASES)
def test_a_tape_returns_to_a_text(cls: Any, kernel: Any) -> None:
    made, k = make(cls, positions="systematic"), kernel_of(kernel)
    text, seeds = text_for(k), torch.arange(ROWS) + 40
    tape = NoiseTape(seeds, device=CPU, road=all_held(text))
    first = walked(made, k, tape, steps=7)
    assert torch.equal(first[-1], text)
    again = walked(made, k, NoiseTape(seeds, device=CPU, start=tape.start, changes=tape.changes()), steps=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_rows_of_their_own_seeds_have_the_enumerated_law() -> None:
    kernel, schedule = world(Absorb)
    sampler, rows = make(Ancestral, steps=4, positions="systematic"), 20_000
    visible = torch.ones(rows, 3, dtype=torch.bool)
    allowed = torch.arange(V + 1) < V
    noise = RowNoise.of(kernel, torch.arange(rows), visible[:1].expand(rows, -1), allowed=allowed, device=CPU)
    out = walked(sampler, kernel, noise, steps=4, denoise=perfect(kernel, schedule), schedule=schedule)[-1]
    assert distance(out, few_steps()) < 1.3 * FLOOR


def test_what_it_claims_depends_on_the_kernel() -> None:
    """Independent tokens are exact in few steps only where a token is independent of the step in which it is drawn."""
    spread, plain = make(Analytic, positions="systematic"), make(Analytic)
    absorb, uniform, power = (kernel_of(cls) for cls in (Absorb, Uniform, Power))
    assert spread.alone(absorb)
    assert not spread.alone(uniform)
    assert not spread.alone(power)
    assert plain.alone(uniform)
    assert not make(Euler).alone(absorb)


def test_kernels_in_discrete_time_are_refused() -> None:
    kernel = Steps(Steps.Config(steps=60, beta_last=0.4), Context({"n": 4}))
    assert make(Ancestral, steps=20).lacks(kernel) is None
    lack = make(Ancestral, steps=20, positions="systematic").lacks(kernel)
    assert lack is not None
    assert lack.endswith("since its positions are systematic")


def test_all_masks_fall_at_the_end() -> None:
    k = kernel_of(Absorb)
    for length in (1, 10):
        tape = NoiseTape(torch.arange(4), device=CPU, start=torch.full((4, length), k.mask))
        rows = walked(make(Analytic, positions="systematic"), k, tape, steps=3, denoise=denoise_with(k), schedule=LogLinear(LogLinear.Config(), Context({})))  # fmt: skip
        assert not bool((rows[-1] == k.mask).any())
