"""Optimizer steps and checkpoints of one process of a training run.

Every random number is a function of the seed, the step and the row's index in the global batch (and, for dropout, the
node of the network). Resumed runs, and runs that split the batch differently over processes or accumulation steps,
therefore have the same losses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.hardware import pick_dtype
from sedd_graph.engine.process import SCHEDULE
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import DivergedError, UserError
from sedd_graph.evaluation.bound import to_batch
from sedd_graph.store.activations import Activations
from sedd_graph.store.manifest import DamagedError, Entry
from sedd_graph.training.checkpoint import (
    AVERAGE,
    MODEL,
    OPTIMIZER,
    Checkpoint,
    State,
    checkpoints,
    read_checkpoint,
    set_aside,
    write_checkpoint,
)
from sedd_graph.training.config import TrainConfig
from sedd_graph.training.distributed import World
from sedd_graph.training.optim import Average, learning_rate, make_optimizers
from sedd_graph.training.optimizer_state import expected_state, pack_optimizers, unpack_optimizers
from sedd_graph.training.weights import check_tensors
from sedd_graph.training.window import RunningLoss

__all__ = ["Say", "Trainer"]

Say = Callable[[str], None]
"""Function that prints a line for the user."""


class Trainer:
    """Trainer of one process: gradient accumulation, optimizer steps, averaged weights and checkpoints.

    Args:
        engine: The engine (network and diffusion process) to train.
        data: The data set.
        config: The ``train`` section of the blueprint.
        run: The run folder.
        world: The process group of the run.
        say: Function that prints a line for the user.

    Raises:
        UserError: ``train.batch`` is not a multiple of ``train.accumulate`` times the number of processes.
    """

    def __init__(
        self,
        engine: Engine,
        data: Dataset | PointData,
        config: TrainConfig,
        run: Path,
        world: World,
        say: Say,
    ) -> None:
        self.engine, self.data, self.config, self.run, self.world = engine, data, config, run, world
        self.say = say
        if config.batch % (config.accumulate * world.size):
            raise UserError(
                f"train.batch = {config.batch} is not a multiple of accumulate * processes = {config.accumulate} * {world.size}"
            )
        self.module: nn.Module = engine.trained
        if world.size > 1:
            ids = [engine.device.index] if engine.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.module, device_ids=ids)
        self.model = engine.model
        self.optimizers = make_optimizers(self.model, config)
        self.average = Average(self.model, config.ema) if config.ema else None
        self.dtype = pick_dtype(config.dtype, engine.device)
        self.step, self.seconds = 0, 0.0
        self.saved: int | None = None
        """Step of the newest checkpoint that this run has written or has been restored from."""
        self.window = RunningLoss(engine.device)
        self.activations: Activations | None = None

    @property
    def micro_batch(self) -> int:
        """Rows of one backward pass of this process."""
        return self.config.batch // (self.config.accumulate * self.world.size)

    def micro_batches(self) -> Iterator[tuple[Any, Randomness]]:
        """Yield (batch, source of random numbers) for each backward pass of this process in the current step.

        A batch has ``train.batch / (train.accumulate * processes)`` rows.
        """
        config, world, share = self.config, self.world, self.micro_batch
        for part in range(config.accumulate):
            start = (part * world.size + world.rank) * share
            rows = self.data.batch(self.step * config.batch, config.batch, start=start, stop=start + share)
            generator = torch.Generator(self.engine.device).manual_seed(mix_seed(config.seed, 1, self.step))
            yield (
                to_batch(rows, self.engine.process, self.engine.device),
                Randomness(generator, start=start, total=config.batch),
            )

    def train_step(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Accumulate the gradients of one optimizer step, without updating the weights.

        Returns:
            The loss summed over this process's rows (nats, scalar tensor); the number of tokens, or coordinates of
            points, whose loss is in that sum (scalar tensor); and the activations that ``save`` in the blueprint names,
            of the last backward pass, by dotted path.
        """
        config = self.config
        nats = torch.zeros((), device=self.engine.device)
        counted = torch.zeros((), device=self.engine.device)
        saved: dict[str, Tensor] = {}
        # third-party components may draw from torch's global generator: seeded, so that a resumed run repeats the draws
        torch.manual_seed(mix_seed(config.seed, 2, self.step, self.world.rank))
        for number, (batch, random) in enumerate(self.micro_batches()):
            draw = self.engine.draw(batch, random=random)
            last = number == config.accumulate - 1
            waiting = isinstance(self.module, DistributedDataParallel) and not last
            with self.module.no_sync() if waiting else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(self.engine.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                    loss, saved = self.module(draw, batch, random.keys(len(batch)))
                # DDP averages over processes: each adds its share of the mean over the whole batch, per position
                (loss.sum() * self.world.size / (config.batch * batch.width)).backward()
            nats += loss.detach().sum()
            counted += batch.counted.sum()
        return nats, counted, saved

    def update(self, progress: float) -> Tensor:
        """Clip the gradient, step the optimizers and update the averaged weights.

        Args:
            progress: Share of the run that is done, in [0, 1], for the learning-rate schedule.

        Returns:
            Norm of the network's gradient before clipping, a scalar tensor. A learned noise schedule is not included.
        """
        config = self.config
        named = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
        # rare large losses dominate the gradient of a learned schedule: clipped together, it would scale down the network's
        rest = [p for name, p in named if not name.startswith(SCHEDULE)]
        norm = nn.utils.clip_grad_norm_(rest, config.clip or math.inf)
        share = learning_rate(config, self.step, progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        return norm

    def diverged(self, what: str) -> DivergedError:
        """Return (without raising) the exception for a diverged run; ``what`` is the beginning of its message."""
        return DivergedError(
            f"{what} by step {self.step}; the last checkpoint is intact. "
            "Try a lower train.optimizer.lr, a longer train.warmup, or train.dtype=float32"
        )

    def save(self) -> None:
        """Write a checkpoint of the current step, in the process of rank 0. All processes must call this method.

        Raises:
            DivergedError: The weights or the loss are not finite. No checkpoint is written, so that the earlier ones
                are retained.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise self.diverged("weights became NaN or infinite")
        if self.saved == self.step:
            return
        if self.activations is not None:
            self.activations.flush()  # a run resumed from this checkpoint does not record earlier steps again
        window = self.window.state(self.world)
        if not all(map(math.isfinite, window.nats)):
            raise self.diverged("the loss became NaN or infinite")
        if self.world.rank == 0:
            weights = {k: v.detach().cpu().contiguous().clone() for k, v in self.model.state_dict().items()}
            average = None
            if self.average is not None:
                average = {**weights, **{k: v.detach().cpu().contiguous() for k, v in self.average.state().items()}}
            state = State(
                step=self.step,
                seconds=self.seconds,
                average_count=self.average.count if self.average else 0,
                world=self.world.size,
                window=window,
                train=self.config.model_dump(mode="json"),
            )
            checkpoint = Checkpoint(weights, average, pack_optimizers(self.optimizers), state)
            write_checkpoint(self.run, checkpoint, keep=self.config.checkpoint.keep)
        self.saved = self.step
        self.world.barrier()

    def resume(self) -> Entry | None:
        """Restore the newest intact checkpoint. Newer ones, which are damaged, are reported in warnings and renamed.

        All processes must call this method. The process of rank 0 selects the checkpoint.

        Returns:
            Size and hash of ``metrics.jsonl`` when the checkpoint was written; None if they are unknown.

        Raises:
            UserError: No checkpoint is whole.
        """
        optimizers = expected_state(self.optimizers)
        found, damage = None, list[tuple[Path, DamagedError]]()
        folder = self.run / "checkpoints"
        if self.world.rank == 0:
            for path in reversed(checkpoints(folder)):
                try:
                    found = self._read(path, optimizers)
                    break
                except DamagedError as error:
                    damage.append((path, error))
        step = int(self.world.first(-1 if found is None else found.state.step))
        if step < 0:
            reasons = "; ".join(str(error) for _, error in damage) or "the first process says why"
            raise UserError(f"no checkpoint under {folder} is whole, so the run cannot be resumed: {reasons}")
        if found is None:
            found = self._read(folder / f"step-{step:08d}", optimizers)
        for path, reason in damage:
            self.say(f"warning     {reason}\nwarning     {path.name} is damaged and is now {set_aside(path).name}")
        self._restore(found)
        self.say(f"resumed from step-{step:08d}")
        return found.metrics

    def _read(self, path: Path, optimizers: Mapping[str, Tensor]) -> Checkpoint:
        """Read a checkpoint and check its tensors against the model and the ``optimizers`` (``meta`` tensors)."""
        found, own = read_checkpoint(path), self.model.state_dict()
        trained = {name for name, _ in self.model.named_parameters()}
        check_tensors(found.model, own, where=str(path / MODEL), finite=trained)
        if self.average is not None:
            if found.average is None:
                raise DamagedError(f"{path / AVERAGE} is missing: train.ema is set")
            check_tensors(found.average, {**own, **self.average.state()}, where=str(path / AVERAGE), finite=trained)
        expected = optimizers if found.optimizers or found.state.step else {}
        check_tensors(found.optimizers, expected, where=str(path / OPTIMIZER))
        return found

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint that fits this model."""
        state = checkpoint.state
        self.model.load_state_dict(checkpoint.model)
        if self.average is not None and checkpoint.average is not None:
            self.average.load(checkpoint.average, state.average_count)
        unpack_optimizers(self.optimizers, checkpoint.optimizers)
        self.step = self.saved = state.step
        self.seconds = state.seconds
        self.window.load(state.window, self.world)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context manager: within the ``with`` block the model has the averaged weights, if ``train.ema`` is set."""
        if self.average is not None:
            self.average.swap()
        try:
            yield
        finally:
            if self.average is not None:
                self.average.swap()
