"""Noise tapes under conditions on whole rows: regular expressions, and particles."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from sedd_graph_registry.noise.interpolating import Absorb
from sedd_graph_registry.sampling.exact import FirstHitting
from sedd_graph_registry.sampling.masked import Confidence, EntropyBound, ReMDM
from sedd_graph_registry.sampling.steps import Analytic, Ancestral, Psi
from torch import Tensor

from sedd_graph.diffusion.draws import Draws
from sedd_graph.diffusion.tokens.noise_record import FINAL, MOVE
from sedd_graph.diffusion.tokens.noise_tape import NoiseTape
from sedd_graph.diffusion.tokens.particles import choose
from sedd_graph.diffusion.tokens.road import Road
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.errors import UserError
from tests.diffusion.test_conditions import MATCHES, factorised, matching
from tests.diffusion.test_noise_tape import CPU, all_held, shifted
from tests.diffusion.test_samplers import FLOOR, LAW, SEQUENCES, L, V, distance, make, perfect, world

EVERY = torch.ones(V + 1, dtype=torch.bool)
TEXTS = SEQUENCES[MATCHES]


def walked(sampler: Any, tape: NoiseTape, *, denoise: Any = None, particles: int = 1, **more: Any) -> list[Tensor]:
    """The rows after each step, and at the end, of a run with a tape; particles are chosen among."""
    k, s = world(Absorb)
    x = tape.prepare(k, s, sampler.times(k, sampler.steps or 1), L, particles=particles)
    frames = list[Tensor]()
    settings = WalkSettings(
        free=torch.ones_like(x, dtype=torch.bool),
        kernel=k,
        schedule=s,
        generator=tape.generator,
        draws=tape,
        on_step=lambda number, rows: frames.append(rows.clone()),
        unconditioned=EVERY if particles > 1 else None,
        **more,
    )
    if more.get("matching") is not None:
        tape.require_match(more["matching"], EVERY, L)
    out = sampler.run(denoise or perfect(k, s), x, settings)
    if particles > 1:
        out = out[choose(sampler.log_weight, particles, draws=tape).index]
    return [*frames, out]


def there(sampler: Any, text: Tensor, seeds: Tensor, **more: Any) -> tuple[NoiseTape, list[Tensor]]:
    tape = NoiseTape(seeds, device=CPU, road=all_held(text))
    return tape, walked(sampler, tape, **more)


def again(tape: NoiseTape, seeds: Tensor) -> NoiseTape:
    return NoiseTape(seeds, device=CPU, start=tape.start, changes=tape.changes())


MASKED = [Ancestral, FirstHitting, *(pytest.param(c, marks=pytest.mark.slow) for c in (Analytic, Psi, Confidence, EntropyBound, ReMDM))]  # fmt: skip


@pytest.mark.parametrize("cls", MASKED)
def test_every_sampler_of_masks_returns_to_a_text_that_matches(cls: Any) -> None:
    sampler, seeds = make(cls), torch.arange(len(TEXTS)) + 3
    tape, first = there(sampler, TEXTS, seeds, matching=matching())
    assert torch.equal(first[-1], TEXTS)
    assert not bool((tape.changes().state == FINAL).any())  # the sampler drew every token
    second = walked(sampler, again(tape, seeds), matching=matching())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = walked(sampler, NoiseTape(seeds, device=CPU, start=tape.start), matching=matching())[-1]
    assert not torch.equal(other, TEXTS)


@pytest.mark.slow
def test_noise_of_texts_that_match_draws_from_another_model() -> None:
    """Texts of one model, all masks shown at once; with their noise, another model draws from its own law given the match."""
    sampler, rows = make(EntropyBound, gamma=1e6), 10_000
    law = factorised(torch.full((1, L), -1), MATCHES)
    code = torch.multinomial(law, rows, replacement=True, generator=torch.Generator().manual_seed(4))
    seeds = torch.arange(rows)
    tape, first = there(sampler, SEQUENCES[code], seeds, matching=matching())
    assert torch.equal(first[-1], SEQUENCES[code])
    k, s = world(Absorb)
    own = torch.tensor([0.2, 0.2, 0.6]).double()
    out = walked(sampler, again(tape, seeds), denoise=shifted(k, s, own), matching=matching())[-1]
    wanted = own[SEQUENCES].prod(-1) * MATCHES
    assert distance(out, wanted / wanted.sum()) < 1.6 * FLOOR
    assert distance(out, law) > 3 * FLOOR
    # power: without the recorded changes, the noise says nothing of the texts; with all of the text's, it is not noise
    fixed = NoiseTape(seeds, device=CPU, road=all_held(SEQUENCES[code]))
    assert distance(walked(sampler, fixed, denoise=shifted(k, s, own), matching=matching())[-1], wanted / wanted.sum()) > 3 * FLOOR  # fmt: skip


def test_a_text_that_does_not_match_is_refused() -> None:
    with pytest.raises(UserError, match="with what is given and allowed"):
        there(make(Ancestral), SEQUENCES[~MATCHES][:2], torch.arange(2), matching=matching())


def test_edits_match_too() -> None:
    sampler, seeds = make(Ancestral), torch.arange(len(TEXTS))
    tape, _ = there(sampler, TEXTS, seeds, matching=matching())
    held = torch.zeros_like(TEXTS, dtype=torch.bool)
    held[:, 0] = True  # the first token is given
    for strength in (0.1, 1.0):
        edit = NoiseTape(seeds, device=CPU, start=tape.start, changes=tape.changes(), road=Road(text=TEXTS, held=held), strength=strength, fresh=1)  # fmt: skip
        out = walked(sampler, edit, matching=matching())[-1]
        assert torch.equal(out[:, 0], TEXTS[:, 0])
        assert matching().matches(out)
        kept = float((out == TEXTS).double().mean())
        assert kept == 1.0 if strength < 0.5 else kept < 1.0


ALLOWED = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
CONDITION: dict[str, Callable[[], dict[str, Any]]] = {
    "allow": lambda: {"allowed": ALLOWED},
    "matching": lambda: {"matching": matching()},
}
HOLDS = {"allow": ALLOWED[torch.arange(L), SEQUENCES].all(-1), "matching": MATCHES}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONDITION)
def test_particles_return_to_a_text_and_their_noise_is_that_of_a_choice_by_weight(name: str) -> None:
    """Texts of the exact law given the condition: then the other particles are as drawn alone, and the choice is uniform."""
    sampler, particles, rows = make(FirstHitting), 4, 2_000
    law = LAW * HOLDS[name] / LAW[HOLDS[name]].sum()
    code = torch.multinomial(law, rows, replacement=True, generator=torch.Generator().manual_seed(6))
    text, seeds, more = SEQUENCES[code], torch.arange(rows), CONDITION[name]()
    tape, first = there(sampler, text, seeds, particles=particles, **more)
    assert torch.equal(first[-1], text)
    assert torch.equal(first[-2][::particles], text)
    changes = tape.changes()
    chosen = changes.call == int(changes.call[changes.state == MOVE].max())
    assert int(chosen.sum()) == rows  # one number for each choice
    assert stats.kstest(changes.value[chosen].numpy(), "uniform").pvalue > 0.01
    second = walked(sampler, again(tape, seeds), particles=particles, **more)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    others = first[-2].view(rows, particles, L)[:, 1:].reshape(-1, L)
    alone = NoiseTape(torch.arange(3 * rows) + 10**6, device=CPU, start=torch.full((3 * rows, L), V))
    plain = walked(sampler, alone, **more)[-1]
    every = torch.bincount((plain * torch.tensor([V * V, V, 1])).sum(-1), minlength=V**L).double() / len(plain)
    assert distance(others, every) < 2.5 * FLOOR


def test_a_text_that_is_never_chosen_is_refused() -> None:
    k, s = world(Absorb)
    tape = NoiseTape(torch.arange(1), device=CPU, road=all_held(SEQUENCES[:1]))
    tape.prepare(k, s, None, L, particles=2)
    with pytest.raises(UserError, match="no probability under the conditions"):
        tape.select(torch.tensor([[0.0, 1.0]], dtype=torch.float64))


def test_draws_of_a_generator_choose_by_weight() -> None:
    share = torch.tensor([[0.7, 0.3]], dtype=torch.float64).expand(20_000, 2)
    found = Draws(torch.Generator().manual_seed(0)).select(share)
    assert float(found.double().mean()) == pytest.approx(0.3, abs=0.015)
