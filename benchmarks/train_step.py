"""Tokens per second of a training step compared with the same network hand-written in plain PyTorch, in one run.

    python benchmarks/train_step.py [--size small] [--device cuda] [--rounds N] [--steps N]

benchmarks/handwritten.py describes the contestants "plain" and "tuned"; the GPU's size leaves eager out. Timing is
interleaved, and each round gives a ratio. A step is all of: rows, noise, forward, backward, clipping, AdamW, averaged weights.
Appends a record to benchmarks/results/train_step.jsonl with the hardware named.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import BLUEPRINTS, append_record, text_data
from handwritten import Loss, Sedd, Trainer
from interleaved import interleave, ratio

from sedd_graph.engine.hardware import describe_hardware, pick_device, pick_dtype
from sedd_graph.engine.measure import measure
from sedd_graph.runs.check import check
from sedd_graph.runs.open import make_engine
from sedd_graph.training.distributed import World
from sedd_graph.training.trainer import Trainer as EngineTrainer

SIZES = {
    # name: blueprint, overrides, contestants
    "tiny": (
        "sedd-tiny.yaml",
        {"dim": 256, "depth": 6, "heads": 4, "cond": 128, "tokens": 96},
        {"batch": 32, "length": 128},
    ),
    "small": (
        "sedd-small.yaml",
        {"dim": 768, "depth": 12, "heads": 12, "cond": 128, "tokens": 50257},
        {"batch": 32, "length": 1024},
    ),
}


def matmul_rate(
    device: torch.device, dtype: torch.dtype = torch.float32, *, size: int = 2048, seconds: float = 0.5
) -> float:
    """Measure the rate of matrix products, FLOP/s, best of several runs: the upper limit for a model's own rate."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def main() -> None:
    """Time, print a table, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="steps per round")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--compile", choices=("auto", "block", "whole"), default="auto")
    arguments = parser.parse_args()
    name, params, shape = SIZES[arguments.size]
    batch, length = arguments.batch or shape["batch"], shape["length"]
    device = pick_device(arguments.device)
    dtype = pick_dtype("auto", device)

    def overrides(tokenizer: str) -> list[str]:
        changes = [f"params.{k}={v}" for k, v in params.items()]
        return [
            *changes,
            f"data.length={length}",
            f"train.batch={batch}",
            "train.accumulate=1",
            "train.warmup=0",
            "train.schedule=constant",
            f"data.tokenizer={tokenizer}",
        ]

    states = params["tokens"] + 1
    size = {"tiny": f"{{op: characters, size: {states - 1}}}", "small": f"{{op: bpe, size: {states - 1}}}"}
    report = check(BLUEPRINTS / name, overrides(size[arguments.size]))
    sizes = measure(report.graph, report.registry, batch=batch, length=length)
    with tempfile.TemporaryDirectory() as cache:
        data = text_data(report, root=Path(cache))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, states - 1, (1_000_000,), generator=generator)

    def by_hand(*, compiled: bool, tuned: bool = False) -> Callable[[], object]:
        torch.manual_seed(0)
        sizes_ = {k: params[k] for k in ("dim", "heads", "depth", "cond")}
        model = Sedd(states=states, dropout=0.1, length=length, tuned=tuned, **sizes_)
        loss = Loss(model, states).to(device)
        if (count := sum(p.numel() for p in loss.parameters())) != report.parameters:
            raise SystemExit(f"{count:,} parameters by hand, {report.parameters:,} in the blueprint")
        if compiled:
            loss.compile(fullgraph=True, dynamic=False)
        trainer = Trainer(loss, lr=3e-4, ema=0.999, clip=1.0, dtype=dtype, tuned=tuned)

        def step() -> object:
            starts = torch.randint(0, len(tokens) - length, (batch,))
            rows = torch.stack([tokens[s : s + length] for s in starts])
            return trainer.step(rows.to(device, non_blocking=True))

        return step

    def ours() -> Callable[[], object]:
        engine = make_engine(report, device=device, compile=arguments.compile)
        trainer = EngineTrainer(engine, data, report.train, BLUEPRINTS, World.single(), print)
        engine.model.train()

        def step() -> object:
            found = trainer.train_step()
            trainer.update(0.0)
            trainer.step += 1
            return found[0]

        return step

    contestants = {"sedd_graph": ours(), "plain, compiled": by_hand(compiled=True)}
    if arguments.size == "tiny":
        contestants["plain, eager"] = by_hand(compiled=False)
        contestants["tuned, eager"] = by_hand(compiled=False, tuned=True)
    else:
        contestants["tuned, compiled"] = by_hand(compiled=True, tuned=True)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    compiling, peak = {}, {}
    for label, step in contestants.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        step()
        wait()
        compiling[label] = time.perf_counter() - start
        for _ in range(2):
            step()
        wait()
        if device.type == "cuda":
            peak[label] = torch.cuda.max_memory_allocated(device) / 2**30
    seconds = interleave(contestants, arguments.rounds, arguments.steps, wait)
    rate = matmul_rate(device, dtype, size=2048 if device.type == "cpu" else 8192)
    flops = 3 * sizes.flops_per_token * batch * length
    print(
        f"{report.name}: {params}, {batch} x {length} tokens, {str(dtype).split('.')[1]}; {describe_hardware(device)}"
    )
    print(f"{arguments.rounds} rounds of {arguments.steps} steps; matmul {rate / 1e9:,.0f} GFLOP/s measured here\n")
    print(
        f"{'':16}{'tokens/s':>10}{'  (min-max)':<18}{'GFLOP/s':>10}{'of matmul':>11}{'first step':>12}{'peak GiB':>10}"
    )
    record: dict[str, object] = {
        "blueprint": report.name,
        "batch": batch,
        "length": length,
        "dtype": str(dtype),
        "hardware": describe_hardware(device),
        "torch": torch.__version__,
        "matmul_flops": rate,
        "flops_per_step": flops,
    }
    for label, values in seconds.items():
        middle = statistics.median(values)
        speed = batch * length / middle
        spread = f"  ({batch * length / max(values):,.0f}-{batch * length / min(values):,.0f})"
        share = flops / middle / rate
        print(
            f"{label:16}{speed:>10,.0f}{spread:<18}{flops / middle / 1e9:>10,.0f}{share:>11.2f}{compiling[label]:>10.1f} s"
            f"{peak.get(label, float('nan')):>10.1f}"
        )
        record[label] = {"tokens_per_second": speed, "seconds": values, "of_matmul": share, "peak_gib": peak.get(label)}
    for label in list(contestants)[1:]:
        middle, error = ratio(seconds[label], seconds["sedd_graph"])
        record[f"ratio to {label}"] = {"median": middle, "standard_error": error}
        print(
            f"\nsedd_graph / {label}: median {middle:.3f}, standard error of the mean {error:.3f} over {arguments.rounds} rounds"
        )
    append_record("train_step", record)


if __name__ == "__main__":
    main()
