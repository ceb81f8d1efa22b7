"""Errors that are not numbers fail: Python's max drops NaN unless it comes first."""

import math
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.strings.birth_death import Delete
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.check import Check
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.families import vectors
from sedd_graph.families.plan import ProcessPlan
from sedd_graph.families.strings import make_parts
from sedd_graph.runs.check import check
from sedd_graph.verify import kernel_draws, kernel_size, sampler, string_contracts, string_draws, vectors_sampler
from sedd_graph.verify.birth_death import BirthDeathTable
from sedd_graph.verify.block_fixture import relative_error
from sedd_graph.verify.inverse import _measurable
from sedd_graph.verify.inverse_log_det import Pair
from sedd_graph.verify.objective_optimum import optimum_faults
from sedd_graph.verify.schedules import check_schedule
from sedd_graph.verify.statistics import binomial_tail, chi_square, correlated, dispersed, shifted
from sedd_graph.verify.string_forced import ForcedDraws
from sedd_graph.verify.toy import ALONE, PAIR, Toy, make_toy, toy_parts
from sedd_graph.verify.worst import least, worst
from tests.conftest import ROOT
from tests.plans import maker, string_plan, token_plan
from tests.verify.parts import part

NAN = math.nan


@pytest.mark.parametrize("errors", [(NAN,), (1.0, NAN), (NAN, 1.0), (0.0, NAN, math.inf)])
def test_an_error_that_is_not_a_number_is_infinite(errors: tuple[float, ...]) -> None:
    assert worst(*errors) == math.inf


def test_the_largest_error_counts() -> None:
    assert (worst(), worst(-2.0), worst(1.0, 3.0, 2.0)) == (0.0, -2.0, 3.0)


@pytest.mark.parametrize("chances", [(NAN,), (0.5, NAN), (NAN, 0.5), (0.5, 0.4, NAN)])
def test_a_probability_that_is_not_a_number_is_zero(chances: tuple[float, ...]) -> None:
    assert least(*chances) == 0.0


def test_the_least_probability_counts() -> None:
    assert (least(), least(3.0), least(0.5, 0.2, 0.7)) == (1.0, 1.0, 0.2)


def test_statistics_of_nan_are_never_chance() -> None:
    many, half = torch.full((4,), 100.0), torch.full((4,), 0.5)
    broken = torch.tensor([0.5, 0.5, NAN, 0.5])
    assert chi_square(many * broken, 100 * half) == chi_square(many * half, 100 * broken) == 0.0
    assert binomial_tail(many * half, many, broken) == 0.0
    assert shifted(many * half, many, half, broken) == shifted(many * half, many, broken, half) == 0.0
    hits = torch.randint(2, (64, 64), generator=torch.Generator().manual_seed(1)).double()
    assert dispersed(hits, NAN) == correlated(hits, NAN) == 0.0
    hits[3, 5] = NAN
    assert dispersed(hits, 0.5) == correlated(hits, 0.5) == 0.0


@pytest.mark.parametrize("test", ["chi_square", "binomial_tail", "shifted"])
@pytest.mark.parametrize("states", [4, 130])
def test_draws_whose_chance_is_no_number_fail(test: str, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = token_plan(part("uniform"), part("loglinear"), part("nelbo"), part("analytic"), states, "log_x0")
    kernel = maker(plan, discover())(None).kernel
    module: Any = kernel_draws if states == 4 else kernel_size
    calls = iter([0.5, NAN, *[0.5] * 200])
    monkeypatch.setattr(module, test, lambda *_: next(calls) if test == "chi_square" else NAN)
    with torch.no_grad():
        checks = kernel_draws.check_draws(kernel, "quick") if states == 4 else sized(kernel)
    assert {c.holds for c in checks if c.name.endswith(".sample")} == {False}


def sized(kernel: Any) -> list[Check]:
    return kernel_size.check_size(kernel, end=9.0, proof="quick")


def test_independence_of_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert least(*kernel_draws.independence(torch.zeros(8, 8, dtype=torch.int64), torch.full((4,), NAN))) == 0.0
    kernel = maker(
        token_plan(part("uniform"), part("loglinear"), part("nelbo"), part("analytic"), 4, "log_x0"), discover()
    )(None).kernel
    monkeypatch.setattr(kernel_draws, "correlated", lambda *_: NAN)
    with torch.no_grad():
        checks = [
            *kernel_draws.check_draws(kernel, "quick"),
            *kernel_draws.check_prior(kernel, end=20.0, proof="quick"),
        ]
    assert {c.name for c in checks if not c.holds} == {"kernel.independent", "kernel.prior_independent"}


def test_a_loss_of_nan_beside_the_optimum_fails() -> None:
    plan = token_plan(part("absorb"), part("loglinear"), part("nelbo"), part("analytic"), 4, "log_x0")
    toy = make_toy(maker(plan, discover()), PAIR)
    objective, loss = toy.parts.objective, toy.parts.objective.loss
    with torch.no_grad():
        assert not optimum_faults(toy, objective, "log_x0", 1e-4, 1)[0]
        factors = iter([1.0, 1.0, NAN])  # perfect, one push, the other
        object.__setattr__(objective, "loss", lambda *v: loss(*v) * next(factors))
        assert optimum_faults(toy, objective, "log_x0", 1e-4, 1)[0][0].part == "optimum"


def vector_parts() -> Any:
    plan = check(ROOT / "blueprints" / "diffusion-lm-tiny.yaml").plan
    assert isinstance(plan, ProcessPlan)
    return vectors.make_parts(plan, discover(), 3)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_steps_of_vectors_that_are_no_numbers_fail(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever of several pairs of times it is."""
    parts, calls = vector_parts(), iter([NAN if i == at else 1.0 for i in range(99)])
    z = torch.randn(2_000, parts.kernel.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pair, clean = torch.tensor([0.5, 0.25], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    bar = vectors_sampler.level(parts.schedule, 0.25)
    scores = [vectors_sampler._score(parts, 0.0, pair, z * (1 - bar) ** 0.5 * next(calls), clean) for _ in range(3)]
    assert scores[at] == math.inf
    assert all(score < 6 for i, score in enumerate(scores) if i != at)


def test_a_second_stream_of_nan_is_far_off() -> None:
    good = torch.ones(3)
    assert relative_error([good, good * NAN], [good, good]) == math.inf
    assert relative_error([], []) == 0.0


def test_a_log_determinant_beside_an_infinite_one_fails() -> None:
    assert Pair(1.0, math.inf, math.inf).excess == math.inf


@pytest.mark.parametrize("stored", [0.0, NAN])
def test_gradients_that_are_not_numbers_are_compared(stored: float) -> None:
    pairs = _measurable([torch.ones(3), torch.tensor([stored])], [torch.ones(3), torch.tensor([NAN])], torch.float64)
    assert len(pairs) == 2
    assert relative_error([b for _, b in pairs], [a for a, _ in pairs]) == math.inf


def test_gradients_of_rounding_are_not_compared() -> None:
    pairs = _measurable([torch.ones(3), torch.tensor([1e-16])], [torch.ones(3), torch.tensor([0.0])], torch.float64)
    assert len(pairs) == 1


class Lonely(LogLinear, kind="schedule"):
    """Not a number at a time that is asked for alone."""

    class Config(LogLinear.Config):
        pass

    def sigma(self, t: Tensor) -> Tensor:
        found = super().sigma(t)
        return found * NAN if t.numel() == 1 and t.dtype == torch.float64 and float(t) < 1 else found


def test_a_schedule_of_nan_at_single_times_fails() -> None:
    failing = [c.name for c in check_schedule(Lonely(Lonely.Config(), Context({})), "quick") if c.holds is False]
    assert "schedule.pointwise" in failing


def delete_table() -> BirthDeathTable:
    return BirthDeathTable(Delete(Delete.Config(), Context({"n": 3})))


def test_strings_of_nan_probability_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    table = delete_table()
    log_p, target = table.kernel.log_p, table.kernel.target
    monkeypatch.setattr(table.kernel, "log_p", lambda *v: log_p(*v) * NAN)
    assert table._errors()["law"] == math.inf
    monkeypatch.setattr(table.kernel, "log_p", log_p)

    def broken(*given: Any) -> Any:
        found = target(*given)
        return type(found)(*(x * NAN if x.is_floating_point() else x for x in vars(found).values()))

    monkeypatch.setattr(table.kernel, "target", broken)
    errors = table._errors()
    assert errors["insert"] == errors["delete"] == math.inf


@pytest.mark.parametrize("name", ["strings.prior", "strings.declared"])
def test_deviations_of_nan_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = delete_table()
    calls = iter([0.0, *[NAN] * 9])
    monkeypatch.setattr(string_draws, "deviation", lambda *_: next(calls))
    monkeypatch.setattr(string_draws, "two_samples", lambda *_: next(calls))
    check: Check
    if name == "strings.prior":
        check = string_draws.check_prior(table, 60.0, table.longest)
    else:
        check = string_draws.check_prior_is_noise(table.kernel, table._sample, 60.0, 0.0)
    assert (check.name, check.holds) == (name, False)


def test_draws_of_nan_deviation_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    table = delete_table()
    table.proof = "quick"
    monkeypatch.setattr(string_draws, "misfit", lambda *_: (0.0, NAN))
    found = string_draws.check_draws("x", "y", table, table._sample, table.levels(), "quick")
    assert found.holds is False
    monkeypatch.undo()
    monkeypatch.setattr(string_draws, "bernstein", lambda total, *_: total * NAN)
    index = torch.zeros(8, dtype=torch.int64)
    sigma = torch.full((8,), 0.5, dtype=torch.float64)
    strings, _ = table.rows(index), table.batch(index)
    assert string_draws.misfit(table, strings, sigma, 2)[1] == math.inf


@pytest.mark.parametrize(("chi", "holds"), [((math.inf, 0.0), False), ((NAN, 0.1), False), ((0.0, 0.1), True)])
def test_samples_whose_distance_is_no_number_fail(
    chi: tuple[float, float], holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = token_plan(part("absorb"), part("loglinear"), part("nelbo"), part("analytic"), 4, "log_x0")
    toy = Toy(toy_parts(maker(plan, discover()), ALONE.tokens), ALONE, whole=True)
    monkeypatch.setattr(sampler, "chi_distance", lambda *_, **__: (*chi, 4))
    with torch.no_grad():
        check = sampler._check_alone(toy, "log_x0", sampler.SIZES["quick"])
    assert check.holds is holds


@pytest.fixture
def string_parts() -> StringParts:
    plan = string_plan(part("delete"), part("loglinear"), part("dise"), part("string_tau"), 10)
    return make_parts(plan, discover())


def test_draws_for_the_bound_of_nan_deviation_fail(string_parts: StringParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(string_contracts, "misfit", lambda *_: (1.0, NAN))
    objective, schedule = string_parts.objective, string_parts.schedule
    found = string_contracts.check_objective_draws(delete_table(), objective, schedule, "quick")
    assert {c.name: c.holds for c in found}["objective.draws"] is False


def test_noise_levels_that_are_no_numbers_fail(string_parts: StringParts, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = ForcedDraws(delete_table(), string_parts.objective, string_parts.schedule)
    assert string_contracts._check_times(forced, "quick").holds
    searchsorted = torch.searchsorted

    def broken(levels: Tensor, values: Tensor, **more: Any) -> Tensor:
        found = searchsorted(levels, values, **more)
        return found.double() * NAN if levels.dtype == torch.float64 and levels.shape == (1_024,) else found

    monkeypatch.setattr(torch, "searchsorted", broken)
    assert string_contracts._check_times(forced, "quick").holds is False
