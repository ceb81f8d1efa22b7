"""Milliseconds per string to compute the regression targets of deletions and insertions, for batches of long strings.

    python benchmarks/edits.py [--rows 32] [--length 1024] [--times 5] [--threads 1]

Prints the median and the range of the wall time and of the processor time of all threads, and the ratio of the median wall
time to the bar: 50 ms per string of 1,024 tokens, growing with the square of the length. Appends a record to
benchmarks/results/edits.jsonl.
"""

import argparse
import statistics
import time
from datetime import UTC, datetime
from typing import Any

import torch
from common import append_record
from sedd_graph_registry.strings.birth_death import Delete, Indel

from sedd_graph.component.base import Context
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.engine.hardware import describe_hardware

TOKENS = 50_257
BAR = 50.0


def measure(kernel: BirthDeath, clean: Batch, sigma: float, times: int) -> dict[str, Any]:
    """Time the targets of one noisy batch at total noise ``sigma``."""
    generator = torch.Generator().manual_seed(0)
    level = torch.full((len(clean),), sigma)
    noisy = kernel.sample(clean, level, random=Randomness(generator), width=None)
    kernel.target(clean, noisy, level)
    wall, processor = [], []
    for _ in range(times):
        began, spent = time.perf_counter(), time.process_time()
        kernel.target(clean, noisy, level)
        wall.append(1000 * (time.perf_counter() - began) / len(clean))
        processor.append(1000 * (time.process_time() - spent) / len(clean))
    median = statistics.median(wall)
    return {
        "sigma": sigma,
        "tokens_left": float(noisy.lengths.double().mean()),
        "wall_ms": {"median": median, "min": min(wall), "max": max(wall)},
        "processor_ms": {"median": statistics.median(processor), "min": min(processor), "max": max(processor)},
        "ratio_to_bar": median / (BAR * (clean.width / 1024) ** 2),
    }


def main() -> None:
    """Time both kernels at three noise levels, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 32), ("length", 1024), ("times", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    context = Context({"n": TOKENS + 1})
    kernels: dict[str, BirthDeath] = {
        "delete": Delete(Delete.Config(), context),
        "indel": Indel(Indel.Config(mean_length=16), context),
    }
    clean = Batch.of(torch.randint(0, TOKENS, (given.rows, given.length), generator=torch.Generator().manual_seed(0)))
    hardware = describe_hardware(torch.device("cpu"))
    print(f"{hardware}; {given.rows} strings of {given.length} tokens")
    record: dict[str, object] = {"hardware": hardware, "torch": torch.__version__, **vars(given)}
    for name, kernel in kernels.items():
        found = [measure(kernel, clean, sigma, given.times) for sigma in (0.02, 0.7, 3.0)]
        record[name] = found
        for one in found:
            wall, processor = (
                "{median:.1f} ({min:.1f} to {max:.1f})".format(**one[key]) for key in ("wall_ms", "processor_ms")
            )
            print(
                f"{name:7} sigma {one['sigma']:<5} {one['tokens_left']:7.1f} tokens left  {wall} ms per string, "
                f"{processor} ms processor time; {one['ratio_to_bar']:.2f} of the bar"
            )
    record["when"] = datetime.now(UTC).isoformat(timespec="seconds")
    append_record("edits", record)


if __name__ == "__main__":
    main()
