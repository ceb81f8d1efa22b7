"""An attention mask that hides nothing is no mask: attention gets one only where rows are padded, with the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sedd_graph_registry.network import attention as module
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.data.batches import Rows
from sedd_graph.diffusion.batch import Batch, Randomness, nothing_hidden, repeated, taken
from sedd_graph.engine import compiling
from sedd_graph.engine.engine import Engine
from sedd_graph.evaluation.bound import evaluate, to_batch
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine, read_data
from sedd_graph.training.distributed import World
from sedd_graph.training.trainer import Trainer

LENGTH = 8
REVERSIBLE = """
blueprint: 1
name: masked
axes: {b: batch, l: length, d: 8, v: 13}
inputs: {tokens: int b l, attend: bool b l}
outputs: {log_x0: head}
blocks:
  branch:
    inputs: {x: float b l d, attend: bool b l}
    outputs: {x: out}
    nodes:
      norm: {op: layer_norm, in: x}
      out: {op: attention, in: {x: norm, attend: attend}, with: {heads: 2}}
  couple:
    invertible: {given: [attend]}
    inputs: {x1: float b l d, x2: float b l d, attend: bool b l}
    outputs: {x1: y1, x2: y2}
    nodes:
      f: {block: branch, in: {x: x2, attend: attend}}
      y1: {op: add, in: [x1, f]}
      g: {block: branch, in: {x: y1, attend: attend}}
      y2: {op: add, in: [x2, g]}
nodes:
  embed: {op: token_embedding, in: tokens, out: float b l d, with: {vocab: v}}
  trunk: {block: couple, repeat: 2, in: {x1: embed, x2: embed, attend: attend}, memory: MEMORY}
  join: {op: mean, in: [trunk.x1, trunk.x2]}
  head: {op: x0_head, in: {x: join, tokens: tokens}, out: float b l v}
process: {op: absorb, schedule: {op: loglinear}}
objective: {op: nelbo}
sample: {op: ancestral, steps: 3}
"""


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The masks that ``scaled_dot_product_attention`` is called with."""
    seen: list[Tensor | None] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        seen.append(attn_mask)
        return attend(q, k, v, attn_mask=attn_mask)

    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", spy)
    return seen


def engine_of(path: Path, *changes: str, std: float = 0.2) -> Engine:
    engine = make_engine(check(path, list(changes)), device=torch.device("cpu"), compile="off")
    for parameter in engine.model.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(parameter.numel()))
    return engine


def losses(engine: Engine, batch: Batch) -> list[Tensor]:
    """The loss of each row, and all gradients."""
    engine.model.zero_grad(set_to_none=True)
    batch = engine.process.batch(batch, engine.device)
    draw = engine.draw(batch, random=Randomness(torch.Generator().manual_seed(0)))
    loss = engine.trained(draw, batch)[0]
    loss.sum().backward()
    return [loss.detach(), *(p.grad for p in engine.model.parameters() if p.grad is not None)]


def dense(batch: Batch) -> Batch:
    """The batch with a mask whose entries are all stored."""
    return Batch(batch.tokens, batch.attend.contiguous(), batch.corrupt, batch.loss)


def test_one_expanded_value_stays_one() -> None:
    mask = nothing_hidden(3, 5, "cpu")
    assert mask.all()
    index = torch.tensor([2, 0, 0, 1])
    for found, rows in ((taken(mask, index), 4), (repeated(mask, 2), 6), (mask[1:], 2)):
        assert found.shape == (rows, 5)
        assert found.stride() == (0, 0)
    values = torch.arange(6).view(3, 2)
    assert torch.equal(taken(values, index), values[index])
    assert torch.equal(repeated(values, 2), values.repeat(2, 1))
    batch = Batch.of(torch.zeros(3, 5, dtype=torch.int64))
    made = Batch.of_arrays(*(x.numpy() for x in (batch.tokens, batch.corrupt, batch.corrupt, batch.loss)))
    pinned = Batch.of_arrays(batch.tokens, dense(batch).attend, batch.corrupt, batch.loss)
    batches = [
        batch,
        batch.to("cpu"),
        made,
        pinned,
        batch.rows(0, 2),
        batch.part(range(2, 7)),
        batch.take(index),
    ]
    assert [b.attend.stride() for b in batches] == [(0, 0)] * 7
    assert [len(b.attend) for b in batches] == [3, 3, 3, 3, 2, 5, 4]
    hiding = dense(batch)
    hiding.attend[1, 4] = False
    assert torch.equal(hiding.to("cpu").attend, hiding.attend)


def test_rows_from_the_host(small: Callable[..., Path]) -> None:
    process = engine_of(small()).process
    tokens, every = np.zeros((2, LENGTH), dtype=np.int64), np.ones((2, LENGTH), dtype=np.bool_)
    assert to_batch(Rows(tokens, every, every, every), process, torch.device("cpu")).attend.stride() == (0, 0)
    every = every.copy()
    every[1, 6:] = False
    assert to_batch(Rows(tokens, every, every, every), process, torch.device("cpu")).attend.sum() == every.sum()


def data(small: Callable[..., Path], lengths: list[int], rows: str) -> Path:
    path = small(
        ("length: 32}", f"length: {LENGTH}, rows: {rows}, corpus: {{op: jsonl, files: [a.jsonl]}}, holdout: 0.5}}"),
        ("characters, size: 128", "bytes"),
        ("tokens: 128", "tokens: 257"),
    )
    texts = [{"text": "abcdefghijkl"[:length]} for length in lengths]
    (path.parent / "a.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return path


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", ["stream", "documents"])
def test_training_and_evaluation(
    small: Callable[..., Path], masks: list[Tensor | None], rows: str, padded: bool
) -> None:
    path = data(small, [5 if padded and i % 2 else LENGTH + 2 for i in range(32)], rows)
    report, engine = check(path, ["train.batch=4", "train.accumulate=2"]), engine_of(path)
    trainer = Trainer(engine, read_data(report, root=path.parent), report.train, Path(), World.single(), print)
    engine.model.train()
    for _ in range(3):
        trainer.train_step()
        trainer.update(0.1)
        trainer.step += 1
    assert len(masks) == 3 * 2 * 2  # steps, backward passes, layers
    hides = padded and rows == "documents"
    assert any(mask is not None for mask in masks) == hides
    masks.clear()
    found = evaluate(engine, trainer.data, rows=6, batches=None, draws=2, seed=0, at_once=4)
    assert masks
    assert any(mask is not None for mask in masks) == hides
    count = len(masks)
    with pytest.MonkeyPatch.context() as patch:  # as all masks were before
        patch.setattr(module, "attendable", lambda attend: attend | ~attend.any(-1, keepdim=True))
        masks.clear()
        again = evaluate(engine, trainer.data, rows=6, batches=None, draws=2, seed=0, at_once=4)
    assert len(masks) == count
    assert all(mask is not None for mask in masks)
    assert again.nats_per_token == pytest.approx(found.nats_per_token, rel=1e-6)


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_gradients_are_those_of_a_stored_mask(tmp_path: Path, masks: list[Tensor | None], memory: str) -> None:
    (tmp_path / "b.yaml").write_text(REVERSIBLE.replace("MEMORY", memory))
    engine = engine_of(tmp_path / "b.yaml")
    batch = Batch.of(torch.randint(0, 12, (3, LENGTH), generator=torch.Generator().manual_seed(0)))
    found = losses(engine, batch)
    passes = len(masks)
    assert passes == 4 * (1 if memory == "store" else 2)  # the backward pass evaluates branches again
    assert masks == [None] * passes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "attendable", lambda attend: attend | ~attend.any(-1, keepdim=True))
        before = losses(engine, batch)
    assert len(masks) == 2 * passes
    assert all(mask is not None for mask in masks[passes:])
    for a, b in zip(found, before, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    hiding = dense(batch)
    hiding.attend[1, 5:] = hiding.corrupt[1, 5:] = hiding.loss[1, 5:] = False
    masks.clear()
    other = losses(engine, hiding)
    assert all(mask is not None for mask in masks)
    alone = Batch.of(batch.tokens[1:2, :5])  # what is hidden changes nothing
    draw = engine.draw(engine.process.batch(hiding, engine.device), random=Randomness(torch.Generator().manual_seed(0)))
    own = type(draw)(draw.xt[1:2, :5], *(getattr(draw, name)[1:2] for name in ("t", "sigma", "dsigma", "weight")))
    assert torch.allclose(engine.trained(own, alone)[0], other[0][1:2], rtol=1e-5)


def test_sampling(small: Callable[..., Path], masks: list[Tensor | None]) -> None:
    engine = engine_of(small())
    drawn = engine.sample(3, LENGTH, seed=1)
    assert masks
    assert all(mask is None for mask in masks)
    every = torch.ones(3, LENGTH, dtype=torch.bool)
    assert torch.equal(engine.sample(3, LENGTH, seed=1, attend=every), drawn)
    assert all(mask is None for mask in masks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "attendable", lambda attend: attend | ~attend.any(-1, keepdim=True))
        assert torch.equal(engine.sample(3, LENGTH, seed=1), drawn)
    every[1, 5:] = False
    masks.clear()
    found = engine.sample(3, LENGTH, seed=1, attend=every)
    assert all(mask is not None for mask in masks)
    assert not found[1, 5:].any()


def test_compiled_blocks_have_two_forms(small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def traced(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "inductor", traced)
    torch.compiler.reset()
    engine = engine_of(small())
    engine.compile("block", everywhere=True)
    batch = Batch.of(torch.randint(0, 127, (4, LENGTH)))
    hiding = dense(batch)
    hiding.attend[1, 5:] = hiding.corrupt[1, 5:] = hiding.loss[1, 5:] = False
    for given in (batch, hiding, batch, hiding, dense(batch), hiding, batch.part(range(2, 6)), batch):
        losses(engine, given)
    assert len(graphs) == 2  # of all layers
    calls = [[n for n in g.graph.nodes if "scaled_dot_product" in str(n.target)] for g in graphs]
    assert [[node.kwargs.get("attn_mask") is None for node in found] for found in calls] == [[True], [False]]
