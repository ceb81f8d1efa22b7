"""Planted faults of kernels in discrete time, and of the objective and sampler on them: each is caught by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.steps import Steps
from sedd_graph_registry.objectives.discrete_time import D3PM
from sedd_graph_registry.sampling.steps import Ancestral
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.diffusion.tokens.step_kernel import step_tables
from sedd_graph.verify.kernel_steps import check_own_schedule
from sedd_graph.verify.noise import check_kernel
from sedd_graph.verify.tokens import prove_objective, prove_process, prove_sampler
from tests.plans import maker, token_plan
from tests.verify.parts import REGISTRY, part
from tests.verify.planted import Fault, after, before

T = 16
GAUSSIAN: dict[str, Any] = {"steps": T, "beta_first": 0.1, "beta_last": 2.0}
TABLE = tuple(
    tuple(tuple(row) for row in (torch.rand(4, 4, generator=torch.Generator().manual_seed(s)).softmax(0)).tolist())
    for s in range(6)
)


def failing(checks: list[Check]) -> set[str]:
    return {c.name for c in checks if c.holds is False}


def tables(change: Any) -> dict[str, Any]:
    """Replace the tables by ``change(tables, steps)``, with T + 1 cumulative products before T step matrices."""

    def make_tables(self: Any) -> Tensor:
        return change(step_tables(self.step_matrices()), self.step_matrices()).contiguous()

    return {"make_tables": make_tables}


def with_products(products: Any) -> dict[str, Any]:
    """Replace the cumulative products by ``products(steps)`` [T, n, n]."""

    def change(found: Tensor, steps: Tensor) -> Tensor:
        found[1 : len(steps) + 1] = products(steps)
        return found

    return tables(change)


def transposed(steps: Tensor) -> Tensor:
    out = [steps[0]]
    for step in steps[1:]:
        out.append(out[-1] @ step)
    return torch.stack(out)


def without_last(found: Tensor, steps: Tensor) -> Tensor:
    found[len(steps)] = found[len(steps) - 1]
    return found


def unbalanced(found: Tensor, steps: Tensor) -> Tensor:
    steps = steps.clone()
    steps[4, :, 1] *= 1.001
    return step_tables(steps)


def negative(found: Tensor, steps: Tensor) -> Tensor:
    steps = steps.clone()
    steps[3, 0, 3] -= 0.1
    steps[3, 1, 3] += 0.1
    return step_tables(steps)


def shifted(by: int) -> Any:
    return lambda self, x, sigma, *more: (x, sigma + by, *more)


def of_one_step(self: Any, now: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """P(now | past) without the skipped steps: the matrix of the last one."""
    return self.tables, torch.where(now == past, 0, torch.where(past == 0, now, self.steps + now))


def commuted(self: Any, now: int, past: int) -> Tensor:
    out = self.tables[self.steps + past + 1]
    for step in range(past + 2, now + 1):
        out = out @ self.tables[self.steps + step]
    return out


def late(self: Any, probs: Tensor, x: Tensor, sigma: Tensor, below: Tensor) -> tuple[Tensor, ...]:
    return probs, x, sigma, (below + 1).clamp(max=sigma)


def even(self: Any, rows: int, length: int, *, generator: torch.Generator, allowed: Any) -> Tensor:
    return torch.randint(0, self.states if allowed is None else 1, (rows, length), generator=generator)


def single_precision(self: Any, probs: Tensor, sigma: Tensor) -> Tensor:
    return (probs.half() @ self.tables[self._step(sigma)].transpose(1, 2).half()).double().clamp(min=1e-7)


FAULTS = [
    Fault("products in the wrong order", Steps, with_products(transposed), ("kernel.transition",), GAUSSIAN),
    Fault("powers of one matrix for products", Steps, with_products(lambda s: transposed(s[:1].expand_as(s))), ("kernel.transition",), GAUSSIAN),
    Fault("products that lack the last step", Steps, tables(without_last), ("kernel.transition",), GAUSSIAN),
    Fault("a column that does not sum to 1", Steps, tables(unbalanced), ("kernel.step_matrix",), GAUSSIAN),
    Fault("a negative probability", Steps, tables(negative), ("kernel.step_matrix",), GAUSSIAN),
    Fault("transposed matrices", Steps, tables(lambda f, s: step_tables(s.transpose(1, 2))), ("kernel.step_matrix",), {"form": "table", "table": TABLE}),
    Fault("skipped steps are left out", Steps, {"_between": of_one_step}, ("kernel.semigroup",), GAUSSIAN),
    Fault("skipped steps in the wrong order", Steps, {"_product": commuted}, ("kernel.semigroup",), GAUSSIAN),
    Fault("noise of one step more", Steps, before(Steps, "sample", shifted(1)), ("kernel.sample",), GAUSSIAN),
    Fault("noise of one step less", Steps, before(Steps, "sample", shifted(-1)), ("kernel.sample",), GAUSSIAN),
    Fault("the posterior of one step less", Steps, before(Steps, "posterior", late), ("kernel.posterior",), GAUSSIAN),
    Fault("a posterior that ignores the prediction", Steps, before(Steps, "posterior", lambda self, p, *more: (torch.full_like(p, 1 / p.shape[-1]), *more)), ("kernel.posterior",), GAUSSIAN),
    Fault("a posterior in half precision", Steps, {"_mixed": single_precision}, ("kernel.posterior", "kernel.float32"), GAUSSIAN),
    Fault("a posterior of the mean row", Steps, after(Steps, "posterior", lambda self, found, *more: found.mean(0, keepdim=True).expand_as(found)), ("kernel.pure",), GAUSSIAN),
    Fault("scores of the step before", Steps, before(Steps, "log_score", lambda self, p, x, s: (p, x, s - 1)), ("kernel.log_score",), GAUSSIAN),
    Fault("an even prior of an uneven process", Steps, {"prior": even}, ("kernel.prior",), {"form": "table", "table": TABLE}),
    Fault("noise that is not the prior at the last step", Steps, {}, ("kernel.prior",), {"steps": 3, "beta_first": 0.01, "beta_last": 0.02}),
    Fault("rates of a process in steps", Steps, {"rate_matrix": lambda self, sigma: torch.zeros(4, 4)}, ("kernel.declares",), GAUSSIAN),
    Fault("one masking rate of a process in steps", Steps, {"masks_evenly": True}, ("kernel.declares",), GAUSSIAN),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_a_fault_of_a_kernel_is_caught_by_name(fault: Fault) -> None:
    found = failing(check_kernel(fault.of(), end=0.0, proof="quick"))
    assert found & set(fault.caught), found


@pytest.mark.parametrize("config", [GAUSSIAN, {"form": "table", "table": TABLE}], ids=["gaussian", "table"])
def test_sound_kernels_pass(config: dict[str, Any]) -> None:
    assert not failing(check_kernel(Fault("", Steps, {}, (), config).of(), end=0.0, proof="quick"))


def test_a_schedule_of_other_steps_is_caught() -> None:
    kernel = Fault("", Steps, {}, (), GAUSSIAN).of()
    assert check_own_schedule(kernel, float(T)).holds
    assert not check_own_schedule(kernel, T - 1.0).holds


def process(**objective: Any) -> Any:
    plan = token_plan(
        part("steps", **GAUSSIAN), part("steps_taken", steps=T), part("d3pm", steps=T, **objective), part("ancestral", steps=T), 4, "log_x0"
    )  # fmt: skip
    return maker(plan, REGISTRY)


def replaced(make: Any, **parts: Any) -> Any:
    def other(states: int | None) -> TokenParts:
        found = make(states)
        return found._replace(**{k: v(found) for k, v in parts.items()})

    return other


@pytest.mark.parametrize(
    "options",
    [
        {"first": "prediction", "auxiliary": 0.01},
        *(pytest.param(v, marks=pytest.mark.slow) for v in ({}, {"first": "prediction"}, {"prior": False})),
    ],
    ids=str,
)
def test_sound_processes_pass(options: dict[str, Any]) -> None:
    checks = prove_process(process(**options), "log_x0", "quick")
    assert not failing(checks)


class DoublePrior(D3PM, kind="objective"):
    def prior_term(self, *arguments: Any) -> Tensor:
        return 2 * super().prior_term(*arguments) + 0.01


class RawFirst(D3PM, kind="objective"):
    """The model of step 1 is the prediction, and the declaration says the posterior."""

    raw_first = False

    def loss(self, outputs: Any, draw: Any, batch: Any, kernel: Any, schedule: Any) -> Tensor:
        config = self.config.model_copy(update={"first": "prediction"})
        return D3PM(config, self.context).loss(outputs, draw, batch, kernel, schedule)


class Undeclared(D3PM, kind="objective"):
    """The raw auxiliary cross-entropy, without saying that its optimum is another one."""

    def off_optimum(self, *arguments: Any) -> None:
        return None


class OneStepLevels(D3PM, kind="objective"):
    def below(self, draw: Any, kernel: Any, schedule: Any) -> Tensor:
        return (super().below(draw, kernel, schedule) - 1).clamp(min=0)


@pytest.mark.parametrize(
    ("cls", "options", "caught"),
    [
        (DoublePrior, {}, "objective.tight"),
        (RawFirst, {}, "objective.loss"),
        (Undeclared, {"auxiliary": 0.5}, "objective.optimum"),
        (OneStepLevels, {}, "objective.draws"),
    ],
)
def test_a_fault_of_the_objective_is_caught_by_name(cls: Any, options: dict[str, Any], caught: str) -> None:
    make = replaced(process(**options), objective=lambda parts: cls(parts.objective.config, parts.objective.context))
    assert caught in failing(prove_objective(make, "log_x0", "quick"))


class LastMatrix(Ancestral, kind="sampler"):
    """A step that skips some of the kernel's takes the matrix of one of them."""

    def step(self, walk: Any, t: Tensor, s: Tensor | None) -> None:
        sigma = walk.schedule.sigma(t)
        below = torch.zeros_like(sigma) if s is None else walk.schedule.sigma(s)
        tables = walk.kernel.tables
        mixed = walk.clean(t).double() @ tables[below.round().long()].transpose(1, 2)
        into = tables[walk.kernel.steps + sigma.round().long()][torch.arange(len(t))[:, None], walk.x]
        walk.move(into * mixed / (into * mixed).sum(-1, keepdim=True), final=s is None)


class Continuous(Ancestral, kind="sampler"):
    """Evenly spaced times to almost 0 and a last step, as in continuous time: the last but one is no step of the kernel."""

    def walk(self, walk: Any, steps: int) -> None:
        rows = walk.x.shape[0]
        times = torch.linspace(1.0, 1e-5, steps + 1)
        for index in range(steps):
            self.step(walk, times[index].expand(rows), times[index + 1].expand(rows) * 0.5)
            walk.end_step()


@pytest.mark.parametrize(("cls", "caught"), [(LastMatrix, "sampler.law"), (Continuous, "sampler.law")])
def test_a_fault_of_the_sampler_is_caught_by_name(cls: Any, caught: str) -> None:
    make = replaced(process(), sampler=lambda parts: cls(parts.sampler.config, parts.sampler.context))
    assert caught in failing(prove_sampler(make, "log_x0", "quick"))
