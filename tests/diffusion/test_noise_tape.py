"""Noise tapes: every sampler returns to a given text, replays exactly, and the recovered noise has its distribution."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from sedd_graph_registry.noise.interpolating import Absorb, Mixture, Uniform
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.sampling.exact import FirstHitting, Uniformization
from sedd_graph_registry.sampling.masked import Confidence, EntropyBound, ReMDM
from sedd_graph_registry.sampling.steps import Analytic, Ancestral, Euler, PredictorCorrector, Psi, TauLeaping
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.categorical import categorical
from sedd_graph.diffusion.draws import placed_uniform
from sedd_graph.diffusion.gumbel import posterior_changes, replay, standard_gumbel
from sedd_graph.diffusion.tokens import addressed_noise
from sedd_graph.diffusion.tokens.noise_record import FINAL, MOVE, Changes
from sedd_graph.diffusion.tokens.noise_tape import NoiseTape
from sedd_graph.diffusion.tokens.road import Road
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.errors import UserError
from tests.diffusion.test_samplers import FLOOR, LAW, SEQUENCES, L, distance, make, perfect, world

CPU, STATES, LENGTH, ROWS = torch.device("cpu"), 9, 10, 6
MASKED = [Ancestral, Analytic, Euler, PredictorCorrector, Psi, TauLeaping, FirstHitting, Uniformization, Confidence, EntropyBound, ReMDM]  # fmt: skip
ANY = [Ancestral, Analytic, Euler, PredictorCorrector, Psi, TauLeaping, Uniformization]
SCHEDULE = LogLinear(LogLinear.Config(), Context({}))
TABLE = torch.randn(STATES, LENGTH, STATES, generator=torch.Generator().manual_seed(1)) * 2


def denoise_with(kernel: Any, table: Tensor = TABLE) -> Callable[..., dict[str, Tensor]]:
    """A network whose prediction at each position depends on all tokens of the row."""

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        places = torch.arange(x.shape[1])
        logits = table[x, places % LENGTH] + table[x, places % LENGTH].mean(1, keepdim=True)
        if kernel.mask is not None:
            logits[..., kernel.mask] = -torch.inf
        found = logits.log_softmax(-1).clamp(min=-1e6)
        if kernel.carries_over:
            carried = torch.where(torch.nn.functional.one_hot(x, kernel.states) > 0, 0.0, -1e6)
            found = torch.where((x == kernel.mask)[..., None], found, carried)
        return {"log_x0": found if at is None else found.gather(1, at[..., None].expand(-1, -1, STATES))}

    return denoise


def walked(
    sampler: Any,
    kernel: Any,
    tape: NoiseTape,
    *,
    steps: int | None = None,
    denoise: Any = None,
    schedule: Any = SCHEDULE,
) -> list[Tensor]:
    """The rows after every step, and at the end."""
    length = tape.start.shape[1] if tape.start is not None else tape._road.text.shape[1]
    x = tape.prepare(kernel, schedule, sampler.times(kernel, steps or sampler.steps or 1), length)
    frames: list[Tensor] = []
    settings = WalkSettings(
        free=torch.ones_like(x, dtype=torch.bool),
        kernel=kernel,
        schedule=schedule,
        generator=tape.generator,
        draws=tape,
        on_step=lambda number, rows: frames.append(rows.clone()),
    )
    return [*frames, sampler.run(denoise or denoise_with(kernel), x, settings, steps=steps)]


def kernel_of(cls: Any) -> Any:
    return cls(cls.Config(), Context({"n": STATES}))


def text_for(kernel: Any, rows: int = ROWS) -> Tensor:
    return torch.randint(0, kernel.data_tokens, (rows, LENGTH), generator=torch.Generator().manual_seed(2))


def all_held(text: Tensor) -> Road:
    return Road(text=text, held=torch.ones_like(text, dtype=torch.bool))


def each(sampler: Any, kernel: Any) -> Any:
    """A case; ``uniformization`` takes hundreds of evaluations."""
    marks = [pytest.mark.slow] if sampler is Uniformization else []
    return pytest.param(sampler, kernel, id=f"{sampler.__name__}-{kernel.__name__}", marks=marks)


@pytest.mark.parametrize(
    ("sampler", "kernel"),
    [
        *(each(s, Absorb) for s in MASKED),
        *(each(s, Uniform) for s in ANY),
        each(Analytic, Mixture),
        each(Psi, Mixture),
    ],
)
def test_every_sampler_returns_to_a_text_and_replays_each_step(sampler: Any, kernel: Any) -> None:
    made, k = make(sampler), kernel_of(kernel)
    text, seeds = text_for(k), torch.arange(ROWS) + 40
    steps = None if made.steps is None else 7
    tape = NoiseTape(seeds, device=CPU, road=all_held(text))
    first = walked(made, k, tape, steps=steps)
    assert torch.equal(first[-1], text)
    assert tape.start is not None
    assert float((tape.start == text).double().mean()) < 0.5  # noise
    changes = tape.changes()
    again = walked(made, k, NoiseTape(seeds, device=CPU, start=tape.start, changes=changes), steps=steps)
    assert len(first) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not bool((changes.state == FINAL).any())  # the sampler drew every token
    other = walked(made, k, NoiseTape(seeds, device=CPU, start=tape.start), steps=steps)  # the noise of the seed alone
    assert not torch.equal(other[-1], text)


def test_tokens_that_no_weight_leads_to_are_restored_and_recorded() -> None:
    k = kernel_of(Absorb)
    text, seeds = text_for(k), torch.arange(ROWS)
    made = make(Ancestral, temperature=0.0)
    tape = NoiseTape(seeds, device=CPU, road=all_held(text))
    assert torch.equal(walked(made, k, tape, steps=4)[-1], text)
    changes = tape.changes()
    assert bool((changes.state == FINAL).any())
    again = NoiseTape(seeds, device=CPU, start=tape.start, changes=changes)
    assert torch.equal(walked(made, k, again, steps=4)[-1], text)


@pytest.mark.parametrize(
    ("sampler", "kernel"),
    [each(FirstHitting, Absorb), each(Uniformization, Absorb), each(Uniformization, Uniform)],
)
def test_noise_by_address_gives_the_law_of_the_data(sampler: Any, kernel: Any) -> None:
    k, schedule = world(kernel)
    rows = 20_000
    start = k.prior(rows, L, generator=torch.Generator().manual_seed(0), allowed=None)
    tape = NoiseTape(torch.arange(rows), device=CPU, start=start)
    out = walked(make(sampler), k, tape, denoise=perfect(k, schedule), schedule=schedule)[-1]
    assert distance(out) < FLOOR


def shifted(kernel: Any, schedule: Any, law: Tensor) -> Callable[..., dict[str, Tensor]]:
    """A network that predicts independent tokens of distribution ``law`` [V], at every noise level, at masks."""

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        found = torch.full((*x.shape, 4), -1e6)
        found[..., :3] = law.log().float()
        carried = torch.where(torch.nn.functional.one_hot(x, 4) > 0, 0.0, -1e6)
        found = torch.where((x == kernel.mask)[..., None], found, carried)
        return {"log_x0": found if at is None else found.gather(1, at[..., None].expand(-1, -1, 4))}

    return denoise


def recovered(rows: int) -> Tensor:
    """Texts of the model that another model draws with the noise recovered from texts of the first one."""
    k, schedule = world(Absorb)
    code = torch.multinomial(LAW, rows, replacement=True, generator=torch.Generator().manual_seed(4))
    tape = NoiseTape(torch.arange(rows), device=CPU, road=all_held(SEQUENCES[code]))
    walked(make(FirstHitting), k, tape, denoise=perfect(k, schedule), schedule=schedule)
    other = torch.tensor([0.6, 0.3, 0.1]).double()
    again = NoiseTape(torch.arange(rows), device=CPU, start=tape.start, changes=tape.changes())
    return walked(make(FirstHitting), k, again, denoise=shifted(k, schedule, other), schedule=schedule)[-1]


def test_recovered_noise_draws_from_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise given texts of one model is noise: with it, another model draws from its own law. A wrong posterior does not."""
    rows, law = 20_000, torch.tensor([0.6, 0.3, 0.1]).double()
    product = torch.einsum("a,b,c->abc", law, law, law).reshape(-1)
    assert distance(recovered(rows), product) < FLOOR

    def untruncated(log_weights: Tensor, chosen: Tensor, fresh: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
        top = (log_weights + fresh).amax(-1, keepdim=True) + 1e-6 - log_weights.gather(-1, chosen[..., None])
        changed = torch.zeros_like(log_weights, dtype=torch.bool).scatter(-1, chosen[..., None], True)
        return fresh.scatter(-1, chosen[..., None], top), changed

    monkeypatch.setattr(addressed_noise, "posterior_changes", untruncated)
    assert distance(recovered(rows), product) > 2 * FLOOR


WEIGHTS = torch.tensor([0.45, 0.3, 0.15, 0.0999, 0.0001], dtype=torch.float64)


def posterior_noise(draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen states, noise and changed states of draws from :data:`WEIGHTS`."""
    seeds, states = torch.arange(draws)[:, None], torch.arange(5)
    fresh, again = (standard_gumbel(placed_uniform(seeds, stream, states)) for stream in (1, 2))
    chosen = categorical(WEIGHTS.expand(draws, -1), generator=torch.Generator().manual_seed(0))
    return chosen, *posterior_changes(WEIGHTS.log().expand(draws, -1), chosen, fresh, again)


def fits(noise: Tensor) -> float:
    """Smallest p-value, times the number of tests (Bonferroni), that states' noise is standard Gumbel."""
    return min(stats.kstest(noise[:, s].numpy(), "gumbel_r").pvalue for s in range(5)) * 5


@pytest.mark.parametrize("draws", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_posterior_noise_replays_and_is_standard_and_a_wrong_one_is_caught(draws: int) -> None:
    chosen, noise, changed = posterior_noise(draws)
    assert torch.equal(replay(WEIGHTS.log().expand(draws, -1), noise), chosen)  # 100 %
    assert fits(noise) > 0.01
    below = noise.gather(1, (chosen[:, None] + 1) % 5)  # given the choice, it is not
    assert stats.kstest(below[:, 0].numpy(), "gumbel_r").pvalue < 1e-6
    assert 1.0 < float(changed.sum(-1).double().mean()) < 2.0
    # power: a maximum at log(sum w) + 0.1 + Gumbel, and no truncation, are both refused at the 1 % level
    mine = noise.scatter_add(1, chosen[:, None], torch.full((draws, 1), 0.1, dtype=torch.float64))
    assert fits(mine) < 0.01
    fresh = standard_gumbel(placed_uniform(torch.arange(draws)[:, None], 1, torch.arange(5)))
    top = (WEIGHTS.log() + fresh).amax(-1) - WEIGHTS.log()[chosen]
    assert fits(fresh.scatter(1, chosen[:, None], top[:, None])) < 0.01


def test_numbers_by_address_are_uniform_and_independent() -> None:
    seeds = torch.arange(300)[:, None, None]
    found = placed_uniform(seeds, torch.arange(20)[:, None], torch.arange(20)).reshape(-1)
    assert stats.kstest(found.numpy(), "uniform").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([found[:-1], found[1:]]))[0, 1])) < 0.02
    assert 0 < float(found.min()) < float(found.max()) < 1
    assert float(placed_uniform(torch.tensor([5]), 1, 2)[0]) == pytest.approx(0.5, abs=0.5)
    # the numbers do not depend on which others are drawn, nor on the shape
    assert torch.equal(
        placed_uniform(torch.tensor([7]), 3, torch.tensor([4])), placed_uniform(seeds[7, 0], 3, torch.arange(5))[4:]
    )


def test_numbers_of_events_are_poisson() -> None:
    tape = NoiseTape(torch.arange(20_000), device=CPU, start=torch.zeros(20_000, 1, dtype=torch.int64))
    tape.prepare(kernel_of(Uniform), SCHEDULE, None, 1)
    counts = tape.poisson(torch.full((20_000, 1), 1.3, dtype=torch.float64), tape.start)[:, 0]  # type: ignore[arg-type]
    expected = stats.poisson(1.3).pmf(range(6)) * 20_000
    seen = torch.bincount(counts.long(), minlength=6)[:6]
    assert (
        stats.chisquare([*seen.tolist(), 20_000 - int(seen.sum())], [*expected, 20_000 - expected.sum()]).pvalue > 1e-3
    )


def changed(**columns: Any) -> Changes:
    fields = {"call": [0], "row": [0], "place": [0], "state": [0], "value": [0.0]} | columns
    return Changes(
        *(torch.tensor(fields[n], dtype=torch.float64 if n == "value" else torch.int64) for n in Changes._fields)
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"row": [7]}, "rows and states"),
        ({"state": [STATES]}, "rows and states"),
        ({"place": [-1]}, "rows and states"),
        ({"value": [float("nan")]}, "not finite"),
        ({"state": [FINAL], "value": [99.0]}, "tokens"),
        ({"call": [3, 1], "row": [0, 0], "place": [0, 0], "state": [MOVE, 0], "value": [0.5, 0.5]}, "order"),
    ],
)
def test_noise_of_another_model_is_refused(columns: dict[str, Any], message: str) -> None:
    tape = NoiseTape(
        torch.arange(2), device=CPU, start=torch.zeros(2, 3, dtype=torch.int64), changes=changed(**columns)
    )
    with pytest.raises(UserError, match=message):
        tape.prepare(kernel_of(Absorb), SCHEDULE, None, 3)


def test_at_strength_1_other_tokens_have_fresh_noise_and_held_ones_are_given() -> None:
    k, made = kernel_of(Absorb), make(Ancestral)
    text, seeds = text_for(k), torch.arange(ROWS)
    tape = NoiseTape(seeds, device=CPU, road=all_held(text))
    walked(made, k, tape, steps=6)
    held = torch.zeros_like(text, dtype=torch.bool)
    held[:, 3] = True
    wanted = torch.where(held, (text + 1) % k.data_tokens, text)

    def edited(strength: float, fresh: int) -> Tensor:
        noise = NoiseTape(seeds, device=CPU, start=tape.start, changes=tape.changes(), road=Road(text=wanted, held=held), strength=strength, fresh=fresh)  # fmt: skip
        return walked(made, k, noise, steps=6)[-1]

    kept = []
    for strength in (0.0, 0.2, 0.7, 1.0):
        out = edited(strength, 1)
        assert torch.equal(out[:, 3], wanted[:, 3])
        kept.append(float((out == wanted)[~held].double().mean()))
    # at 0 the noise of the tape alone; above, each other token is favoured, the less the more noise is fresh
    assert kept[1] == 1.0
    assert kept[1] > kept[0]
    assert kept[1] > kept[2] > kept[3]
    assert not torch.equal(edited(1.0, 1), edited(1.0, 2))
