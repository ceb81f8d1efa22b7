"""Bounds that must agree, on networks that have learned: whatever form of the loss is taken, schedule and draws included.

The forms of the papers are written out here (axes: b rows, l length, n states), in float64, beside those that train.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.schedules import Cosine, Geometric, LogLinear
from sedd_graph_registry.noise.schedules_learned import Learned
from sedd_graph_registry.objectives.bounds import MaskedCount, Nelbo, ScoreEntropy
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.data.config import DataConfig
from sedd_graph.data.rows import open_data
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.engine.engine import Engine
from sedd_graph.evaluation.bound import to_batch
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine
from sedd_graph.training.loop import train
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

LENGTH, TOKENS, ROWS = 16, 64, 512
SIZES = [f"params.{k}={v}" for k, v in {"dim": 32, "heads": 2, "depth": 1, "cond": 16, "dropout": 0.0, "tokens": TOKENS}.items()]  # fmt: skip
TRAIN = "train={steps: 300, batch: 32, warmup: 20, optimizer: {op: adamw, lr: 3e-3}, ema: null, evaluate: null, compile: 'off'}"
DATA = f"data={{tokenizer: {{op: characters, size: {TOKENS}}}, length: {LENGTH}}}"
NOISE = {
    "absorb": [],
    # the network is told the noise, and no token is a mask
    "uniform": [
        "process={op: uniform, schedule: {op: loglinear}}",
        f"axes.v={TOKENS}",
        "nodes.head.with={mask: none}",
        "nodes.still.with={by: 1}",
    ],
}


@pytest.fixture(scope="module", params=NOISE)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Batch]:
    report = check(ROOT / "blueprints" / "mdlm-tiny.yaml", [*SIZES, DATA, TRAIN, *NOISE[request.param]])
    assert isinstance(report.data, DataConfig)
    folder: Path = tmp_path_factory.mktemp(request.param)
    data, engine = open_data(report.data, root=folder), make_engine(report, device=torch.device("cpu"), compile="off")
    train(engine, data, report.train, run=folder, say=lambda text: None)
    engine.model.eval()
    batch = to_batch(next(data.held_out(ROWS)), engine.device)
    assert isinstance(batch, Batch)
    return engine, batch


def made(cls: Any, engine: Engine, **config: Any) -> Any:
    return cls(cls.Config(**config), Context({"n": engine.process.kernel.states}))


@torch.no_grad()
def drawn(
    engine: Engine, batch: Batch, objective: Objective, schedule: Schedule, seed: int
) -> tuple[Draw, Tensor, Tensor]:
    """A draw, what the network says to it, and the loss, nats [b]."""
    kernel, random = engine.process.kernel, Randomness(torch.Generator().manual_seed(seed))
    draw = objective.corrupt(batch, kernel, schedule, random=random)
    outputs, _ = engine.model.run(engine.process.objective.inputs(draw, batch))
    return draw, outputs["log_x0"], objective.loss(outputs, draw, batch, kernel, schedule)


def agree(engine: Engine, batch: Batch, forms: dict[str, tuple[Objective, Schedule]], draws: int = 4) -> float:
    """Each form with draws of its own: means of nats per row within four standard errors of the first."""
    found = {}
    for number, (name, (objective, schedule)) in enumerate(forms.items()):
        rows = torch.cat([drawn(engine, batch, objective, schedule, 10 * number + i)[2] for i in range(draws)]).double()
        # rows come again in every draw: errors over rows would be too small by what they have in common, which all forms share
        found[name] = float(rows.mean()), float(rows.std()) / math.sqrt(len(rows))
    (first, error), *others = found.values()
    for mean, other in others:
        assert abs(mean - first) < 4 * math.hypot(error, other), found
    assert max(error for _, error in found.values()) < 0.05 * first, found
    return first


def udlm(p: Tensor, xt: Tensor, x0: Tensor, alpha: Tensor) -> Tensor:
    """UDLM (arXiv 2412.10193, eq. 18), by sums over all states, per unit of sigma; -alpha' / alpha is 1 there."""
    n = p.shape[-1]
    other = (1 - alpha)[:, None, None]
    clean = n * alpha[:, None, None] * torch.nn.functional.one_hot(x0, n) + other
    said = n * alpha[:, None, None] * p + other
    clean_z, said_z = (v.gather(-1, xt[..., None]) for v in (clean, said))
    terms = clean / clean_z * ((said_z / said).log() + (clean / clean_z).log())
    return -(n / clean_z - n / said_z - terms.sum(-1, keepdim=True))[..., 0] / n


def duo(p: Tensor, xt: Tensor, x0: Tensor, alpha: Tensor) -> Tensor:
    """Duo (arXiv 2506.10892): the same without a sum over clean tokens, per unit of sigma."""
    n, a = p.shape[-1], alpha[:, None]
    logs = (n * a[..., None] * p + 1 - a[..., None]).log()
    at_z, at_x0 = (logs.gather(-1, i[..., None])[..., 0] for i in (xt, x0))
    eq, c = (xt == x0).double(), (1 - a) / (n * a + 1 - a)
    t2 = -(eq * c + 1 - eq) * (logs.sum(-1) - n * at_z) - (1 - eq) * n * a / (1 - a) * (at_x0 - at_z)
    t2 = t2 + ((n - 1) * c * eq - (1 - eq) / c) * c.log()
    return -(n * (1 / (1 - a + n * a * eq) - (-at_z).exp()) - t2) / n


def test_forms_of_one_bound_agree(trained: tuple[Engine, Batch]) -> None:
    engine, batch = trained
    nelbo, entropy, loglinear = made(Nelbo, engine), made(ScoreEntropy, engine), made(LogLinear, engine)
    draw, log_x0, nats = drawn(engine, batch, nelbo, loglinear, 0)
    p, x0, sigma = log_x0.double().exp(), batch.tokens, draw.sigma.double()
    by_score = entropy.loss({"log_x0": log_x0}, draw, batch, engine.process.kernel, loglinear)
    forms: dict[str, tuple[Objective, Schedule]] = {
        "nelbo": (nelbo, loglinear),
        "score entropy": (entropy, made(LogLinear, engine)),
        "another schedule": (nelbo, made(Cosine, engine)),
        "one that is learned": (nelbo, made(Learned, engine)),
    }
    torch.manual_seed(0)
    torch.nn.init.normal_(forms["one that is learned"][1].raw, std=0.1)  # type: ignore[arg-type]
    if engine.process.kernel.mask is not None:
        masked = draw.xt == engine.process.kernel.mask
        k = 1 / torch.expm1(sigma)[:, None]
        scores = k[..., None] * p[..., :-1]
        right = scores.gather(-1, x0[..., None])[..., 0]
        written = {  # SEDD's loss with scores that are normalised, and MDLM's
            "sedd": scores.sum(-1) - k * right.log() + k * (k.log() - 1),
            "mdlm": -k * log_x0.double().gather(-1, x0[..., None])[..., 0],
        }
        written = {name: torch.where(masked, each, 0.0) for name, each in written.items()}
        forms["counts"] = made(MaskedCount, engine), loglinear
    else:
        alpha = (-sigma).exp()
        written = {"udlm": udlm(p, draw.xt, x0, alpha), "duo": duo(p, draw.xt, x0, alpha)}
        forms["geometric"] = entropy, made(Geometric, engine)
    written = {name: draw.weight * draw.dsigma.double() * each.sum(-1) for name, each in written.items()}
    for name, found in {"score entropy": by_score.double(), **written}.items():
        torch.testing.assert_close(found, nats.double(), rtol=1e-3, atol=5e-3, msg=(name + ": {}").format)
    bound = agree(engine, batch, forms) / LENGTH
    print(f"{bound:.3f} nats per token")
    assert bound < 0.8 * math.log(TOKENS)  # it has learned
