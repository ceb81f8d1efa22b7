"""Placement of a model on the processes of a run: whole in each (DDP), or sharded (FSDP2; HSDP is both).

Replicas (DistributedDataParallel) hold all weights, and all-reduce gradients while the backward pass goes on. Shards
(``fully_shard``, arXiv 2304.11277) hold a part of each weight, of its gradient and of its optimizer state; a block's weights
are gathered before the block runs and freed after. A two-dimensional device mesh combines both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from sedd_graph.component.base import Component
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.network import CompileMode
from sedd_graph.engine.shard_init import ShardInit, fill_shards
from sedd_graph.errors import UserError
from sedd_graph.training.config import ParallelConfig, TrainConfig
from sedd_graph.training.distributed import World
from sedd_graph.training.staging import Shard

__all__ = ["Placement", "compile_mode", "place", "shard_init", "sizes"]


class Placement:
    """A model in one process, or whole in each of several processes.

    Args:
        module: Module that computes the loss; DistributedDataParallel for several processes.
        written: Part of each tensor that this process writes to a checkpoint.
    """

    sharded = False
    """Whether each process holds only a part of the weights."""

    def __init__(self, module: nn.Module, written: Shard) -> None:
        self.module, self.written = module, written

    @contextlib.contextmanager
    def backward_pass(self, *, last: bool) -> Iterator[None]:
        """Context of the draw, the loss and the backward pass of one micro-batch.

        Args:
            last: Whether it is the last of the optimizer step, after which gradients are summed over processes.
        """
        waits = isinstance(self.module, nn.parallel.DistributedDataParallel) and not last
        with self.module.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            yield

    def gather(self) -> None:
        """Gather all weights in each process, for evaluation and sampling. All processes must call this method."""

    def shard(self) -> None:
        """Free the weights that :meth:`gather` has gathered."""


class _Shards(Placement):
    """A model of which each process holds a part.

    The root, the module that computes the loss, gathers the weights outside blocks (embedding, head, learned schedule) for
    the whole step, since draws and penalties of components read them too.

    Args:
        module: Module that computes the loss, sharded.
        written: Part of each tensor that this process writes to a checkpoint.
    """

    sharded = True

    def __init__(self, module: nn.Module, written: Shard) -> None:
        from torch.distributed.fsdp import FSDPModule

        super().__init__(module, written)
        if not isinstance(module, FSDPModule):
            raise TypeError("the module is not sharded")
        self._root = module
        self._blocks = [m for m in module.modules() if isinstance(m, FSDPModule) and m is not module]

    @contextlib.contextmanager
    def backward_pass(self, *, last: bool) -> Iterator[None]:
        self._root.set_requires_gradient_sync(last)
        self._root.set_is_last_backward(last)
        self._root.unshard()
        yield

    def gather(self) -> None:
        for module in (self._root, *self._blocks):
            module.unshard()
        for block in self._blocks:
            block.set_reshard_after_forward(False, recurse=False)

    def shard(self) -> None:
        for block in self._blocks:
            block.set_reshard_after_forward(True, recurse=False)
        for module in (self._root, *self._blocks):
            module.reshard()


def sizes(config: ParallelConfig, processes: int) -> tuple[int, int]:
    """Return the numbers of replicas and of shards of each, whose product is the number of processes.

    Raises:
        UserError: The configured numbers do not give the number of processes.
    """
    replicate, shard = config.replicate, config.shard
    if shard is None:
        shard = processes // (replicate or 1)
    replicate = replicate or processes // shard
    if replicate * shard != processes:
        raise UserError(
            f"train.parallel asks for {config.replicate or 'any number of'} replicas of {config.shard or 'any number of'} "
            f"shards, which {processes} process(es) cannot be: replicate * shard must be the number of processes"
        )
    return replicate, shard


def compile_mode(engine: Engine, config: TrainConfig) -> CompileMode:
    """Return the scope of ``torch.compile``. Shards are gathered block by block, which ``whole`` would not allow.

    Raises:
        UserError: ``train.compile`` is ``cuda_graphs``, and weights are sharded.
    """
    if config.compile == "cuda_graphs" and config.parallel.shard != 1:
        raise UserError("train.compile: cuda_graphs needs train.parallel.shard: 1; choose block")
    if config.parallel.shard == 1 or config.compile in ("block", "off"):
        return config.compile
    repeated = any(True for _ in engine.model.branches())
    return "block" if config.compile == "whole" else "auto" if repeated else "off"


def shard_init(config: ParallelConfig, world: World) -> ShardInit | None:
    """Return the initialisation of this process's part of the weights; None if it holds all of them.

    Raises:
        UserError: The number of processes does not fit ``config``.
    """
    if not world.joined or config.shard == 1:
        return None
    _, shard = sizes(config, world.size)
    return ShardInit(world.rank % shard, shard)  # ranks of a two-dimensional mesh count along shards first


def place(engine: Engine, config: ParallelConfig, world: World) -> Placement:
    """Place the model of an engine on the processes of a run, in place.

    Args:
        engine: The engine, with the same weights in every process, or with this process's part of them
            (:func:`shard_init`).
        config: The ``train.parallel`` section of the blueprint.
        world: The process group.

    Raises:
        UserError: The number of processes does not fit ``config``, or the model cannot be sharded.
    """
    replicate, shard = sizes(config, world.size)
    first = Shard(0 if world.rank == 0 else -1, 1)
    if not world.joined:
        return Placement(engine.trained, first)
    if config.shard == 1:
        return Placement(_replicated(engine), first)
    return _Shards(_sharded(engine, replicate, shard), Shard(world.rank if world.rank < shard else -1, shard))


def _replicated(engine: Engine) -> nn.Module:
    if engine.compile_mode == "block":
        # blocks are compiled one by one: there is nothing to split at the borders of buckets
        import torch._dynamo.config as dynamo_config

        dynamo_config.optimize_ddp = False
    ids = [engine.device.index] if engine.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(engine.trained, device_ids=ids, gradient_as_bucket_view=True)


def _sharded(engine: Engine, replicate: int, shard: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = engine.model
    _require_shardable(model)
    kind = engine.device.type
    if replicate == 1:
        mesh = init_device_mesh(kind, (shard,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(kind, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    rows = None if engine.network.part is None else engine.network.part.named(engine.trained)
    for block in model.layers():
        if not any(_penalised(part) for part in block.modules()):
            fully_shard(block, mesh=mesh)
    fully_shard(engine.trained, mesh=mesh)
    if rows is not None:
        fill_shards(engine.trained, rows, engine.device)
    return engine.trained


def _penalised(part: nn.Module) -> bool:
    """Return whether the loss reads the weights of a component outside of its evaluation."""
    return isinstance(part, Component) and type(part).penalty is not Component.penalty


def _require_shardable(model: nn.Module) -> None:
    """Raise :class:`UserError` if a model cannot be sharded."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise UserError(f"train.parallel.shard: parameter {name!r} is a single number, which cannot be sharded")
        if parameter.dtype != torch.float32:
            raise UserError(f"train.parallel.shard: parameter {name!r} is {parameter.dtype}, not torch.float32")
