"""What streaming saved ports to zarr costs: the same training step with one tap every ten steps, and without.

    python benchmarks/streaming.py [--rounds N] [--steps N] [--compile auto|block|whole|off] [--device cuda]

The two take turns in one process, the first of a round changing from round to round, and every round gives a ratio. A
block of steps with a tap has its records in its middle and ends when they are in the store, so that they are written
while training goes on, as in a run, and nothing is left to the block that follows.
Appends a record to benchmarks/results/streaming.jsonl with the hardware named. The bar is 5 % of the step time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import zarr

from sedd_graph.data.rows import open_data
from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine
from sedd_graph.store.arrays import Activations, TapSpec
from sedd_graph.training.distributed import World
from sedd_graph.training.loop import Trainer

HERE = Path(__file__).resolve().parent
EVERY = 10
BAR = 0.05


def main() -> None:
    """Time, print a table, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=EVERY, help=f"steps per block (a multiple of {EVERY})")
    parser.add_argument("--compile", choices=("auto", "block", "whole", "off"), default="auto")
    arguments = parser.parse_args()
    if arguments.steps % EVERY:
        parser.error(f"--steps must be a multiple of {EVERY}")
    device = pick_device(arguments.device)
    blueprint = HERE.parent / "blueprints" / "sedd-tiny.yaml"
    steady = ["train.warmup=0", "train.schedule=constant"]
    with tempfile.TemporaryDirectory() as folder:
        trainers: dict[str, Trainer] = {}
        for label, more in (("plain", []), ("streaming", [f"nodes.trunk.save={{ports: [x], every: {EVERY}}}"])):
            report = check(blueprint, [*steady, *more])
            data = open_data(report.data, root=report.loaded.root)
            engine = make_engine(report, device=device, compile=arguments.compile)
            trainers[label] = Trainer(engine, data, report.train, Path(folder), World.single(), None, print)
            engine.model.train()
        (tap,) = report.graph.taps
        spec = TapSpec(tap[0].replace(".", "/"), tap[1].every, tap[1].dtype, tap[1].rows, tap[1].chunk)
        store = Activations(Path(folder) / "activations.zarr", [spec])
        handing_over = 0.0

        def run(label: str, steps: int) -> float:
            nonlocal handing_over
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
                    handing_over += time.perf_counter() - before
            if label == "streaming":
                store.flush()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return (time.perf_counter() - start) / steps

        for label in trainers:  # compile, warm up; records then fall in the middle of a block
            run(label, EVERY // 2)
        handing_over = 0.0
        seconds: dict[str, list[float]] = {label: [] for label in trainers}
        for number in range(arguments.rounds):
            for label in list(trainers)[:: 1 if number % 2 else -1]:
                seconds[label].append(run(label, arguments.steps))
        store.close()
        record_bytes = zarr.open_array(str(store.path / spec.path / "value"), mode="r")[0].nbytes
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["streaming"], strict=True)]
    cost, error = statistics.median(ratios) - 1, statistics.stdev(ratios) / len(ratios) ** 0.5
    records = arguments.rounds * arguments.steps // EVERY
    print(
        f"{report.name}, {report.train.batch} x {report.data.length} tokens; {describe_hardware(device)}; compile {engine.compile_mode}"
    )
    print(
        f"{arguments.rounds} rounds of {arguments.steps} steps; one record of {record_bytes / 2**20:.2f} MiB every {EVERY} steps\n"
    )
    print(f"{'':12}{'ms per step':>12}  (min-max)")
    for label, values in seconds.items():
        print(f"{label:12}{1e3 * statistics.median(values):>12.1f}  ({1e3 * min(values):.1f}-{1e3 * max(values):.1f})")
    print(f"\nhanding a record over {1e3 * handing_over / records:.2f} ms of the training thread")
    print(f"cost of streaming {cost:+.2%} of the step time (median), standard error {error:.2%}; bar {BAR:.0%}")
    result = {
        "blueprint": report.name,
        "batch": report.train.batch,
        "length": report.data.length,
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
    with (HERE / "results" / "streaming.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
