"""A stack of token blocks with the same weights under our reversible execution and under memcnn's: time, and gradients
beside those with stored activations.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import memcnn
import torch
from torch import Tensor, nn
from turns import take_turns

import sedd_graph
from sedd_graph.engine.regions import RegionModule

__all__ = ["LAYERS", "MODEL", "ROWS", "TOKENS", "Stack"]

LAYERS, TOKENS, ROWS, MODEL = 8, 128, 8, 128
STACK = """
blueprint: 1
name: stack
use: {rev: "sedd_graph:blocks/reversible.yaml"}
axes: {b: batch, l: length, d: %d, e: 32}
inputs: {x1: float b l d, x2: float b l d, c: float b e}
outputs: {x1: stack.x1, x2: stack.x2}
nodes:
  rope: {op: rotary, in: x1, with: {dim: %d}}
  stack:
    block: rev.two_stream
    repeat: %d
    in: {x1: x1, x2: x2, c: c, angles: rope}
    with: {heads: 4, dropout: 0.1}
    memory: reversible
"""


class Branch(nn.Module):
    """One of our branches as memcnn wants it: a module of one argument. What conditions it can only be held beside it."""

    def __init__(self, branch: RegionModule, others: Sequence[Tensor], dropout: float) -> None:
        super().__init__()
        self.branch, self.others, self.dropout = branch, others, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.dropout(self.branch(None, x, *self.others)[0])
        return found


def off(found: Tensor | None, expected: Tensor | None) -> float:
    """Relative error; 1 where there is no gradient at all."""
    assert expected is not None
    return 1.0 if found is None else float((found - expected).norm() / expected.norm())


class Stack:
    """The same weights under our reversible execution and under memcnn's."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stack.yaml"
            path.write_text(STACK % (MODEL, MODEL // 4, LAYERS), encoding="utf-8")
            self.model = sedd_graph.build(path, device="cpu", compile="off").model
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.model.parameters():  # gates start at zero, which would hide what is behind them
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
        self.x = torch.randn(2, ROWS, TOKENS, MODEL, generator=generator)
        self.c = torch.randn(ROWS, 32, generator=generator).requires_grad_()
        self.run: Any = self.model._modules["stack"]
        self.angles = self.model._modules["rope"](self.x[0])  # type: ignore[misc]
        self.model.train()

    def ours(self, memory: str, *, dropout: bool) -> Tensor:
        """The loss; ``memory`` is ``store`` or ``reversible``."""
        self.run.memory = memory
        key = torch.arange(1, ROWS + 1, dtype=torch.int32) * 7919 if dropout else None
        streams = [x.clone().requires_grad_() for x in self.x]
        outputs, _ = self.model.run({"x1": streams[0], "x2": streams[1], "c": self.c}, key)
        return sum(y.square().mean() for y in outputs.values())  # type: ignore[return-value]

    def memcnn(self, *, stored: bool, dropout: float = 0.0, same_rng: bool = False) -> Callable[[], Tensor]:
        """The loss; ``stored`` runs memcnn's own wrapper without its reversible execution."""
        wrapped = []
        for layer in self.run._modules.values():
            f = Branch(layer._modules["f"], (self.c, self.angles), dropout)
            g = Branch(layer._modules["g"], (self.c,), dropout)
            coupling = memcnn.AdditiveCoupling(f, g, split_dim=-1)
            wrapped.append(memcnn.InvertibleModuleWrapper(coupling, disable=stored, preserve_rng_state=same_rng))

        def loss() -> Tensor:
            x = torch.cat(list(self.x), -1).requires_grad_() * 1.0  # memcnn empties its input: not one that is ours
            for layer in wrapped:
                x = layer(x)
            return sum(y.square().mean() for y in x.chunk(2, -1))  # type: ignore[return-value]

        return loss

    def gradients(self, loss: Callable[[], Tensor], *, again: bool = True) -> tuple[float, Tensor, Tensor | None]:
        """The loss, and the gradients of all parameters (as one vector) and of the conditioning."""
        self.model.zero_grad(set_to_none=True)
        self.c.grad = None
        torch.manual_seed(0)
        value = loss()
        value.backward()
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]
        return float(value.detach()), torch.cat([g.flatten() for g in own]), self.c.grad

    def timed(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of training steps without dropout, reversible and stored, of both."""
        losses = {
            "sedd_graph, reversible": lambda: self.ours("reversible", dropout=False),
            "memcnn InvertibleModuleWrapper": self.memcnn(stored=False),
            "sedd_graph, stored": lambda: self.ours("store", dropout=False),
            "memcnn, stored": self.memcnn(stored=True),
        }

        def step(loss: Callable[[], Tensor]) -> None:
            loss().backward()
            self.model.zero_grad(set_to_none=True)

        steps = {name: functools.partial(step, loss) for name, loss in losses.items()}
        for run in (*steps.values(), *steps.values()):
            run()
        return take_turns(steps, rounds, 1)

    def errors(self) -> dict[str, dict[str, float]]:
        """Relative errors of gradients under reversible execution, beside the same library's with stored activations."""
        found = {}
        for what, dropout in (("plain", False), ("dropout 0.1", True)):
            stored, undone = (
                self.gradients(lambda m=m, d=dropout: self.ours(m, dropout=d)) for m in ("store", "reversible")
            )  # type: ignore[misc]
            assert stored[0] == undone[0]
            found[f"sedd_graph, {what}"] = {
                "weights": off(undone[1], stored[1]),
                "conditioning": off(undone[2], stored[2]),
            }
        for what, dropout, same in (
            ("plain", 0.0, False),
            ("dropout 0.1", 0.1, False),
            ("dropout 0.1, preserve_rng_state", 0.1, True),
        ):
            stored = self.gradients(self.memcnn(stored=True, dropout=dropout))
            undone = self.gradients(self.memcnn(stored=False, dropout=dropout, same_rng=same))
            assert stored[0] == undone[0]
            found[f"memcnn, {what}"] = {"weights": off(undone[1], stored[1]), "conditioning": off(undone[2], stored[2])}
        return found
