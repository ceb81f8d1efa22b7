"""A blueprint's network on a device: built, compiled, and run."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from sedd_graph.component.registry import Registry
from sedd_graph.engine.compiling import compile_in_place
from sedd_graph.engine.construct import build_model
from sedd_graph.engine.positionwise_suffix import PositionwiseSuffix
from sedd_graph.engine.regions import RegionModule
from sedd_graph.graph.model import Graph

__all__ = ["CompileMode", "Network"]

CompileMode = Literal["auto", "block", "whole", "off"]
"""What is compiled; see :meth:`Network.compile`."""


class Network:
    """The module of a graph, with fresh weights drawn from ``seed``, and how it is compiled."""

    def __init__(self, graph: Graph, registry: Registry, *, device: torch.device, seed: int = 0) -> None:
        self.graph, self.device = graph, device
        torch.manual_seed(seed)
        self.model = build_model(graph, registry).to(device)
        self.compile_mode: CompileMode = "off"
        self._everywhere = False

    def compile(self, mode: CompileMode, trained: nn.Module | None, *, everywhere: bool | None = None) -> None:
        """Compile in place; nothing is compiled before it first runs, and state-dict keys do not change.

        Args:
            mode: ``block``: each repeated block, one compilation for all repeats. ``whole``: ``trained`` (network and loss) as
                one graph, where no block has a backward pass of its own; several times the compile time for a few percent
                of speed. ``auto``: ``block`` (``whole`` where no block is repeated) on a GPU, and on a CPU that has a
                C++ compiler. ``off``: eager.
            trained: the module that training calls.
            everywhere: also in evaluation and sampling. By default on a GPU alone: on a CPU another shape or mode takes longer to
                compile than a few samples take.
        """
        self._everywhere = self.device.type != "cpu" if everywhere is None else everywhere
        if mode == "auto":
            cpu = self.device.type == "cpu" and any(shutil.which(name) for name in ("c++", "g++", "clang++"))
            able = cpu or self.device.type == "cuda"
            mode = "off" if not able else "block" if any(True for _ in self.model.branches()) else "whole"
        if mode == "whole" and any(m.custom_backward for m in self.model.modules() if isinstance(m, RegionModule)):
            mode = "block"
        if mode == "whole" and trained is not None:
            compile_in_place(trained)
        elif mode != "off":
            for block in self.model.branches():
                compile_in_place(block)
        self.compile_mode = mode

    @property
    def compiled_everywhere(self) -> bool:
        """Whether evaluation and sampling run compiled code, too."""
        return self.compile_mode != "off" and self._everywhere

    @cached_property
    def suffix(self) -> PositionwiseSuffix:
        """The position-wise suffix of the graph."""
        return PositionwiseSuffix(self.graph.root)

    def run(
        self, inputs: Mapping[str, Tensor], key: Tensor | None = None, at: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Return the outputs by name. ``key`` int32 [b] turns dropout on; ``at`` int64 [b, k] asks for these positions alone."""
        return self.model.run(inputs, key)[0] if at is None else self.suffix.run(self.model, inputs, at)

    @contextlib.contextmanager
    def evaluating(self, *, eager: bool = False) -> Iterator[None]:
        """Evaluation mode; eager if asked, and wherever compiled code is for training alone."""
        training = self.model.training
        self.model.eval()
        stance = (
            torch.compiler.set_stance("force_eager")
            if self.compile_mode != "off" and (eager or not self._everywhere)
            else contextlib.nullcontext()
        )
        try:
            with stance:
                yield
        finally:
            self.model.train(training)
