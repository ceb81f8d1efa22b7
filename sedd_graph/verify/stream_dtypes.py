"""Data types that the inputs of a block have in its graph under autocast, found without weights or data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sedd_graph.component.registry import Registry
from sedd_graph.engine.construct import build_model
from sedd_graph.graph.claims import Use
from sedd_graph.graph.model import Graph

__all__ = ["StreamDtypes"]


class StreamDtypes:
    """Data types of the inputs of blocks when the whole network runs under autocast.

    Args:
        graph: The typed graph.
        registry: The installed components.
    """

    def __init__(self, graph: Graph, registry: Registry) -> None:
        self.graph, self.registry = graph, registry
        self._found: dict[torch.dtype, dict[str, list[torch.dtype]]] = {}

    def of(self, use: Use, autocast: torch.dtype) -> Mapping[str, torch.dtype]:
        """Return the dtypes that the float inputs of a block have where the network first uses it, by input name.

        The network is run under autocast on fake tensors, which have no data.

        Args:
            use: The block, with the path of its first use.
            autocast: Data type of autocast, such as ``torch.bfloat16``.

        Returns:
            Data type by input name; empty if that run raises an error.
        """
        if autocast not in self._found:
            try:
                self._found[autocast] = self._run(autocast)
            except Exception:  # third-party code may raise anything on tensors without data
                self._found[autocast] = {}
        dtypes = self._found[autocast].get(use.path, [])
        return {n: d for n, d in zip(use.layer.inputs, dtypes, strict=False) if d.is_floating_point}

    def _run(self, autocast: torch.dtype) -> dict[str, list[torch.dtype]]:
        """Run the network on tensors without data, and return the data types of all arguments of each region by path."""
        found: dict[str, list[torch.dtype]] = {}

        def hook(path: str) -> Any:
            def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
                found[path] = [x.dtype for x in arguments[1:] if isinstance(x, Tensor)]

            return record

        kinds = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}
        with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", autocast, cache_enabled=False):
            model = build_model(self.graph, self.registry)
            for path, module in model.named_modules():
                module.register_forward_pre_hook(hook(path))
            inputs = {
                name: torch.zeros([d.size.evaluate({"batch": 2, "length": 8}) for d in t.dims], dtype=kinds[t.kind])
                for name, t in self.graph.root.inputs.items()
            }
            model.run(inputs)
        return found
