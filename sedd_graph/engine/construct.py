"""From a graph to its module: every component made in its place, or every reason why one cannot stand there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sedd_graph.component.base import Context
from sedd_graph.component.registry import Registry
from sedd_graph.engine.regions import Model, Plan, RegionModule
from sedd_graph.engine.reversible import make_running
from sedd_graph.errors import BlueprintError, Problem, UserError
from sedd_graph.graph.blocks import chained
from sedd_graph.graph.model import Graph, Op, Region, Running, Step

__all__ = ["build_block", "build_model", "build_shapes", "count_parameters", "count_shapes"]

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


_PLAIN, _NOWHERE = Running(), ("", 0, 0)


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


def count_shapes(graph: Graph, registry: Registry) -> int:
    """How many parameters the graph has, allocating none: each distinct block is made once, however often it stands there.

    Raises :class:`BlueprintError` with every component that refuses its place.
    """
    problems: list[Problem] = []
    with torch.device("meta"), _NoDraws():
        root = _Maker(registry, problems, shared={}).region(graph.root, "")
    if problems or root is None:
        raise BlueprintError(problems)
    counts: dict[int, int] = {}

    def count(module: nn.Module) -> int:
        if not isinstance(module, RegionModule):
            return count_parameters(module)
        if id(module) not in counts:
            # children() would leave out a module that it has met before
            counts[id(module)] = sum(count(child) for child in module._modules.values() if child is not None)
        return counts[id(module)]

    return count(root)


def build_model(graph: Graph, registry: Registry) -> Model:
    """Make the module, its parameters drawn from torch's global generator.

    Raises :class:`BlueprintError` with every component that refuses its place.
    """
    problems: list[Problem] = []
    root = _Maker(registry, problems).region(graph.root, "")
    if problems or root is None:
        raise BlueprintError(problems)
    return Model(graph, root)


def build_block(region: Region, registry: Registry, *, repeat: int = 0, running: Running = _PLAIN) -> RegionModule:
    """One block by itself, or a chain of ``repeat`` > 0 of it, run as ``running`` says. Raises :class:`BlueprintError`."""
    problems: list[Problem] = []
    body = chained(region, repeat, _NOWHERE) if repeat else region
    use = Step(region.label, body, {}, region.output_types, None, _NOWHERE, running)
    made = _Maker(registry, problems).region(body, f"{region.label}.", use)
    if problems or made is None:
        raise BlueprintError(problems)
    return made


class _Maker:
    """With ``shared``, all uses of one region that run alike are one module."""

    def __init__(
        self,
        registry: Registry,
        problems: list[Problem],
        shared: dict[tuple[int, Running | None], RegionModule] | None = None,
    ) -> None:
        self.registry, self.problems, self.shared = registry, problems, shared
        self.plans: dict[int, tuple[Plan, tuple[int, ...], int]] = {}

    def region(self, region: Region, prefix: str, use: Step | None = None) -> RegionModule | None:
        if self.shared is None:
            return self.made(region, prefix, use)
        key = (id(region), use.running if use else None)
        if key not in self.shared:
            made = self.made(region, prefix, use)
            if made is None:
                return None
            self.shared[key] = made
        return self.shared[key]

    def made(self, region: Region, prefix: str, use: Step | None) -> RegionModule | None:
        children: dict[str, nn.Module] = {}
        for step in region.steps:
            path = f"{prefix}{step.name}"
            if isinstance(step.body, Region):
                child: nn.Module | None = self.region(step.body, path + ".", step)
            else:
                child = self.component(step, path)
            if child is not None:
                children[step.name] = child
        if self.problems:
            return None
        plan, returned, _ = self.plan(region)
        if use is None or use.running == Running():
            return RegionModule(children, plan, returned, repeat=region.repeat)
        try:
            return make_running(region, children, plan, returned, use.running)
        except UserError as error:
            self.problems.append(Problem(*use.position, prefix.rstrip("."), str(error)))
            return None

    def component(self, step: Step, path: str) -> nn.Module | None:
        op = step.body
        assert isinstance(op, Op)
        cls = self.registry.component(op.contract.op)
        try:
            made: nn.Module = cls(op.config, Context(op.static_axes, frozenset(step.inputs), path))
            return made
        except (ValueError, TypeError, KeyError) as error:
            text = f"needs the size of axis {error}, which nothing binds" if isinstance(error, KeyError) else str(error)
            self.problems.append(Problem(*step.position, path, f"op {op.contract.name!r}: {text}"))
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
