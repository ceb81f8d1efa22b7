"""The trial step of ``build``: the step that training will run, so that what cannot run, compile or fit fails before training."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sedd_graph.data.points import PointData
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.hardware import describe_hardware, pick_dtype
from sedd_graph.engine.measure import Measure
from sedd_graph.engine.peak import allocated_peak
from sedd_graph.training.config import TrainConfig
from sedd_graph.training.distributed import World
from sedd_graph.training.trainer import Trainer

__all__ = ["Trial", "try_step"]

EAGER = 4e9
"""An eager trial step takes as many rows as need this number of FLOPs, at least one; compiled code is tried at its shape."""
_OF_A_STEP = ("optimizer", "schedule", "warmup", "clip", "ema", "dtype", "seed")
"""Settings that a step depends on."""
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Trial:
    """Result of a trial step.

    Attributes:
        rows: Number of rows of a backward pass.
        micro_batch: Number of rows of a backward pass in training.
        dtype: Precision of the network, such as ``float32``.
        compile: Compile mode of the network.
        first_s: Seconds of the first step, compilation included.
        step_s: Seconds of the second step, of at most two backward passes, measured while its memory is; None if there was
            none.
        peak_bytes: Largest memory of a step, bytes: of weights, averages, gradients, moments and all that it allocates;
            None where it is not known.
        estimate_bytes: Estimate of the same.
        finite: Whether the loss is finite.
    """

    rows: int
    micro_batch: int
    dtype: str
    compile: str
    first_s: float
    step_s: float | None
    peak_bytes: int | None
    estimate_bytes: int
    finite: bool

    def text(self, device: torch.device) -> str:
        """Return lines for the user."""
        how = "eager" if self.compile == "off" else f"compiled ({self.compile})"
        rows = f"{self.rows} rows" if self.rows == self.micro_batch else f"{self.rows} of {self.micro_batch} rows"
        then = "" if self.step_s is None else f", then {self.step_s:.2f} s"
        lines = [f"engine      {how}, first step {self.first_s:.1f} s{then} on {describe_hardware(device)}"]
        if self.peak_bytes is not None:
            lines.append(
                f"measured    {self.peak_bytes / GIB:,.2f} GiB at the peak of a step of {rows} in {self.dtype} "
                f"(estimate: {self.estimate_bytes / GIB:,.2f} GiB in float32)"
            )
        if not self.finite:
            lines.append("warning     the loss of the trial step is not finite")
        return "\n".join(lines)


def try_step(
    engine: Engine, data: Dataset | PointData | None, config: TrainConfig, cost: Measure, *, processes: int = 1
) -> Trial:
    """Run one or two steps of training on the first rows, as one of ``processes`` processes would; the weights change.

    Args:
        engine: The engine, which is not used after.
        data: The data set; None: network and loss are evaluated with gradients on arbitrary rows.
        config: The ``train`` section of the blueprint.
        cost: Estimate of the memory of a step.
        processes: Number of processes that will train.
    """
    micro_batch, eager = max(1, config.batch // (config.accumulate * processes)), engine.compile_mode == "off"
    rows = micro_batch
    if eager:
        rows = min(rows, max(1, int(EAGER // max(1, cost.passes * cost.flops_per_token * cost.length))))
    step = (
        _ExampleStep(engine, config, rows, cost.length) if data is None else _TrainingStep(engine, config, rows, data)
    )
    seconds: list[float] = []

    def run() -> bool:
        began = time.perf_counter()
        found = step.run()
        seconds.append(time.perf_counter() - began)
        return found

    if not eager:
        run()  # compiles
    held = step.held()
    peak, finite = allocated_peak(run, engine.device)
    grown = (cost.saved_bytes - cost.chunk_bytes) * rows // max(1, cost.batch)
    return Trial(
        rows=rows,
        micro_batch=micro_batch,
        dtype=str(step.dtype).removeprefix("torch."),
        compile=engine.compile_mode,
        first_s=seconds[0],
        step_s=None if eager else seconds[1],
        peak_bytes=None if peak is None else held + peak,
        estimate_bytes=cost.state_bytes + cost.chunk_bytes + grown,
        finite=finite,
    )


class _ExampleStep:
    """Forward and backward pass on arbitrary rows."""

    def __init__(self, engine: Engine, config: TrainConfig, rows: int, length: int) -> None:
        self.engine, self.dtype = engine, pick_dtype(config.dtype, engine.device)
        self.rows = engine.process.example(rows, length)

    def run(self) -> bool:
        """Run the step, and return whether the loss is finite."""
        engine, training = self.engine, self.engine.process.compiles
        engine.model.train(training)  # layers that are initialised from data must not be initialised from these rows
        with torch.autocast(engine.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            loss = engine.loss(self.rows).mean()
        loss.backward()
        engine.model.zero_grad(set_to_none=True)
        return bool(loss.isfinite())

    def held(self) -> int:
        """Return the memory of the tensors that outlive a step, bytes."""
        return _bytes([*self.engine.model.parameters(), *self.engine.model.buffers()])


class _TrainingStep:
    """Step of training, with as many rows in each of at most two backward passes."""

    def __init__(self, engine: Engine, config: TrainConfig, rows: int, data: Dataset | PointData) -> None:
        passes = min(2, config.accumulate)  # the gradients of the first are kept during the second
        own = {name: getattr(config, name) for name in _OF_A_STEP} | {"batch": rows * passes, "accumulate": passes}
        settings = TrainConfig().model_copy(update=own)
        self.trainer = Trainer(engine, data, settings, Path(), World.single(), lambda text: None)
        self.dtype = self.trainer.dtype
        engine.model.train()

    def run(self) -> bool:
        """Run the step, and return whether the loss is finite."""
        nats, _, _ = self.trainer.train_step()
        self.trainer.update(0.0)
        return bool(nats.isfinite())

    def held(self) -> int:
        """Return the memory of the tensors that outlive a step, bytes."""
        trainer, module = self.trainer, self.trainer.engine.trained
        states = [value for o in trainer.optimizers for state in o.state.values() for value in state.values()]
        average = [] if trainer.average is None else list(trainer.average.state().values())
        return _bytes(
            [*module.parameters(), *module.buffers(), *average, *(x for x in states if isinstance(x, Tensor))]
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
