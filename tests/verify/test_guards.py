"""Every error of a component is a finding that names the component and its method, not an internal error."""

from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Uniform
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.objectives.bounds import Nelbo
from sedd_graph_registry.strings.birth_death import Delete
from sedd_graph_registry.strings.samplers import StringTau

from sedd_graph.component.base import Context
from sedd_graph.component.check import Check
from sedd_graph.component.registry import discover
from sedd_graph.diffusion.strings.parts import StringParts
from sedd_graph.diffusion.tokens.parts import TokenParts
from sedd_graph.errors import UserError
from sedd_graph.families.strings import make_parts
from sedd_graph.verify.classifier import check_classifier
from sedd_graph.verify.guards import described, guarded
from sedd_graph.verify.strings import prove_strings
from sedd_graph.verify.tokens import prove_objective, prove_parts, prove_sampler
from tests.plans import string_plan
from tests.verify.parts import part
from tests.verify.test_tokens import processes


def raising(name: str) -> dict[str, Any]:
    def method(self: Any, *arguments: Any, **more: Any) -> Any:
        raise KeyError("weights")

    method.__code__ = method.__code__.replace(co_name=name)
    return {name: method}


def planted(base: Any, method: str, states: int) -> Any:
    """Construct a component of which one method raises an error."""
    cls = type(f"Planted{base.__name__}", (base,), raising(method))
    return cls(base.Config(), Context({"n": states}))


def tokens(**replaced: Any) -> Any:
    sound = processes(kernel=part("uniform"))

    def make(states: int | None) -> TokenParts:
        return sound(states)._replace(**{k: f(states or 4) for k, f in replaced.items()})

    return make


def values(checks: list[Check]) -> dict[str, str]:
    return {c.name: c.value for c in checks if c.holds is False}


@pytest.mark.parametrize("method", ["bound", "evaluated", "differs", "corrupt", "loss"])
def test_of_an_objective(method: str) -> None:
    make = tokens(objective=lambda n: planted(Nelbo, method, n))
    found = values(prove_objective(make, "log_x0", "quick"))
    assert found["objective.runs"].endswith(f"PlantedNelbo.{method}: KeyError: 'weights'")


@pytest.mark.parametrize("method", ["sigma", "dsigma", "time"])
def test_of_a_schedule(method: str) -> None:
    make = tokens(schedule=lambda n: planted(LogLinear, method, n))
    found = values(prove_parts(make, "quick"))
    assert found["schedule.runs"].endswith(f"PlantedLogLinear.{method}: KeyError: 'weights'")


@pytest.mark.parametrize("method", ["posterior", "unmixed", "prior"])
def test_of_a_kernel(method: str) -> None:
    make = tokens(kernel=lambda n: planted(Uniform, method, n))
    found = values(prove_parts(make, "quick"))
    assert any(value.endswith(f"PlantedUniform.{method}: KeyError: 'weights'") for value in found.values())


def test_of_a_toy_that_cannot_be_made() -> None:
    def make(states: int | None) -> TokenParts:
        if states is not None:
            raise ValueError("no toy")
        return tokens()(None)

    for checks in (
        prove_parts(make, "quick"),
        prove_objective(make, "log_x0", "quick"),
        prove_sampler(make, "log_x0", "quick"),
    ):
        assert list(values(checks).values()) == ["ValueError: no toy"]


@pytest.mark.parametrize(
    ("of", "base", "method", "name"),
    [
        ("kernel", Delete, "table", "strings.runs"),
        ("schedule", LogLinear, "sigma", "schedule.runs"),
        ("sampler", StringTau, "walk", "sampler.runs"),
    ],
)
def test_of_components_of_strings(of: str, base: Any, method: str, name: str) -> None:
    plan = string_plan(part("delete"), part("loglinear"), part("dise"), part("string_tau"), 10)

    def make(states: int | None) -> StringParts:
        parts = make_parts(plan, discover(), states)
        return parts._replace(**{of: planted(base, method, parts.kernel.states)})

    found = values(prove_strings(make, "quick"))
    assert found[name].endswith(f"Planted{base.__name__}.{method}: KeyError: 'weights'")


def test_of_a_classifier() -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    assert list(values(check_classifier(Broken(), 4))) == ["classifier.runs"]  # type: ignore[arg-type]  # on purpose


def test_the_innermost_component_is_named() -> None:
    schedule = planted(LogLinear, "dsigma", 3)
    outer = type("Outer", (LogLinear,), {"sigma": lambda self, t: schedule.dsigma(t)})
    (check,) = guarded("x", lambda: outer(LogLinear.Config(), Context({})).sigma(torch.ones(1)))
    assert (check.name, check.holds) == ("x.runs", False)
    assert check.value.endswith("PlantedLogLinear.dsigma: KeyError: 'weights'")


def test_messages_for_users_stay_as_they_are() -> None:
    assert described(UserError("take fewer")) == "take fewer"
    assert described(ValueError("a\nb")) == "ValueError: a"
