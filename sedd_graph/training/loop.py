"""Training loop, which runs optimizer steps, logs metrics, evaluates, samples and writes checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from sedd_graph.component.progress import progress
from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.engine import Engine
from sedd_graph.errors import DivergedError, SeddGraphError
from sedd_graph.evaluation.bound import evaluate
from sedd_graph.store.activations import Activations
from sedd_graph.training.checkpoint import require_start, sweep_checkpoints
from sedd_graph.training.checkpoint_reader import Stored
from sedd_graph.training.config import EvaluateConfig, SampleConfig, TrainConfig
from sedd_graph.training.distributed import Agreed, Agreement, World
from sedd_graph.training.stopping import Clock, Signals
from sedd_graph.training.trackers import Trackers
from sedd_graph.training.trainer import Say, Trainer

__all__ = ["Result", "train"]


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of :func:`train`: the last step, the reason why training ended, and the training time."""

    step: int
    """Number of optimizer steps done, earlier runs of a resumed training included."""
    reason: str
    """Reason why training ended: ``done`` (all steps), ``budget`` (``train.budget_s``), or the name of a signal."""
    seconds: float
    """Training time in seconds, without evaluations, samples and checkpoints."""


@dataclasses.dataclass
class _Loop:
    """Repeats the steps of ``trainer`` and reports, evaluates, samples and writes checkpoints between them."""

    trainer: Trainer
    trackers: Trackers | None
    decode: Callable[[Tensor], list[str]]
    measure: Callable[[], Mapping[str, float]] | None
    saved_at: float = 0.0
    """Time of the newest checkpoint, or of the start, by the monotonic clock, seconds."""
    fallbacks: dict[str, float] = dataclasses.field(default_factory=dict)

    def run(self) -> Result:
        """Train until all steps are done, the time limit is reached or a signal arrives, then write a checkpoint.

        Raises:
            DivergedError: The loss, the gradient or the weights are not finite.
        """
        trainer, config, world = self.trainer, self.trainer.config, self.trainer.world
        clock, start = Clock(trainer.seconds), trainer.step
        agreement, reason, self.saved_at = Agreement(world, trainer.seconds), "done", time.monotonic()
        trainer.model.train()
        steps = config.steps if config.budget_s is None else None
        with Signals() as signals, progress("training", total=steps, done=trainer.step) as advance:
            while trainer.step < config.steps:
                if world.size == 1:
                    agreement.send(self.facts(clock, signals))
                agreed = agreement.receive()
                clock.pause()
                self.checkpoint(agreed)
                clock.go()
                if (ended := self.ended(agreed, trainer.seconds, trainer.step - start)) is not None:
                    reason = ended
                    break
                trainer.seconds = agreed.seconds
                if world.size > 1:
                    agreement.send(self.facts(clock, signals))
                if (told := trainer.engine.begin_step(self.fraction(), trainer.averaged)) is not None:
                    trainer.say(told)
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
            self.save(wait=True)
            signals.writing = False
            if reason in ("done", "budget") and world.any(signals.caught is not None):
                reason = signals.caught or "signal"  # arrived in the last step or while the checkpoint was written
        return Result(trainer.step, reason, trainer.seconds)

    def facts(self, clock: Clock, signals: Signals) -> Agreed:
        """Return what this process contributes to the facts that all processes agree on."""
        every_s = self.trainer.config.checkpoint.every_s
        late = every_s is not None and time.monotonic() - self.saved_at >= every_s
        number = 0 if signals.caught is None else int(signal.Signals[signals.caught])
        return Agreed(clock.seconds, number, late, self.trainer.writer.writing)

    def ended(self, agreed: Agreed, before: float, steps: int) -> str | None:
        """Return the reason why training ends before the next step; None if it goes on.

        Args:
            agreed: The facts that all processes agree on.
            before: Training time before the last step, seconds.
            steps: Number of steps since training was started or resumed.
        """
        budget = self.trainer.config.budget_s
        if budget is not None and agreed.seconds >= budget:
            if 0 < steps <= min(2, self.trainer.world.size):
                spent = f"{agreed.seconds - before:.0f} s, all of train.budget_s"
                self.trainer.say(
                    f"warning     the first step, compilation included, took {spent}: increase it, or set train.compile=off"
                )
            return "budget"
        return signal.Signals(agreed.signal).name if agreed.signal else None

    def checkpoint(self, agreed: Agreed) -> None:
        """Go on with the checkpoint that is being written, if no process is still at it, and begin one if it is due."""
        trainer = self.trainer
        if trainer.writer.pending and not agreed.writing:
            trainer.writer.advance()
        due = trainer.step % trainer.config.checkpoint.every == 0 and trainer.step > 0
        if trainer.saved != trainer.step and (due or agreed.late):
            self.save(wait=False)

    def save(self, *, wait: bool) -> None:
        """Write a checkpoint, before which the margins of codes are logged.

        Args:
            wait: Return when the checkpoint is whole; otherwise it is written while training goes on.
        """
        if self.trainer.saved != self.trainer.step:
            self.report_measured()
        self.trainer.save(wait=wait)
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

    def report_measured(self) -> None:
        """Log what ``measure`` returns with the weights that are evaluated."""
        if self.measure is None:
            return
        with self.trainer.averaged():
            metrics = self.measure() if self.trackers is not None else {}
        if metrics and self.trackers is not None:
            self.trackers.log(self.trainer.step, metrics)

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
        units, unit = trainer.data.units, trainer.engine.loss_unit
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
        """Evaluate and sample, each if it is due; the time is excluded from the training time."""
        trainer, config, step = self.trainer, self.trainer.config, self.trainer.step
        if step >= config.steps:
            return
        evaluated = config.evaluate is not None and step % config.evaluate.every == 0
        sampled = config.sample is not None and step % config.sample.every == 0
        if config.evaluate is not None and evaluated:
            self.evaluate(config.evaluate)
        if config.sample is not None and sampled:
            self.sample(config.sample)
        if evaluated or sampled:
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
            if trainer.world.rank:
                return
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
    measure: Callable[[], Mapping[str, float]] | None = None,
    start: Stored | None = None,
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
        measure: Function that returns metrics of the averaged weights to log at each checkpoint, such as the margins of
            codes; None for none, so that weights need not be gathered.
        start: Weights from which training starts, by plain names; None for those of the engine. Unused with ``resume``.
        say: Function that prints a line for the user.

    Returns:
        The number of steps done, the reason why training ended, and the training time.

    Raises:
        DivergedError: The loss, the gradient or the weights are not finite.
        UserError: The run cannot be started or resumed as requested.
    """
    world = world or World.single()
    trainer = Trainer(engine, data, config, run, world, say, None if resume else start)
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
    except DivergedError:  # of all processes
        trainer.writer.finish()
        raise
    except SeddGraphError:
        if world.size == 1:  # others could be waited for in vain
            with contextlib.suppress(SeddGraphError):
                trainer.writer.finish()
        raise
    finally:
        trainer.rows.close()
        trainer.writer.close()
        if trainer.activations is not None:
            trainer.activations.close()
    trainer.open()
    return result
