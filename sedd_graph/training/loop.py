"""Training loop, which runs optimizer steps, logs metrics, evaluates, samples and writes checkpoints."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sedd_graph.component.progress import progress
from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.engine import Engine
from sedd_graph.evaluation.bound import evaluate
from sedd_graph.store.activations import Activations
from sedd_graph.training.checkpoint import require_start, sweep_checkpoints
from sedd_graph.training.config import EvaluateConfig, SampleConfig, TrainConfig
from sedd_graph.training.distributed import World
from sedd_graph.training.trackers import Trackers
from sedd_graph.training.trainer import Say, Trainer

__all__ = ["STOPPING", "Result", "train"]


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of :func:`train`: the last step, the reason why training ended, and the training time."""

    step: int
    """Number of optimizer steps done, earlier runs of a resumed training included."""
    reason: str
    """Reason why training ended: ``done`` (all steps), ``budget`` (``train.budget_s``), or the name of a signal."""
    seconds: float
    """Training time in seconds, without evaluations, samples and checkpoints."""


STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Names of the signals that end training after the step with a checkpoint: Ctrl-C, and those that clusters send before
they take a machine back. Windows has no SIGHUP and no SIGUSR1."""


class _Signals:
    """Context that records the first signal of :data:`STOPPING`, to end after the step.

    A second SIGINT raises KeyboardInterrupt, except while the last checkpoint is written (:attr:`writing`); other later
    signals change nothing, since a cluster may send several. Signals that the process was started to ignore, as SIGHUP by
    ``nohup``, are still ignored.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self.writing = False
        """True while the last checkpoint is written, which no signal of :data:`STOPPING` interrupts."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in STOPPING if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on)
        return self

    def _on(self, number: int, frame: Any) -> None:
        if self.caught is not None and number == signal.SIGINT and not self.writing:
            raise KeyboardInterrupt
        self.caught = self.caught or signal.Signals(number).name

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
    measure: Callable[[], Mapping[str, float]]
    saved_at: float = 0.0
    """Time of the newest checkpoint, or of the start, by the monotonic clock, seconds."""
    fallbacks: dict[str, float] = dataclasses.field(default_factory=dict)

    def run(self) -> Result:
        """Train until all steps are done, the time limit is reached or a signal arrives, then write a checkpoint.

        Raises:
            DivergedError: The loss, the gradient or the weights are not finite.
        """
        trainer, config, world = self.trainer, self.trainer.config, self.trainer.world
        clock, start_seconds = _Clock(trainer.seconds), trainer.seconds
        reason, first, self.saved_at = "done", trainer.step + 1, time.monotonic()
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
                trainer.window.add(nats, counted)
                trainer.step += 1
                advance()
                self.report_fallbacks()
                self.record(saved)
                if trainer.step % config.log_every == 0 or trainer.step == 1:
                    seconds = clock.seconds
                    loss, steps, passed = trainer.window.take(world, trainer.step, seconds)
                    self.report(loss, norm.item(), seconds, steps * config.batch / passed)
                clock.pause()
                self.between_steps()
                clock.go()
            trainer.seconds = clock.seconds
            signals.writing = True
            self.save()
            signals.writing = False
            if reason in ("done", "budget") and world.any(signals.caught is not None):
                reason = signals.caught or "signal"  # arrived in the last step or while the checkpoint was written
        return Result(trainer.step, reason, trainer.seconds)

    def save(self) -> None:
        """Write a checkpoint, before which the margins of codes are logged and the metrics flushed to the disk."""
        if self.trackers is not None:
            if self.trainer.saved != self.trainer.step:
                self.report_measured(self.trackers)
            self.trackers.sync()
        self.trainer.save()
        self.saved_at = time.monotonic()

    def fraction(self) -> float:
        """Return the share of the run that is done, in [0, 1]: the larger of the shares of steps and of time."""
        config, trainer = self.trainer.config, self.trainer
        by_time = trainer.seconds / config.budget_s if config.budget_s is not None else 0.0
        return min(1.0, max(trainer.step / config.steps, by_time))

    def record(self, saved: Mapping[str, Tensor]) -> None:
        """Write to ``activations.zarr`` the saved activations (by dotted path) that are due at this step."""
        activations, step = self.trainer.activations, self.trainer.step
        if activations is not None:
            for name in activations.due(step):
                activations.put(name, step, saved[name.replace("/", ".")].detach().float().cpu().numpy())

    def report_fallbacks(self) -> None:
        """Log each block that fell back from reversible execution to checkpointing at this step."""
        found = self.trainer.engine.network.fallbacks()
        new = {f"drift_{path}": error for path, error in found.items() if path not in self.fallbacks}
        self.fallbacks = found
        if new and self.trackers is not None:
            self.trackers.log(self.trainer.step, new)

    def report_measured(self, trackers: Trackers) -> None:
        """Log what ``measure`` returns with the weights that are evaluated."""
        with self.trainer.averaged():
            metrics = self.measure()
        if metrics:
            trackers.log(self.trainer.step, metrics)

    def report(self, loss: float, norm: float, seconds: float, rows_per_second: float) -> None:
        """Log and print the loss and related metrics.

        Args:
            loss: Mean training loss per token (per dimension for points), in the process's ``loss_unit``.
            norm: Norm of the gradient before clipping.
            seconds: Training time, seconds.
            rows_per_second: Training rows per second.

        Raises:
            DivergedError: The loss or the gradient norm is not finite.
        """
        trainer, config = self.trainer, self.trainer.config
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise trainer.diverged(f"the loss became {loss} (gradient norm {norm:g})")
        units, unit = trainer.data.units, trainer.engine.process.loss_unit
        speed = rows_per_second * trainer.data.width
        bits = {f"bits_per_{units.bits}": loss / (math.log(2) * units.ratio)} if unit == "nats" else {}
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        metrics = {
            "loss": loss,
            **bits,
            "gradient_norm": norm,
            "learning_rate": rate,
            f"{units.nats}s_per_second": speed,
            "seconds": seconds,
        }
        if self.trackers is not None:
            self.trackers.log(trainer.step, metrics)
        if trainer.world.rank == 0:
            limit = f"/{config.steps}" if config.budget_s is None else f"  {seconds:.0f}/{config.budget_s:.0f} s"
            per = f"nats/{units.nats}" if bits else f"{unit} per {units.nats}"
            told = "".join(f"  {value:.3f} bits/{units.bits}" for value in bits.values())
            trainer.say(
                f"step {trainer.step}{limit}  loss {loss:.4f} {per}{told}  lr {rate:.2e}  {speed:,.0f} {units.nats}s/s"
            )

    def between_steps(self) -> None:
        """Evaluate, sample and write a checkpoint, each if it is due; the time is excluded from the training time."""
        trainer, config, step = self.trainer, self.trainer.config, self.trainer.step
        if step >= config.steps:
            return
        if config.evaluate is not None and step % config.evaluate.every == 0:
            self.evaluate(config.evaluate)
        if trainer.world.rank == 0 and config.sample is not None and step % config.sample.every == 0:
            self.sample(config.sample)
        every_s = config.checkpoint.every_s
        late = every_s is not None and trainer.world.any(time.monotonic() - self.saved_at >= every_s)
        if late or step % config.checkpoint.every == 0:
            self.save()
        trainer.world.barrier()

    def evaluate(self, config: EvaluateConfig) -> None:
        """Evaluate the averaged weights on held-out rows, of which each process takes a share; log and print the result."""
        trainer, rows, seed = self.trainer, self.trainer.config.batch, self.trainer.config.seed
        with trainer.averaged():
            found = evaluate(
                trainer.engine,
                trainer.data,
                rows=rows,
                batches=config.batches,
                draws=config.draws,
                seed=seed,
                at_once=trainer.micro_batch,
                workers=trainer.world,
            )
        trainer.say(f"step {trainer.step}  held-out {found}")
        if self.trackers is not None:
            self.trackers.log(trainer.step, {f"heldout_{name}": value for name, value in found.curve().items()})

    def sample(self, config: SampleConfig) -> None:
        """Draw samples with the averaged weights, and log and print their text."""
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
    measure: Callable[[], Mapping[str, float]] = dict,
    say: Say = print,
) -> Result:
    """Train an engine in place and write checkpoints to the run folder.

    At the end the engine has the averaged weights, if ``train.ema`` is set.

    Args:
        engine: The engine (network and diffusion process) to train.
        data: The data set.
        config: The ``train`` section of the blueprint.
        run: The run folder.
        resume: True to resume from the newest checkpoint of the run that is whole.
        world: The process group of the run; one process by default.
        trackers: Log of the run's metrics; None to log nothing.
        activations: Function that opens ``activations.zarr``, the store of the activations that ``save`` in the
            blueprint names. Its argument is the step from which training resumes (0 for a new run); it returns None if
            the blueprint names none.
        decode: Function that converts sampled rows [b, ...] to one text per row.
        measure: Function that returns metrics to log at each checkpoint, such as the margins of codes.
        say: Function that prints a line for the user.

    Returns:
        The number of steps done, the reason why training ended, and the training time.

    Raises:
        DivergedError: The loss, the gradient or the weights are not finite.
        UserError: The run cannot be started or resumed as requested.
    """
    world = world or World.single()
    trainer = Trainer(engine, data, config, run, world, say)
    require_start(run, resume=resume)
    if world.rank == 0:
        sweep_checkpoints(run / "checkpoints")
    metrics = trainer.resume() if resume else None
    if trackers is not None:
        # at step 0: removes records of an attempt that ended before its first checkpoint
        trackers.resume(trainer.step, metrics, say)
    trainer.activations = activations(trainer.step) if world.rank == 0 else None
    try:
        result = _Loop(trainer, trackers, decode, measure).run()
    finally:
        if trainer.activations is not None:
            trainer.activations.close()
    if trainer.average is not None:
        trainer.average.swap()
    return result
