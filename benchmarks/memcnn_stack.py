"""A stack of token blocks with the same weights under reversible execution of sedd_graph and of memcnn: time and gradients."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import memcnn
import torch
from interleaved import interleave
from torch import Tensor, nn

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
    """One of our branches as a module of one argument, which memcnn requires; it stores its conditioning itself."""

    def __init__(self, branch: RegionModule, others: Sequence[Tensor], dropout: float) -> None:
        super().__init__()
        self.branch, self.others, self.dropout = branch, others, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.dropout(self.branch(None, x, *self.others)[0])
        return found


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    """Return the relative error of a gradient; 1 if there is none."""
    if expected is None:
        raise SystemExit("no gradient with stored activations")
    return 1.0 if found is None else float((found - expected).norm() / expected.norm())


class Stack:
    """One stack of blocks, run by sedd_graph and, with the same weights, by memcnn."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "stack.yaml"
            path.write_text(STACK % (MODEL, MODEL // 4, LAYERS), encoding="utf-8")
            self.model = sedd_graph.build(path, device="cpu", compile="off").model
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.model.parameters():  # gates start at zero, which would hide errors behind them
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
        self.x = torch.randn(2, ROWS, TOKENS, MODEL, generator=generator)
        self.c = torch.randn(ROWS, 32, generator=generator).requires_grad_()
        self.run: Any = self.model._modules["stack"]
        rope: Any = self.model._modules["rope"]
        self.angles: Tensor = rope(self.x[0])
        self.model.train()

    def ours(self, memory: str, *, dropout: bool) -> Tensor:
        """Return the loss in sedd_graph; ``memory`` is ``store`` or ``reversible``."""
        self.run.memory = memory
        key = torch.arange(1, ROWS + 1, dtype=torch.int32) * 7919 if dropout else None
        streams = [x.clone().requires_grad_() for x in self.x]
        outputs, _ = self.model.run({"x1": streams[0], "x2": streams[1], "c": self.c}, key)
        return torch.stack([y.square().mean() for y in outputs.values()]).sum()

    def memcnn(self, *, stored: bool, dropout: float = 0.0, same_rng: bool = False) -> Callable[[], Tensor]:
        """Return a function for the loss in memcnn; ``stored`` turns its reversible execution off."""
        wrapped = []
        for layer in self.run._modules.values():
            f = Branch(layer._modules["f"], (self.c, self.angles), dropout)
            g = Branch(layer._modules["g"], (self.c,), dropout)
            coupling = memcnn.AdditiveCoupling(f, g, split_dim=-1)
            wrapped.append(memcnn.InvertibleModuleWrapper(coupling, disable=stored, preserve_rng_state=same_rng))

        def loss() -> Tensor:
            x = (
                torch.cat(list(self.x), -1).requires_grad_() * 1.0
            )  # memcnn frees its input, so that it gets one of its own
            for layer in wrapped:
                x = layer(x)
            return torch.stack([y.square().mean() for y in x.chunk(2, -1)]).sum()

        return loss

    def gradients(self, loss: Callable[[], Tensor]) -> tuple[float, Tensor, Tensor | None]:
        """Return the loss, and the gradients of all parameters (as one vector) and of the conditioning."""
        self.model.zero_grad(set_to_none=True)
        self.c.grad = None
        torch.manual_seed(0)
        value = loss()
        value.backward()
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]
        return float(value.detach()), torch.cat([g.flatten() for g in own]), self.c.grad

    def timed(self, rounds: int) -> dict[str, list[float]]:
        """Return seconds of training steps without dropout, reversible and stored, of both libraries."""
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
        return interleave(steps, rounds, 1)

    def errors(self) -> dict[str, dict[str, float]]:
        """Return the errors of gradients under reversible execution, relative to the same library's with stored activations."""
        found = {}
        for what, dropout in (("plain", False), ("dropout 0.1", True)):
            stored, reversible = (
                self.gradients(functools.partial(self.ours, memory, dropout=dropout))
                for memory in ("store", "reversible")
            )
            found[f"sedd_graph, {what}"] = _errors(stored, reversible)
        for what, rate, same in (
            ("plain", 0.0, False),
            ("dropout 0.1", 0.1, False),
            ("dropout 0.1, preserve_rng_state", 0.1, True),
        ):
            stored = self.gradients(self.memcnn(stored=True, dropout=rate))
            reversible = self.gradients(self.memcnn(stored=False, dropout=rate, same_rng=same))
            found[f"memcnn, {what}"] = _errors(stored, reversible)
        return found


Gradients = tuple[float, Tensor, Tensor | None]
"""The loss, and the gradients of the weights and of the conditioning."""


def _errors(stored: Gradients, reversible: Gradients) -> dict[str, float]:
    if stored[0] != reversible[0]:
        raise SystemExit(f"the losses differ: {stored[0]} and {reversible[0]}")
    return {
        "weights": relative_error(reversible[1], stored[1]),
        "conditioning": relative_error(reversible[2], stored[2]),
    }
