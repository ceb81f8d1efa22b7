"""Verification of whole token processes: each defect of an objective, a sampler or a declared kernel fails its check."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Uniform
from sedd_graph_registry.objectives.block_diffusion import BlockNelbo
from sedd_graph_registry.objectives.bounds import Nelbo, ScoreEntropy
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.check import Check
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.families.plan import Part
from sedd_graph.verify.tokens import prove_objective, prove_parts, prove_sampler
from tests.plans import maker, token_plan

REGISTRY = discover()
Make = Callable[[int | None], TokenParts]


def part(op: str, **config: Any) -> Part:
    contract = REGISTRY.contract(op)
    return Part(contract, contract.config.model_validate(config))


def processes(
    output: str = "log_x0", *, kernel: Part | None = None, objective: str = "nelbo", sampler: str = "analytic"
) -> Make:
    """Return the factory of a sound process."""
    kernel = kernel or part("absorb")
    schedule = "loglinear" if kernel.name == "absorb" else "geometric"
    made: Make = maker(token_plan(kernel, part(schedule), part(objective), part(sampler), 4, output), REGISTRY)
    return made


def failing(checks: list[Check]) -> set[str]:
    return {c.name for c in checks if c.holds is False}


class Doubled(Nelbo, kind="objective"):
    """Twice the bound."""

    class Config(Nelbo.Config):
        pass

    def loss(self, *arguments: Any) -> Tensor:
        return 2 * super().loss(*arguments)


class FirstHalf(Nelbo, kind="objective"):
    """The bound of the first half of each row."""

    class Config(Nelbo.Config):
        pass

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        first = torch.arange(batch.width) < batch.width // 2
        return super().loss(outputs, draw, dataclasses.replace(batch, loss=batch.loss & first), kernel, schedule)


class WithoutRate(ScoreEntropy, kind="objective"):
    """Score entropy without the factor dsigma."""

    class Config(ScoreEntropy.Config):
        pass

    def corrupt(self, *arguments: Any, **more: Any) -> Draw:
        draw = super().corrupt(*arguments, **more)
        return dataclasses.replace(draw, dsigma=torch.ones_like(draw.dsigma))


@pytest.mark.parametrize(
    ("cls", "output", "objective", "caught"),
    [
        (Doubled, "log_x0", "nelbo", "objective.loss"),
        (FirstHalf, "log_x0", "nelbo", "objective.loss"),
        (WithoutRate, "log_score", "score_entropy", "objective.draws"),
    ],
)
def test_a_wrong_bound_is_caught(cls: type[Objective], output: str, objective: str, caught: str) -> None:
    make = processes(output, objective=objective)
    wrong = cls(cls.Config(), Context({"n": 4}))
    assert failing(prove_objective(make, output, "quick")) == set()
    found = failing(prove_objective(lambda states: make(states)._replace(objective=wrong), output, "quick"))
    assert caught in found


class HalfEvaluated(BlockNelbo, kind="objective"):
    """Draws of evaluation have half their weight; those of training are sound."""

    class Config(BlockNelbo.Config):
        pass

    def bound_draw(
        self, batch: Batch, kernel: Kernel, schedule: Schedule, *, random: Randomness
    ) -> tuple[Objective, Draw]:
        objective, draw = super().bound_draw(batch, kernel, schedule, random=random)
        return objective, dataclasses.replace(draw, weight=draw.weight / 2)


def test_a_wrong_bound_of_evaluation_is_caught() -> None:
    make = processes(objective="block_nelbo")
    wrong = HalfEvaluated(HalfEvaluated.Config(block=2), Context({"n": 4}))
    assert failing(prove_objective(make, "log_x0", "quick")) == set()
    found = prove_objective(lambda states: make(states)._replace(objective=wrong), "log_x0", "quick")
    assert failing(found) == {"objective.evaluated"}


class LowBound(Uniform, kind="kernel"):
    """The bound on reverse rates is too low for uniformization."""

    class Config(Uniform.Config):
        pass

    @property
    def rate_bound(self) -> float:
        return 0.1


def test_a_move_of_a_probability_above_one_is_caught() -> None:
    make = processes(kernel=part("uniform"), sampler="uniformization")
    wrong = LowBound(LowBound.Config(), Context({"n": 4}))
    assert failing(prove_sampler(make, "log_x0", "quick")) == set()
    found = failing(prove_sampler(lambda states: make(states)._replace(kernel=wrong), "log_x0", "quick"))
    assert "sampler.bound" in found


def test_a_heuristic_sampler_is_measured_and_not_judged() -> None:
    (found,) = (
        c for c in prove_sampler(processes(sampler="confidence"), "log_x0", "quick") if c.name == "sampler.heuristic"
    )
    assert found.holds is None
    assert "do not follow the model" in found.claim


class SlowDeclared(Uniform, kind="kernel"):
    """A kernel that mixes slowly at the declared number of states, where its loss is also inaccurate in float32."""

    class Config(Uniform.Config):
        pass

    def unmixed(self, sigma: float) -> float | None:
        return 0.1

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        exact = torch.as_tensor(super().nelbo(log_x0, xt, x0, sigma))
        return exact * 1.01 if log_x0.dtype == torch.float32 else exact


def test_a_defect_at_the_declared_size_alone_is_caught() -> None:
    make = processes(kernel=part("uniform"))
    wrong = SlowDeclared(SlowDeclared.Config(), Context({"n": 4}))
    assert failing(prove_parts(make)) == set()
    found = prove_parts(lambda states: make(states)._replace(kernel=wrong) if states is None else make(states))
    assert failing(found) == {"kernel.declared", "kernel.mixed"}
