"""The network of a graph on a device: its module, compilation and evaluation.

Axes: b batch, l positions of a row.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from sedd_graph.component.registry import Registry
from sedd_graph.diffusion.tokens.stage import Stage
from sedd_graph.engine.compiling import compile_in_place
from sedd_graph.engine.construct import build_model
from sedd_graph.engine.regions import RegionModule
from sedd_graph.engine.running import RunningModule
from sedd_graph.engine.shard_init import ShardInit
from sedd_graph.engine.split import Split, begin, split
from sedd_graph.errors import UserError
from sedd_graph.graph.model import Graph

__all__ = ["CompileMode", "Network", "Observer"]

CompileMode = Literal["auto", "block", "whole", "cuda_graphs", "off"]
"""Scope of compilation: each repeated block (``block``), network and loss as one graph (``whole``), or none (``off``).

``cuda_graphs`` is ``whole`` with kernels that a GPU records once and replays.

``auto`` chooses one of the three by the device, see :meth:`Network.compile`.
"""

Observer = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor | None], None]
"""Type of callbacks ``observer(inputs, saved, rows)`` after an evaluation of a network: its inputs by name, the saved
activations by dotted path, and the indices of its first rows in the batch, int64 [b], or None for all rows in order."""


class Network:
    """The network of a graph on a device, with newly initialised weights.

    Args:
        graph: The typed graph.
        registry: The installed components.
        device: Device of the weights.
        seed: Seed of the weight initialisation; it sets torch's global random generator.
        part: Part of the parameters that this process holds. The parameters are then ``meta`` tensors until the model is
            sharded (:func:`sedd_graph.training.parallel.place`). None for all.

    Attributes:
        model: Module of the network.
        compile_mode: Compile mode in effect: ``block``, ``whole``, ``cuda_graphs`` or ``off``.
        observer: Callback after each :meth:`run`; None: no callback.
        dtype: Precision of evaluation and sampling (:meth:`evaluating`): float32, or bfloat16 by autocast.
    """

    def __init__(
        self,
        graph: Graph,
        registry: Registry,
        *,
        device: torch.device,
        seed: int = 0,
        part: ShardInit | None = None,
    ) -> None:
        self.graph, self.device, self.part = graph, device, part
        torch.manual_seed(seed)
        self.model = build_model(graph, registry, part)
        self.model._apply(lambda t: t if t.is_meta else t.to(device))
        self.compile_mode: CompileMode = "off"
        self._everywhere = False
        self.observer: Observer | None = None
        self.dtype = torch.float32

    def compile(self, mode: CompileMode, trained: nn.Module | None, *, everywhere: bool | None = None) -> None:
        """Compile the network in place.

        Code is compiled when it is first called. The keys of the state dict do not change.

        Args:
            mode: ``block`` compiles each repeated block, once for all its repeats. A position-wise end that is evaluated
                with the loss (:mod:`sedd_graph.engine.tail`) is compiled in every mode but ``off``. ``whole`` compiles
                ``trained`` as one graph; it takes several times as long to compile as ``block`` and runs a few percent
                faster. If a block has a custom backward pass (checkpointing, reversible or exact), ``whole`` falls back
                to ``block``. ``cuda_graphs`` is ``whole`` with recorded kernels, which the host starts all at once: it
                helps where a step has few rows, and holds the memory of its results. ``off`` runs eagerly. ``auto``
                chooses: ``off`` on a CPU without a C++ compiler and on a device that is neither a CPU nor a CUDA GPU;
                otherwise ``block`` if the network has repeated blocks, and ``whole`` if it has none.
            trained: Module that computes the network and the training loss, or the network before its position-wise end
                where that is evaluated with the loss; the training loop calls it. None if the
                blueprint declares no process and cannot be trained; ``whole`` then compiles the same as ``block``.
            everywhere: Whether evaluation and sampling run compiled code too. None: only on a GPU, since on a CPU
                compiling for another shape takes longer than drawing a few samples.

        Raises:
            UserError: ``mode`` is ``cuda_graphs``, and the device is no CUDA GPU, or a block has a custom backward pass.
        """
        self._everywhere = self.device.type != "cpu" if everywhere is None else everywhere
        if mode == "auto":
            cpu = self.device.type == "cpu" and any(shutil.which(name) for name in ("c++", "g++", "clang++"))
            able = cpu or self.device.type == "cuda"
            mode = "off" if not able else "block" if any(True for _ in self.model.branches()) else "whole"
        custom = any(m.custom_backward for m in self.model.modules() if isinstance(m, RegionModule))
        if mode == "cuda_graphs" and (self.device.type != "cuda" or custom):
            lack = "blocks that are neither reversible nor checkpointed" if custom else f"a CUDA GPU, not {self.device}"
            raise UserError(f"compile: cuda_graphs needs {lack}; choose block or whole")
        if mode == "whole" and custom:
            mode = "block"
        if mode in ("whole", "cuda_graphs") and trained is not None:
            compile_in_place(trained, recorded=mode == "cuda_graphs")
        elif mode != "off":
            for block in self.model.branches():
                compile_in_place(block, getattr(block, "share", 1.0))
        self.compile_mode = mode
        self.model.compiled = mode != "off"

    @property
    def compiled_everywhere(self) -> bool:
        """Whether evaluation and sampling run compiled code, in addition to training."""
        return self.compile_mode != "off" and self._everywhere

    @cached_property
    def _running(self) -> dict[str, RunningModule]:
        return {name: m for name, m in self.model.named_modules() if isinstance(m, RunningModule)}

    def fallbacks(self) -> dict[str, float]:
        """Return the blocks that fell back from reversible execution to checkpointing, since an inverse was inaccurate.

        Returns:
            For each dotted path of a block, the relative error of its reconstructed inputs
            (:attr:`~sedd_graph.engine.running.RunningModule.fallback`).
        """
        return {name: block.fallback for name, block in self._running.items() if block.fallback is not None}

    @cached_property
    def parts(self) -> Split | None:
        """The network as a trunk and a position-wise end, which a sampler evaluates where it reads outputs; None: it has none."""
        return split(self.graph, self.model)

    def begin(self, inputs: Mapping[str, Tensor], rows: Tensor | None = None) -> Stage:
        """Evaluate the network up to its position-wise end, without dropout.

        Args:
            inputs: Input tensors by name; names that are not inputs of the graph are ignored.
            rows: Indices of the first rows in the batch, for :attr:`observer`; None: all rows in order.

        Returns:
            What the outputs are computed from where they are read.
        """
        stage, saved = begin(self.model, self.parts, inputs)
        if self.observer is not None:
            self.observer(inputs, saved, rows)
        return stage

    def run(
        self, inputs: Mapping[str, Tensor], key: Tensor | None = None, rows: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Evaluate the network and return its outputs by name.

        Args:
            inputs: Input tensors by name; names that are not inputs of the graph are ignored.
            key: Dropout key of each row, int32 [b]; None turns dropout off.
            rows: Indices of the first rows in the batch, for :attr:`observer`; None: all rows in order.

        Returns:
            The outputs by name, [b, l, ...].
        """
        outputs, saved = self.model.run(inputs, key)
        if self.observer is not None:
            self.observer(inputs, saved, rows)
        return outputs

    @contextlib.contextmanager
    def evaluating(self, *, eager: bool = False) -> Iterator[None]:
        """Context manager that switches the network to evaluation mode, and back to the previous mode on exit.

        Within it the network runs in :attr:`dtype`; outside, as in training, the caller chooses the precision.

        Args:
            eager: Run eagerly within the context. Otherwise compiled code runs if :attr:`compiled_everywhere`.
        """
        training = self.model.training
        self.model.eval()
        stance = (
            torch.compiler.set_stance("force_eager")
            if self.compile_mode != "off" and (eager or not self._everywhere)
            else contextlib.nullcontext()
        )
        full = self.dtype is torch.float32
        precision = contextlib.nullcontext() if full else torch.autocast(self.device.type, self.dtype)
        try:
            with stance, precision:
                yield
        finally:
            self.model.train(training)
