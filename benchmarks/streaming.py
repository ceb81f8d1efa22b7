"""Cost of streaming saved activations to zarr: the same training step with one saved port every ten steps, and without.

    python benchmarks/streaming.py [--rounds N] [--steps N] [--compile auto|block|whole|off] [--device cuda]

Both are timed in one process, interleaved, and each round gives a ratio. A round with records has them in its middle and ends
when they are in the store: they are written during training, as in a run, and no write falls into the next round.
Appends a record to benchmarks/results/streaming.jsonl with the hardware named. The bar is 5 % of the step time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import zarr
from common import BLUEPRINTS, append_record, data_config, text_data

from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine
from sedd_graph.store.activations import Activations, TapSpec
from sedd_graph.store.arrays import array_of
from sedd_graph.training.distributed import World
from sedd_graph.training.trainer import Trainer

EVERY = 10
BAR = 0.05


def main() -> None:
    """Time, print a table, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=EVERY, help=f"steps per round (a multiple of {EVERY})")
    parser.add_argument("--compile", choices=("auto", "block", "whole", "off"), default="auto")
    arguments = parser.parse_args()
    if arguments.steps % EVERY:
        parser.error(f"--steps must be a multiple of {EVERY}")
    device = pick_device(arguments.device)
    blueprint = BLUEPRINTS / "sedd-tiny.yaml"
    steady = ["train.warmup=0", "train.schedule=constant"]
    with tempfile.TemporaryDirectory() as folder:
        trainers: dict[str, Trainer] = {}
        for label, more in (("plain", []), ("streaming", [f"nodes.trunk.save={{ports: [x], every: {EVERY}}}"])):
            report = check(blueprint, [*steady, *more])
            data = text_data(report, root=report.loaded.root)
            engine = make_engine(report, device=device, compile=arguments.compile)
            trainers[label] = Trainer(engine, data, report.train, Path(folder), World.single(), print)
            engine.model.train()
        (tap,) = report.graph.taps
        spec = TapSpec(tap[0].replace(".", "/"), tap[1].every, tap[1].dtype, tap[1].rows, tap[1].chunk)
        store = Activations(Path(folder) / "activations.zarr", [spec])
        enqueueing = 0.0

        def run(label: str, steps: int) -> float:
            nonlocal enqueueing
            trainer, start = trainers[label], time.perf_counter()
            for _ in range(steps):
                _, _, taps = trainer.train_step()
                trainer.update(0.0)
                trainer.step += 1
                if label == "streaming":
                    before = time.perf_counter()
                    for name in store.due(trainer.step):
                        found = taps[name.replace("/", ".")].detach().float().cpu().numpy()
                        store.put(name, trainer.step, found)
                    enqueueing += time.perf_counter() - before
            if label == "streaming":
                store.flush()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return (time.perf_counter() - start) / steps

        for label in trainers:  # compile, warm up; records then fall into the middle of a round
            run(label, EVERY // 2)
        enqueueing = 0.0
        seconds: dict[str, list[float]] = {label: [] for label in trainers}
        for number in range(arguments.rounds):
            for label in list(trainers)[:: 1 if number % 2 else -1]:
                seconds[label].append(run(label, arguments.steps))
        store.close()
        stored = array_of(zarr.open_group(str(store.path), mode="r"), f"{spec.path}/value")
        record_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["streaming"], strict=True)]
    cost, error = statistics.median(ratios) - 1, statistics.stdev(ratios) / len(ratios) ** 0.5
    records = arguments.rounds * arguments.steps // EVERY
    print(
        f"{report.name}, {report.train.batch} x {data_config(report).length} tokens; {describe_hardware(device)}; compile {engine.compile_mode}"
    )
    print(
        f"{arguments.rounds} rounds of {arguments.steps} steps; one record of {record_bytes / 2**20:.2f} MiB every {EVERY} steps\n"
    )
    print(f"{'':12}{'ms per step':>12}  (min-max)")
    for label, values in seconds.items():
        print(f"{label:12}{1e3 * statistics.median(values):>12.1f}  ({1e3 * min(values):.1f}-{1e3 * max(values):.1f})")
    print(f"\nenqueueing a record takes {1e3 * enqueueing / records:.2f} ms of the training thread")
    print(f"cost of streaming {cost:+.2%} of the step time (median), standard error {error:.2%}; bar {BAR:.0%}")
    result = {
        "blueprint": report.name,
        "batch": report.train.batch,
        "length": data_config(report).length,
        "compile": engine.compile_mode,
        "hardware": describe_hardware(device),
        "torch": torch.__version__,
        "record_bytes": record_bytes,
        "every": EVERY,
        "steps_per_block": arguments.steps,
        "seconds": seconds,
        "ratios": ratios,
        "cost": cost,
        "standard_error": error,
    }
    append_record("streaming", result)


if __name__ == "__main__":
    main()
