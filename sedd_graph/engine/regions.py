"""From a graph to a module: each region runs its steps in order, and saved ports ride along as further outputs.

Module path = node path = state-dict key. All repeats of a block share one plan, so that one compiled forward serves
them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sedd_graph.component import Context
from sedd_graph.errors import BlueprintError, Problem
from sedd_graph.graph.model import Graph, Op, Region, Step
from sedd_graph.keys import fold
from sedd_graph.plugins import Registry

__all__ = ["Model", "RegionModule", "build_model", "build_shapes", "count_parameters"]

Plan = tuple[tuple[str, tuple[int, ...]], ...]
"""Per step: its name, and where its arguments stand (-1 for none)."""


class RegionModule(nn.Module):
    """Runs one region: a key (or None) and tensors in, a tuple of outputs and then of taps out.

    ``keyed`` tells whether any component below draws at random; each such step gets a key of its own.
    """

    def __init__(self, children: Mapping[str, nn.Module], plan: Plan, returned: tuple[int, ...]) -> None:
        super().__init__()
        for name, child in children.items():
            # add_module would refuse names that nn.Module uses itself, such as 'half' or 'type'
            self._modules[name] = child
        self.plan, self.returned = plan, returned
        self.keyed = any(child.keyed for child in children.values())

    def forward(self, key: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        values: list[Any] = list(inputs)
        for place, (name, places) in enumerate(self.plan):
            step: Any = self._modules[name]
            arguments = [None if a < 0 else values[a] for a in places]
            own = fold(key, place) if step.keyed and key is not None else None
            if isinstance(step, RegionModule):
                result = step(own, *arguments)
            else:
                result = step(*arguments, key=own) if step.keyed else step(*arguments)
            if isinstance(result, tuple):
                values.extend(result)
            else:
                values.append(result)
        return tuple([values[i] for i in self.returned])


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

    def regions(self) -> list[RegionModule]:
        """Every block instance, outermost first."""
        return [m for m in self.modules() if isinstance(m, RegionModule)]


_FILLS = (
    Tensor.normal_,
    Tensor.uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.trunc_normal_,
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    nn.init.xavier_uniform_,
    nn.init.xavier_normal_,
)


class _NoDraws(TorchFunctionMode):
    """Leaves random fills undone: on meta tensors they have nothing to fill, and torch loads its compiler to find out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_shapes(graph: Graph, registry: Registry) -> Model:
    """The module with the shapes of its parameters and nothing behind them (on the meta device)."""
    with torch.device("meta"), _NoDraws():
        return build_model(graph, registry)


def build_model(graph: Graph, registry: Registry) -> Model:
    """Make the module, its parameters drawn from torch's global generator.

    Raises :class:`BlueprintError` with every component that refuses its place.
    """
    problems: list[Problem] = []
    root = _Maker(registry, problems).region(graph.root, "")
    if problems or root is None:
        raise BlueprintError(problems)
    return Model(graph, root)


class _Maker:
    def __init__(self, registry: Registry, problems: list[Problem]) -> None:
        self.registry, self.problems = registry, problems
        self.plans: dict[int, tuple[Plan, tuple[int, ...], int]] = {}

    def region(self, region: Region, prefix: str) -> RegionModule | None:
        children: dict[str, nn.Module] = {}
        for step in region.steps:
            path = f"{prefix}{step.name}"
            child = self.region(step.body, path + ".") if isinstance(step.body, Region) else self.component(step, path)
            if child is not None:
                children[step.name] = child
        if self.problems:
            return None
        plan, returned, _ = self.plan(region)
        return RegionModule(children, plan, returned)

    def component(self, step: Step, path: str) -> nn.Module | None:
        op = step.body
        assert isinstance(op, Op)
        cls = self.registry.component(op.contract.op)
        try:
            made: nn.Module = cls(op.config, Context(op.static_axes, frozenset(step.inputs), path))
            return made
        except (ValueError, TypeError, KeyError) as error:
            text = f"needs the size of axis {error}, which nothing binds" if isinstance(error, KeyError) else str(error)
            self.problems.append(Problem(*step.place, path, f"op {op.contract.name!r}: {text}"))
            return None

    def plan(self, region: Region) -> tuple[Plan, tuple[int, ...], int]:
        """The plan of a region, what it returns, and how many taps that includes. One object for all its uses."""
        if id(region) in self.plans:
            return self.plans[id(region)]
        slots: dict[tuple[str, str], int] = {("", name): i for i, name in enumerate(region.inputs)}
        total, rows, taps = len(slots), [], []
        for step in region.steps:
            if isinstance(step.body, Region):
                ports = list(step.body.inputs)
                outputs, inner = list(step.body.outputs), self.plan(step.body)[2]
                arguments = [slots[r.step, r.port] for port in ports for r in step.inputs[port]]
            else:
                outputs, inner, arguments = [p.name for p in step.body.signature.outputs], 0, []
                for port in step.body.signature.inputs:
                    refs = step.inputs.get(port.name, ())
                    arguments += [slots[r.step, r.port] for r in refs] if refs else [] if port.variadic else [-1]
            for index, name in enumerate(outputs):
                slots[step.name, name] = total + index
            taps += list(range(total + len(outputs), total + len(outputs) + inner))
            if step.save is not None:
                taps += [slots[step.name, port] for port in step.save.ports]
            rows.append((step.name, tuple(arguments)))
            total += len(outputs) + inner
        returned = [slots[r.step, r.port] for r in region.outputs.values()] + taps
        self.plans[id(region)] = (tuple(rows), tuple(returned), len(taps))
        return self.plans[id(region)]


def count_parameters(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())
