"""Confidences: the probability that the network gave each token when it was drawn, at no cost to the draws."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Uniform
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.sampling.exact import FirstHitting
from sedd_graph_registry.sampling.masked import Confidence, ReMDM
from sedd_graph_registry.sampling.steps import Analytic, Ancestral, Psi
from sedd_graph_registry.strings.birth_death import Indel
from sedd_graph_registry.strings.flexmdm import FlexTau, MaskDelete
from sedd_graph_registry.strings.samplers import StringTau
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.strings.sampler import StringSettings
from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.diffusion.tokens import readings
from sedd_graph.diffusion.tokens.block_diffusion import write_blocks
from sedd_graph.diffusion.tokens.stage import Stage, StagedDenoise
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.runs.frames import quantised
from tests.diffusion.strings import strings
from tests.diffusion.test_sampler_costs import SET_UP, Waits, network, process

N, ROWS, LENGTH = 20, 3, 24
TIMES = torch.linspace(1.0, 1e-5, 13, dtype=torch.float64)
"""Times of the steps of a sampler with twelve."""


class Seen:
    """Rows and confidences of each step, and the rows that the network was evaluated on."""

    def __init__(self) -> None:
        self.rows, self.sure, self.inputs = list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor, Tensor]]()

    def of(self, settings: WalkSettings) -> WalkSettings:
        return dataclasses.replace(
            settings,
            on_step=lambda _, x: self.rows.append(x.clone()),
            on_confidence=lambda _, sure: self.sure.append(sure.clone()),
        )

    def watched(self, inner: StagedDenoise) -> StagedDenoise:
        def first(x: Tensor, t: Tensor, rows: Tensor) -> Stage:
            self.inputs.append((x.clone(), t.clone(), rows.clone()))
            return inner.begin(x, t, rows)

        return StagedDenoise(first)


def made(cls: Any, config: dict[str, Any], seen: Seen | None, kernel: Any) -> tuple[Tensor, WalkSettings]:
    sampler = cls(cls.Config(**config), Context({"n": N}))
    x, settings = process(kernel, N, ROWS, LENGTH)
    denoise = network(N, kernel=settings.kernel)
    told = settings if seen is None else seen.of(settings)
    return sampler.run(denoise if seen is None else seen.watched(denoise), x, told), settings


CASES = [
    (Ancestral, {"steps": 12}, Absorb),
    (Ancestral, {"steps": 12, "temperature": 0.5, "top_p": 0.8}, Absorb),
    (Analytic, {"steps": 12}, Absorb),
    (Confidence, {"steps": 6, "by": "margin"}, Absorb),
    (ReMDM, {"steps": 12, "eta": 0.3}, Absorb),
    (FirstHitting, {}, Absorb),
]


@pytest.mark.parametrize("apart", [False, True], ids=["whole", "apart"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{len(case[1])}")
def test_a_confidence_is_the_networks_probability_where_the_token_was_drawn(
    case: Any, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed again from the rows that the network saw; temperature and nucleus do not change it. Draws are the same."""
    if apart:
        monkeypatch.setattr(readings, "NUMBERS", 300)
    cls, config, kernel = case
    seen = Seen()
    out, settings = made(cls, config, seen, kernel)
    assert torch.equal(out, made(cls, config, None, kernel)[0])
    inner, mask = network(N, kernel=settings.kernel), settings.kernel.require_mask()
    possible = []
    for x, t, rows in seen.inputs:
        full = torch.full((ROWS, LENGTH, N), torch.nan)
        full[rows] = inner(x, t, rows)["log_x0"].exp()
        possible.append(full)
    assert len(seen.rows) == len(seen.sure)
    for rows, sure in zip(seen.rows, seen.sure, strict=True):
        assert torch.equal(sure.isnan(), rows == mask)
        near = torch.stack([(p.gather(-1, rows[..., None])[..., 0] - sure).abs() for p in possible]).nan_to_num(1.0)
        assert bool((near.amin(0)[rows != mask] < 1e-5).all())
    if cls is Ancestral:
        found = 0
        for step, (before, after) in enumerate(pairwise(seen.rows)):
            new = (before == mask) & (after != mask)
            expected = inner(before, TIMES[step].float().expand(ROWS), torch.arange(ROWS))["log_x0"].exp()
            expected = expected.gather(-1, after[..., None])[..., 0]
            assert torch.allclose(seen.sure[step + 1][new], expected[new], atol=1e-5)
            found += int(new.sum())
        assert found == ROWS * LENGTH


def test_under_uniform_noise_it_is_the_chance_of_the_token_among_those_it_may_become() -> None:
    seen = Seen()
    _, settings = made(Ancestral, {"steps": 6}, seen, Uniform)
    inner, k = network(N, kernel=settings.kernel), settings.kernel
    times = torch.linspace(1.0, 1e-5, 7, dtype=torch.float64)
    assert bool(seen.sure[0].isnan().all())  # noise
    for step in range(6):
        before, after = seen.rows[step], seen.rows[step + 1]
        t = times[step].expand(ROWS)
        clean = inner(before, t.float(), torch.arange(ROWS))["log_x0"].exp()
        law = k.posterior(
            clean, before, settings.schedule.sigma(t), settings.schedule.sigma(times[step + 1].expand(ROWS))
        )
        law = law.scatter(-1, before[..., None], 0.0)
        share = (law / law.sum(-1, keepdim=True)).gather(-1, after[..., None])[..., 0]
        changed = before != after
        assert torch.allclose(seen.sure[step + 1][changed].double(), share[changed].double(), atol=1e-4)
        assert torch.equal(seen.sure[step + 1][~changed].nan_to_num(-1), seen.sure[step][~changed].nan_to_num(-1))


@pytest.mark.parametrize("case", [*CASES, (Psi, {"kappa": 0.5, "steps": 12}, Uniform)], ids=lambda case: f"{case[0].__name__}-{len(case[1])}")  # fmt: skip
def test_confidences_add_no_wait_for_the_device(case: Any) -> None:
    cls, config, kernel = case
    sampler = cls(cls.Config(**config), Context({"n": N}))
    x, settings = process(kernel, N, ROWS, LENGTH)
    counts, calls = list[int](), list[int]()
    for told in (None, lambda step, sure: None):
        settings.generator.manual_seed(0)
        with Waits() as waits:
            sampler.run(
                network(N, calls=calls, kernel=settings.kernel), x, dataclasses.replace(settings, on_confidence=told)
            )
        counts.append(waits.count)
    assert counts[0] == counts[1] <= len(calls) // 2 + SET_UP


def test_blocks_report_the_confidences_of_the_whole_row() -> None:
    seen = Seen()
    sampler = Ancestral(Ancestral.Config(steps=4), Context({"n": N}))
    x, settings = process(Absorb, N, ROWS, LENGTH)
    denoise = network(N, kernel=settings.kernel)
    write_blocks(sampler, lambda before: denoise, x, seen.of(settings), block=8)
    assert len(seen.rows) == len(seen.sure)
    for rows, sure in zip(seen.rows, seen.sure, strict=True):
        assert torch.equal(sure.isnan(), rows == settings.kernel.require_mask())
    assert not bool(seen.sure[-1].isnan().any())


# -- strings ---------------------------------------------------------------------------------------------------------


def chance(step: int) -> float:
    """Probability of token 0 in the step of a number; that of token 1 is another one, and so is that of every other step."""
    return 0.2 + 0.011 * step


def born(token: int, sure: float) -> int | None:
    """The step in which a token was drawn; None for noise."""
    if sure != sure:
        return None
    (step,) = (k for k in range(30) if abs(sure - (chance(k) if token == 0 else 1 - chance(k))) < 1e-4)
    return step


def test_confidences_of_strings_move_with_their_tokens() -> None:
    """Each step draws tokens with probabilities of its own, by which each token tells when it was drawn."""
    kernel = Indel(Indel.Config(frequencies=(0.6, 0.4)), Context({"n": 3}))
    x = strings([[0, 1, 1, 0, 1]] * 40, kernel.start)
    none = torch.zeros_like(x.attend)
    calls, frames = list[int](), list[list[list[tuple[int, int | None]]]]()
    kept: list[Tensor] = []

    def rates(x: Strings, sigma: Tensor) -> dict[str, Tensor]:
        p = chance(len(calls))
        calls.append(1)
        weights = torch.tensor([p, 1 - p]).log() - 1.0
        return {"log_insert": weights.expand(*x.tokens.shape, 2), "log_delete": torch.full(x.tokens.shape, -0.5)}

    def on_step(step: int, now: Strings) -> None:
        found = []
        for tokens, attend, sure in zip(now.tokens.tolist(), now.attend.tolist(), kept[-1].tolist(), strict=True):
            row = [(t, born(t, s)) for t, a, s in zip(tokens[1:], attend[1:], sure[1:], strict=True) if a]
            assert all(s != s for a, s in zip(attend, sure, strict=True) if not a)
            found.append(row)
        frames.append(found)

    settings = StringSettings(
        fixed=none, shut=none, longest=40, kernel=kernel, schedule=LogLinear(LogLinear.Config(), Context({})),
        generator=torch.Generator().manual_seed(0), on_step=on_step, on_confidence=lambda _, sure: kept.append(sure),
    )  # fmt: skip
    StringTau(StringTau.Config(steps=12), Context({"n": 3})).run(rates, x, settings)
    assert all(when is None for row in frames[0] for _, when in row)
    inserted = deleted = 0
    for step, (before, after) in enumerate(pairwise(frames)):
        for old, new in zip(before, after, strict=True):
            stayed = [pair for pair in new if pair[1] != step]
            rest = iter(old)
            assert all(pair in rest for pair in stayed)  # a subsequence
            inserted, deleted = inserted + len(new) - len(stayed), deleted + len(old) - len(stayed)
    assert inserted > 100
    assert deleted > 100


def test_masks_that_are_inserted_have_no_confidence_until_they_are_filled() -> None:
    kernel = MaskDelete(MaskDelete.Config(), Context({"n": 4}))
    x = strings([[]] * 30, kernel.start)
    none = torch.zeros_like(x.attend)
    kept: list[Tensor] = []
    filled = 0

    def rates(x: Strings, sigma: Tensor) -> dict[str, Tensor]:
        log_x0 = torch.tensor([0.75, 0.25, 1e-9]).log().expand(*x.tokens.shape, 3)
        return {"log_gap": torch.full(x.tokens.shape, 1.5), "log_x0": log_x0}

    def on_step(step: int, now: Strings) -> None:
        nonlocal filled
        data = now.attend & (now.tokens < 2)
        assert torch.equal(kept[-1].isnan(), ~data)
        assert torch.allclose(kept[-1][data], torch.tensor([0.75, 0.25])[now.tokens[data]])
        filled += int(data.sum())

    settings = StringSettings(
        fixed=none, shut=none, longest=20, kernel=kernel, schedule=LogLinear(LogLinear.Config(), Context({})),
        generator=torch.Generator().manual_seed(0), on_step=on_step, on_confidence=lambda _, sure: kept.append(sure),
    )  # fmt: skip
    FlexTau(FlexTau.Config(steps=8), Context({"n": 4})).run(rates, x, settings)
    assert filled > 50


def test_confidences_are_stored_as_bytes() -> None:
    values = torch.tensor([[0.0, 1.0, 0.5, torch.nan, 1.0001]])
    assert quantised(values).tolist() == [[0, 254, 127, 255, 254]]
    assert quantised(values).dtype == torch.uint8
