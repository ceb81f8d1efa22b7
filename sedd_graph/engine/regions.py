"""PyTorch modules of the regions of a graph. A region is the whole graph, or the subgraph of one use of a block.

The module of a region evaluates the region's steps (components and nested regions) in order, and returns the region's
outputs and saved activations. The dotted path of a node in the graph is the path of its module, and so the prefix of
its keys in the state dict. All repeats of a block share one execution plan (:class:`Plan`), and therefore one
compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from sedd_graph.component.counter_rng import fold
from sedd_graph.graph.model import Graph

__all__ = ["Model", "Plan", "RegionModule", "last_use"]


def last_use(reads: Sequence[Collection[int]], retained: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """Return for each step the tensors of a region (graph values) that no later step reads and that can then be freed.

    Args:
        reads: For each step, the indices of the graph values that the step reads; -1 for an optional port that is not
            connected.
        retained: Indices of the graph values that are needed after the last step, which are never freed.

    Returns:
        For each step, the sorted indices of the graph values that can be freed after the step.
    """
    seen = {-1, *retained}
    found = []
    for read in reversed(reads):
        found.append(tuple(sorted(set(read) - seen)))
        seen.update(read)
    return tuple(reversed(found))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Execution plan of a region, shared by all modules of the region.

    The tensors of a run (graph values) are numbered in order of execution: first the region's inputs, then for each
    step its outputs and its saved activations.

    Attributes:
        steps: For each step a pair (name, graph-value indices of its arguments); -1 for an optional port that is not
            connected.
        returned: Graph-value indices of the outputs, followed by those of the saved activations.
        saved: Number of saved activations.
        numbers: For each step the number that is folded into the dropout key; empty for the index of the step.
    """

    steps: tuple[tuple[str, tuple[int, ...]], ...]
    returned: tuple[int, ...]
    saved: int
    numbers: tuple[int, ...] = ()

    @cached_property
    def last_use(self) -> tuple[tuple[int, ...], ...]:
        """For each step, the indices of the tensors (graph values) that no later step reads and that can be freed."""
        return last_use([places for _, places in self.steps], self.returned)


class _Named(nn.Module):
    """Base class of modules whose children have names from a blueprint, which may be names of their attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a plain attribute even where a child has its name, such as ``training``, which ``train()`` sets."""
        if isinstance(value, nn.Module | Tensor):
            super().__setattr__(name, value)
        else:
            object.__setattr__(self, name, value)


class RegionModule(_Named):
    """Module of a region: maps a dropout key and inputs to a tuple of outputs, followed by saved activations.

    Args:
        children: Modules of the steps by name.
        plan: Execution plan of the region.
        repeat: Number of layers if the region is a chain of one repeated block, otherwise 0.

    Attributes:
        keyed: Whether a component within the region takes a dropout key.
        share: Share of the activations that compiled code of this module saves (:func:`compile_in_place`).
    """

    def __init__(self, children: Mapping[str, nn.Module], plan: Plan, *, repeat: int = 0) -> None:
        super().__init__()
        for name, child in children.items():
            # add_module would refuse names that nn.Module uses itself, such as 'half' or 'type'
            self._modules[name] = child
        self.plan, self.repeat = plan, repeat
        self.share = 1.0
        self.keyed = any(child.keyed for child in children.values())
        # tuples, which the compiler compares faster than a dataclass
        self._steps, self._returned, self._last_use = plan.steps, plan.returned, plan.last_use
        self._numbers = plan.numbers or tuple(range(len(plan.steps)))

    @property
    def custom_backward(self) -> bool:
        """Whether the module has a custom backward pass, which cannot be compiled with its surroundings."""
        return False

    def forward(
        self, key: Tensor | None, *inputs: Tensor, evaluate: Callable[..., tuple[Tensor, ...]] | None = None
    ) -> tuple[Tensor, ...]:
        """Evaluate the region.

        Args:
            key: Dropout key of each row, int32 [b]; None turns dropout off.
            *inputs: Input tensors in the order of the region's inputs.
            evaluate: Function of the inputs that is evaluated instead, within the hooks of this module: those of FSDP2
                gather its weights.

        Returns:
            The outputs, followed by the saved activations; or what ``evaluate`` returns.
        """
        if evaluate is not None:
            return evaluate(*inputs)
        values: list[Any] = list(inputs)
        steps: dict[str, Any] = self._modules
        for number, (name, places), last in zip(self._numbers, self._steps, self._last_use, strict=True):
            step = steps[name]
            arguments = [None if a < 0 else values[a] for a in places]
            own = fold(key, number) if key is not None and step.keyed else None
            if isinstance(step, RegionModule):
                result = step(own, *arguments)
            else:
                result = step(*arguments, key=own) if step.keyed else step(*arguments)
            if isinstance(result, tuple):
                values.extend(result)
            else:
                values.append(result)
            for value in last:
                values[value] = None  # frees its memory, unless autograd has saved it
        return tuple([values[i] for i in self._returned])

    def branches(self) -> Iterator[nn.Module]:
        """Yield the modules to compile: every repeat of each outermost repeated block.

        A repeat that contains a custom backward pass is not compiled as a whole; its own repeated blocks are. All
        repeats of a block share one compilation.
        """
        for child in self.children():
            if isinstance(child, RegionModule):
                if self.repeat and not any(m.custom_backward for m in child.modules() if isinstance(m, RegionModule)):
                    yield child
                else:
                    yield from child.branches()

    def layers(self) -> Iterator[nn.Module]:
        """Yield the modules whose weights are used together: every repeat of each outermost repeated block.

        Each is called as a module in every memory mode, in the forward pass and wherever the backward pass evaluates it
        again, so that FSDP2 (``fully_shard``) can gather and free its weights.
        """
        for child in self.children():
            if isinstance(child, RegionModule):
                if self.repeat:
                    yield child
                else:
                    yield from child.layers()


class Model(_Named):
    """Module of a graph: maps input tensors, passed by name, to a dict of output tensors.

    Args:
        graph: The typed graph.
        root: Module of the graph's top-level region.

    Attributes:
        input_names: Names of the inputs.
        output_names: Names of the outputs.
        tap_names: Dotted paths of the saved activations.
        compiled: Whether training runs compiled code; set by :meth:`sedd_graph.engine.network.Network.compile`.
    """

    compiled: bool = False

    def __init__(self, graph: Graph, root: RegionModule) -> None:
        super().__init__()
        self.input_names = tuple(graph.root.inputs)
        self.output_names = tuple(graph.root.outputs)
        self.tap_names = tuple(path for path, _, _ in graph.taps)
        # The root's steps are this module's own children, so that paths carry no prefix.
        self._modules.update(root._modules)
        self._root = (root,)  # in a tuple: not a child a second time

    @property
    def root(self) -> RegionModule:
        """Module of the graph's top-level region."""
        return self._root[0]

    def run(
        self, inputs: Mapping[str, Tensor], key: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Evaluate the network and return its outputs and saved activations.

        Args:
            inputs: Input tensors by name; names that are not inputs of the graph are ignored.
            key: Dropout key of each row, int32 [b]; None turns dropout off.

        Returns:
            The outputs by name, and the saved activations by dotted path.
        """
        values = self._root[0](key, *[inputs[name] for name in self.input_names])
        count = len(self.output_names)
        outputs = dict(zip(self.output_names, values[:count], strict=True))
        return outputs, dict(zip(self.tap_names, values[count:], strict=True))

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Evaluate the network without dropout and return its outputs by name.

        Args:
            **inputs: Exactly the inputs of the graph, by name.

        Raises:
            TypeError: An input is missing or unknown.
        """
        unknown = inputs.keys() ^ set(self.input_names)
        if unknown:
            raise TypeError(
                f"the model takes {', '.join(self.input_names)}; missing or unknown: {', '.join(sorted(unknown))}"
            )
        return self.run(inputs)[0]

    def branches(self) -> Iterator[nn.Module]:
        """Yield the modules to compile: the repeats of repeated blocks, see :meth:`RegionModule.branches`."""
        return self._root[0].branches()

    def layers(self) -> Iterator[nn.Module]:
        """Yield the repeats of repeated blocks, whose weights are used together, see :meth:`RegionModule.layers`."""
        return self._root[0].layers()
