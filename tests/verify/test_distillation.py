"""Distillation is proved on enumerated data for six processes; wrong couplings, times, gradients and bounds are caught."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from sedd_graph_registry.training.distillation import IDLM, Consistency
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.component.registry import installed
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.distillation import UNLIKELY, Distillation, Networks, Pair
from sedd_graph.diffusion.strings.deletion_distillation import DeletionDistillable
from sedd_graph.families import token_distillation
from sedd_graph.families.table import process_class
from sedd_graph.families.token_distillation import TokenDistillable
from sedd_graph.runs.check import check
from sedd_graph.verify import distillation, distillation_case, distillation_follower
from sedd_graph.verify.distillation_case import DistillationCase

SIX = ["mdlm-tiny", "sedd-uniform-tiny", "mixture-tiny", "power-tiny", "bd3lm-tiny", "did-tiny"]
FORWARD = Consistency(Consistency.Config())
ROW = IDLM(IDLM.Config(credit="row"))


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "ROWS", 12_000)
    monkeypatch.setattr(distillation_follower, "ROWS", 12_000)
    monkeypatch.setattr(distillation_follower, "BOUND_ROWS", 30_000)
    monkeypatch.setattr(distillation_follower, "GRADIENT_ROWS", 60_000)
    monkeypatch.setattr(distillation_case, "LEVELS", ((0.5, 1.0),))


def proved(name: str, objective: Distillation) -> dict[str, Any]:
    report = check(name)
    found = process_class(report.plan.family).prove_distillation(report.plan, installed(), objective)
    return {c.name: c for c in found}


def failing(name: str, objective: Distillation = FORWARD) -> set[str]:
    return {name for name, c in proved(name, objective).items() if c.holds is False}


@pytest.mark.parametrize("name", SIX)
def test_forward_consistency_is_least_at_the_posterior(name: str) -> None:
    found = proved(name, FORWARD)
    assert {c.holds for c in found.values()} == {True}, found
    assert "distill.optimum" in found


@pytest.mark.parametrize("name", ["mdlm-tiny", "sedd-uniform-tiny"])
def test_idlm_is_the_divergence_from_the_data(name: str) -> None:
    found = proved(name, ROW)
    assert {c.holds for c in found.values()} == {True}, found
    assert {"distill.data", "distill.gradient", "distill.follower"} <= found.keys()


@pytest.mark.parametrize(
    "objective",
    [
        Consistency(Consistency.Config(divergence="reverse")),
        Consistency(Consistency.Config(divergence="forward", pairs="student")),
        IDLM(IDLM.Config()),
        IDLM(IDLM.Config(credit="prediction")),
    ],
    ids=["reverse", "student", "token", "prediction"],
)
def test_a_heuristic_is_called_one(objective: Distillation) -> None:
    found = proved("mdlm-tiny", objective)
    assert found["distill.heuristic"].holds is None
    assert not {"distill.optimum", "distill.gradient"} & found.keys()
    assert not [c for c in found.values() if c.holds is False]


@pytest.mark.parametrize("credit", ["token", "prediction"])
@pytest.mark.parametrize("name", ["mdlm-tiny", "sedd-uniform-tiny", "mixture-tiny", "power-tiny"])
def test_heuristic_credit_leads_towards_the_data(name: str, credit: Any) -> None:
    found = proved(name, IDLM(IDLM.Config(credit=credit)))
    assert found["distill.direction"].holds, found["distill.direction"]


def test_the_credit_of_a_prediction_is_the_mean_of_that_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under masks whose tokens all have one rate, where the noisy token tells nothing of the clean one; with less variance."""
    case = enumerated("mdlm-tiny", monkeypatch)
    table, students = distillation_follower._imperfect(case, 0.7) or pytest.fail("students are enumerated")
    _, follower = students.divergence(table)
    generator = torch.Generator().manual_seed(5)
    batch, directions = case.draw(80_000, generator), torch.randn(8, *table["log_x0"].shape, generator=generator)

    def along(credit: Any) -> Tensor:
        """Gradients of each row along the directions, [b, 8]."""
        objective, asked = IDLM(IDLM.Config(credit=credit)), dict[str, Tensor]()
        s, t = (torch.full((len(batch),), v) for v in (0.3, 0.7))
        draw = objective.at(case.process, batch, s, t, Randomness(torch.Generator().manual_seed(7)))
        with torch.enable_grad():
            networks = Networks(distillation_follower._student(case, table, asked), case.perfect, follower)
            loss = objective.loss(case.process, networks, draw, batch)
            (given,) = torch.autograd.grad(loss.sum(), [asked["log_x0"]])
        return torch.stack([(given * d[asked["code"]]).double().flatten(1).sum(1) for d in directions], 1)

    token, prediction = along("token"), along("prediction")
    off = (token - prediction).mean(0).abs() / ((token - prediction).std(0) / len(batch) ** 0.5)
    assert float(off.max()) < 5
    assert float((prediction.mean(0).abs() / (prediction.std(0) / len(batch) ** 0.5)).max()) > 10
    assert bool((prediction.var(0) < 0.7 * token.var(0)).all())


def enumerated(name: str, monkeypatch: pytest.MonkeyPatch) -> DistillationCase:
    """The enumerated data set that a process is proved on."""
    found: list[DistillationCase] = []

    def keep(case: DistillationCase, objective: Distillation) -> list[Check]:
        found.append(case)
        return []

    monkeypatch.setattr(distillation, "prove_distillation", keep)
    proved(name, FORWARD)
    return found[0]


def test_the_reverse_divergence_is_least_at_a_sharper_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the geometric mean of the teacher's predictions over those x_s at which the token is still noisy."""
    case = enumerated("mdlm-tiny", monkeypatch)
    process: Any = case.process
    generator = torch.Generator().manual_seed(3)
    batch = case.draw(20_000, generator)
    s, t = (torch.full((len(batch),), float(case.time(torch.tensor(v).double()))) for v in (0.3, 0.9))
    pair = process.pair(batch, s, t, Randomness(generator))
    teacher, true = case.perfect(pair.lower, batch), case.perfect(pair.upper, batch)
    code = case.code(pair.upper, batch)[:, 0]
    mask = process.kernel.mask
    hidden, still = pair.upper.xt == mask, pair.lower.xt == mask
    _, row = torch.unique(code, return_inverse=True)

    def means(value: Tensor, weight: Tensor) -> Tensor:
        """Mean over the rows with the same x_t, [b, l, v], of a value with a weight [b, l]."""
        total, count = torch.zeros(len(code), *value.shape[1:]), torch.zeros(len(code), weight.shape[1])
        total, count = total.index_add(0, row, value * weight[..., None]), count.index_add(0, row, weight)
        return (total / count.clamp(min=1)[..., None])[row]

    log_p = teacher["log_x0"][..., :-1].clamp(min=math.log(UNLIKELY))
    least = torch.cat([means(log_p, still.float()).log_softmax(-1), torch.full((*still.shape, 1), -60.0)], -1)
    own = least.clone().requires_grad_()
    with torch.enable_grad():
        loss = process.divergence({"log_x0": own}, teacher, pair, batch, "reverse")
        (gradient,) = torch.autograd.grad(loss.sum(), [own])
    mean = means(gradient, torch.ones_like(still, dtype=torch.float32))
    assert float(mean[..., :-1].abs().max()) < 1e-4
    assert float(gradient.abs().max()) > 0.01

    def entropy(log_q: Tensor) -> float:
        each = -(log_q.exp() * log_q.clamp(min=-60)).sum(-1)
        return float(
            each[hidden & (means(still[..., None].float(), torch.ones_like(still).float())[..., 0] > 0)].mean()
        )

    assert entropy(least[..., :-1]) < entropy(true["log_x0"][..., :-1])


@pytest.mark.parametrize(
    ("objective", "optimum", "check"),
    [
        (Consistency(Consistency.Config(divergence="reverse")), "posterior", "distill.optimum"),
        (IDLM(IDLM.Config(credit="token")), "data", "distill.gradient"),
    ],
    ids=["reverse", "token"],
)
def test_a_heuristic_that_claims_an_optimum_is_caught(objective: Any, optimum: str, check: str) -> None:
    class Claims(type(objective), kind="distillation"):  # type: ignore[misc]  # a class of the case
        Config = type(objective).Config
        least_at = optimum

    assert failing("mdlm-tiny", Claims(objective.config)) == {check}


# -- planted faults -------------------------------------------------------------------------------------------------


def test_independent_draws_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TokenDistillable.pair

    def pair(self: TokenDistillable, batch: Any, s: Tensor, t: Tensor, random: Any) -> Pair:
        first, second = original(self, batch, s, t, random), original(self, batch, s, t, random)
        return Pair(first.lower, second.upper)

    monkeypatch.setattr(TokenDistillable, "pair", pair)
    assert "distill.pairs" in failing("mdlm-tiny")


def test_replaced_tokens_that_are_never_replaced_again_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """One uniform number decides at both levels: each marginal is right, and x_t tells about x_0 what x_s does not."""
    original = TokenDistillable.pair

    def pair(self: TokenDistillable, batch: Any, s: Tensor, t: Tensor, random: Any) -> Pair:
        found = original(self, batch, s, t, random)
        state = random.generator.get_state()
        draws = []
        for draw in (found.lower, found.upper):
            random.generator.set_state(state)
            xt = self.kernel.sample(batch.tokens, draw.sigma, random=random, corrupt=batch.corrupt)
            draws.append(dataclasses.replace(draw, xt=xt))
        return Pair(*draws)

    monkeypatch.setattr(TokenDistillable, "pair", pair)
    assert "distill.pairs" in failing("mixture-tiny")


def test_exchanged_times_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TokenDistillable.pair

    def pair(self: TokenDistillable, *arguments: Any) -> Pair:
        found = original(self, *arguments)
        return Pair(found.upper, found.lower)

    monkeypatch.setattr(TokenDistillable, "pair", pair)
    assert "distill.optimum" in failing("mdlm-tiny")


def test_a_teacher_with_a_gradient_is_caught() -> None:
    class Leaks(Consistency, kind="distillation"):
        Config = Consistency.Config

        def loss(self, process: Any, networks: Networks, draw: Any, batch: Any) -> Tensor:
            student, teacher = networks.student(draw.pair.upper, batch), networks.teacher(draw.pair.lower, batch)
            at = process._groups(process.objective.read_positions(draw.pair.upper, batch, process.kernel), batch)
            zero = torch.zeros(len(at.row))
            q, p = (
                process._below(*each, at, zero) for each in ((student, draw.pair.upper), (teacher, draw.pair.lower))
            )
            nats = (p * (p.clamp(min=1e-20).log() - q.clamp(min=1e-20).log())).sum((1, 2))
            return torch.zeros(len(batch)).index_add(0, at.row, nats)

    assert "distill.teacher" in failing("mdlm-tiny", Leaks(FORWARD.config))


def test_a_loss_that_draws_is_caught() -> None:
    class Draws(Consistency, kind="distillation"):
        Config = Consistency.Config

        def loss(self, *arguments: Any) -> Tensor:
            return super().loss(*arguments) * (1 + torch.rand(()))

    assert "distill.loss" in failing("mdlm-tiny", Draws(FORWARD.config))


def test_a_bound_that_is_not_the_processs_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TokenDistillable.nats
    monkeypatch.setattr(TokenDistillable, "nats", lambda self, *arguments: 0.5 * original(self, *arguments))
    assert failing("mdlm-tiny", ROW) == {"distill.data", "distill.gradient"}


def test_lower_states_follow_the_posterior_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    original = token_distillation.lower_states
    monkeypatch.setattr(
        token_distillation, "lower_states", lambda *a: original(a[0], a[1], a[2], a[3], 0.5 * a[4], a[5])
    )
    assert "distill.pairs" in failing("mdlm-tiny")


def with_gradient(network: str, factor: float, config: Any = ROW.config) -> Distillation:
    """``idlm`` with the gradients of one network multiplied."""

    class Scaled(IDLM, kind="distillation"):
        Config = IDLM.Config

        def loss(self, process: Any, networks: Networks, draw: Any, batch: Any) -> Tensor:
            original = getattr(networks, network)

            def changed(at: Any, rows: Any) -> dict[str, Tensor]:
                return {name: factor * v + (1 - factor) * v.detach() for name, v in original(at, rows).items()}

            return super().loss(process, networks._replace(**{network: changed}), draw, batch)

    return Scaled(config)


@pytest.mark.parametrize("factor", [-1.0, 0.5])
def test_another_gradient_than_that_of_the_divergence_is_caught(factor: float) -> None:
    assert failing("mdlm-tiny", with_gradient("student", factor)) == {"distill.gradient"}


@pytest.mark.parametrize("credit", ["token", "prediction"])
def test_heuristic_credit_with_the_wrong_sign_is_caught(credit: Any) -> None:
    objective = with_gradient("student", -1.0, IDLM.Config(credit=credit))
    assert failing("mdlm-tiny", objective) == {"distill.direction"}


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_a_follower_that_does_not_follow_is_caught(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "prove_gradient", lambda *arguments: Check("distill.gradient", "", None, "", ""))
    assert failing("mdlm-tiny", with_gradient("follower", factor)) == {"distill.follower"}


def test_the_expected_numbers_without_what_is_seen_have_the_same_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward consistency on strings is least at the posterior with either form of the teacher's numbers."""
    original = DeletionDistillable.target
    monkeypatch.setattr(DeletionDistillable, "target", lambda self, *a, seen: original(self, *a, seen=False))
    found = proved("did-tiny", FORWARD)
    assert found["distill.optimum"].holds, found["distill.optimum"]
    monkeypatch.setattr(
        "sedd_graph.diffusion.strings.deletion_distillation._earlier", lambda pair: torch.ones_like(pair.lower.sigma)
    )
    assert "distill.optimum" in failing("did-tiny")
