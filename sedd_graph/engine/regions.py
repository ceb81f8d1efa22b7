"""Modules of a graph: each region runs its steps in order and returns its outputs, then its saved activations.

Module path = node path = state-dict key. All repeats of a block share one plan, so that one compilation serves them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from sedd_graph.component.counter_rng import fold
from sedd_graph.graph.model import Graph

__all__ = ["Model", "Plan", "RegionModule", "last_use"]


def last_use(reads: Sequence[Collection[int]], retained: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """Return for each step the values that it is the last to read.

    Args:
        reads: Values that each step reads; -1 stands for none.
        retained: Values that are needed after the last step.
    """
    seen = {-1, *retained}
    found = []
    for read in reversed(reads):
        found.append(tuple(sorted(set(read) - seen)))
        seen.update(read)
    return tuple(reversed(found))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Order of execution of a region, shared by all its modules. Values are numbered: inputs first, then results of steps.

    Attributes:
        steps: Name of each step, and the values of its arguments (-1 for none).
        returned: Values of the outputs, then of the saved activations.
        saved: Number of saved activations.
    """

    steps: tuple[tuple[str, tuple[int, ...]], ...]
    returned: tuple[int, ...]
    saved: int

    @cached_property
    def last_use(self) -> tuple[tuple[int, ...], ...]:
        """Values that can be freed after each step."""
        return last_use([places for _, places in self.steps], self.returned)


class RegionModule(nn.Module):
    """Module of a region. Maps a dropout key (or None) and the inputs to a tuple of outputs, then saved activations.

    Attributes:
        keyed: True if a component below uses dropout; each such step gets its own dropout key.
        repeat: Number of layers if it is a chain of one block, else 0.
    """

    def __init__(self, children: Mapping[str, nn.Module], plan: Plan, *, repeat: int = 0) -> None:
        super().__init__()
        for name, child in children.items():
            # add_module would refuse names that nn.Module uses itself, such as 'half' or 'type'
            self._modules[name] = child
        self.plan, self.repeat = plan, repeat
        self.keyed = any(child.keyed for child in children.values())
        # tuples, which the compiler compares faster than a dataclass
        self._steps, self._returned, self._last_use = plan.steps, plan.returned, plan.last_use

    @property
    def custom_backward(self) -> bool:
        """True if its backward pass is an autograd function of its own, which cannot be compiled with its surroundings."""
        return False

    def forward(self, key: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        values: list[Any] = list(inputs)
        steps: dict[str, Any] = self._modules
        for place, ((name, places), last) in enumerate(zip(self._steps, self._last_use, strict=True)):
            step = steps[name]
            arguments = [None if a < 0 else values[a] for a in places]
            own = fold(key, place) if key is not None and step.keyed else None
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
        """Yield the blocks to compile, outermost first: each repeat of a block, which share one compilation."""
        for child in self.children():
            if isinstance(child, RegionModule):
                if self.repeat and not any(m.custom_backward for m in child.modules() if isinstance(m, RegionModule)):
                    yield child
                else:
                    yield from child.branches()


class Model(nn.Module):
    """Network of a graph. Maps the graph's inputs by name to a dict of its outputs."""

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
        """Module of the graph's own steps."""
        return self._root[0]

    def run(
        self, inputs: Mapping[str, Tensor], key: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return outputs by name, and saved activations by dotted path.

        Args:
            inputs: Inputs by name; others than the graph's are ignored.
            key: Dropout key, int32 [b]; None for no dropout.
        """
        values = self._root[0](key, *[inputs[name] for name in self.input_names])
        count = len(self.output_names)
        outputs = dict(zip(self.output_names, values[:count], strict=True))
        return outputs, dict(zip(self.tap_names, values[count:], strict=True))

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        unknown = inputs.keys() ^ set(self.input_names)
        if unknown:
            raise TypeError(
                f"the model takes {', '.join(self.input_names)}; missing or unknown: {', '.join(sorted(unknown))}"
            )
        return self.run(inputs)[0]

    def branches(self) -> Iterator[nn.Module]:
        """Yield the blocks to compile (see :meth:`RegionModule.branches`)."""
        return self._root[0].branches()
