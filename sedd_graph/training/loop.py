"""The training loop: rows in, optimizer steps, metrics, evaluations, samples and checkpoints out.

Every random number is a function of the seed, the step and the global row (and, in the network, the node), so a resumed
run, and one split over processes or accumulation steps, goes through the same losses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
from sedd_graph.training.config import TrainConfig
from sedd_graph.training.distributed import World
from sedd_graph.training.optim import Average, learning_rate, make_optimizers
from sedd_graph.training.trackers import Trackers

__all__ = ["Result", "Trainer", "train"]

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """How training ended: ``reason`` is ``done``, ``budget`` or the name of a signal."""

    step: int
    reason: str
    seconds: float


class _Signals:
    """The first SIGINT or SIGTERM asks for a clean end after the step; a second one ends at once."""

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


class Trainer:
    """One process's part of a training run: its step, its optimizers, its averaged weights, its checkpoints."""

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
        """This process's rows of the global batch, one part for each backward pass."""
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
        """Returns the sum of nats over this process's rows, the tokens counted, and the saved ports."""
        config = self.config
        nats = torch.zeros((), device=self.engine.device)
        counted = torch.zeros((), device=self.engine.device)
        taps: dict[str, Tensor] = {}
        # what a stranger's component draws from torch's own generator comes back after a resume, too
        torch.manual_seed(mix_seed(config.seed, 2, self.step, self.world.rank))
        for number, (batch, random) in enumerate(self.micro_batches()):
            draw = self.engine.draw(batch, random=random)
            last = number == config.accumulate - 1
            waiting = isinstance(self.module, DistributedDataParallel) and not last
            with self.module.no_sync() if waiting else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(self.engine.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                    loss, taps = self.module(draw, batch, random.keys(len(batch)))
                # DDP averages over processes: each adds its share of the mean over the whole batch, per position
                (loss.sum() * self.world.size / (config.batch * batch.width)).backward()
            nats += loss.detach().sum()
            counted += batch.counted.sum()
        return nats, counted, taps

    def update(self, progress: float) -> Tensor:
        """Clip, step, average. Returns the norm of the gradient."""
        config = self.config
        named = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
        # a learned schedule is led by the rare loss that is large: it would shorten the network's step, or be cut itself
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
        return self.run / "checkpoints"

    def diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what} by step {self.step}; the last checkpoint is whole. "
            "Try a lower train.optimizer.lr, a longer train.warmup, or train.dtype=float32"
        )

    def save(self) -> None:
        """Write a checkpoint (rank 0). Raises :class:`DivergedError` for weights that are no numbers: they would push
        out a checkpoint that can be gone on from."""
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise self.diverged("weights became NaN or infinite")
        if self.activations is not None:
            self.activations.flush()  # a resume goes on from here: what came before must be on disk
        if self.world.rank == 0 and not (self.folder / f"step-{self.step:08d}").exists():
            clean = {k: v.detach().cpu().contiguous().clone() for k, v in self.model.state_dict().items()}
            average = None
            if self.average is not None:
                average = {**clean, **{k: v.detach().cpu().contiguous() for k, v in self.average.state().items()}}
            packed = pack_optimizers(self.optimizers)
            state = {
                "seconds": self.seconds,
                "average_count": self.average.count if self.average else 0,
                "world": self.world.size,
                "train": self.config.model_dump(mode="json"),
            }
            write_checkpoint(
                self.folder, self.step, Checkpoint(clean, average, packed, state), keep=self.config.checkpoint.keep
            )
        self.world.barrier()

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of the run."""
        checkpoint = read_checkpoint(path)
        load_weights(self.model, checkpoint.model, where=str(path))
        if self.average is not None and checkpoint.average is not None:
            self.average.load(checkpoint.average, int(checkpoint.state.get("average_count", 0)))
        unpack_optimizers(self.optimizers, checkpoint.optimizers)
        self.step, self.seconds = checkpoint.state["step"], float(checkpoint.state.get("seconds", 0.0))
        self.say(f"resumed from {path.name}")

    # -- the loop ---------------------------------------------------------------------------------------------------

    def loop(self, activations: Activations | None, decode: Callable[[Tensor], list[str]]) -> Result:
        config, units = self.config, self.data.units
        self.activations = activations
        reason, first, since, began = "done", self.step + 1, self.step, time.perf_counter()
        mark, held_up = began, 0.0
        start_seconds = self.seconds
        total = torch.zeros(2, device=self.engine.device, dtype=torch.float64)
        self.model.train()
        steps = config.steps if config.budget_s is None else None
        with _Signals() as signals, progress("training", total=steps, done=self.step) as advance:
            while self.step < config.steps:
                self.seconds = start_seconds + time.perf_counter() - began - held_up
                over = config.budget_s is not None and self.seconds >= config.budget_s
                if self.world.any(over):
                    reason = "budget"
                    if self.step == first:
                        self.say(
                            f"warning     the first step, compilation included, took {self.seconds - start_seconds:.0f} s and "
                            "spent train.budget_s: raise it, or set train.compile=off"
                        )
                    break
                if self.world.any(signals.caught is not None):
                    reason = signals.caught or "signal"
                    break
                fraction = self.step / config.steps
                if config.budget_s is not None:
                    fraction = max(fraction, self.seconds / config.budget_s)
                nats, counted, taps = self.train_step()
                norm = self.update(min(1.0, fraction))
                total += torch.stack([nats, counted]).double()
                self.step += 1
                advance()
                if activations is not None:
                    for name in activations.due(self.step):
                        activations.put(name, self.step, taps[name.replace("/", ".")].detach().float().cpu().numpy())
                if self.step % config.log_every == 0 or self.step == first:
                    self.world.sum_(total)
                    now = time.perf_counter()
                    per_token = (total[0] / total[1]).item()
                    if not (math.isfinite(per_token) and math.isfinite(norm.item())):
                        raise self.diverged(f"the loss became {per_token} (gradient norm {norm.item():g})")
                    done = self.step - since
                    metrics = {
                        "loss": per_token,
                        f"bits_per_{units.bits}": per_token / (math.log(2) * units.ratio),
                        "gradient_norm": norm.item(),
                        "learning_rate": self.optimizers[0].param_groups[0]["lr"],
                        f"{units.nats}s_per_second": done * config.batch * self.data.width / (now - mark),
                        "seconds": start_seconds + now - began - held_up,
                    }
                    self.report(metrics)
                    total.zero_()
                    since, mark = self.step, now
                before = time.perf_counter()
                self.on_the_way(decode)
                paused = time.perf_counter() - before
                held_up, mark = held_up + paused, mark + paused
        self.seconds = start_seconds + time.perf_counter() - began - held_up
        self.save()
        return Result(self.step, reason, self.seconds)

    def report(self, metrics: dict[str, float]) -> None:
        if self.trackers is not None:
            self.trackers.log(self.step, metrics)
        if self.world.rank == 0:
            limit = (
                f"/{self.config.steps}"
                if self.config.budget_s is None
                else f"  {metrics['seconds']:.0f}/{self.config.budget_s:.0f} s"
            )
            units = self.data.units
            self.say(
                f"step {self.step}{limit}  loss {metrics['loss']:.4f} nats/{units.nats}  "
                f"{metrics[f'bits_per_{units.bits}']:.3f} bits/{units.bits}  "
                f"lr {metrics['learning_rate']:.2e}  {metrics[f'{units.nats}s_per_second']:,.0f} {units.nats}s/s"
            )

    def on_the_way(self, decode: Callable[[Tensor], list[str]]) -> None:
        """Evaluations, samples and checkpoints that are due; their time is no training time."""
        config = self.config
        if self.step >= config.steps:
            return
        if config.evaluate is not None and self.step % config.evaluate.every == 0 and self.world.rank == 0:
            with self.averaged():
                found = evaluate(
                    self.engine,
                    self.data,
                    rows=config.batch,
                    batches=config.evaluate.batches,
                    draws=config.evaluate.draws,
                    seed=config.seed,
                )
            self.say(f"step {self.step}  held-out {found}")
            if self.trackers is not None:
                self.trackers.log(
                    self.step,
                    {f"heldout_{name}": value for name, value in found.curve().items()},
                )
        if config.sample is not None and self.step % config.sample.every == 0 and self.world.rank == 0:
            with self.averaged():
                stepless = self.engine.process.steps is None
                steps = None if stepless else config.sample.steps
                rows = self.engine.sample(config.sample.rows, self.data.width, steps=steps, seed=config.seed)
            for text in decode(rows):
                self.say(f"sample: {text!r}")
                if self.trackers is not None:
                    self.trackers.text(self.step, "sample", text)
        if self.step % config.checkpoint.every == 0:
            self.save()
        self.world.barrier()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the current ones."""
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
    """Train ``engine`` in place and leave checkpoints under ``run``. The engine ends with the averaged weights.

    ``activations(step)`` opens the store of saved ports (``step`` is the step gone on from, or 0). Raises
    :class:`DivergedError` where the loss is no longer finite, and :class:`UserError` for a request that cannot be met.
    """
    world = world or World.single()
    trainer = Trainer(engine, data, config, run, world, trackers, say)
    start = start_point(run, resume=resume)
    if start is not None:
        trainer.restore(start)
    if trackers is not None:
        trackers.resume(trainer.step)  # from 0: what an attempt that reached no checkpoint has left
    store = activations(trainer.step) if world.rank == 0 else None
    try:
        result = trainer.loop(store, decode)
    finally:
        if store is not None:
            store.close()
    if trainer.average is not None:
        trainer.average.swap()
    return result
