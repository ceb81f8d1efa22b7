"""A learned pace of masking: the estimated gradient is that of the bound by enumeration, and the engine trains it."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from sedd_graph_registry.noise.masking import LearnedPower
from sedd_graph_registry.noise.schedules import LogLinear
from sedd_graph_registry.objectives.learned import GenMD4
from torch import Tensor

import sedd_graph
from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.engine.process import KERNEL
from tests.conftest import ROOT

DOUBLE = torch.float64
W = torch.tensor([0.5, 1.0, 2.0])


def world() -> tuple[LearnedPower, LogLinear, GenMD4]:
    kernel = LearnedPower(LearnedPower.Config(), Context({"n": 4}))
    with torch.no_grad():
        kernel.raw.copy_(W.expm1().log())
    return kernel, LogLinear(LogLinear.Config(), Context({})), GenMD4(GenMD4.Config(), Context({"n": 4}))


def network(x: Tensor) -> Tensor:
    """log_x0 float64 [b, 2, 4] that looks at both positions and knows nothing of the pace."""
    table = torch.randn(4, 4, 2, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    table[..., 3] = -1e6
    carried = torch.nn.functional.one_hot(x, 4).to(DOUBLE).log().clamp(min=-1e6)
    return torch.where((x == 3)[..., None], table[x[:, 0], x[:, 1]].log_softmax(-1), carried)


def test_golden_10() -> None:
    """math: section 5.1, at t = .4, where 1 - exp(-sigma) = t."""
    kernel, t = world()[0], 0.4
    belief = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE)
    guess = belief / t ** W.double()
    log_x0 = torch.cat([(guess / guess.sum()).log(), torch.tensor([-1e6], dtype=DOUBLE)])[None, None]
    sigma = -torch.log1p(torch.tensor([-t], dtype=DOUBLE))
    loss = kernel.nelbo(log_x0, torch.tensor([[3]]), torch.tensor([[2]]), sigma)
    assert loss.item() / (1 - t) == pytest.approx(5.422189562, rel=1e-6)


def test_two_draws_estimate_the_gradient_of_the_enumerated_bound() -> None:
    kernel, schedule, objective = world()
    x0 = torch.tensor([[2, 0]])
    t = torch.tensor([0.3])
    sigma, dsigma = schedule.sigma(t), schedule.dsigma(t)
    seen = torch.tensor([[a, b] for a in (2, 3) for b in (0, 3)])  # all that (2, 0) can be seen as

    def chances() -> Tensor:
        log_keep, log_hit, _ = (v[0] for v in kernel.token_schedules(sigma.double()))
        each = [torch.stack([log_keep[v], log_hit[v]]) for v in (2, 0)]
        return (each[0][:, None] + each[1]).reshape(-1).exp()

    # the truth: the mean loss over all four, differentiated as a whole
    rows = torch.full((4,), sigma.item())
    nats = dsigma * kernel.nelbo(network(seen).float(), seen, x0.expand(4, 2), rows).sum(-1)
    start = objective._start(x0, kernel, schedule).sum()
    (wanted,) = torch.autograd.grad((chances() * nats).sum() + start, kernel.raw)
    # the estimate, in the mean over all sixteen pairs of draws
    law, found, value, pathwise = chances().detach(), torch.zeros_like(wanted), 0.0, torch.zeros_like(wanted)
    for i, j in itertools.product(range(4), repeat=2):
        xt = seen[[i, j]]
        draw = Draw(xt, t.repeat(2), sigma.repeat(2), dsigma.repeat(2), torch.ones(2))
        loss = objective.loss({"log_x0": network(xt)}, draw, Batch.of(x0), kernel, schedule).sum()
        found += (law[i] * law[j]).float() * torch.autograd.grad(loss, kernel.raw, retain_graph=True)[0]
        one = Draw(xt[:1], t, sigma, dsigma, torch.ones(1))
        alone = objective.loss({"log_x0": network(xt[:1])}, one, Batch.of(x0), kernel, schedule).sum()
        pathwise += (law[i] * law[j]).float() * torch.autograd.grad(alone, kernel.raw)[0]
        value += float(law[i] * law[j] * loss.detach())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert value == pytest.approx(float(((chances() * nats).sum() + start).detach()), rel=1e-5)
    # without the term of the draws it is another gradient
    assert float((pathwise - wanted).abs().max()) > 0.05


def test_its_optimum_is_the_law_of_the_clean_token() -> None:
    kernel = world()[0]
    law, sigma = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE), torch.tensor([0.7], dtype=DOUBLE)
    logits = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")
    with torch.no_grad():
        hit = law * kernel.token_schedules(sigma)[1][0].exp()

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_x0 = torch.cat([logits.log_softmax(-1), torch.full((1,), -1e6, dtype=DOUBLE)]).expand(1, 3, 4)
        loss = (hit * kernel.nelbo(log_x0, torch.full((1, 3), 3), torch.arange(3)[None], sigma)[0]).sum()
        loss.backward(inputs=[logits])
        return loss

    optimizer.step(closure)
    assert logits.softmax(-1).tolist() == pytest.approx(law.tolist(), abs=1e-4)


def test_masking_all_at_once_is_not_free() -> None:
    """As w goes to 0 the integral does as well; what is masked before it begins has to be paid for."""
    kernel, schedule, objective = world()
    x0 = torch.tensor([[0, 1]])
    with torch.no_grad():
        kernel.raw.fill_(-12.0)
        cost = objective._start(x0, kernel, schedule).sum()
    assert float(cost) == pytest.approx(2 * math.log(3), rel=1e-3)


def test_the_engine_trains_and_keeps_it(tmp_path: Path) -> None:
    path = ROOT / "blueprints" / "genmd4-tiny.yaml"
    sizes = [f"params.{name}={size}" for name, size in {"dim": 16, "heads": 2, "depth": 1, "cond": 8}.items()]
    engine = sedd_graph.build(path, [*sizes, "data=null", "train=null"], device="cpu", compile="off")
    raw = dict(engine.model.named_parameters())[f"{KERNEL}.raw"]
    assert raw is engine.process.kernel.raw
    before, rows = raw.detach().clone(), torch.randint(0, 257, (4, 8), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(engine.model.parameters(), lr=1e-2)
    engine.loss(rows).mean().backward()
    optimizer.step()
    assert bool((raw != before).any())
    engine.save(tmp_path / "run")
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "run" / "model.safetensors")[f"{KERNEL}.raw"], raw.detach())
