"""What the measurements of benchmarks/gpu.py share: sizes, engines, random rows, and time and memory of a device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import BLUEPRINTS, data_config
from torch import Tensor

from sedd_graph.data.batches import Stream
from sedd_graph.data.rows import Dataset
from sedd_graph.engine.engine import Engine
from sedd_graph.engine.measure import measure
from sedd_graph.engine.network import CompileMode
from sedd_graph.runs.check import Report, check
from sedd_graph.runs.open import make_engine
from sedd_graph.training.config import TrainConfig
from sedd_graph.training.distributed import World
from sedd_graph.training.trainer import Trainer

__all__ = ["CPU", "Found", "Setting", "made", "random_data", "spread", "trainer", "training_flops"]

CPU = torch.device("cpu")
Found = Iterator[tuple[str, Mapping[str, Any]]]
"""Measurements, each with its name, in the order in which they are written."""
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by the vendor's data sheet."""


@dataclasses.dataclass
class Setting:
    """Device and sizes of the measurements.

    Attributes:
        device: The device.
        toy: Whether sizes are those of a toy, on which everything that needs no GPU runs within seconds.
        rates: Measured FLOP/s of matrix products by precision.
        until: Time at which the present item must end, by ``time.monotonic``.
    """

    device: torch.device
    toy: bool
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    until: float = float("inf")

    def pick(self, real: Any, toy: Any) -> Any:
        """Return ``toy`` for a toy, else ``real``."""
        return toy if self.toy else real

    def left(self) -> float:
        """Return the seconds left for the present item."""
        return self.until - time.monotonic()

    def sizes(self, *, depth: int = 12, length: int = 1024, tokens: int = 50257) -> list[str]:
        """Return overrides that set the size of a model."""
        if self.toy:
            depth, length, tokens = min(depth, 1), 16, 24
        small = ["params.dim=16", "params.heads=2", "params.cond=8"] if self.toy else []
        tokenizer = f"data.tokenizer={{op: characters, size: {tokens}}}"
        return [*small, f"params.depth={depth}", f"params.tokens={tokens}", f"data.length={length}", tokenizer]

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], *, warm: int = 2, repeat: int = 5) -> float:
        """Return the mean seconds of ``work``, after ``warm`` calls that do not count."""
        warm, repeat = (1, 1) if self.toy else (warm, repeat)
        for _ in range(warm):
            work()
        self.wait()
        began = time.perf_counter()
        for _ in range(repeat):
            work()
        self.wait()
        return (time.perf_counter() - began) / repeat

    def peak(self, work: Callable[[], object]) -> float | None:
        """Return the largest memory of a GPU that is allocated during ``work``, GiB; None on a CPU."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def speed(self, flops: float, seconds: float) -> dict[str, float]:
        """Return FLOP/s, also as shares of the data sheet's and of the measured rate of bfloat16 products."""
        found = {"tflops": flops / seconds / 1e12}
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        sheet = next((rate for key, rate in DATASHEET.items() if key in name), None)
        found |= {} if sheet is None else {"mfu": flops / seconds / sheet}
        rate = self.rates.get("bfloat16")
        return found | ({} if rate is None else {"of_matmul": flops / seconds / rate})


def made(
    setting: Setting,
    blueprint: str,
    *changes: str,
    batch: int = 4,
    mode: CompileMode = "off",
    device: torch.device | None = None,
    **sizes: int,
) -> tuple[Engine, Report]:
    """Return the engine of a shipped blueprint with new weights, and its checked blueprint.

    Args:
        setting: Device and sizes.
        blueprint: Name of the blueprint.
        *changes: Overrides.
        batch: Rows of a training step.
        mode: Compile mode; a toy runs eagerly.
        device: Device; None for that of the setting.
        **sizes: Sizes that differ from those of :meth:`Setting.sizes`.
    """
    own = [f"train.batch={batch}", "train.accumulate=1", "train.warmup=0", "train.schedule=constant"]
    report = check(BLUEPRINTS / f"{blueprint}.yaml", [*setting.sizes(**sizes), *own, *changes])
    engine = make_engine(report, device=device or setting.device, compile="off" if setting.toy else mode)
    engine.model.train()
    return engine, report


def spread(engine: Engine) -> None:
    """Give all weights values, the same on every device; zeros would hide the gradients before them."""
    with torch.no_grad():
        for p in engine.model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.02)


def random_data(report: Report, *, rows: int = 512) -> Dataset:
    """Return random tokens as a data set: speed does not depend on them, and no tokenizer has to be trained."""
    config = data_config(report)
    tokens = np.random.default_rng(0).integers(0, report.plan.states - 1, (rows * config.length,)).astype(np.uint16)
    train, held = (
        Stream(tokens, config.length, shifted=False),
        Stream(tokens[: 8 * config.length], config.length, False),
    )
    return Dataset(config, None, train, held, 4.0, None, None)  # type: ignore[arg-type]


def trainer(
    engine: Engine, report: Report, *, run: Path = Path(), world: World | None = None, **changes: Any
) -> tuple[Trainer, Callable[[], Tensor]]:
    """Return a trainer of the engine on random rows, and a function that takes a step and returns its loss, nats."""
    config: TrainConfig = report.train.model_copy(update=changes)
    found = Trainer(engine, random_data(report), config, run, world or World.single(), lambda text: None)

    def step() -> Tensor:
        nats, counted, _ = found.train_step()
        found.update(found.step / max(1, config.steps))
        found.step += 1
        return nats / counted

    return found, step


def training_flops(report: Report, batch: int) -> int:
    """Return the FLOPs of a training step of ``batch`` rows: three times those of a forward pass."""
    length = data_config(report).length
    return 3 * measure(report.graph, report.registry, batch=1, length=length).flops_per_token * batch * length
