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
from sedd_graph.training.adapters import plain_tensors
from sedd_graph.training.checkpoint import (
    AVERAGE,
    HELPERS,
    METRICS,
    MODEL,
    OPTIMIZER,
    State,
    checkpoints,
    file_name,
    files_of,
    read_state,
    set_aside,
    step_of,
)
from sedd_graph.training.checkpoint_reader import Stored, stored
from sedd_graph.training.checkpoint_writer import CheckpointWriter
from sedd_graph.training.config import TrainConfig
from sedd_graph.training.distributed import World, local
from sedd_graph.training.optim import Average, learning_rate, make_optimizers
from sedd_graph.training.optimizer_state import create_state, named_state, set_state
from sedd_graph.training.parallel import place
from sedd_graph.training.prefetch import Prefetcher
from sedd_graph.training.weights import all_finite
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
        start: Weights from which training starts, by plain names (:mod:`sedd_graph.training.adapters`), of which this
            process reads its part; None for those of the engine.

    Raises:
        UserError: ``train.batch`` is not a multiple of ``train.accumulate`` times the number of processes, or the engine is
            compiled with ``cuda_graphs`` and there are several processes.
    """

    def __init__(
        self,
        engine: Engine,
        data: Dataset | PointData,
        config: TrainConfig,
        run: Path,
        world: World,
        say: Say,
        start: Stored | None = None,
    ) -> None:
        self.engine, self.data, self.config, self.run, self.world = engine, data, config, run, world
        self.say = say
        if config.batch % (config.accumulate * world.size):
            raise UserError(
                f"train.batch = {config.batch} is not a multiple of accumulate * processes = {config.accumulate} * {world.size}"
            )
        if engine.compile_mode == "cuda_graphs" and world.size > 1:
            raise UserError(f"train.compile: cuda_graphs is for one process, not {world.size}; choose block or whole")
        self.placement = place(engine, config.parallel, world)
        self.model = engine.model
        if start is not None:
            start.read_into(plain_tensors(self.model))
        self.parameters = dict(self.model.named_parameters())
        """Parameters by name, of which this process holds its part."""
        if engine.helpers is not None:
            self.parameters |= {f"{HELPERS}:{name}": p for name, p in engine.helpers.named_parameters()}
        self.optimizers = make_optimizers(self.parameters, config)
        self.average = Average(self.model, config.ema) if config.ema else None
        self.dtype = pick_dtype(config.dtype, engine.device)
        self.rows = Prefetcher(self._rows, pinned=engine.device.type == "cuda")
        self.step, self.seconds = 0, 0.0
        self.saved: int | None = None
        """Step of the newest checkpoint that this run has written or has been restored from."""
        self.writer = CheckpointWriter(run, world, self.placement.written, keep=config.checkpoint.keep)
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
        config = self.config
        for part in range(config.accumulate):
            last = part == config.accumulate - 1
            following = (self.step + 1, 0) if last else (self.step, part + 1)
            rows = self.rows.take((self.step, part), following if following[0] < config.steps else None)
            generator = torch.Generator(self.engine.device).manual_seed(mix_seed(config.seed, 1, self.step))
            start, _ = self._share(part)
            yield (
                to_batch(rows, self.engine.process, self.engine.device),
                Randomness(generator, start=start, total=config.batch),
            )

    def _share(self, part: int) -> tuple[int, int]:
        """Return the places in the global batch of the first row of this process's micro-batch, and behind its last."""
        start = (part * self.world.size + self.world.rank) * self.micro_batch
        return start, start + self.micro_batch

    def _rows(self, step: int, part: int) -> Any:
        start, stop = self._share(part)
        return self.data.batch(step * self.config.batch, self.config.batch, start=start, stop=stop)

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
            with self.placement.backward_pass(last=number == config.accumulate - 1):
                draw = self.engine.draw(batch, random=random)
                with torch.autocast(self.engine.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                    loss, saved = self.placement.module(draw, batch, random.keys(len(batch)))
                # gradients are averaged over processes: each adds its share of the mean over the whole batch, per position
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
        self.writer.wait_for_copy()
        named = [(name, p) for name, p in self.parameters.items() if p.grad is not None]
        # rare large losses dominate the gradient of a learned schedule: clipped together, it would scale down the network's
        rest = [p for name, p in named if not name.startswith(SCHEDULE)]
        norm: Tensor = nn.utils.clip_grad_norm_(rest, config.clip or math.inf)
        if self.placement.sharded:
            norm = norm.full_tensor()  # type: ignore[attr-defined]  # a DTensor
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

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint of the current step. All processes must call this method.

        Args:
            wait: Return when the checkpoint is whole. Otherwise it is copied and written while training goes on
                (:meth:`CheckpointWriter.advance`).

        Raises:
            DivergedError: The weights or the loss are not finite. No checkpoint is written, so that the earlier ones
                are retained.
        """
        if self.world.any(not all_finite([local(p) for p in self.model.parameters()])):
            raise self.diverged("weights became NaN or infinite")
        if self.saved != self.step:
            if self.activations is not None:
                self.activations.flush()  # a run resumed from this checkpoint does not record earlier steps again
            window = self.window.state(self.world)
            if not all(map(math.isfinite, window.nats)):
                raise self.diverged("the loss became NaN or infinite")
            state = State(
                step=self.step,
                seconds=self.seconds,
                average_count=self.average.count if self.average else 0,
                world=self.world.size,
                window=window,
                train=self.config.model_dump(mode="json"),
            )
            optimizers = named_state(self.optimizers, self.parameters)
            weights = self._weights()
            buffers = {name for kind in weights.values() for name in kind} - self.parameters.keys()
            self.writer.begin({**weights, OPTIMIZER: optimizers}, state, at_once=buffers)
            self.saved = self.step
        if wait:
            self.writer.finish()

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights of the model, their average and those of helpers by kind and name."""
        model, helpers = self.model.state_dict(), self.engine.helpers
        found = {MODEL: model} if self.average is None else {MODEL: model, AVERAGE: {**model, **self.average.state()}}
        return found if helpers is None else found | {HELPERS: helpers.state_dict()}

    def resume(self) -> Entry | None:
        """Restore the newest intact checkpoint. Newer ones, which are damaged, are reported in warnings and renamed.

        All processes must call this method; they share the work of verifying files.

        Returns:
            Size and hash of ``metrics.jsonl`` when the checkpoint was written; None if they are unknown.

        Raises:
            UserError: No checkpoint is whole.
        """
        optimizers = create_state(self.optimizers, self.parameters)
        folder, damage = self.run / "checkpoints", list[tuple[Path, str]]()
        paths = checkpoints(folder)
        while (step := self.world.first(step_of(paths[-1]) if paths else -1)) >= 0:
            path = paths.pop() if self.world.rank == 0 else folder / f"step-{step:08d}"
            try:
                reason, metrics = "", self._restore(path, optimizers)
            except DamagedError as error:
                reason = str(error)
            if reasons := [text for text in self.world.texts(reason) if text]:
                damage.append((path, reasons[0]))
                continue
            for damaged, reason in damage:
                if self.world.rank == 0:
                    aside = set_aside(damaged).name
                    self.say(f"warning     {reason}\nwarning     {damaged.name} is damaged and is now {aside}")
            self.say(f"resumed from step-{step:08d}")
            return metrics
        why = "; ".join(reason for _, reason in damage)
        raise UserError(f"no checkpoint under {folder} is whole, so the run cannot be resumed: {why}")

    def _restore(self, path: Path, optimizers: Mapping[str, Tensor]) -> Entry | None:
        """Verify and read a checkpoint in place; return the entry of ``metrics.jsonl`` in its manifest."""
        state, manifest = read_state(path, rank=self.world.rank, size=self.world.size)
        trained = set(self.parameters)
        for kind, targets in self._weights().items():
            if kind == AVERAGE and not files_of(manifest, kind, path):
                raise DamagedError(f"{path / file_name(kind)} is missing: train.ema is set")
            stored(path, kind, manifest).read_into(targets, finite=trained)
        written = stored(path, OPTIMIZER, manifest)
        fresh = state.step == 0 and not written.tensors()
        if not fresh:
            written.read_into(optimizers)
        set_state(self.optimizers, self.parameters, {} if fresh else optimizers)
        if self.average is not None:
            self.average.count = state.average_count
        self.step = self.saved = state.step
        self.seconds = state.seconds
        self.window.load(state.window, self.world)
        return manifest.run.get(METRICS)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context manager: within the ``with`` block the model is whole in each process, with the averaged weights if
        ``train.ema`` is set. All processes must enter it."""
        self.open()
        try:
            yield
        finally:
            self.placement.shard()
            if self.average is not None:
                self.average.swap()

    def open(self) -> None:
        """Give the model the averaged weights, if ``train.ema`` is set, whole in each process."""
        self.writer.wait_for_copy()
        if self.average is not None:
            self.average.swap()
        self.placement.gather()
