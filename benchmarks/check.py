"""Time and memory of ``sedd-graph build --check`` beyond ``import torch``, and of ``sedd-graph --help``.

    python benchmarks/check.py [--times 7] [--blueprint blueprints/sedd-medium.yaml]

Each command runs in its own process, one of each per round, so that a slow moment of the machine falls on all. Wall seconds
are from start to end; peak memory is the maximum resident size of the process (``wait4``). A record is appended to
benchmarks/results/check.jsonl. Bars: 1 s and 150 MB beyond ``import torch``; 0.4 s for ``--help``.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(command: list[str]) -> tuple[float, float]:
    """Return the wall seconds and the peak resident MB of one process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return time.perf_counter() - began, usage.ru_maxrss * unit / 1e6


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the minimum and the maximum."""
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def hardware() -> str:
    """Return the processor's name and the number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name or platform.machine()}, {cores} cores, {platform.system()}"


def main() -> None:
    """Measure, print, and append a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--blueprint", default="blueprints/sedd-medium.yaml")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "sedd_graph"]
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "build --check": [*command, "build", arguments.blueprint, "--check"],
        "--help": [*command, "--help"],
    }
    for one in commands.values():
        run(one)  # compiles bytecode and fills the file cache
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.times):
        for name, one in commands.items():
            wall, peak = run(one)
            seconds[name].append(wall)
            memory[name].append(peak)
    pairs = {"s": seconds, "MB": memory}
    record = {unit: {name: spread(found) for name, found in measured.items()} for unit, measured in pairs.items()}
    beyond = {
        unit: round(record[unit]["build --check"]["median"] - record[unit]["import torch"]["median"], 3)
        for unit in pairs
    }
    print(hardware())
    for name in commands:
        s, mb = record["s"][name], record["MB"][name]
        print(
            f"{name:<14} {s['median']:6.2f} s  ({s['min']:.2f}-{s['max']:.2f})   "
            f"{mb['median']:7.1f} MB ({mb['min']:.1f}-{mb['max']:.1f})"
        )
    held = beyond["s"] <= 1 and beyond["MB"] <= 150 and record["s"]["--help"]["median"] <= 0.4
    print(f"{arguments.blueprint} beyond import torch: {beyond['s']:.2f} s (bar 1), {beyond['MB']:.1f} MB (bar 150)")
    print("within the bars" if held else "NOT within the bars")
    versions = {"python": platform.python_version(), "torch": version("torch"), "sedd_graph": version("sedd_graph")}
    full = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions,
        "blueprint": arguments.blueprint,
        "times": arguments.times,
        **record,
        "beyond": beyond,
        "held": held,
    }
    with (ROOT / "benchmarks" / "results" / "check.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(full) + "\n")  # without common.py, which imports torch


if __name__ == "__main__":
    main()
