"""What the engine reaches on one GPU, in ten minutes: fourteen items in order, each written to the disk as it is measured.

    python benchmarks/gpu.py [--device cuda] [--only 1 4 7] [--seconds 590]
    python benchmarks/gpu.py --toy [--output FILE]

1 the device itself; 2 agreement of devices, precisions and compiled code; 3 waits of the host; 4 training of ``sedd-small``
beside the same model written by hand (benchmarks/handwritten.py); 5 memory modes; 6 exact arithmetic; 7 sampling and
evaluation; 8 resumption; 9 replicas and shards; 10 more than 2^31 logits; 11 a model of characters; 12 attention under
masks; 13 block diffusion; 14 CUDA graphs. Each item has a time of its own. What fails is written as an error, and the next
item begins. ``--toy`` runs everything at toy sizes, eagerly, on any device: it shows that the measurements work, not what
they measure. Appends to benchmarks/results/gpu.jsonl: one record per measurement, with the hardware, the versions and the
seconds since the start.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import gpu_attention
import gpu_checks
import gpu_speed
import torch
from common import RESULTS
from gpu_common import Found, Setting

from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.runs.provenance import revision

ITEMS: dict[int, tuple[Callable[[Setting], Found], float]] = {
    # number: item, seconds
    1: (gpu_speed.device, 20),
    2: (gpu_checks.agreement, 50),
    3: (gpu_checks.syncs, 40),
    4: (gpu_speed.training, 155),
    5: (gpu_speed.memory_modes, 60),
    6: (gpu_checks.exact, 25),
    7: (gpu_speed.sampling, 80),
    8: (gpu_checks.resume, 20),
    9: (gpu_checks.parallel, 40),
    10: (gpu_checks.large, 15),
    11: (gpu_speed.characters, 35),
    12: (gpu_attention.attention, 16),
    13: (gpu_attention.block_step, 16),
    14: (gpu_attention.launches, 16),
}


SHORTEST = 1.0
"""An item with less time than this is not begun, seconds."""


class OutOfTimeError(Exception):
    """The time of an item is over."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTimeError` in the context after so many seconds; an infinite number sets no limit."""
    if not math.isfinite(seconds):
        yield
        return

    def over(number: int, frame: Any) -> None:
        raise OutOfTimeError(f"{seconds:.0f} s are over")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Record:
    """File of measurements, to which each is appended, flushed to the disk and printed as it comes."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path, self._facts, self._began = path, facts, time.monotonic()
        self.errors = 0

    def write(self, item: int, name: str, values: Mapping[str, Any]) -> None:
        self.errors += "error" in values
        record = {"item": item, "name": name, "at_s": round(time.monotonic() - self._began, 1), **values, **self._facts}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, default=str) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{item:>2} {record['at_s']:>6.1f} s  {name}: {shown[:400]}", flush=True)


def run(setting: Setting, record: Record, numbers: Sequence[int], seconds: float) -> None:
    """Run items in order.

    Args:
        setting: Device and sizes.
        record: Record of the measurements.
        numbers: Numbers of the items.
        seconds: Time of all of them together.
    """
    end = time.monotonic() + seconds
    for number in numbers:
        item, own = ITEMS[number]
        own = min(own, end - time.monotonic())
        if own < SHORTEST:
            record.write(number, item.__name__, {"not measured": "no time was left"})
            continue
        setting.until = math.inf if setting.toy else time.monotonic() + own
        try:
            with limited(math.inf if setting.toy else own):
                for name, values in item(setting):
                    record.write(number, name, values)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {str(error)[:1000]} ({Path(where.filename).name}:{where.lineno})"
            record.write(number, item.__name__, {"error": what})
        gc.collect()
        if setting.device.type == "cuda":
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--only", type=int, nargs="+", choices=ITEMS, default=list(ITEMS))
    parser.add_argument("--seconds", type=float, default=590.0)
    parser.add_argument("--output", type=Path, default=None)
    given = parser.parse_args(arguments)
    setting = Setting(pick_device(given.device), given.toy)
    if setting.device.type != "cuda" and not given.toy:
        raise SystemExit("there is no GPU here: --toy runs the measurements at toy sizes")
    facts = {
        "hardware": describe_hardware(setting.device),
        "torch": torch.__version__,
        "revision": revision(),
        "toy": given.toy,
    }
    output = given.output or RESULTS / ("gpu-toy.jsonl" if given.toy else "gpu.jsonl")
    record = Record(output, facts)
    run(setting, record, given.only, given.seconds)
    print(f"{record.errors} error(s); written to {output}")
    return 1 if record.errors else 0


if __name__ == "__main__":
    sys.exit(main())
