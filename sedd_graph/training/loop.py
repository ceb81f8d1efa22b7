"""The training loop: optimizer steps, metrics, evaluations, samples and checkpoints.

Every random number is a function of the seed, the step and the global row (and, in the network, the node). The losses are
therefore equal when a run is resumed or its batch is split over processes or accumulation steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sedd_graph.component.progress import progress
from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.hardware import pick_dtype
from sedd_graph.engine.process import SCHEDULE
from sedd_graph.engine.seeds import mix_seed
from sedd_graph.errors import DivergedError, UserError
from sedd_graph.evaluation.bound import evaluate, to_batch
from sedd_graph.store.arrays import Activations
from sedd_graph.training.checkpoint import (
    Checkpoint,
    load_weights,
    pack_optimizers,
    read_checkpoint,
    start_point,
    unpack_optimizers,
    write_checkpoint,
)
from sedd_graph.training.config import EvaluateConfig, SampleConfig, TrainConfig
from sedd_graph.training.distributed import World
from sedd_graph.training.optim import Average, learning_rate, make_optimizers
from sedd_graph.training.trackers import Trackers

__all__ = ["Result", "Trainer", "train"]

Say = Callable[[str], None]
"""Function that prints a line for the user."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of training."""

    step: int
    """Last optimizer step."""
    reason: str
    """Cause of the end: ``done``, ``budget`` or the name of a signal."""
    seconds: float
    """Training time, without evaluations, samples and checkpoints."""


class _Signals:
    """Context that records the first SIGINT or SIGTERM, to end after the step; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.caught: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on)
        return self

    def _on(self, number: int, frame: Any) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = signal.Signals(number).name

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Clock:
    """Training time of a run in seconds; time between :meth:`pause` and :meth:`go` is excluded."""

    def __init__(self, seconds: float) -> None:
        self._before, self._started = seconds, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def pause(self) -> None:
        self._before = self.seconds

    def go(self) -> None:
        self._started = time.perf_counter()


class Trainer:
    """One process's part of a training run: step count, optimizers, averaged weights and checkpoints.

    Args:
        engine: The engine to train.
        data: The data set.
        config: The ``train`` section.
        run: The run folder.
        world: The processes of the run.
        trackers: Where metrics are logged, or None.
        say: Function that prints a line for the user.

    Raises:
        UserError: The batch cannot be divided over the processes.
    """

    def __init__(
        self,
        engine: Engine,
        data: Dataset | PointData,
        config: TrainConfig,
        run: Path,
        world: World,
        trackers: Trackers | None,
        say: Say,
    ) -> None:
        self.engine, self.data, self.config, self.run, self.world = engine, data, config, run, world
        self.trackers, self.say = trackers, say
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
        self.activations: Activations | None = None

    # -- one step ---------------------------------------------------------------------------------------------------

    def micro_batches(self) -> Iterator[tuple[Any, Randomness]]:
        """Yield this process's rows of the global batch, one part for each backward pass."""
        config, world = self.config, self.world
        share = config.batch // (config.accumulate * world.size)
        for part in range(config.accumulate):
            start = (part * world.size + world.rank) * share
            rows = self.data.batch(self.step * config.batch, config.batch, start=start, stop=start + share)
            generator = torch.Generator(self.engine.device).manual_seed(mix_seed(config.seed, 1, self.step))
            yield (
                to_batch(rows, self.engine.process, self.engine.device),
                Randomness(generator, start=start, total=config.batch),
            )

    def train_step(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Accumulate the gradients of one step.

        Returns:
            The loss summed over this process's rows (nats), the number of tokens that it counts, and the saved activations of the
            last backward pass by dotted path.
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
        """Clip the gradient, step the optimizers and update the averaged weights. Returns the norm of the gradient.

        ``progress`` in [0, 1] is the share of the run that is done, for the learning-rate schedule.
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

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints."""
        return self.run / "checkpoints"

    def diverged(self, what: str) -> DivergedError:
        """Return the exception for a run that diverged."""
        return DivergedError(
            f"{what} by step {self.step}; the last checkpoint is intact. "
            "Try a lower train.optimizer.lr, a longer train.warmup, or train.dtype=float32"
        )

    def save(self) -> None:
        """Write a checkpoint (rank 0).

        Raises:
            DivergedError: The weights are not finite; the checkpoint would displace one that can be resumed from.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise self.diverged("weights became NaN or infinite")
        if self.activations is not None:
            self.activations.flush()  # a run resumed from this checkpoint does not record earlier steps again
        if self.world.rank == 0 and not (self.folder / f"step-{self.step:08d}").exists():
            weights = {k: v.detach().cpu().contiguous().clone() for k, v in self.model.state_dict().items()}
            average = None
            if self.average is not None:
                average = {**weights, **{k: v.detach().cpu().contiguous() for k, v in self.average.state().items()}}
            state = {
                "seconds": self.seconds,
                "average_count": self.average.count if self.average else 0,
                "world": self.world.size,
                "train": self.config.model_dump(mode="json"),
            }
            checkpoint = Checkpoint(weights, average, pack_optimizers(self.optimizers), state)
            write_checkpoint(self.folder, self.step, checkpoint, keep=self.config.checkpoint.keep)
        self.world.barrier()

    def restore(self, path: Path) -> None:
        """Restore weights, optimizers and step from the checkpoint at ``path``. Raises :class:`UserError` if it does not fit."""
        checkpoint = read_checkpoint(path)
        load_weights(self.model, checkpoint.model, where=str(path))
        if self.average is not None and checkpoint.average is not None:
            self.average.load(checkpoint.average, int(checkpoint.state.get("average_count", 0)))
        unpack_optimizers(self.optimizers, checkpoint.optimizers)
        self.step, self.seconds = checkpoint.state["step"], float(checkpoint.state.get("seconds", 0.0))
        self.say(f"resumed from {path.name}")

    # -- the loop ---------------------------------------------------------------------------------------------------

    def loop(self, activations: Activations | None, decode: Callable[[Tensor], list[str]]) -> Result:
        """Train until all steps are done, the time budget is spent or a signal arrives, then write a checkpoint.

        Args:
            activations: Store of saved activations, or None.
            decode: Converts sampled rows to text.

        Raises:
            DivergedError: The loss, the gradient or the weights are not finite.
        """
        config, clock = self.config, _Clock(self.seconds)
        self.activations = activations
        reason, first, logged, logged_at = "done", self.step + 1, self.step, self.seconds
        start_seconds = self.seconds
        total = torch.zeros(2, device=self.engine.device, dtype=torch.float64)
        self.model.train()
        steps = config.steps if config.budget_s is None else None
        with _Signals() as signals, progress("training", total=steps, done=self.step) as advance:
            while self.step < config.steps:
                self.seconds = clock.seconds
                if self.world.any(config.budget_s is not None and self.seconds >= config.budget_s):
                    reason = "budget"
                    if self.step == first:
                        self.say(
                            f"warning     the first step, compilation included, took {self.seconds - start_seconds:.0f} s, all of "
                            "train.budget_s: increase it, or set train.compile=off"
                        )
                    break
                if self.world.any(signals.caught is not None):
                    reason = signals.caught or "signal"
                    break
                nats, counted, saved = self.train_step()
                norm = self.update(self.fraction())
                total += torch.stack([nats, counted]).double()
                self.step += 1
                advance()
                self.record(saved)
                if self.step % config.log_every == 0 or self.step == first:
                    self.world.sum_(total)
                    seconds = clock.seconds
                    rows_per_second = (self.step - logged) * config.batch / (seconds - logged_at)
                    self.report((total[0] / total[1]).item(), norm.item(), seconds, rows_per_second)
                    total.zero_()
                    logged, logged_at = self.step, seconds
                clock.pause()
                self.between_steps(decode)
                clock.go()
        self.seconds = clock.seconds
        self.save()
        return Result(self.step, reason, self.seconds)

    def fraction(self) -> float:
        """Return the share of the run that is done, by steps or by time, whichever is larger."""
        by_time = self.seconds / self.config.budget_s if self.config.budget_s is not None else 0.0
        return min(1.0, max(self.step / self.config.steps, by_time))

    def record(self, saved: Mapping[str, Tensor]) -> None:
        """Add the saved activations that are due at this step to their store."""
        if self.activations is not None:
            for name in self.activations.due(self.step):
                self.activations.put(name, self.step, saved[name.replace("/", ".")].detach().float().cpu().numpy())

    def report(self, loss: float, norm: float, seconds: float, rows_per_second: float) -> None:
        """Log and print the loss (nats per token) and related metrics. Raises :class:`DivergedError` if they are not finite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self.diverged(f"the loss became {loss} (gradient norm {norm:g})")
        units, budget = self.data.units, self.config.budget_s
        bits, speed = loss / (math.log(2) * units.ratio), rows_per_second * self.data.width
        rate = self.optimizers[0].param_groups[0]["lr"]
        metrics = {
            "loss": loss,
            f"bits_per_{units.bits}": bits,
            "gradient_norm": norm,
            "learning_rate": rate,
            f"{units.nats}s_per_second": speed,
            "seconds": seconds,
        }
        if self.trackers is not None:
            self.trackers.log(self.step, metrics)
        if self.world.rank == 0:
            limit = f"/{self.config.steps}" if budget is None else f"  {seconds:.0f}/{budget:.0f} s"
            self.say(
                f"step {self.step}{limit}  loss {loss:.4f} nats/{units.nats}  {bits:.3f} bits/{units.bits}  "
                f"lr {rate:.2e}  {speed:,.0f} {units.nats}s/s"
            )

    def between_steps(self, decode: Callable[[Tensor], list[str]]) -> None:
        """Evaluate, sample and write a checkpoint where they are due; their time does not count as training time."""
        config = self.config
        if self.step >= config.steps:
            return
        if self.world.rank == 0:
            if config.evaluate is not None and self.step % config.evaluate.every == 0:
                self.evaluate(config.evaluate)
            if config.sample is not None and self.step % config.sample.every == 0:
                self.sample(config.sample, decode)
        if self.step % config.checkpoint.every == 0:
            self.save()
        self.world.barrier()

    def evaluate(self, config: EvaluateConfig) -> None:
        """Evaluate the averaged weights on held-out rows; log and print the result."""
        rows, seed = self.config.batch, self.config.seed
        with self.averaged():
            found = evaluate(self.engine, self.data, rows=rows, batches=config.batches, draws=config.draws, seed=seed)
        self.say(f"step {self.step}  held-out {found}")
        if self.trackers is not None:
            self.trackers.log(self.step, {f"heldout_{name}": value for name, value in found.curve().items()})

    def sample(self, config: SampleConfig, decode: Callable[[Tensor], list[str]]) -> None:
        """Draw samples with the averaged weights; log and print their text."""
        steps = None if self.engine.process.steps is None else config.steps
        with self.averaged():
            rows = self.engine.sample(config.rows, self.data.width, steps=steps, seed=self.config.seed)
        for text in decode(rows):
            self.say(f"sample: {text!r}")
            if self.trackers is not None:
                self.trackers.text(self.step, "sample", text)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averaged weights within the context."""
        if self.average is not None:
            self.average.swap()
        try:
            yield
        finally:
            if self.average is not None:
                self.average.swap()


def train(
    engine: Engine,
    data: Dataset | PointData,
    config: TrainConfig,
    *,
    run: Path,
    resume: bool = False,
    world: World | None = None,
    trackers: Trackers | None = None,
    activations: Callable[[int], Activations | None] = lambda step: None,
    decode: Callable[[Tensor], list[str]] = lambda rows: [],
    say: Say = print,
) -> Result:
    """Train ``engine`` in place and write checkpoints under ``run``. At the end the engine has the averaged weights.

    Args:
        engine: The engine to train.
        data: The data set.
        config: The ``train`` section.
        run: The run folder.
        resume: Whether to resume from the newest checkpoint of the run.
        world: The processes of the run; one by default.
        trackers: Where metrics are logged, or None.
        activations: Opens the store of saved activations, from the step that training resumes from (0 for a new run).
        decode: Converts sampled rows to text.
        say: Function that prints a line for the user.

    Raises:
        DivergedError: The loss, the gradient or the weights are not finite.
        UserError: The run cannot be started or resumed as requested.
    """
    world = world or World.single()
    trainer = Trainer(engine, data, config, run, world, trackers, say)
    start = start_point(run, resume=resume)
    if start is not None:
        trainer.restore(start)
    if trackers is not None:
        trackers.resume(trainer.step)  # at step 0: removes records of an attempt that ended before its first checkpoint
    store = activations(trainer.step) if world.rank == 0 else None
    try:
        result = trainer.loop(store, decode)
    finally:
        if store is not None:
            store.close()
    if trainer.average is not None:
        trainer.average.swap()
    return result
