"""Gradients of rebuilt blocks against differences of the loss: what memory-saving libraries get wrong (dropout, conditioning).

The loss is a function of the key, so it can be differenced with dropout on. No gradient of ours has a part in what is expected.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sedd_graph

STACK = """
blueprint: 1
name: stack
use: {rev: "sedd_graph:blocks/reversible.yaml"}
axes: {b: batch, l: length, d: 8, e: 6}
inputs: {x1: float b l d, x2: float b l d, c: float b e}
outputs: {y1: stack.x1, y2: stack.x2}
nodes:
  rope: {op: rotary, in: x1, with: {dim: 4}}
  stack:
    block: rev.two_stream
    repeat: 3
    in: {x1: x1, x2: x2, c: c, angles: rope}
    with: {heads: 2, dropout: 0.3}
    memory: reversible
"""
KEY = torch.tensor([11, -7, 2], dtype=torch.int32)


@pytest.mark.parametrize("key", [KEY, None], ids=["dropout", "none"])
def test_gradients_are_the_differences_of_the_loss(tmp_path: Path, key: Tensor | None) -> None:
    (tmp_path / "stack.yaml").write_text(STACK, encoding="utf-8")
    model = sedd_graph.build(tmp_path / "stack.yaml", device="cpu", compile="off").model.double().train()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for p in model.parameters():  # gates start at zero, which would hide what is behind them
            p.add_(draw(*p.shape) * 0.3)
    inputs = {"x1": draw(3, 5, 8), "x2": draw(3, 5, 8), "c": draw(3, 6)}
    leaves = [*(x.requires_grad_() for x in inputs.values()), *model.parameters()]

    def loss(key: Tensor | None = key) -> Tensor:
        outputs, _ = model.run(inputs, key)
        return sum(((1 + i) * y).sin().sum() for i, y in enumerate(outputs.values()))  # type: ignore[return-value]

    found = torch.autograd.grad(loss(), leaves)
    with torch.no_grad():
        assert (loss() != loss(None)) == (key is not None)
        for leaf, gradient in zip(leaves, found, strict=True):
            way, step, start = draw(*leaf.shape), 1e-5, leaf.clone()
            ends = []
            for sign in (1, -1):
                leaf.copy_(start + sign * step * way)
                ends.append(loss())
            leaf.copy_(start)
            expected = (ends[0] - ends[1]) / (2 * step)
            assert abs((gradient * way).sum() - expected) <= 1e-6 * abs(expected) + 1e-7
            assert gradient.abs().max() > 1e-3  # nothing that is meant to be there is missing
