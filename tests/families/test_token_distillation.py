"""Networks that are compared at a few positions at a time: the numbers and gradients of whole rows, in bounded memory."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from sedd_graph_registry.training.distillation import Consistency
from torch import Tensor

import sedd_graph
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.distillation import Direction, Networks
from sedd_graph.engine import tail as tails
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.peak import PeakMemory
from sedd_graph.families.token_distillation import TokenDistillable
from sedd_graph.training.distilling import Distiller
from tests.engine.test_tail import network, rows, spread

PROCESSES = ["mdlm-tiny", "sedd-uniform-tiny", "mixture-tiny", "power-tiny", "bd3lm-tiny", "neighbours-tiny"]


def distiller(engine: Engine, **fields: Any) -> Distiller:
    """A student that differs from its teacher."""
    spread(engine)
    found = Distiller(
        engine, Consistency(Consistency.Config(rounds=1, steps=4, **fields)), engine.process.distillable()
    )
    for p in engine.model.parameters():
        p.data += 0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + 1))
    engine.model.train()
    return found


def whole(engine: Any, draw: Any, batch: Batch, key: Tensor | None) -> Tensor:
    """The loss of outputs that are computed at all positions."""
    process: Any = engine.process
    plain = TokenDistillable(process.parts, process.plan.output)

    def evaluate(model: Any, key: Tensor | None, at: Any, rows: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = model.run(process.objective.inputs(at, rows), key)[0]
        return found

    networks = Networks(
        lambda at, rows: evaluate(engine.model, key, at, rows),
        lambda at, rows: evaluate(engine.helpers.teacher, None, at, rows),
    )
    loss: Tensor = engine.objective.loss(plain, networks, draw, batch)
    return loss


@pytest.mark.parametrize("divergence", get_args(Direction))
@pytest.mark.parametrize("name", PROCESSES)
def test_losses_and_gradients_are_those_of_whole_rows(name: str, divergence: Any) -> None:
    engine = distiller(
        sedd_graph.build(f"blueprints/{name}.yaml", ["params.depth=1"], device="cpu", compile="off"),
        divergence=divergence,
    )
    draw, batch, key = rows(engine, 5, 64)
    weights = [p for p in engine.model.parameters() if p.requires_grad]
    loss = engine.trained(draw, batch, key)[0]
    found = torch.autograd.grad(loss.sum(), weights, allow_unused=True)
    expected = whole(engine, draw, batch, key)
    true = torch.autograd.grad(expected.sum(), weights, allow_unused=True)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert float(loss.detach().max()) > 0
    for own, other in zip(found, true, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            assert (own - other).norm() <= 1e-3 * other.norm() + 1e-8


@pytest.mark.parametrize(("case", "share"), [("nelbo", 0.5), ("uniform", 1.0)])
def test_heads_see_the_positions_that_are_compared(case: str, share: float, tmp_path: Path) -> None:
    engine = distiller(network(tmp_path, case, d=8, v=30))
    seen: dict[str, int] = {}
    models = {"student": engine.model, "teacher": engine.helpers.teacher}
    for name, model in models.items():
        head: Any = model.root._modules["head"]
        head.register_forward_hook(
            lambda m, i, o, name=name: seen.update({name: seen.get(name, 0) + i[0][..., 0].numel()})
        )
    batch = Batch.of(torch.zeros(16, 256, dtype=torch.int64))
    draw = engine.draw(batch, random=Randomness(torch.Generator().manual_seed(1)))
    engine.trained(draw, batch)[0].sum().backward()
    for count in seen.values():
        assert count == pytest.approx(share * 16 * 256, rel=0.25)
    process: Any = engine.process
    assert seen["student"] >= process.objective.read_positions(draw.pair.upper, batch, process.kernel).sum()


@pytest.mark.parametrize("case", ["nelbo", "score_entropy", "uniform"])
def test_memory_is_that_of_a_chunk(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of the size of the vocabulary has 16 MB."""
    monkeypatch.setattr(tails, "WORKING", 2**21)
    engine = distiller(network(tmp_path, case, d=8, v=2001))
    draw, batch, _ = rows(engine, 8, 256)
    with (peak := PeakMemory(engine.trained.parameters())):
        engine.trained(draw, batch)[0].sum().backward()
    weights = sum(4 * p.numel() for p in engine.trained.parameters())
    assert peak.peak - weights < 1.5 * 2**21
