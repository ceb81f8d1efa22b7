"""The training loop: optimizer steps, metrics, evaluations, samples and checkpoints until a run ends."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_graph.component.progress import progress
from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.engine import Engine
from sedd_graph.evaluation.bound import evaluate
from sedd_graph.store.arrays import Activations
from sedd_graph.training.checkpoint import start_point
from sedd_graph.training.config import EvaluateConfig, SampleConfig, TrainConfig
from sedd_graph.training.distributed import World
from sedd_graph.training.trackers import Trackers
from sedd_graph.training.trainer import Say, Trainer

__all__ = ["Result", "train"]


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


@dataclasses.dataclass
class _Loop:
    """Repeats the steps of ``trainer`` and reports, evaluates, samples and writes checkpoints between them."""

    trainer: Trainer
    trackers: Trackers | None
    decode: Callable[[Tensor], list[str]]

    def run(self) -> Result:
        """Train until all steps are done, the time budget is spent or a signal arrives, then write a checkpoint.

        Raises:
            DivergedError: The loss, the gradient or the weights are not finite.
        """
        trainer, config, world = self.trainer, self.trainer.config, self.trainer.world
        clock, start_seconds = _Clock(trainer.seconds), trainer.seconds
        reason, first, logged, logged_at = "done", trainer.step + 1, trainer.step, start_seconds
        total = torch.zeros(2, device=trainer.engine.device, dtype=torch.float64)
        trainer.model.train()
        steps = config.steps if config.budget_s is None else None
        with _Signals() as signals, progress("training", total=steps, done=trainer.step) as advance:
            while trainer.step < config.steps:
                trainer.seconds = clock.seconds
                if world.any(config.budget_s is not None and trainer.seconds >= config.budget_s):
                    reason = "budget"
                    if trainer.step == first:
                        spent = f"{trainer.seconds - start_seconds:.0f} s, all of train.budget_s"
                        trainer.say(
                            f"warning     the first step, compilation included, took {spent}: "
                            "increase it, or set train.compile=off"
                        )
                    break
                if world.any(signals.caught is not None):
                    reason = signals.caught or "signal"
                    break
                nats, counted, saved = trainer.train_step()
                norm = trainer.update(self.fraction())
                total += torch.stack([nats, counted]).double()
                trainer.step += 1
                advance()
                self.record(saved)
                if trainer.step % config.log_every == 0 or trainer.step == first:
                    world.sum_(total)
                    seconds = clock.seconds
                    rows_per_second = (trainer.step - logged) * config.batch / (seconds - logged_at)
                    self.report((total[0] / total[1]).item(), norm.item(), seconds, rows_per_second)
                    total.zero_()
                    logged, logged_at = trainer.step, seconds
                clock.pause()
                self.between_steps()
                clock.go()
        trainer.seconds = clock.seconds
        trainer.save()
        return Result(trainer.step, reason, trainer.seconds)

    def fraction(self) -> float:
        """Return the share of the run that is done, by steps or by time, whichever is larger."""
        config, trainer = self.trainer.config, self.trainer
        by_time = trainer.seconds / config.budget_s if config.budget_s is not None else 0.0
        return min(1.0, max(trainer.step / config.steps, by_time))

    def record(self, saved: Mapping[str, Tensor]) -> None:
        """Add the saved activations that are due at this step to their store."""
        activations, step = self.trainer.activations, self.trainer.step
        if activations is not None:
            for name in activations.due(step):
                activations.put(name, step, saved[name.replace("/", ".")].detach().float().cpu().numpy())

    def report(self, loss: float, norm: float, seconds: float, rows_per_second: float) -> None:
        """Log and print the loss (nats per token) and related metrics. Raises :class:`DivergedError` if they are not finite."""
        trainer, config = self.trainer, self.trainer.config
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise trainer.diverged(f"the loss became {loss} (gradient norm {norm:g})")
        units = trainer.data.units
        bits, speed = loss / (math.log(2) * units.ratio), rows_per_second * trainer.data.width
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        metrics = {
            "loss": loss,
            f"bits_per_{units.bits}": bits,
            "gradient_norm": norm,
            "learning_rate": rate,
            f"{units.nats}s_per_second": speed,
            "seconds": seconds,
        }
        if self.trackers is not None:
            self.trackers.log(trainer.step, metrics)
        if trainer.world.rank == 0:
            limit = f"/{config.steps}" if config.budget_s is None else f"  {seconds:.0f}/{config.budget_s:.0f} s"
            trainer.say(
                f"step {trainer.step}{limit}  loss {loss:.4f} nats/{units.nats}  {bits:.3f} bits/{units.bits}  "
                f"lr {rate:.2e}  {speed:,.0f} {units.nats}s/s"
            )

    def between_steps(self) -> None:
        """Evaluate, sample and write a checkpoint where they are due; their time does not count as training time."""
        trainer, config, step = self.trainer, self.trainer.config, self.trainer.step
        if step >= config.steps:
            return
        if trainer.world.rank == 0:
            if config.evaluate is not None and step % config.evaluate.every == 0:
                self.evaluate(config.evaluate)
            if config.sample is not None and step % config.sample.every == 0:
                self.sample(config.sample)
        if step % config.checkpoint.every == 0:
            trainer.save()
        trainer.world.barrier()

    def evaluate(self, config: EvaluateConfig) -> None:
        """Evaluate the averaged weights on held-out rows; log and print the result."""
        trainer, rows, seed = self.trainer, self.trainer.config.batch, self.trainer.config.seed
        with trainer.averaged():
            found = evaluate(
                trainer.engine, trainer.data, rows=rows, batches=config.batches, draws=config.draws, seed=seed
            )
        trainer.say(f"step {trainer.step}  held-out {found}")
        if self.trackers is not None:
            self.trackers.log(trainer.step, {f"heldout_{name}": value for name, value in found.curve().items()})

    def sample(self, config: SampleConfig) -> None:
        """Draw samples with the averaged weights; log and print their text."""
        trainer = self.trainer
        steps = None if trainer.engine.process.steps is None else config.steps
        with trainer.averaged():
            rows = trainer.engine.sample(config.rows, trainer.data.width, steps=steps, seed=trainer.config.seed)
        for text in self.decode(rows):
            trainer.say(f"sample: {text!r}")
            if self.trackers is not None:
                self.trackers.text(trainer.step, "sample", text)


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
        resume: True to resume from the newest checkpoint of the run.
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
    trainer = Trainer(engine, data, config, run, world, say)
    start = start_point(run, resume=resume)
    if start is not None:
        trainer.restore(start)
    if trackers is not None:
        trackers.resume(trainer.step)  # at step 0: removes records of an attempt that ended before its first checkpoint
    trainer.activations = activations(trainer.step) if world.rank == 0 else None
    try:
        result = _Loop(trainer, trackers, decode).run()
    finally:
        if trainer.activations is not None:
            trainer.activations.close()
    if trainer.average is not None:
        trainer.average.swap()
    return result
