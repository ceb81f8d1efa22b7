"""The modules that a graph becomes: each region runs its steps in order, and saved ports ride along as further outputs.

Module path = node path = state-dict key. All repeats of a block share one plan, so that one compiled forward serves
them all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sedd_graph.component.counter_rng import fold
from sedd_graph.graph.model import Graph

__all__ = ["Model", "Plan", "RegionModule", "spent"]

Plan = tuple[tuple[str, tuple[int, ...]], ...]
"""Per step: its name, and where its arguments stand (-1 for none)."""


def spent(reads: Sequence[Collection[int]], kept: Collection[int]) -> tuple[tuple[int, ...], ...]:
    """For each step, which of the values that it reads (-1: none) no later step reads and nobody has asked to be kept."""
    seen = {-1, *kept}
    found = []
    for read in reversed(reads):
        found.append(tuple(sorted(set(read) - seen)))
        seen.update(read)
    return tuple(reversed(found))


class RegionModule(nn.Module):
    """Runs one region: a key (or None) and tensors in, a tuple of outputs and then of taps out.

    ``keyed`` tells whether any component below draws at random; each such step gets a key of its own. ``repeat`` > 0
    marks a chain of one block.
    """

    inseparable = False
    """Whether it has a backward pass of its own, which no compiler looks into."""

    def __init__(
        self, children: Mapping[str, nn.Module], plan: Plan, returned: tuple[int, ...], *, repeat: int = 0
    ) -> None:
        super().__init__()
        for name, child in children.items():
            # add_module would refuse names that nn.Module uses itself, such as 'half' or 'type'
            self._modules[name] = child
        self.plan, self.returned, self.repeat = plan, returned, repeat
        self.keyed = any(child.keyed for child in children.values())
        self._spent = spent([places for _, places in plan], returned)

    def forward(self, key: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        values: list[Any] = list(inputs)
        steps: dict[str, Any] = self._modules
        for place, ((name, places), past) in enumerate(zip(self.plan, self._spent, strict=True)):
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
            for value in past:
                values[value] = None  # its memory is free for the next step, unless a backward pass keeps it
        return tuple([values[i] for i in self.returned])

    def branches(self) -> Iterator[nn.Module]:
        """The blocks below that are worth compiling, outermost first: each repeat of a block, all by one compilation."""
        for child in self.children():
            if isinstance(child, RegionModule):
                if self.repeat and not any(m.inseparable for m in child.modules() if isinstance(m, RegionModule)):
                    yield child
                else:
                    yield from child.branches()


class Model(nn.Module):
    """A blueprint's network: called with the graph's inputs by name, it returns a dict of the graph's outputs."""

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
        """The graph's own steps."""
        return self._root[0]

    def run(
        self, inputs: Mapping[str, Tensor], key: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs by name, and the saved ports by dotted path. ``inputs`` may hold more than the graph asks for.

        ``key`` int32 [b] is what dropout is drawn from; without it nothing is dropped.
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
        """The blocks that are worth compiling (see :meth:`RegionModule.branches`)."""
        return self._root[0].branches()
