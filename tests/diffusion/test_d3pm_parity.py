"""The public D3PM code (google-research, images and text) by its reference file: matrices, posteriors, losses.

Components are configured as a blueprint configures them. ``images`` count steps from 0 to T - 1, ``text`` too; here
they are 1 to T. Axes: T steps, B rows, L positions, K states.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.component.registry import installed
from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.tokens.objective import lower_posterior
from tests.conftest import PARITY

K, T = 7, 12
FILE = load_file(PARITY / "d3pm.safetensors")
ALMOST_1 = 1 - 1e-12
COSINE = {"op": "cosine", "eps": 1e-13, "offset": 0.008}
JSD = {"op": "betas", "values": [1 / (T - i) for i in range(T)], "largest": ALMOST_1}
LINEAR = {"op": "linear_betas", "steps": T, "beta_first": 0.02, "beta_last": 1.0, "largest": ALMOST_1}
NEAREST = {"op": "steps", "steps": T, "beta_first": 0.05, "beta_last": 0.5, "end": False, "neighbours": 3}
IMAGES = {"first": "prediction"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "images.uniform.cosine": ({"op": "uniform"}, COSINE, {"last": "clipped"}),
    "images.uniform.linear": ({"op": "uniform"}, LINEAR, {"last": "schedule"}),
    "images.absorbing.jsd": ({"op": "absorb"}, JSD, {}),
    "images.absorbing_data.jsd": ({"op": "absorb"}, JSD, {}),
    "images.absorbing_data.cosine": ({"op": "absorb"}, COSINE, {"last": "clipped"}),
    "images.gaussian.linear": ({"op": "steps", "steps": T, "beta_first": 0.02, "beta_last": 0.5}, None, {}),
    "text.uniform.cosine": ({"op": "uniform"}, COSINE, {"last": "clipped"}),
    "text.absorbing.standard": ({"op": "absorb"}, JSD, {}),
    "text.gaussian.linear": (
        {"op": "steps", "steps": T, "beta_first": 0.02, "beta_last": 0.5, "end": False, "scale": "text"},
        None,
        {},
    ),
    "text.nearest.linear": (NEAREST | {"form": "nearest"}, None, {}),
    "text.nearest_cached.linear": (NEAREST | {"form": "nearest_rate", "rounded": True}, None, {}),
}
"""Kernel, schedule and options of the objective of each case."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A case of the file with our components; states are renumbered so that the mask is the last one.

    Attributes:
        name: Name of the case.
        kernel: Our kernel.
        schedule: Our schedule.
        objective: Function that makes our objective with more options.
        order: The state of the file that each of our states is, int64 [K].
    """

    name: str
    kernel: Any
    schedule: Any
    objective: Callable[..., Any]
    order: Tensor

    @property
    def text(self) -> bool:
        return self.name.startswith("text")

    def array(self, name: str) -> Tensor:
        """Return an array of the file, without change."""
        return FILE[f"{self.name}.{name}"]

    def states(self, name: str) -> Tensor:
        """Return an array of states, in our numbers."""
        return self.order.argsort()[self.array(name)]

    def laws(self, name: str) -> Tensor:
        """Return an array whose last axis is states, in our order, float64."""
        return self.array(name)[..., self.order].double()

    def matrices(self, name: str) -> Tensor:
        """Return matrices [T, K, K] in our order, with the columns of ``from`` states."""
        found = self.array(name).double()
        found = found if self.text else found.transpose(1, 2)
        return found[:, self.order[:, None], self.order]

    @property
    def batch(self) -> Batch:
        return Batch.of(self.states("x_start"))

    def step(self, step: int, **options: Any) -> tuple[Any, dict[str, Tensor], Draw]:
        """Return the objective, the network's outputs and the noisy rows of one step, from 1 to T."""
        objective = self.objective(**options)
        xt = self.states("x_next" if self.text else "x_t")[step - 1]
        t = torch.full((len(xt),), step / T)
        draw = objective.corrupt(self.batch, self.kernel, self.schedule, random=None, t=t, xt=xt)
        logits = self.array("logits")[step - 1][..., self.order]
        outputs = {"log_x0": logits.double().log_softmax(-1)}
        return objective, outputs, dataclasses.replace(draw, weight=torch.ones_like(t))

    def nats(self, step: int, **options: Any) -> Tensor:
        """Return the loss of one step of each row, float64 [B]."""
        objective, outputs, draw = self.step(step, **options)
        loss: Tensor = objective.loss(outputs, draw, self.batch, self.kernel, self.schedule)
        return loss.double()


def component(declared: Mapping[str, Any], axes: Mapping[str, int]) -> Any:
    registry = installed()
    cls = registry.component(str(declared["op"]))
    config = cls.Config.model_validate({k: v for k, v in declared.items() if k != "op"})
    return cls(config, Context(axes))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Reference:
    monkeypatch.chdir(tmp_path)
    name = request.param
    kernel, schedule, options = CASES[name]
    if f"{name}.embeddings" in FILE:
        np.save(tmp_path / "embeddings.npy", FILE[f"{name}.embeddings"].numpy())
        kernel = kernel | {"file": "embeddings.npy"}
    made = component(kernel, {"n": K})
    options = options | ({} if name.startswith("text") else IMAGES)
    own = type(made).own_schedule(made.config)

    def objective(**more: Any) -> Any:
        return component({"op": "d3pm", "steps": T, "prior": False, **options, **more}, {"n": K})

    mask = {"absorbing": K // 2, "absorbing_data": K // 2}.get(name.split(".")[1]) if "images" in name else K - 1
    order = torch.tensor([s for s in range(K) if s != mask] + ([] if mask is None else [mask]))
    found = Reference(name, made, component(schedule or own or {}, {"n": K}), objective, order)
    assert found.objective().lacks(made) is None
    return found


def test_transitions(case: Reference) -> None:
    """Q_t and the products of the first t matrices."""
    sigma = case.objective().levels(torch.arange(T + 1), case.schedule, case.kernel).double()
    q = torch.stack([case.kernel.transition_matrix(sigma[i + 1], float(sigma[i])) for i in range(T)])
    torch.testing.assert_close(q, case.matrices("Q"), rtol=0, atol=1e-6)
    exact, products = case.matrices("Qbar"), case.kernel.transition_matrix(sigma[1:])
    if case.name == "text.gaussian.linear":  # the original reads past the end of its table: products end at T - 1
        assert torch.equal(exact[-1], exact[-2])
        torch.testing.assert_close(products[-1], case.matrices("Q")[-1] @ exact[-2], rtol=0, atol=1e-6)
        exact, products = exact[:-1], products[:-1]
    if case.name == "text.uniform.cosine":  # the original's steps are clipped, and its x_T is stationary
        last = case.objective(last="stationary").levels(torch.full((1,), T), case.schedule, case.kernel).double()
        products[-1] = case.kernel.transition_matrix(last)[0]
    torch.testing.assert_close(products, exact, rtol=0, atol=1e-6)
    seen = products.transpose(1, 2)[:, case.batch.tokens]
    torch.testing.assert_close(seen, case.laws("q_probs")[: len(seen)], rtol=0, atol=1e-6)


def test_posteriors(case: Reference) -> None:
    """q(x_{t-1} | x_t, x_0) and p(x_{t-1} | x_t) in all steps."""
    true, model = ("posterior", "p") if case.text else ("exact.q_posterior", "exact.p")
    one = torch.nn.functional.one_hot(case.batch.tokens, K).double()
    for step in range(1, T + 1):
        objective, outputs, draw = case.step(step)
        below = objective.below(draw, case.kernel, case.schedule)
        found = case.kernel.posterior(one, draw.xt, draw.sigma, below)
        torch.testing.assert_close(found.double(), case.laws(true)[step - 1], rtol=0, atol=1e-6)
        found = lower_posterior(outputs, draw, case.kernel, below).double()
        if step == 1 and not case.text:
            found = outputs["log_x0"].exp()  # as 'first: prediction' has it
        torch.testing.assert_close(found, case.laws(model)[step - 1], rtol=0, atol=1e-6)


def test_losses(case: Reference) -> None:
    """The divergence of each step, nats; of step 1 it is -log p(x_0 | x_1)."""
    for step in range(1, T + 1):
        found = case.nats(step)
        exact = case.array("loss_nats_0" if case.text else "exact.vb_nats")[step - 1].double()
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
        if not case.text:
            torch.testing.assert_close(found, case.array("vb_nats")[step - 1].double(), rtol=0, atol=1e-2)
        elif step > 1:
            torch.testing.assert_close(found, case.array("kl_nats")[step - 1].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [0.001, 0.01])
def test_auxiliary(case: Reference, weight: float) -> None:
    """The cross-entropy of the logits themselves, alone and in the hybrid loss."""
    for step in range(1, T + 1):
        plain, hybrid = case.nats(step), case.nats(step, auxiliary=weight)
        large = case.nats(step, auxiliary=100.0)
        exact = case.array("ce_nats" if case.text else "exact.ce_nats")[step - 1].double()
        torch.testing.assert_close((large - plain) / 100, exact, rtol=1e-5, atol=1e-5)
        if case.text:
            exact = case.array(f"loss_nats_{weight:g}")[step - 1].double()
            torch.testing.assert_close(hybrid, exact, rtol=1e-5, atol=1e-5)
        else:  # bits, the mean over positions, float32
            exact = case.array(f"hybrid_bits_{weight:g}")[step - 1].double() * np.log(2) * case.batch.width
            torch.testing.assert_close(hybrid, exact, rtol=0, atol=1e-2)


def test_prior(case: Reference) -> None:
    """KL(q(x_T | x_0) || prior), nats."""
    options = {"last": "stationary"} if case.name == "text.uniform.cosine" else {}
    found = case.objective(**options).prior_term(case.batch, case.kernel, case.schedule).double()
    exact = case.array("prior_nats" if case.text else "exact.prior_nats").double()
    if case.kernel.masks_evenly and "cosine" not in case.name:
        # a mask at the last step, up to exp(-30) here: the prior has no other token
        assert bool((exact == 0).all())
        assert bool(found.isinf().all())
        return
    if case.name == "text.gaussian.linear":  # its prior term is that of T - 1 steps
        found = case.kernel.prior_divergence(case.batch.tokens, torch.full((len(exact),), T - 1.0)).sum(-1)
    if case.name == "images.absorbing_data.cosine":
        assert bool(found.isinf().all())  # a token is left that the prior never has; in the file eps makes it finite
        return
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    bound = case.objective(prior=True).bound()
    last, outputs, draw = case.step(T)
    with_prior = bound.loss(outputs, draw, case.batch, case.kernel, case.schedule).double()
    ends_early = case.kernel.steps is not None or bound.config.last is not None
    expected = case.nats(T) + (last.prior_term(case.batch, case.kernel, case.schedule) if ends_early else 0)
    torch.testing.assert_close(with_prior, expected, rtol=1e-5, atol=1e-5)
