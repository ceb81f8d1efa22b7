"""Construction of PyTorch modules from a typed graph.

All components that cannot be constructed are reported together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sedd_graph.component.base import Context
from sedd_graph.component.registry import Registry
from sedd_graph.engine.regions import Model, Plan, RegionModule
from sedd_graph.engine.running import make_running
from sedd_graph.engine.shard_init import ShardInit
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
    """Mode that skips random initialisation: it has no effect on meta tensors, but makes torch load its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_shapes(graph: Graph, registry: Registry) -> Model:
    """Build the model on the meta device: parameters have shapes but no storage.

    Args:
        graph: The typed graph.
        registry: The installed components.

    Raises:
        BlueprintError: Components cannot be constructed. The error lists them all.
    """
    with torch.device("meta"), _NoDraws():
        return build_model(graph, registry)


def count_shapes(graph: Graph, registry: Registry) -> int:
    """Return the number of parameters of a graph without allocating them.

    Each distinct block is built once, on the meta device, and its parameters are counted once per use.

    Args:
        graph: The typed graph.
        registry: The installed components.

    Raises:
        BlueprintError: Components cannot be constructed. The error lists them all.
    """
    problems: list[Problem] = []
    with torch.device("meta"), _NoDraws():
        root = _Builder(registry, problems, shared={}).region(graph.root, "")
    if problems or root is None:
        raise BlueprintError(problems)
    counts: dict[int, int] = {}

    def count(module: nn.Module) -> int:
        if not isinstance(module, RegionModule):
            return count_parameters(module)
        if id(module) not in counts:
            # children() would skip a shared module
            counts[id(module)] = sum(count(child) for child in module._modules.values() if child is not None)
        return counts[id(module)]

    return count(root)


def build_model(graph: Graph, registry: Registry, part: ShardInit | None = None) -> Model:
    """Build the network of a graph, with parameters initialised from torch's global random generator.

    Args:
        graph: The typed graph.
        registry: The installed components.
        part: Part of the parameters that this process holds, which takes them; None for all.

    Raises:
        BlueprintError: Components cannot be constructed. The error lists them all.
    """
    problems: list[Problem] = []
    root = _Builder(registry, problems, part=part).region(graph.root, "")
    if problems or root is None:
        raise BlueprintError(problems)
    return Model(graph, root)


def build_block(region: Region, registry: Registry, *, repeat: int = 0, running: Running = _PLAIN) -> RegionModule:
    """Build the module of one block without its surrounding graph, or of a chain of ``repeat`` copies of the block.

    Args:
        region: The block.
        registry: The installed components.
        repeat: Number of copies in the chain, in which each reads the outputs of the one before; 0: one block, without
            a chain.
        running: Memory mode (``store``, ``checkpoint`` or ``reversible``) and arithmetic of the block. By default
            ``store`` and ordinary floating point.

    Raises:
        BlueprintError: Components cannot be constructed, or the block cannot be run as ``running`` declares, such as
            reversibly without an inverse.
    """
    problems: list[Problem] = []
    body = chained(region, repeat, _NOWHERE) if repeat else region
    use = Step(region.label, body, {}, region.output_types, None, _NOWHERE, running)
    made = _Builder(registry, problems).region(body, f"{region.label}.", use)
    if problems or made is None:
        raise BlueprintError(problems)
    return made


class _Builder:
    """Builder of region modules, which collects problems. With ``shared``, equal uses of a region share one module."""

    def __init__(
        self,
        registry: Registry,
        problems: list[Problem],
        shared: dict[tuple[int, Running | None], RegionModule] | None = None,
        part: ShardInit | None = None,
    ) -> None:
        self.registry, self.problems, self.shared, self.part = registry, problems, shared, part
        self.plans: dict[int, Plan] = {}

    def region(self, region: Region, prefix: str, use: Step | None = None) -> RegionModule | None:
        """Build a region at the path ``prefix`` for the step ``use``; None where there are problems."""
        key = (id(region), use.running if use else None)
        if self.shared is not None and key in self.shared:
            return self.shared[key]
        made = self._built(region, prefix, use)
        if self.shared is not None and made is not None:
            self.shared[key] = made
        return made

    def _built(self, region: Region, prefix: str, use: Step | None) -> RegionModule | None:
        children: dict[str, nn.Module] = {}
        for step in region.steps:
            path = f"{prefix}{step.name}"
            if isinstance(step.body, Region):
                child: nn.Module | None = self.region(step.body, path + ".", step)
            else:
                child = self._component(step.body, step, path)
            if child is not None:
                children[step.name] = child
        if self.problems:
            return None
        plan = self._plan(region)
        if use is None or use.running == Running():
            return RegionModule(children, plan, repeat=region.repeat)
        try:
            return make_running(region, children, plan, use.running)
        except UserError as error:
            self.problems.append(Problem(*use.position, prefix.rstrip("."), str(error)))
            return None

    def _component(self, op: Op, step: Step, path: str) -> nn.Module | None:
        cls = self.registry.component(op.contract.op)
        try:
            made: nn.Module = cls(op.config, Context(op.static_axes, frozenset(step.inputs), path))
            if self.part is not None:
                self.part.take(made)
            return made
        except (ValueError, TypeError, KeyError) as error:
            text = f"needs the size of axis {error}, which nothing binds" if isinstance(error, KeyError) else str(error)
        except (RuntimeError, OverflowError) as error:  # of torch, for sizes whose product it cannot hold
            text = f"cannot be constructed, even without storage: {str(error).splitlines()[0]}"
        self.problems.append(Problem(*step.position, path, f"op {op.contract.name!r}: {text}"))
        return None

    def _plan(self, region: Region) -> Plan:
        """Return the plan of a region, one object for all its uses."""
        if id(region) in self.plans:
            return self.plans[id(region)]
        slots: dict[tuple[str, str], int] = {("", name): i for i, name in enumerate(region.inputs)}
        total, steps, saved = len(slots), [], []
        for step in region.steps:
            if isinstance(step.body, Region):
                outputs, inner = list(step.body.outputs), self._plan(step.body).saved
                arguments = [slots[r.step, r.port] for port in step.body.inputs for r in step.inputs[port]]
            else:
                outputs, inner, arguments = [p.name for p in step.body.signature.outputs], 0, []
                for port in step.body.signature.inputs:
                    refs = step.inputs.get(port.name, ())
                    arguments += [slots[r.step, r.port] for r in refs] if refs else [] if port.variadic else [-1]
            for index, name in enumerate(outputs):
                slots[step.name, name] = total + index
            saved += list(range(total + len(outputs), total + len(outputs) + inner))
            if step.save is not None:
                saved += [slots[step.name, port] for port in step.save.ports]
            steps.append((step.name, tuple(arguments)))
            total += len(outputs) + inner
        returned = [slots[r.step, r.port] for r in region.outputs.values()] + saved
        self.plans[id(region)] = Plan(tuple(steps), tuple(returned), len(saved))
        return self.plans[id(region)]


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of ``model``. A shared parameter is counted once."""
    return sum(p.numel() for p in model.parameters())
